"""Failed calls of the Kubernetes API."""

from __future__ import annotations

import aiohttp
import msgspec

from kubeai.errors import KubeAIError


class ApiError(KubeAIError):
    """A call to the Kubernetes API failed.

    ``status`` is the HTTP status, or 0 if there was no response (a write may have been applied).
    """

    def __init__(
        self, status: int, reason: str, message: str, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.retry_after_s = retry_after_s


class Status(msgspec.Struct):
    """The Status object that describes a failure."""

    message: str = ""
    reason: str = ""
    code: int = 0


def api_error(response: aiohttp.ClientResponse, body: bytes) -> ApiError:
    """The error of a response with a status of 400 or above."""
    try:
        status = msgspec.json.decode(body, type=Status)
    except (msgspec.DecodeError, UnicodeDecodeError):
        status = Status(message=body[:200].decode(errors="replace").strip())
    retry_after = response.headers.get("Retry-After", "")
    return ApiError(
        response.status,
        status.reason or response.reason or "",
        status.message or f"HTTP {response.status}",
        float(retry_after) if retry_after.isdecimal() else None,
    )


def no_response(verb: str, what: str, error: Exception) -> ApiError:
    """The error of a call that got no response."""
    reason = "Timeout" if isinstance(error, TimeoutError) else "Unreachable"
    return ApiError(0, reason, f"{verb} {what}: {error or type(error).__name__}")
