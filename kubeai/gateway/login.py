"""Logging in to the console with an API key: the form, the cookie, and the two routes behind it.

The form is plain HTML without a script, so it works while every other path of the console needs a
key. ``POST /ui/login`` checks the key like that of any request and puts it into a cookie that only
the browser reads (HttpOnly), sends to this site only (SameSite=Strict), and only below ``/ui``.
``POST /ui/logout`` removes the cookie. Both refuse forms of other sites, so no site can log a
browser in to somebody else's key. Served by local_routes.py; the form is also the answer to a
browser that asks for the console without a valid key.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Mapping
from html import escape
from types import MappingProxyType
from urllib.parse import parse_qsl, urlsplit

from aiohttp import web

from kubeai.gateway.console import COOKIE_NAME, LOGIN_PATH, LOGIN_PATHS, LOGOUT_PATH, PATH
from kubeai.openai.errors import ErrorResponse

BODY_MAX_BYTES = 4096  # a key has up to 512 bytes, each up to three of them in a form
FORM_TYPE = "application/x-www-form-urlencoded"
# Bytes that a cookie may have (RFC 6265, section 4.1.1). Keys of `kubeai key create` have no other.
_COOKIE_VALUE = re.compile(r"[!#-+\--:<-\[\]-~]+")

_STYLE = """
:root { color-scheme: light dark; }
body { margin: 0; min-height: 100vh; display: grid; place-items: center;
  background: light-dark(#f5f6f8, #0e1116); color: light-dark(#1b2029, #e2e6ec);
  font: 15px/1.45 Inter, ui-sans-serif, system-ui, "Segoe UI", Roboto, sans-serif; }
main { width: min(24rem, calc(100vw - 2rem)); padding: 1.75rem; box-sizing: border-box;
  background: light-dark(#fff, #161a21); border: 1px solid light-dark(#e2e5ea, #262c36);
  border-radius: 10px; }
h1 { margin: 0 0 1rem; font-size: 1.2rem; }
label { display: block; margin-bottom: .35rem; font-weight: 500; }
input, button { width: 100%; box-sizing: border-box; padding: .55rem .7rem; font: inherit;
  border-radius: 6px; border: 1px solid light-dark(#767f8d, #6b7686); }
input { background: light-dark(#fff, #11151b); color: inherit; }
button { margin-top: .9rem; border-color: transparent; background: light-dark(#2f5bd7, #8aabff);
  color: light-dark(#fff, #0e1116); font-weight: 600; cursor: pointer; }
:focus-visible { outline: 2px solid light-dark(#2f5bd7, #8aabff); outline-offset: 2px; }
.error { margin: 0 0 1rem; color: light-dark(#b3261e, #f58a82); overflow-wrap: anywhere; }
.hint code { white-space: nowrap; }
.hint { margin: .9rem 0 0; color: light-dark(#5a6371, #97a1b0); font-size: .87rem; }
"""
_STYLE_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()

# Headers of each response here. With `no-referrer`, browsers would send the form without an Origin.
HEADERS = {
    "Content-Security-Policy": (
        f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; form-action 'self'; "
        "base-uri 'none'; frame-ancestors 'none'"
    ),
    "Cache-Control": "no-store",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}
HTML_TYPE = "text/html; charset=utf-8"

Check = Callable[[bytes, str], object]


def login_page(message: str = "") -> str:
    """The form as HTML. ``message``: why it is shown again."""
    error = f'<p class="error" role="alert">{escape(message)}</p>' if message else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Log in · KubeAI</title><style>{_STYLE}</style></head><body><main>"
        f"<h1>KubeAI</h1>{error}"
        f'<form method="post" action="{LOGIN_PATH}">'
        '<label for="key">API key of an admin</label>'
        '<input id="key" name="key" type="password" required autofocus '
        'autocomplete="current-password" spellcheck="false">'
        '<button type="submit">Log in</button></form>'
        '<p class="hint">Create one with <code>kubeai key create NAME --admin</code>.</p>'
        "</main></body></html>"
    )


def login_response(
    status: int, message: str, headers: Mapping[str, str] = MappingProxyType({})
) -> web.Response:
    """The form as the response to a browser without a valid key. ``message``: why."""
    return web.Response(
        text=login_page(message),
        status=status,
        headers={**HEADERS, **headers, "Content-Type": HTML_TYPE},
    )


def is_login(method: str, path: str) -> bool:
    """Whether a request needs no key because it logs in or out. ``path``: without a query."""
    return method == "POST" and path in LOGIN_PATHS


async def answer(request: web.Request, check: Check) -> web.Response:
    """The response to a request that :func:`is_login` accepts.

    ``check(key, address)`` raises ErrorResponse unless the key is an administrator's. ``address``:
    the client's.
    """
    _check_origin(request)
    if request.path == LOGOUT_PATH:
        return _redirect(request, "", "; Max-Age=0")
    text = await _key_in(request)
    try:
        check(text.encode(), _address(request))
        if not _COOKIE_VALUE.fullmatch(text):
            raise ErrorResponse(
                "This key has characters that a browser cannot keep. Create another one with "
                "kubeai key create."
            )
    except ErrorResponse as error:
        retry = {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}
        return login_response(error.status, error.message, retry)
    return _redirect(request, text, "")


async def _key_in(request: web.Request) -> str:
    """The key in the form's body, without the white space that comes with copying."""
    if request.content_type != FORM_TYPE:
        raise ErrorResponse(f"The Content-Type must be {FORM_TYPE}.", status=415)
    body = b""
    async for piece in request.content.iter_any():
        body += piece
        if len(body) > BODY_MAX_BYTES:
            raise ErrorResponse(f"The form is longer than {BODY_MAX_BYTES} bytes.", status=413)
    try:
        text = body.decode("ascii")
        fields = parse_qsl(text, keep_blank_values=True, strict_parsing=True, errors="strict")
        ((name, text),) = fields
        if name != "key":
            raise ValueError
    except ValueError:
        raise ErrorResponse("The form must have one field, named key.") from None
    return text.strip()


def _check_origin(request: web.Request) -> None:
    """ErrorResponse for a form of another site."""
    host = request.headers.get("X-Forwarded-Host", request.host).lower()
    for origin in request.headers.getall("Origin", ()):
        try:
            authority = urlsplit(origin).netloc.lower()
        except ValueError:
            authority = ""
        if authority != host:
            raise ErrorResponse(
                "Requests from other sites are not allowed.", status=403, code="foreign_origin"
            )


def _address(request: web.Request) -> str:
    """The client's address: the last one in X-Forwarded-For, which the relay has added."""
    return request.headers.get("X-Forwarded-For", "").rpartition(",")[2].strip()


def _redirect(request: web.Request, value: str, attributes: str) -> web.Response:
    """Back to the console, with a cookie."""
    secure = "; Secure" if request.headers.get("X-Forwarded-Proto") == "https" else ""
    cookie = f"{COOKIE_NAME}={value}; Path={PATH}; HttpOnly; SameSite=Strict{secure}{attributes}"
    return web.Response(
        status=303, headers={**HEADERS, "Location": f"{PATH}/", "Set-Cookie": cookie}
    )
