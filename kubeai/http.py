"""aiohttp, imported without the machine's certificate authorities.

It reads all of them, twice, as it is imported: 110 ms of each process's start. Who speaks TLS here
brings a context of its own, as neither a pod nor an API is known by those authorities.
"""

from __future__ import annotations

import ssl

__all__ = ["aiohttp", "web"]


def _nothing(context: ssl.SSLContext) -> None:
    pass


# Found before the method of this name that the class inherits.
ssl.SSLContext.set_default_verify_paths = _nothing  # type: ignore[method-assign, assignment]
try:
    import aiohttp
    from aiohttp import web
finally:
    del ssl.SSLContext.set_default_verify_paths
