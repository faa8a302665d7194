"""OpenAI's responses API."""

from __future__ import annotations

from typing import Any

import msgspec
from typing_extensions import override

from kubeai.mock_engine.formats.base import (
    ApiFormat,
    Content,
    GenerationRequest,
    Messages,
    Positive,
    Usage,
    content_text,
    decode,
    sse_data,
)
from kubeai.simulation import text
from kubeai.simulation.text import Reply


class ResponseItem(msgspec.Struct):
    """An input item: a message, a tool call or a tool's output."""

    type: str = "message"
    role: str | None = None
    content: Content = None
    output: Content = None  # of a tool call
    arguments: str = ""

    def rendered(self) -> tuple[str, str]:
        """(role or type, text) of the item."""
        content = content_text(self.content) + self.arguments + content_text(self.output)
        return self.role or self.type, content


class ResponsesRequest(msgspec.Struct):
    """The supported fields of ``POST /v1/responses``."""

    input: str | list[ResponseItem]
    model: str | None = None
    instructions: str | None = None
    stream: bool | None = False
    max_output_tokens: Positive | None = None
    previous_response_id: str | None = None
    request_id: str | None = None  # vLLM's and SGLang's: the response's ID


class Responses(ApiFormat):
    """OpenAI's responses API."""

    prefix = "resp_"

    @staticmethod
    @override
    def parse(body: bytes) -> GenerationRequest:
        request = decode(body, ResponsesRequest)
        messages: Messages = [("system", request.instructions)] if request.instructions else []
        if isinstance(request.input, str):
            messages.append(("user", request.input))
        else:
            messages += [item.rendered() for item in request.input]
        limit = request.max_output_tokens
        return GenerationRequest(
            request.model,
            [text.render(messages)],
            [],
            limit,
            bool(request.stream),
            True,
            request.previous_response_id,
            request.request_id,
        )

    @override
    def response(self, replies: list[Reply], usage: Usage) -> dict[str, Any]:
        (reply,) = replies
        cut = reply.finish == "length"
        output = [self._item("incomplete" if cut else "completed", [self._part(reply.text)])]
        return self._response("incomplete" if cut else "completed", output) | {
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "usage": {
                "input_tokens": usage.prompt,
                "input_tokens_details": {"cached_tokens": usage.cached},
                "output_tokens": usage.completion,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage.prompt + usage.completion,
            },
        }

    @override
    def opening(self, usage: Usage) -> bytes:
        begun = {"response": self._response("in_progress", [])}
        return b"".join(
            (
                self._event(0, "response.created", begun),
                self._event(1, "response.in_progress", begun),
                self._event(
                    2,
                    "response.output_item.added",
                    {"output_index": 0, "item": self._item("in_progress", [])},
                ),
                self._event(
                    3, "response.content_part.added", self._place() | {"part": self._part("")}
                ),
            )
        )

    @override
    def token(self, index: int, number: int, piece: bytes) -> bytes:
        return self._delta(4 + number, piece.decode())

    @override
    def last_token(self, index: int, piece: str, reply: Reply) -> bytes:
        return self._delta(3 + reply.tokens, piece)

    @override
    def closing(self, replies: list[Reply], usage: Usage) -> bytes:
        whole = self.response(replies, usage)
        (item,) = whole["output"]
        (part,) = item["content"]
        done = {"text": replies[0].text, "logprobs": []}
        number = 4 + replies[0].tokens
        return b"".join(
            (
                self._event(number, "response.output_text.done", self._place() | done),
                self._event(
                    number + 1, "response.content_part.done", self._place() | {"part": part}
                ),
                self._event(
                    number + 2, "response.output_item.done", {"output_index": 0, "item": item}
                ),
                self._event(number + 3, f"response.{whole['status']}", {"response": whole}),
            )
        )

    def _response(self, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.meta.id,
            "object": "response",
            "created_at": self.meta.created,
            "model": self.meta.model,
            "status": status,
            "output": output,
            "instructions": None,
            "metadata": {"replica": self.meta.replica},
            "max_output_tokens": self.request.limit,
            "parallel_tool_calls": True,
            "temperature": 1.0,
            "tool_choice": "auto",
            "tools": [],
            "top_p": 1.0,
        }

    def _item(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        item = {"id": f"msg_{self.meta.id}", "type": "message", "role": "assistant"}
        return item | {"status": status, "content": content}

    @staticmethod
    def _part(content: str) -> dict[str, Any]:
        return {"type": "output_text", "text": content, "annotations": [], "logprobs": []}

    def _place(self) -> dict[str, Any]:
        return {"item_id": f"msg_{self.meta.id}", "output_index": 0, "content_index": 0}

    def _delta(self, number: int, content: str) -> bytes:
        more = {"delta": content, "logprobs": []}
        return self._event(number, "response.output_text.delta", self._place() | more)

    @staticmethod
    def _event(number: int, kind: str, value: dict[str, Any]) -> bytes:
        body = {"type": kind, "sequence_number": number} | value
        return f"event: {kind}\n".encode() + sse_data(body)
