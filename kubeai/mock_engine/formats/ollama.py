"""Ollama's own API: chat and generation as streams of JSON lines, and embeddings."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any

import msgspec
from typing_extensions import override

from kubeai.mock_engine.formats.base import (
    PROMPTS_MAX,
    ApiFormat,
    GenerationRequest,
    Message,
    Messages,
    Meta,
    Positive,
    Usage,
    decode,
    encode,
    stop_strings,
)
from kubeai.mock_engine.formats.computed import ComputedRequest, length
from kubeai.simulation import text
from kubeai.simulation.text import Reply


def _model(name: str | None) -> str | None:
    return name and name.removesuffix(":latest")


class Options(msgspec.Struct):
    """``options`` of a request."""

    num_predict: int | None = None
    stop: str | list[str] | None = None

    @property
    def limit(self) -> int | None:
        """The number of tokens to generate; None: no limit."""
        return self.num_predict if self.num_predict and self.num_predict > 0 else None


class ChatRequest(msgspec.Struct):
    """The supported fields of ``POST /api/chat``."""

    messages: Annotated[list[Message], msgspec.Meta(min_length=1)]
    model: str | None = None
    stream: bool | None = True
    options: Options | None = None


class GenerateRequest(msgspec.Struct):
    """The supported fields of ``POST /api/generate``."""

    prompt: str = ""
    model: str | None = None
    system: str | None = None
    stream: bool | None = True
    options: Options | None = None


class OllamaChat(ApiFormat):
    """``/api/chat``."""

    prefix = ""
    stream_type = "application/x-ndjson"

    @staticmethod
    @override
    def parse(body: bytes) -> GenerationRequest:
        request = decode(body, ChatRequest)
        messages = [message.rendered() for message in request.messages]
        return _generation(request, messages)

    @override
    def response(self, replies: list[Reply], usage: Usage) -> dict[str, Any]:
        (reply,) = replies
        return self._content(reply.text) | self._done(reply, usage)

    def _token(self, index: int, piece: str) -> bytes:
        return encode(self._content(piece) | {"done": False}) + b"\n"

    @override
    def last_token(self, index: int, piece: str, reply: Reply) -> bytes:
        return self._token(index, piece)

    @override
    def closing(self, replies: list[Reply], usage: Usage) -> bytes:
        return encode(self._content("") | self._done(replies[0], usage)) + b"\n"

    def _content(self, content: str) -> dict[str, Any]:
        return self._head() | {"message": {"role": "assistant", "content": content}}

    def _head(self) -> dict[str, Any]:
        created = datetime.fromtimestamp(self.meta.created, UTC).isoformat(timespec="seconds")
        return {"model": self.meta.model, "created_at": created}

    @staticmethod
    def _done(reply: Reply, usage: Usage) -> dict[str, Any]:
        return {
            "done": True,
            "done_reason": reply.finish,
            "total_duration": 1,  # nanoseconds
            "load_duration": 1,
            "prompt_eval_count": usage.prompt,
            "prompt_eval_duration": 1,
            "eval_count": usage.completion,
            "eval_duration": 1,
        }


class OllamaGenerate(OllamaChat):
    """``/api/generate``."""

    @staticmethod
    @override
    def parse(body: bytes) -> GenerationRequest:
        request = decode(body, GenerateRequest)
        messages: Messages = [("system", request.system)] if request.system else []
        return _generation(request, [*messages, ("user", request.prompt)])

    @override
    def _content(self, content: str) -> dict[str, Any]:
        return self._head() | {"response": content}


def _generation(request: ChatRequest | GenerateRequest, messages: Messages) -> GenerationRequest:
    options = request.options or Options()
    return GenerationRequest(
        _model(request.model),
        [text.render(messages)],
        stop_strings(options.stop),
        options.limit,
        request.stream is not False,
        True,
    )


class OllamaEmbedRequest(ComputedRequest, kw_only=True):
    """The supported fields of ``POST /api/embed``."""

    input: str | Annotated[list[str], msgspec.Meta(max_length=PROMPTS_MAX)]
    dimensions: Positive | None = None

    def texts(self) -> list[str]:
        """The texts to embed."""
        return [self.input] if isinstance(self.input, str) else self.input

    @override
    def lengths(self) -> list[int]:
        return [length(each) for each in self.texts()]

    @override
    def response(self, meta: Meta, tokens: int) -> dict[str, Any]:
        dimensions = self.dimensions or text.EMBEDDING_DIMENSIONS
        return {
            "model": meta.model,
            "embeddings": [text.embed(each, dimensions).tolist() for each in self.texts()],
            "total_duration": 1,
            "load_duration": 1,
            "prompt_eval_count": tokens,
        }


class OllamaEmbeddingsRequest(ComputedRequest, kw_only=True):
    """The supported fields of ``POST /api/embeddings``."""

    prompt: str

    @override
    def lengths(self) -> list[int]:
        return [length(self.prompt)]

    @override
    def response(self, meta: Meta, tokens: int) -> dict[str, Any]:
        return {"embedding": text.embed(self.prompt).tolist()}
