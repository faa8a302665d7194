"""OpenAI's chat completions and completions APIs."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from typing_extensions import override

from kubeai.mock_engine.formats.base import (
    DONE,
    PROMPTS_MAX,
    ApiError,
    ApiFormat,
    GenerationRequest,
    Input,
    Message,
    Positive,
    Usage,
    decode,
    parse_prompts,
    sse_data,
    stop_strings,
)
from kubeai.simulation import text
from kubeai.simulation.text import Reply


class StreamOptions(msgspec.Struct):
    """``stream_options`` of a request."""

    include_usage: bool = False


class ChatRequest(msgspec.Struct):
    """The supported fields of ``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], msgspec.Meta(min_length=1)]
    model: str | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: Positive | None = None
    max_completion_tokens: Positive | None = None
    stop: str | list[str] | None = None
    n: int | None = 1


class Chat(ApiFormat):
    """OpenAI's chat completions API."""

    prefix = "chatcmpl-"

    @staticmethod
    @override
    def parse(body: bytes) -> GenerationRequest:
        request = decode(body, ChatRequest)
        require_n_1(request.n)
        require_stream(request)
        return GenerationRequest(
            request.model,
            [text.render(message.rendered() for message in request.messages)],
            stop_strings(request.stop),
            request.max_completion_tokens or request.max_tokens,
            bool(request.stream),
            request.stream_options is not None and request.stream_options.include_usage,
        )

    @override
    def response(self, replies: list[Reply], usage: Usage) -> dict[str, Any]:
        (reply,) = replies
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": reply.text, "tool_calls": []},
            "logprobs": None,
            "finish_reason": reply.finish,
            "stop_reason": reply.stop,
        }
        return self._object("chat.completion", [choice]) | {"usage": usage.openai()}

    @override
    def opening(self, usage: Usage) -> bytes:
        return self._chunk({"role": "assistant", "content": ""})

    def _token(self, index: int, piece: str) -> bytes:
        return self._chunk({"content": piece})

    @override
    def last_token(self, index: int, piece: str, reply: Reply) -> bytes:
        return self._chunk({"content": piece}, reply.finish, {"stop_reason": reply.stop})

    @override
    def closing(self, replies: list[Reply], usage: Usage) -> bytes:
        if not self.request.usage:
            return DONE
        return (
            sse_data(self._object("chat.completion.chunk", []) | {"usage": usage.openai()}) + DONE
        )

    def _chunk(
        self, delta: dict[str, str], finish: str | None = None, more: dict[str, Any] | None = None
    ) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return sse_data(self._object("chat.completion.chunk", [choice | (more or {})]))

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        meta = self.meta
        head = {"id": meta.id, "object": kind, "created": meta.created, "model": meta.model}
        return head | {"choices": choices, "system_fingerprint": meta.replica}


class BatchRequest(msgspec.Struct):
    """The supported fields of ``POST /v1/chat/completions/batch``."""

    messages: Annotated[
        list[Annotated[list[Message], msgspec.Meta(min_length=1)]],
        msgspec.Meta(min_length=1, max_length=PROMPTS_MAX),
    ]
    model: str | None = None
    max_tokens: Positive | None = None
    max_completion_tokens: Positive | None = None
    stop: str | list[str] | None = None


class ChatBatch(Chat):
    """vLLM's batch of conversations: a choice for each."""

    @staticmethod
    @override
    def parse(body: bytes) -> GenerationRequest:
        request = decode(body, BatchRequest)
        return GenerationRequest(
            request.model,
            [text.render(each.rendered() for each in one) for one in request.messages],
            stop_strings(request.stop),
            request.max_completion_tokens or request.max_tokens,
            False,
            False,
        )

    @override
    def response(self, replies: list[Reply], usage: Usage) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": reply.text},
                "finish_reason": reply.finish,
            }
            for index, reply in enumerate(replies)
        ]
        return self._object("chat.completion", choices) | {"usage": usage.openai()}


def require_n_1(count: int | None) -> None:
    """ApiError if a request asks for several choices."""
    if count not in (None, 1):
        raise ApiError("n: the mock engine only supports n=1", param="n")


def require_stream(request: ChatRequest | CompletionRequest) -> None:
    """ApiError if a request that is not for a stream has options of one."""
    if request.stream_options is not None and not request.stream:
        raise ApiError("stream_options: only allowed when `stream` is true", param="stream_options")


class CompletionRequest(msgspec.Struct):
    """The supported fields of ``POST /v1/completions``."""

    prompt: Input
    model: str | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: Positive | None = 16
    stop: str | list[str] | None = None
    n: int | None = 1
    echo: bool | None = False


class Completions(ApiFormat):
    """OpenAI's completions API."""

    prefix = "cmpl-"

    @staticmethod
    @override
    def parse(body: bytes) -> GenerationRequest:
        request = decode(body, CompletionRequest)
        require_n_1(request.n)
        if request.echo:
            raise ApiError("echo: the mock engine does not support echo", param="echo")
        require_stream(request)
        return GenerationRequest(
            request.model,
            parse_prompts(request.prompt, "prompt"),
            stop_strings(request.stop),
            request.max_tokens,
            bool(request.stream),
            request.stream_options is not None and request.stream_options.include_usage,
        )

    @override
    def response(self, replies: list[Reply], usage: Usage) -> dict[str, Any]:
        choices = [self._choice(i, r.text, r.finish, r.stop) for i, r in enumerate(replies)]
        return self._object(choices) | {"usage": usage.openai()}

    def _token(self, index: int, piece: str) -> bytes:
        return sse_data(self._object([self._choice(index, piece, None, None)]))

    @override
    def last_token(self, index: int, piece: str, reply: Reply) -> bytes:
        return sse_data(self._object([self._choice(index, piece, reply.finish, reply.stop)]))

    @override
    def closing(self, replies: list[Reply], usage: Usage) -> bytes:
        if not self.request.usage:
            return DONE
        return sse_data(self._object([]) | {"usage": usage.openai()}) + DONE

    def _choice(
        self, index: int, content: str, finish: str | None, stop: str | None
    ) -> dict[str, Any]:
        choice = {"index": index, "text": content, "logprobs": None}
        return choice | {"finish_reason": finish, "stop_reason": stop}

    def _object(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        meta = self.meta
        head = {"id": meta.id, "object": "text_completion", "created": meta.created}
        return head | {
            "model": meta.model,
            "choices": choices,
            "system_fingerprint": meta.replica,
        }
