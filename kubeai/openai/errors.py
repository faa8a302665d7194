"""The gateway's own error responses, in the format of the API that the client uses.

The request's path decides: ``/v1/messages`` and paths below it get Anthropic's format, paths below
``/api/`` Ollama's, all other paths OpenAI's. Every error of the gateway goes through
:func:`error_answer`, whether the relay, the proxy or the aiohttp application rejects the request.
Errors from engines are forwarded unchanged.

If an event stream has begun while the request was held, :func:`error_event` formats the error as an
event of that stream, and :func:`engine_error` reads the engine's error for it. Pure: no I/O.
"""

from __future__ import annotations

import contextlib
from typing import Any

import msgspec

from kubeai.errors import quoted
from kubeai.openai.routes import OLLAMA_PREFIX, PREFIX, Kind, origin_form

_MESSAGES_PATHS = (PREFIX + Kind.MESSAGES.value, Kind.MESSAGES.value)
ENGINE_TEXT_MAX_CHARS = 500  # of an engine's error that is not JSON
# The error types in Anthropic's API reference by status. Its other 4xx are invalid_request_error,
# its other 5xx api_error. Here 503 always means that the gateway or the model cannot accept the
# request now, which Anthropic's API reports as 529 overloaded_error.
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}


class ErrorResponse(Exception):
    """An error response by the gateway itself, with ``status`` and ``body()``.

    ``kind``: the error's type in OpenAI's format, if the status does not determine it.
    ``retry_after_s``: when the client should try again; None: as for the status.
    ``is_retryable``: False if the same request will fail again.
    """

    def __init__(
        self,
        message: str,
        param: str | None = None,
        status: int = 400,
        code: str | None = None,
        *,
        kind: str | None = None,
        retry_after_s: int | None = None,
        is_retryable: bool = True,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.status = status
        self.code = code
        self.kind = kind
        self.retry_after_s = retry_after_s
        self.is_retryable = is_retryable

    def body(self) -> bytes:
        """The response's body in OpenAI's format."""
        kind = self.kind or openai_type(self.status)
        return error_body(self.message, kind, self.code, self.param)


class UnsupportedCoding(ErrorResponse):
    """415 for a body in a content coding that is not supported (RFC 9110, section 15.5.16)."""

    def __init__(self, message: str, accepted: str) -> None:
        """``accepted``: the value of the response's Accept-Encoding."""
        super().__init__(message, param="Content-Encoding", status=415)
        self.accepted = accepted


CRASHED_ENGINES = "X-KubeAI-Crashed-Engines"


class EngineDied(ErrorResponse):
    """502 for a request that is considered the cause of a crash."""

    def __init__(self, count: int) -> None:
        """``count``: of the engines that have crashed while they served the request."""
        super().__init__(
            "The engine crashed while serving this request. It is not retried.",
            status=502,
            code="engine_died",
            is_retryable=False,
        )
        self.count = count


class OpenAIErrorDetail(msgspec.Struct):
    """What went wrong, as OpenAI's API describes it."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIError(msgspec.Struct):
    """The body of an error response in OpenAI's format."""

    error: OpenAIErrorDetail


def error_body(
    message: str,
    type: str = "invalid_request_error",
    code: str | None = None,
    param: str | None = None,
) -> bytes:
    """OpenAI's error object as JSON. Lone surrogates in ``message`` are replaced."""
    detail = OpenAIErrorDetail(_sendable(message), type, param, code)
    return msgspec.json.encode(OpenAIError(detail))


def model_not_found(model: str) -> ErrorResponse:
    """The same 404 for a missing model, a missing adapter and a selector that does not match."""
    return ErrorResponse(
        f"The model {quoted(model)} does not exist or you do not have access to it.",
        param="model",
        status=404,
        code="model_not_found",
    )


class AnthropicErrorDetail(msgspec.Struct):
    """What went wrong, as Anthropic's API describes it."""

    type: str
    message: str


class AnthropicError(msgspec.Struct, tag="error"):
    """The body of an error response in Anthropic's format."""

    error: AnthropicErrorDetail
    request_id: str | None


class OllamaError(msgspec.Struct):
    """The body of an error response in Ollama's format."""

    error: str


def error_format(path: str) -> type[OpenAIError | AnthropicError | OllamaError]:
    """The format of the gateway's errors on a path (without a query)."""
    if path.removeprefix(PREFIX).startswith(OLLAMA_PREFIX):
        return OllamaError
    if any(path == one or path.startswith(one + "/") for one in _MESSAGES_PATHS):
        return AnthropicError
    return OpenAIError


def error_answer(
    error: ErrorResponse, target: str, request_id: str | None
) -> tuple[bytes, dict[str, str]]:
    """The JSON body of an error response, and its additional headers.

    ``target``: of the request, in origin or absolute form; "" if unknown. ``request_id``: the value
    of the response's X-Request-Id header, None if it has none.
    """
    headers = {}
    if isinstance(error, UnsupportedCoding):
        headers["Accept-Encoding"] = error.accepted
    if isinstance(error, EngineDied):
        headers[CRASHED_ENGINES] = str(error.count)
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"  # RFC 9110, section 15.5.2
    answer_format = error_format(origin_form(target).partition("?")[0])
    if answer_format is OllamaError:
        return msgspec.json.encode(OllamaError(_sendable(error.message))), headers
    if answer_format is OpenAIError:
        return error.body(), headers
    if request_id is not None:
        headers["request-id"] = request_id  # the header that Anthropic's clients read
    return _anthropic_body(error, request_id), headers


def anthropic_type(status: int) -> str:
    """The type of an error in Anthropic's format."""
    default = "invalid_request_error" if status < 500 else "api_error"
    return _ANTHROPIC_TYPES.get(status, default)


def openai_type(status: int) -> str:
    """The type of an error in OpenAI's format, if the error has no other."""
    return "invalid_request_error" if status < 500 else "server_error"


def _anthropic_body(error: ErrorResponse, request_id: str | None) -> bytes:
    detail = AnthropicErrorDetail(anthropic_type(error.status), _sendable(error.message))
    return msgspec.json.encode(AnthropicError(detail, request_id))


# -- errors in an event stream that has begun ------------------------------------------------------


class _ResponsesError(msgspec.Struct, tag="error"):
    """The ``error`` event of OpenAI's Responses API."""

    code: str | None
    message: str
    param: str | None
    sequence_number: int = 0


def error_event(error: ErrorResponse, kind: Kind, request_id: str | None) -> bytes:
    """The error as the last server-sent event of a response to a request of this kind."""
    if kind is Kind.MESSAGES:
        return b"event: error\ndata: " + _anthropic_body(error, request_id) + b"\n\n"
    if kind is Kind.RESPONSES:
        event = _ResponsesError(error.code, _sendable(error.message), error.param)
        return b"event: error\ndata: " + msgspec.json.encode(event) + b"\n\n"
    return b"data: " + error.body() + b"\n\n"


def engine_error(status: int, content_type: str, body: bytes) -> ErrorResponse:
    """The error event's content for an engine's response that is not an event stream.

    The engine's own message, type and code if its body has them, in either API's format or in one
    of vLLM's (``message`` at the top) and FastAPI's (``detail``). Otherwise, its text.
    """
    if status < 300:
        shown = quoted(content_type or "no type")
        message = f"The engine did not send an event stream, but {shown}."
        return ErrorResponse(message, status=502, code="bad_gateway")
    detail: Any = body.decode("utf-8", "replace")[:ENGINE_TEXT_MAX_CHARS].strip()
    with contextlib.suppress(msgspec.DecodeError, RecursionError):
        detail = msgspec.json.decode(body)
    if isinstance(detail, dict):
        detail = detail.get("error") or detail.get("detail") or detail
    found = detail if isinstance(detail, dict) else {"message": detail}
    said = found.get("message")
    if not isinstance(said, str) or not said:
        said = f"The engine responded with status {status}."
    return ErrorResponse(
        said,
        _text(found.get("param")),
        status,
        _text(found.get("code")),
        kind=_text(found.get("type")),
    )


def _text(value: object) -> str | None:
    """A member of an engine's error; some engines send numbers."""
    return str(value) if isinstance(value, str | int) else None


def _sendable(message: str) -> str:
    """The message without lone surrogates, which JSON cannot contain."""
    return message.encode("utf-8", "replace").decode()


def relay_error(
    status: int, message: str, target: bytes, request_id: str | None
) -> tuple[bytes, bytes]:
    """Like :func:`error_answer`, for the relay's own errors: (body, header lines)."""
    error = ErrorResponse(message, status=status)
    body, headers = error_answer(error, target.decode("latin-1"), request_id)
    return body, header_lines(headers)


def header_lines(headers: dict[str, str]) -> bytes:
    """Headers in wire format."""
    return "".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode("latin-1")
