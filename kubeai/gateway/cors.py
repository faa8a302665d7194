"""Cross-origin resource sharing (CORS): which web pages may use the API from a browser.

:class:`CorsPolicy` adds the headers of the Fetch standard to responses, preflight responses
included. Created by context.py from ``gateway.corsOrigins``, called by proxy.py and realtime.py.
The relay removes CORS headers of engines where it adds these.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from kubeai.gateway.console import is_console
from kubeai.openai.routes import origin_form

if TYPE_CHECKING:
    from kubeai.gateway._fast_path import FastPath

PREFLIGHT_MAX_AGE_S = 600
# Longer ones are not allowed, because responses to the latest 256 different requests are kept.
ORIGIN_MAX_BYTES = REQUESTED_MAX_BYTES = 1024
METHODS = "GET, HEAD, POST, OPTIONS"
# Browsers hide all other headers from scripts, except those that every response may have.
EXPOSED = ", ".join(
    (
        *("X-Request-Id", "request-id", "Retry-After", "x-should-retry"),
        *("X-KubeAI-Waited", "X-KubeAI-Explain", "X-KubeAI-Model", "X-KubeAI-Crashed-Engines"),
        *(
            f"x-ratelimit-{what}-{of}"
            for of in ("requests", "tokens")
            for what in ("limit", "remaining", "reset")
        ),
    )
)
_PORT = re.compile(r":\d+$")


class CorsPolicy:
    """The allowed origins: exact ones, ``scheme://host:*`` for any port, or ``*`` for all."""

    def __init__(self, origins: Sequence[str]) -> None:
        self._all = "*" in origins
        self._exact = frozenset(origins)
        self._any_port = frozenset(
            origin.removesuffix(":*") for origin in origins if origin.endswith(":*")
        )
        self._headers = lru_cache(maxsize=256)(self._make_headers)

    def allows(self, origin: str) -> bool:
        """Whether pages of an origin may use the API."""
        origin = origin.lower()
        return self._all or origin in self._exact or _PORT.sub("", origin) in self._any_port

    def apply(self, exchange: FastPath) -> None:
        """Add the headers to all responses to a request, and hide its origin from engines.

        An engine with a policy of its own would reject the request. The console sees the origin,
        which it checks, and gets no headers.
        """
        if is_console(origin_form(exchange.target)):
            exchange.set_cors_headers(None)
            return
        origins = exchange.headers(b"origin")
        asked = exchange.headers(b"access-control-request-method")
        wanted = b", ".join(exchange.headers(b"access-control-request-headers"))
        if len(wanted) > REQUESTED_MAX_BYTES:
            wanted = b""
        origin = None
        if len(origins) == 1 and len(origins[0]) <= ORIGIN_MAX_BYTES:
            origin = origins[0].decode("latin-1")
        preflight = exchange.method == "OPTIONS" and bool(asked)
        exchange.set_cors_headers(self._headers(origin, preflight, wanted.decode("latin-1")))
        # realtime.py checks that of a WebSocket handshake.
        if origins and not (exchange.asks_websocket and exchange.method == "GET"):
            exchange.drop_header(b"origin")

    def _make_headers(self, origin: str | None, preflight: bool, requested: str) -> bytes:
        """The header lines of a response, each ending in CRLF.

        ``origin``: of the request; None if it has none. ``requested``: the headers that a preflight
        request asks for; may be empty.
        """
        if self._all:
            lines = ["Access-Control-Allow-Origin: *"]
        elif origin is not None and self.allows(origin):
            lines = ["Vary: Origin", f"Access-Control-Allow-Origin: {origin}"]
        else:
            return b"Vary: Origin\r\n"
        if preflight:
            lines += [
                f"Access-Control-Allow-Methods: {METHODS}",
                f"Access-Control-Max-Age: {PREFLIGHT_MAX_AGE_S}",
            ]
            if requested:
                lines.append(f"Access-Control-Allow-Headers: {requested}")
        else:
            lines.append(f"Access-Control-Expose-Headers: {EXPOSED}")
        return "".join(f"{line}\r\n" for line in lines).encode("latin-1")
