"""aiohttp, imported without loading the system's CA certificates.

aiohttp loads all of them, twice, when it is imported, which adds 110 ms to the start of each
process. Code that uses TLS here creates its own SSL context, because neither pods nor Kubernetes
API servers have certificates from those authorities.
"""

from __future__ import annotations

import ssl

__all__ = ["aiohttp", "web"]


def _nothing(context: ssl.SSLContext) -> None:
    pass


# Shadows the inherited method of this name.
ssl.SSLContext.set_default_verify_paths = _nothing  # type: ignore[method-assign, assignment]
try:
    import aiohttp
    from aiohttp import web
finally:
    del ssl.SSLContext.set_default_verify_paths
