"""The mock engine's ``/v1/realtime``: it receives audio over a WebSocket and sends its words.

The events are vLLM's. A client names the model (``session.update``), begins an utterance
(``input_audio_buffer.commit``) and appends audio. Each piece gets a ``transcription.delta`` whose
number of words depends on its length; ``final`` ends the utterance with ``transcription.done``.
"""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import uuid4
from weakref import WeakSet

import msgspec
from aiohttp import WSCloseCode, WSMsgType, web

from kubeai.mock_engine.formats.base import ApiError
from kubeai.simulation import text

MESSAGE_MAX_BYTES = 16 << 20
# Of audio that waits for its utterance to begin. vLLM's limit of a clip, which is all that bounds
# its own queue of them.
WAITING_AUDIO_MAX_BYTES = 25 << 20
WAITING_AUDIO_MAX_PIECES = 10_000
BYTES_PER_S = 32_000  # of audio: 16 kHz, 16 bits, one channel
WORDS_PER_S = 2
AUDIO_TOKENS_PER_S = 50


class _Event(msgspec.Struct):
    type: str
    model: str | None = None
    audio: str = ""
    final: bool = False


class Realtime:
    """Serves all WebSockets of the engine."""

    def __init__(
        self, check_model: Callable[[str], object], run: Callable[[int, int], Awaitable[None]]
    ) -> None:
        """``check_model`` raises ApiError if the engine does not serve a model. ``run`` takes as
        long as a prompt and a reply of these lengths in tokens."""
        self._check_model = check_model
        self._run = run
        self._open: WeakSet[web.WebSocketResponse] = WeakSet()

    async def serve(self, request: web.Request) -> web.WebSocketResponse:
        """``GET /v1/realtime``."""
        socket = web.WebSocketResponse(max_msg_size=MESSAGE_MAX_BYTES)
        await socket.prepare(request)
        self._open.add(socket)
        session = _Session(socket, self._check_model, self._run)
        await session.created()
        async for message in socket:
            if message.type is WSMsgType.TEXT:
                await session.receive(message.data)
        return socket

    async def close(self, _: web.Application) -> None:
        """Close all WebSockets, as vLLM does when it stops."""
        for socket in list(self._open):
            await socket.close(code=WSCloseCode.SERVICE_RESTART)


class _Session:
    def __init__(
        self,
        socket: web.WebSocketResponse,
        check_model: Callable[[str], object],
        run: Callable[[int, int], Awaitable[None]],
    ) -> None:
        self._socket = socket
        self._check_model = check_model
        self._run = run
        self._has_model = False
        self._started = False
        self._audio: list[bytes] = []  # appended before the utterance began
        self._text = ""
        self._tokens = [0, 0]  # of the prompt and of the reply

    async def created(self) -> None:
        await self._send("session.created", id=f"sess-{uuid4().hex}", created=int(time.time()))

    async def receive(self, message: str) -> None:
        try:
            await self._handle(msgspec.json.decode(message, type=_Event))
        except msgspec.DecodeError:
            await self._send("error", error="Invalid JSON", code="invalid_json")
        except ApiError as error:
            await self._send("error", error=error.message, code=error.kind)

    async def _handle(self, event: _Event) -> None:
        if event.type == "session.update":
            self._update(event.model)
        elif event.type == "input_audio_buffer.append":
            self._append(_decoded(event.audio))
            if self._started:
                await self._transcribe()
        elif event.type == "input_audio_buffer.commit":
            if not self._has_model:
                message = "Send a session.update event with the model first."
                raise ApiError(message, kind="model_not_validated")
            self._started = True
            await self._transcribe()
            if event.final:
                await self._finish()
        else:
            raise ApiError(f"Unknown event type: {event.type}", kind="unknown_event")

    def _update(self, model: str | None) -> None:
        if model is None:
            raise ApiError("Missing required field: model", kind="invalid_event")
        try:
            self._check_model(model)
        except ApiError as error:
            raise ApiError(error.message, kind="model_not_found") from None
        self._has_model = True

    def _append(self, audio: bytes) -> None:
        """Collect a piece of audio; one that is too much is dropped, and the session goes on."""
        size = sum(map(len, self._audio)) + len(audio)
        if size > WAITING_AUDIO_MAX_BYTES or len(self._audio) >= WAITING_AUDIO_MAX_PIECES:
            raise ApiError("Maximum file size exceeded", kind="invalid_audio")
        self._audio.append(audio)

    async def _transcribe(self) -> None:
        audio, self._audio = self._audio, []
        for piece in audio:
            seconds = len(piece) / BYTES_PER_S
            words = text.reply(
                hashlib.sha256(piece).digest(), limit=max(1, round(WORDS_PER_S * seconds))
            ).text
            prompt, reply = int(AUDIO_TOKENS_PER_S * seconds) + 1, len(words.split())
            await self._run(prompt, reply)
            self._tokens = [self._tokens[0] + prompt, self._tokens[1] + reply]
            words = f" {words}" if self._text else words
            self._text += words
            await self._send("transcription.delta", delta=words)

    async def _finish(self) -> None:
        prompt, reply = self._tokens
        usage = {
            "prompt_tokens": prompt,
            "total_tokens": prompt + reply,
            "completion_tokens": reply,
        }
        await self._send("transcription.done", text=self._text, usage=usage)
        self._text, self._tokens, self._started = "", [0, 0], False

    async def _send(self, kind: str, **fields: Any) -> None:
        await self._socket.send_str(msgspec.json.encode({"type": kind, **fields}).decode())


def _decoded(audio: str) -> bytes:
    try:
        decoded = base64.b64decode(audio, validate=True)
    except ValueError:
        decoded = b""
    if not decoded:
        raise ApiError("Invalid audio data", kind="invalid_audio")
    return decoded
