"""Anthropic's messages API."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from typing_extensions import override

from kubeai.mock_engine.formats.base import (
    ApiFormat,
    Content,
    GenerationRequest,
    Message,
    Messages,
    Positive,
    Usage,
    content_text,
    decode,
    sse_data,
)
from kubeai.simulation import text
from kubeai.simulation.text import Reply


class MessagesRequest(msgspec.Struct):
    """The supported fields of ``POST /v1/messages``."""

    messages: Annotated[list[Message], msgspec.Meta(min_length=1)]
    max_tokens: Positive
    model: str | None = None
    system: Content = None
    stream: bool | None = False
    stop_sequences: list[str] | None = None


class AnthropicMessages(ApiFormat):
    """Anthropic's messages API."""

    prefix = "msg_"

    @staticmethod
    @override
    def parse(body: bytes) -> GenerationRequest:
        request = decode(body, MessagesRequest)
        messages: Messages = [("system", content_text(request.system))] if request.system else []
        messages += [message.rendered() for message in request.messages]
        return GenerationRequest(
            request.model,
            [text.render(messages)],
            request.stop_sequences or [],
            request.max_tokens,
            bool(request.stream),
            True,
        )

    @override
    def response(self, replies: list[Reply], usage: Usage) -> dict[str, Any]:
        (reply,) = replies
        return self._message(usage) | {
            "content": [{"type": "text", "text": reply.text}],
            "usage": self._usage(usage) | {"output_tokens": usage.completion},
            **self._ending(reply),
        }

    @override
    def opening(self, usage: Usage) -> bytes:
        return self._event("message_start", {"message": self._message(usage)}) + self._event(
            "content_block_start", {"index": 0, "content_block": {"type": "text", "text": ""}}
        )

    def _token(self, index: int, piece: str) -> bytes:
        return self._delta(piece)

    @override
    def last_token(self, index: int, piece: str, reply: Reply) -> bytes:
        return self._delta(piece)

    @override
    def closing(self, replies: list[Reply], usage: Usage) -> bytes:
        final = self._usage(usage) | {"output_tokens": usage.completion}
        return b"".join(
            (
                self._event("content_block_stop", {"index": 0}),
                self._event("message_delta", {"delta": self._ending(replies[0]), "usage": final}),
                self._event("message_stop", {}),
            )
        )

    def _message(self, usage: Usage) -> dict[str, Any]:
        return {
            "id": self.meta.id,
            "type": "message",
            "role": "assistant",
            "model": self.meta.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": self._usage(usage),
        }

    @staticmethod
    def _usage(usage: Usage) -> dict[str, Any]:
        # Anthropic does not include cached tokens in the input tokens.
        return {
            "input_tokens": usage.prompt - usage.cached,
            "cache_read_input_tokens": usage.cached,
            "output_tokens": 0,
        }

    @staticmethod
    def _ending(reply: Reply) -> dict[str, Any]:
        reasons = {"length": "max_tokens", "stop": "stop_sequence" if reply.stop else "end_turn"}
        return {"stop_reason": reasons[reply.finish], "stop_sequence": reply.stop}

    def _delta(self, content: str) -> bytes:
        delta = {"type": "text_delta", "text": content}
        return self._event("content_block_delta", {"index": 0, "delta": delta})

    @staticmethod
    def _event(kind: str, value: dict[str, Any]) -> bytes:
        return f"event: {kind}\n".encode() + sse_data({"type": kind} | value)
