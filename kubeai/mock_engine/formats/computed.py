"""The base of requests that generate no text: they are parsed, computed and answered."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import msgspec

from kubeai.mock_engine.formats.base import Meta
from kubeai.simulation import text


class Media(NamedTuple):
    """A response that is not JSON."""

    content_type: str
    body: bytes


class ComputedRequest(msgspec.Struct, kw_only=True):
    """A request that the engine computes as prompts without output."""

    prefix: ClassVar[str] = ""  # of the response's id
    model: str | None = None

    def lengths(self) -> list[int]:
        """The length of each prompt in tokens; empty if there is nothing to compute."""
        return []

    def response(self, meta: Meta, tokens: int) -> dict[str, Any] | Media:
        """The response. ``tokens``: the total length of the prompts."""
        raise NotImplementedError


def length(content: str) -> int:
    """The length of a text in tokens."""
    return text.count(text.pack(content))


def prompt_usage(tokens: int) -> dict[str, int]:
    """The usage object of a request without output, in OpenAI's format."""
    return {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0}


def listed(meta: Meta, data: list[dict[str, Any]], tokens: int) -> dict[str, Any]:
    """A list in OpenAI's format."""
    return {
        "id": meta.id,
        "object": "list",
        "created": meta.created,
        "model": meta.model,
        "data": data,
        "usage": prompt_usage(tokens),
    }
