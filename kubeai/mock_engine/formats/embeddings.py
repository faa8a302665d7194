"""Embeddings, reranking, scores and classes, in the formats of OpenAI, Cohere and vLLM."""

from __future__ import annotations

import base64
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from typing_extensions import override

from kubeai.mock_engine.formats.base import PROMPTS_MAX, ApiError, Input, Meta, parse_prompts
from kubeai.mock_engine.formats.computed import ComputedRequest, length, listed
from kubeai.simulation import text

DIMENSIONS_MAX = 4096
CLASSES = ("negative", "positive")

Texts = str | Annotated[list[str], msgspec.Meta(min_length=1, max_length=PROMPTS_MAX)]


def _texts(value: Texts) -> list[str]:
    return [value] if isinstance(value, str) else value


def _score(one: str, other: str) -> float:
    return text.similarity(text.embed(one), text.embed(other))


def _content(prompt: bytes) -> str:
    return prompt.rstrip(b"\0").decode("utf-8", "replace")


class _InputRequest(ComputedRequest, kw_only=True):
    """A request with inputs as OpenAI's embeddings API has them."""

    input: Input

    def prompts(self) -> list[bytes]:
        """The tokens of each input."""
        return parse_prompts(self.input, "input")

    @override
    def lengths(self) -> list[int]:
        return [text.count(prompt) for prompt in self.prompts()]


class EmbeddingRequest(_InputRequest, kw_only=True):
    """The supported fields of ``POST /v1/embeddings``."""

    prefix: ClassVar[str] = "embd-"
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, msgspec.Meta(ge=1, le=DIMENSIONS_MAX)] | None = None

    @override
    def response(self, meta: Meta, tokens: int) -> dict[str, Any]:
        dimensions = self.dimensions or text.EMBEDDING_DIMENSIONS
        data = []
        for index, prompt in enumerate(self.prompts()):
            vector = text.embed(_content(prompt), dimensions)
            value = (
                base64.b64encode(vector.tobytes()).decode()
                if self.encoding_format == "base64"
                else vector.tolist()
            )
            data.append({"object": "embedding", "index": index, "embedding": value})
        return listed(meta, data, tokens)


class PoolingRequest(_InputRequest, kw_only=True):
    """The supported fields of ``POST /pooling``."""

    prefix: ClassVar[str] = "pool-"

    @override
    def response(self, meta: Meta, tokens: int) -> dict[str, Any]:
        vectors = (text.embed(_content(prompt)).tolist() for prompt in self.prompts())
        data = [
            {"object": "pooling", "index": index, "data": vector}
            for index, vector in enumerate(vectors)
        ]
        return listed(meta, data, tokens)


class ClassifyRequest(_InputRequest, kw_only=True):
    """The supported fields of ``POST /classify``."""

    prefix: ClassVar[str] = "classify-"

    @override
    def response(self, meta: Meta, tokens: int) -> dict[str, Any]:
        data = []
        for index, prompt in enumerate(self.prompts()):
            positive = (1 + _score(_content(prompt), CLASSES[1])) / 2
            probs = [1 - positive, positive]
            data.append(
                {
                    "index": index,
                    "label": CLASSES[probs.index(max(probs))],
                    "probs": probs,
                    "num_classes": len(CLASSES),
                }
            )
        return listed(meta, data, tokens)


class CohereEmbedRequest(ComputedRequest, kw_only=True):
    """The supported fields of ``POST /v2/embed``."""

    prefix: ClassVar[str] = "embd-"
    texts: Annotated[list[str], msgspec.Meta(min_length=1, max_length=PROMPTS_MAX)]
    input_type: str | None = None

    @override
    def lengths(self) -> list[int]:
        return [length(each) for each in self.texts]

    @override
    def response(self, meta: Meta, tokens: int) -> dict[str, Any]:
        return {
            "id": meta.id,
            "embeddings": {"float": [text.embed(each).tolist() for each in self.texts]},
            "texts": self.texts,
            "meta": {"api_version": {"version": "2"}, "billed_units": {"input_tokens": tokens}},
            "response_type": "embeddings_by_type",
        }


class RerankRequest(ComputedRequest, kw_only=True):
    """The supported fields of ``POST /v1/rerank``."""

    prefix: ClassVar[str] = "rerank-"
    query: str
    documents: Annotated[
        list[str | dict[str, Any]], msgspec.Meta(min_length=1, max_length=PROMPTS_MAX)
    ]
    top_n: Annotated[int, msgspec.Meta(ge=0)] | None = None
    return_documents: bool | None = True

    def texts(self) -> list[str]:
        """The text of each document."""
        return [
            item if isinstance(item, str) else str(item.get("text") or "")
            for item in self.documents
        ]

    @override
    def lengths(self) -> list[int]:
        query = length(self.query)
        return [query + length(document) for document in self.texts()]

    @override
    def response(self, meta: Meta, tokens: int) -> dict[str, Any]:
        query = text.embed(self.query)
        results = []
        for index, document in enumerate(self.texts()):
            score = text.similarity(query, text.embed(document))
            result: dict[str, Any] = {"index": index, "relevance_score": score}
            if self.return_documents:
                result["document"] = {"text": document}
            results.append(result)
        results.sort(key=lambda result: (-result["relevance_score"], result["index"]))
        return {
            "id": meta.id,
            "model": meta.model,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
            "results": results[: self.top_n or None],
        }


class ScoreRequest(ComputedRequest, kw_only=True):
    """The supported fields of ``POST /v1/score``: two texts, or one and several, in pairs."""

    prefix: ClassVar[str] = "score-"
    text_1: Texts | None = None
    text_2: Texts | None = None
    queries: Texts | None = None
    documents: Texts | None = None

    def pairs(self) -> list[tuple[str, str]]:
        """The texts to compare."""
        one, other = self.text_1 or self.queries, self.text_2 or self.documents
        if not one or not other:
            raise ApiError("text_1, text_2: both are required", param="text_1")
        left, right = _texts(one), _texts(other)
        if len(left) == 1:
            left = left * len(right)
        if len(left) != len(right):
            raise ApiError("text_1, text_2: have different lengths", param="text_2")
        return list(zip(left, right, strict=True))

    @override
    def lengths(self) -> list[int]:
        return [length(one) + length(other) for one, other in self.pairs()]

    @override
    def response(self, meta: Meta, tokens: int) -> dict[str, Any]:
        data = [
            {"index": index, "object": "score", "score": _score(*pair)}
            for index, pair in enumerate(self.pairs())
        ]
        return listed(meta, data, tokens)


class GenerativeScoringRequest(ComputedRequest, kw_only=True):
    """The supported fields of ``POST /generative_scoring``."""

    prefix: ClassVar[str] = "generative-scoring-"
    query: str
    items: Annotated[list[str], msgspec.Meta(min_length=1, max_length=PROMPTS_MAX)]

    @override
    def lengths(self) -> list[int]:
        return [length(self.query) + length(item) for item in self.items]

    @override
    def response(self, meta: Meta, tokens: int) -> dict[str, Any]:
        data = [
            {"index": index, "object": "score", "score": (1 + _score(self.query, item)) / 2}
            for index, item in enumerate(self.items)
        ]
        return listed(meta, data, tokens)
