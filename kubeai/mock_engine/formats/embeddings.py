"""The embeddings and rerank APIs."""

from __future__ import annotations

import base64
from typing import Annotated, Any, Literal

import msgspec

from kubeai.mock_engine.formats.base import (
    PROMPTS_MAX,
    Input,
    Meta,
    parse_prompts,
)
from kubeai.simulation import text

DIMENSIONS_MAX = 4096


class EmbeddingRequest(msgspec.Struct):
    """The supported fields of ``POST /v1/embeddings``."""

    input: Input
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, msgspec.Meta(ge=1, le=DIMENSIONS_MAX)] | None = None

    def prompts(self) -> list[bytes]:
        """The tokens of each input."""
        return parse_prompts(self.input, "input")

    def response(self, meta: Meta, prompts: list[bytes], tokens: int) -> dict[str, Any]:
        """The response for these prompts, whose length is ``tokens`` in total."""
        dimensions = self.dimensions or text.EMBEDDING_DIMENSIONS
        data = []
        for index, prompt in enumerate(prompts):
            vector = text.embed(prompt.rstrip(b"\0").decode("utf-8", "replace"), dimensions)
            value = (
                base64.b64encode(vector.tobytes()).decode()
                if self.encoding_format == "base64"
                else vector.tolist()
            )
            data.append({"object": "embedding", "index": index, "embedding": value})
        return {
            "id": meta.id,
            "object": "list",
            "created": meta.created,
            "model": meta.model,
            "data": data,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0},
        }


class RerankRequest(msgspec.Struct):
    """The supported fields of ``POST /v1/rerank``."""

    query: str
    documents: Annotated[
        list[str | dict[str, Any]], msgspec.Meta(min_length=1, max_length=PROMPTS_MAX)
    ]
    model: str | None = None
    top_n: Annotated[int, msgspec.Meta(ge=0)] | None = None
    return_documents: bool | None = True

    def texts(self) -> list[str]:
        """The text of each document."""
        return [
            item if isinstance(item, str) else str(item.get("text") or "")
            for item in self.documents
        ]

    def response(self, meta: Meta, tokens: int) -> dict[str, Any]:
        """The ``top_n`` documents, most similar to the query first.

        ``tokens``: total length of all prompts.
        """
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
