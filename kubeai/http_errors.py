"""Turns the exceptions of an aiohttp application's handlers into error responses.

Used by the gateway's local routes and by the console.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from aiohttp import web
from aiohttp.typedefs import Middleware

from kubeai.logs import get_logger
from kubeai.openai.errors import ErrorResponse

log = get_logger(__name__)


def error_middleware(
    answer: Callable[[web.Request, ErrorResponse], web.StreamResponse], internal: ErrorResponse
) -> Middleware:
    """``answer``: makes the response. ``internal``: the error for an unexpected exception."""

    @web.middleware
    async def errors(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        try:
            return await handler(request)
        except ErrorResponse as error:
            return answer(request, error)
        except web.HTTPException as error:
            if error.status < 400:
                raise
            return answer(request, ErrorResponse(error.reason, status=error.status))
        except (ConnectionError, web.RequestPayloadError):
            # The client has disconnected. A second response must not follow one that has begun.
            if request.transport is not None:
                request.transport.abort()
            return web.Response()
        except Exception:
            log.exception("request handler failed", method=request.method, path=request.path)
            return answer(request, internal)

    return errors
