"""Who may see the console, which the supervisor serves and a worker relays to like to any upstream.

If keys are required, their administrators may, from anywhere; the key comes in a header, or in the
cookie of the login (login.py), which is accepted here only and never passed on. Without keys, only
clients on this machine may: the TCP peer is a loopback address, and no proxy has passed the request
on.

A page of another site must not use a client's browser in either case: the Host must not be a name
that an attacker can point here (DNS rebinding), and an Origin must be the console's own. The Host
does not matter if the key is in a header, which browsers do not add. The supervisor checks the
rest, such as the headers of changes. Called by proxy.py.

The console's playground has no key, because scripts cannot read the cookie. It sends its requests
to the paths of the API below ``/ui``, with a header that other sites cannot make a browser send.
"""

from __future__ import annotations

from collections.abc import Collection
from ipaddress import IPv6Address, ip_address
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from kubeai.errors import quoted
from kubeai.gateway.denials import admin_required
from kubeai.openai.errors import ErrorResponse
from kubeai.openai.routes import PREFIX

if TYPE_CHECKING:
    from kubeai._keys import Key
    from kubeai.gateway.relay._exchange import Exchange

PATH = "/ui"
CONSOLE_BODY_MAX_BYTES = 4 << 20  # of manifests
COOKIE_NAME = "kubeai_key"
LOGIN_PATH, LOGOUT_PATH = f"{PATH}/login", f"{PATH}/logout"  # POST; see login.py
LOGIN_PATHS = frozenset((LOGIN_PATH, LOGOUT_PATH))
_PLAYGROUND = PATH + PREFIX + "/"
_COOKIE = COOKIE_NAME.encode()


def is_console(path: str) -> bool:
    """Whether a request target in origin form belongs to the console."""
    path = path.partition("?")[0]
    return path == PATH or path.startswith(PATH + "/")


def check_request(request: Exchange, hosts: Collection[str]) -> None:
    """:func:`check_client` for a request whose head is complete."""
    check_client(
        request.peer,
        request.host,
        [origin.decode("latin-1") for origin in request.headers(b"origin")],
        forwarded=request.is_forwarded or any(map(request.headers, (b"forwarded", b"via"))),
        hosts=hosts,
    )


def check_admin(request: Exchange, key: Key | None) -> None:
    """ErrorResponse if the client of a request may not see the console, where keys are required."""
    if key is None or not key.is_admin:
        raise admin_required()
    check_origin(request)


def check_origin(request: Exchange) -> None:
    """ErrorResponse if a page of another site has made a request.

    A proxy in front may have replaced the Host. No page can make a browser send X-Forwarded-Host.
    """
    forwarded = request.headers(b"x-forwarded-host")
    host = (forwarded[-1].decode("latin-1") if forwarded else request.host or "").lower()
    for origin in request.headers(b"origin"):
        if _authority(origin.decode("latin-1")) != host:
            raise _foreign()


def take_cookie(request: Exchange) -> bytes | None:
    """Remove the login's cookie from a request, and return its value; None if there is none.

    The value is empty, and so no valid key, if there are several different ones.
    """
    cookies = [part.strip() for line in request.headers(b"cookie") for part in line.split(b";")]
    values = {value for name, _, value in (c.partition(b"=") for c in cookies) if name == _COOKIE}
    if not values:
        return None
    others = [cookie for cookie in cookies if cookie.partition(b"=")[0] != _COOKIE]
    request.drop_header(b"cookie")
    if others:
        request.set_header(b"cookie", b"; ".join(others))
    return values.pop() if len(values) == 1 else b""


def playground_target(request: Exchange) -> str | None:
    """The target in the API that a request of the console's playground is for; None: it is not one.

    ErrorResponse if it comes from another site.
    """
    if not request.target.startswith(_PLAYGROUND) or request.headers(b"x-kubeai-ui") != [b"1"]:
        return None
    check_origin(request)
    return request.target.removeprefix(PATH)


def wants_page(request: Exchange) -> bool:
    """Whether a browser opens the console or the root, so that an error should be a page."""
    if request.method != "GET" or not (is_console(request.target) or request.target == "/"):
        return False
    return any(b"text/html" in value for value in request.headers(b"accept"))


def check_client(
    peer: str,
    host: str | None,
    origins: Collection[str],
    *,
    forwarded: bool,
    hosts: Collection[str] = (),
) -> None:
    """ErrorResponse if the client may not see the console.

    ``peer``: its address. ``host``, ``origins``: its Host and Origin headers. ``forwarded``:
    whether a proxy has passed the request on. ``hosts``: allowed names in Host, besides IP
    addresses and localhost.
    """
    if forwarded or not _is_loopback(peer):
        raise ErrorResponse(
            "The console is only served to loopback addresses. Use `kubectl port-forward`.",
            status=403,
            code="not_loopback",
        )
    check_host(host, hosts)
    for origin in origins:
        if _authority(origin) != (host or "").lower():
            raise _foreign()


def check_host(host: str | None, hosts: Collection[str]) -> None:
    """ErrorResponse if the console has another name than the Host of a browser's request.

    ``hosts``: as of :func:`check_client`.
    """
    name = _host_name(host or "")
    if not (_is_address(name) or _is_localhost(name) or name in map(str.lower, hosts)):
        raise ErrorResponse(
            f"The console is not served as {quoted(name)}. Use localhost, or add the name to "
            "gateway.ui.hosts.",
            status=421,
            code="unknown_host",
        )


def _foreign() -> ErrorResponse:
    return ErrorResponse(
        "Requests from other sites are not allowed.", status=403, code="foreign_origin"
    )


def _authority(origin: str) -> str:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _host_name(host: str) -> str:
    """A Host header without its port and brackets, in lower case."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()


def _is_localhost(name: str) -> bool:
    return name == "localhost" or name.endswith(".localhost")


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def _is_loopback(peer: str) -> bool:
    try:
        address = ip_address(peer)
    except ValueError:
        return False
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped.is_loopback
    return address.is_loopback
