"""``/v1/realtime``, the only route that becomes a WebSocket: its handshake, and its model.

OpenAI's clients name the model in the query. vLLM's name it in an event (``session.update``), which
they send once they have received ``session.created``. For them, :class:`Session` accepts the
handshake in the place of the engine, which then gets the events with its own name of the model.

Browsers let any page open a WebSocket to any host, and send the page's origin. A handshake with an
``Origin`` must therefore come from a page that may use the API: of ``gateway.corsOrigins``, or of
the gateway's own host. Called by proxy.py.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import quote, unquote_plus, urlsplit

import msgspec

from kubeai.errors import decode_problem, quoted
from kubeai.openai.errors import ErrorResponse, error_event
from kubeai.openai.routes import Kind

if TYPE_CHECKING:
    from kubeai.gateway.cors import CorsPolicy
    from kubeai.gateway.relay._early import EarlyStream
    from kubeai.gateway.relay._exchange import Exchange
    from kubeai.gateway.relay._tunnel import Tunnel
    from kubeai.openai.request import InferenceRequest


def no_websocket() -> ErrorResponse:
    """426 on other routes, after which clients such as Codex fall back to HTTP at once."""
    return ErrorResponse(
        "WebSocket is not supported on this path. Send a POST request over HTTP/1.1.",
        status=426,
        code="upgrade_required",
    )


def websocket_required() -> ErrorResponse:
    """426 for a request that is not a handshake."""
    return ErrorResponse(
        "This path is a WebSocket. Send a handshake over HTTP/1.1, with 'Upgrade: websocket'.",
        status=426,
        code="upgrade_required",
    )


def check_handshake(exchange: Exchange, cors: CorsPolicy | None) -> None:
    """ErrorResponse if the handshake has a body, or comes from a page that may not use the API.

    Engines do not get the origin: one with a policy of its own would reject it.
    """
    if not exchange.received:
        raise ErrorResponse("A WebSocket handshake has no body.")
    origins = [value.decode("latin-1") for value in exchange.headers(b"origin")]
    for origin in origins:
        if not (_is_own(origin, exchange.host) or (cors is not None and cors.allows(origin))):
            raise ErrorResponse(
                f"Pages from {quoted(origin)} may not use this API. Add the origin to "
                "gateway.corsOrigins.",
                status=403,
                code="foreign_origin",
            )
    if origins:
        exchange.drop_header(b"origin")


def _is_own(origin: str, host: str | None) -> bool:
    try:
        return host is not None and urlsplit(origin).netloc.lower() == host.lower()
    except ValueError:
        return False


def model_in(query: str) -> str | None:
    """The value of ``model`` in a query, or None. ErrorResponse if it is empty or not unique."""
    models = [unquote_plus(value) for key, value in _parameters(query) if key == "model"]
    if not models:
        return None
    if len(models) > 1 or not models[0]:
        problem = "more than one" if len(models) > 1 else "an empty"
        raise ErrorResponse(f"The query has {problem} model.", param="model")
    return models[0]


def engines_query(query: str, request: InferenceRequest) -> str:
    """The query with the engine's name of the model; all else is unchanged."""
    if not request.is_renamed:
        return query
    parts = [
        f"model={quote(request.engines_name, safe='')}" if key == "model" else part
        for part, (key, _) in zip(query.split("&"), _parameters(query), strict=True)
    ]
    return "&".join(parts)


def _parameters(query: str) -> list[tuple[str, str]]:
    """The decoded names and the values of a query's parameters."""
    split = [part.partition("=") for part in query.split("&")]
    return [(unquote_plus(name), value) for name, _, value in split]


# -- a session whose first events name the model ---------------------------------------------------

MODEL_TIMEOUT_S = 60.0  # for the event with the model
EVENTS_MAX_BYTES = 256 << 10  # before the event with the model
# That are read before there is an engine. Beyond it, pings are not answered, but collected as well.
FRAMES_MAX_COUNT = 10_000
CONTROL_MAX_BYTES = 125  # of a ping or a close frame; RFC 6455, section 5.5
_ACCEPT_SUFFIX = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455, section 1.3
_TEXT, _CLOSE, _PING = 1, 8, 9
_PONG = 10
_POLICY_VIOLATION, _INTERNAL_ERROR, _TRY_AGAIN_LATER = 1008, 1011, 1013  # close codes


class _Frame(NamedTuple):
    """A frame from a client."""

    is_final: bool
    opcode: int
    payload: bytes
    size: int  # with its head


class _Event(msgspec.Struct):
    type: str = ""
    model: str | None = None


class Session:
    """The client's side of a WebSocket until its model is known and an engine has accepted it."""

    def __init__(self, exchange: EarlyStream, tunnel: Tunnel) -> None:
        """ErrorResponse if the handshake is invalid."""
        keys = exchange.headers(b"sec-websocket-key")
        if exchange.headers(b"sec-websocket-version") != [b"13"] or not _is_key(keys):
            raise ErrorResponse(
                "The WebSocket handshake needs Sec-WebSocket-Version: 13 and a Sec-WebSocket-Key."
            )
        self._exchange = exchange
        self._tunnel = tunnel
        self._read_bytes = 0  # frames up to here in ``tunnel.early`` have been read
        self._frames_count = 0  # of those that have been read
        self._named = ""  # the model in the event, as it is sent to the engine
        self._event_bytes = 0  # the size of that event's frame
        self._update: asyncio.Future[tuple[int, _Frame]] = (
            asyncio.get_running_loop().create_future()
        )
        digest = hashlib.sha1(keys[0] + _ACCEPT_SUFFIX, usedforsecurity=False).digest()
        self._accept = base64.b64encode(digest)

    async def model(self) -> str:
        """Accept the handshake, and wait for the event with the model.

        ErrorResponse if none comes.
        """
        # Extensions and subprotocols are negotiated with the engine, which is not known yet: drop
        # the client's offers.
        self._exchange.drop_header(b"sec-websocket-extensions")
        self._exchange.drop_header(b"sec-websocket-protocol")
        created = {
            "type": "session.created",
            "id": f"sess-{self._exchange.request_id}",
            "created": int(time.time()),
        }
        accept = b"Sec-WebSocket-Accept: %b\r\n" % self._accept
        self._tunnel.accept(self, accept, _frame(_TEXT, _encode(created)))
        if self._exchange.finished:
            # By a close frame that came with the handshake. This task has been cancelled, which has
            # no effect while it does not wait.
            raise asyncio.CancelledError
        try:
            async with asyncio.timeout(MODEL_TIMEOUT_S):
                _, frame = await self._update
        except TimeoutError:
            raise ErrorResponse(
                "No session.update with a model was received in time.", param="model", status=408
            ) from None
        self._named = str(_decode(frame.payload).model)
        self._event_bytes = frame.size
        return self._named

    def name_model(self, name: str) -> None:
        """Replace the model in the event by the name that the engine knows, unless it is that."""
        begin, frame = self._update.result()
        if name == self._named:
            return
        try:
            event = msgspec.json.decode(frame.payload, type=dict[str, msgspec.Raw])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise _violation(
                f"session.update is not valid JSON: {decode_problem(error)}."
            ) from None
        changed = _frame(_TEXT, _encode({**event, "model": name}), is_masked=True)
        self._tunnel.early[begin : begin + self._event_bytes] = changed
        self._read_bytes += len(changed) - self._event_bytes
        self._named, self._event_bytes = name, len(changed)

    def wake(self) -> None:
        """Read the frames that have come: answer and remove pings, and look for the model."""
        if self._frames_count == FRAMES_MAX_COUNT:
            return
        early, begin = self._tunnel.early, self._read_bytes
        data, at = bytes(early[begin:]), 0  # what is new, and at most one frame that was incomplete
        kept: list[bytes] = []
        kept_to = 0
        try:
            while self._frames_count < FRAMES_MAX_COUNT and (frame := _read_frame(data, at)):
                self._frames_count += 1
                if frame.opcode in (_PING, _CLOSE):
                    self._answer(frame)
                    kept.append(data[kept_to:at])
                    kept_to = at + frame.size
                else:
                    self._take(frame)
                at += frame.size
            is_long = self._read_bytes > EVENTS_MAX_BYTES or self._frames_count == FRAMES_MAX_COUNT
            if is_long and not self._update.done():
                raise _violation("No session.update with a model was received first.")
        except ErrorResponse as error:
            if not self._update.done():
                self._update.set_exception(error)
                self._update.exception()  # so that it is not logged if the client has left
        if kept:
            early[begin:] = b"".join((*kept, data[kept_to:]))

    def _answer(self, frame: _Frame) -> None:
        if frame.opcode == _CLOSE:
            self._exchange.end(101, _frame(_CLOSE, frame.payload[:2]))
        else:
            self._tunnel.write(_frame(_PONG, frame.payload))

    def _take(self, frame: _Frame) -> None:
        if frame.opcode == _TEXT and not self._update.done():
            if not frame.is_final:
                raise _violation("A message before session.update is fragmented.")
            event = _decode(frame.payload)
            if event.type == "session.update" and event.model:
                self._update.set_result((self._read_bytes, frame))
        self._read_bytes += frame.size


def last_event(error: ErrorResponse, kind: Kind, request_id: str) -> bytes:
    """The error as the end of a stream that has begun: the last event, or the last frames."""
    return last_frames(error) if kind is Kind.REALTIME else error_event(error, kind, request_id)


def last_frames(error: ErrorResponse) -> bytes:
    """The error as vLLM's event, and the close frame."""
    event = {"type": "error", "error": error.message, "code": error.code or str(error.status)}
    code = _POLICY_VIOLATION
    if error.status >= 500:
        code = _TRY_AGAIN_LATER if error.status in (503, 504) else _INTERNAL_ERROR
    return _frame(_TEXT, _encode(event)) + _frame(_CLOSE, code.to_bytes(2, "big"))


def _violation(message: str) -> ErrorResponse:
    return ErrorResponse(message, param="model")


def _is_key(keys: list[bytes]) -> bool:
    try:
        return len(keys) == 1 and len(base64.b64decode(keys[0], validate=True)) == 16
    except ValueError:
        return False


def _encode(event: Mapping[str, object]) -> bytes:
    return msgspec.json.encode(event)


def _decode(payload: bytes) -> _Event:
    try:
        return msgspec.json.decode(payload, type=_Event)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _Event()  # for the engine to reject


def _frame(opcode: int, payload: bytes, *, is_masked: bool = False) -> bytes:
    """A frame with a whole message. RFC 6455, section 5.2."""
    size, mask = len(payload), 0x80 if is_masked else 0
    if size < 126:
        head = bytes((0x80 | opcode, mask | size))
    elif size < 1 << 16:
        head = bytes((0x80 | opcode, mask | 126)) + size.to_bytes(2, "big")
    else:
        head = bytes((0x80 | opcode, mask | 127)) + size.to_bytes(8, "big")
    return head + (bytes(4) if is_masked else b"") + payload  # a mask of zeros changes nothing


def _read_frame(data: bytes, at: int) -> _Frame | None:
    """Read a client's frame at an offset; None if it is incomplete. ErrorResponse if invalid."""
    if len(data) < at + 2:
        return None
    first, size = data[at], data[at + 1] & 0x7F
    if first & 0x70 or not data[at + 1] & 0x80:
        raise _violation("A frame uses an extension that was not agreed on, or is not masked.")
    body = at + 2
    if size > CONTROL_MAX_BYTES and first & 0x08:
        raise _violation(f"A control frame is longer than {CONTROL_MAX_BYTES} bytes.")
    if size > 125:
        width = 2 if size == 126 else 8
        size = int.from_bytes(data[body : body + width], "big")
        body += width
    if size > EVENTS_MAX_BYTES:
        raise _violation(f"A frame is longer than {EVENTS_MAX_BYTES} bytes.")
    end = body + 4 + size
    if len(data) < body or len(data) < end:
        return None
    payload = data[body + 4 : end]
    mask = data[body : body + 4] * (size // 4 + 1)
    unmasked = int.from_bytes(payload, "big") ^ int.from_bytes(mask[:size], "big")
    return _Frame(bool(first & 0x80), first & 0x0F, unmasked.to_bytes(size, "big"), end - at)
