"""Reads inference requests as far as routing needs it. Pure: no I/O.

Owns the reading of JSON bodies, the hash key, the replacement of ``model`` for adapters, and the
X-Label-Selector and X-KubeAI-Max-Wait headers. Called by the gateway for every request.

The gateway and the engine must read the same ``model``, so a body that two JSON parsers may
interpret differently is rejected with 400. Required are strict JSON (no NaN, no trailing comma, no
raw control characters), valid UTF-8 without a BOM, no lone surrogates, exactly one top-level
``model``, even if its key is escaped, and no key that differs from it only in case (Go's decoder
would accept it). The rest of the body is left to the engine: unknown fields, unusual structures and
wrong types pass through, and at most make the hash key less specific.

Reading is one compiled pass (``_body_scan``). For a body above ``LARGE_BYTES``, :func:`read`,
:func:`prompt_of` and :func:`body_for` release the GIL, so that a thread can call them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import msgspec

from kubeai.api.config.duration import parse_duration
from kubeai.api.labels import Selector, label_selector
from kubeai.errors import quoted
from kubeai.openai import _body_scan
from kubeai.openai._body_scan import LARGE_BYTES, InferenceRequest, Shape, named
from kubeai.openai._prompt_scan import prompt_of
from kubeai.openai.errors import ErrorResponse
from kubeai.openai.routes import Kind

__all__ = [
    "LARGE_BYTES",
    "SHAPES",
    "InferenceRequest",
    "body_for",
    "json_string",
    "named",
    "parse_max_wait",
    "parse_selectors",
    "prompt_of",
    "read",
    "split_model",
]

SHAPES: dict[Kind, Shape] = {
    shape.kind: shape
    for shape in (
        Shape(Kind.CHAT, conversation=b"messages", generates=True, has_usage_option=True),
        Shape(Kind.CHAT_BATCH, conversation=b"messages", uses_prefix_cache=False, generates=True),
        Shape(Kind.COMPLETIONS, text=b"prompt", generates=True, has_usage_option=True),
        Shape(
            Kind.RESPONSES,
            conversation=b"input",
            system=b"instructions",
            previous=b"previous_response_id",
            generates=True,
        ),
        Shape(Kind.MESSAGES, conversation=b"messages", system=b"system", generates=True),
        Shape(Kind.COUNT_TOKENS, has_prompt=False),
        Shape(Kind.SYSTEM_ONE, text=b"state", system=b"instructions", generates=True),
        Shape(Kind.EMBEDDINGS, text=b"input", uses_prefix_cache=False),
        Shape(Kind.EMBED_V2, text=b"texts", uses_prefix_cache=False),
        Shape(Kind.RERANK, text=b"query", uses_prefix_cache=False),
        Shape(Kind.SCORE, text=b"queries", uses_prefix_cache=False),
        Shape(Kind.GENERATIVE_SCORING, text=b"query", uses_prefix_cache=False),
        Shape(Kind.POOLING, text=b"input", uses_prefix_cache=False),
        Shape(Kind.CLASSIFY, text=b"input", uses_prefix_cache=False),
        Shape(Kind.TOKENIZE, has_prompt=False),
        Shape(Kind.DETOKENIZE, has_prompt=False),
        Shape(Kind.SPEECH, text=b"input", uses_prefix_cache=False),
        Shape(Kind.IMAGES, has_prompt=False),
        Shape(Kind.IMAGE_EDITS, has_prompt=False),  # unless it is a form
        Shape(Kind.OLLAMA_CHAT, conversation=b"messages", streams_by_default=True, generates=True),
        Shape(
            Kind.OLLAMA_GENERATE,
            text=b"prompt",
            system=b"system",
            streams_by_default=True,
            generates=True,
        ),
        Shape(Kind.OLLAMA_EMBED, text=b"input", uses_prefix_cache=False),
        Shape(Kind.OLLAMA_EMBEDDINGS, text=b"prompt", uses_prefix_cache=False),
    )
}

SELECTORS_MAX_COUNT = 8  # headers of a request
_encode = msgspec.json.Encoder().encode


def read(kind: Kind, body: bytes) -> InferenceRequest:
    """Parse a request's JSON body. ErrorResponse if it is invalid or ambiguous; see the module."""
    return _body_scan.read(SHAPES[kind], body)


def body_for(request: InferenceRequest, body: bytes) -> bytes:
    """The body to send to the engine, which gets its own name of the model."""
    return request.with_model(json_string(request.engines_name)) if request.is_renamed else body


def json_string(text: str) -> bytes:
    """Text as a JSON string, with its quotes."""
    return _encode(text)


def split_model(model: str) -> tuple[str, str | None]:
    """Split ``<model>_<adapter>`` at the first ``_``, which no Model's name contains."""
    name, separator, adapter = model.partition("_")
    return name, adapter if separator else None


def parse_selectors(texts: Sequence[str]) -> list[Selector]:
    """Parse X-Label-Selector headers, which must all match. ErrorResponse if one is invalid."""
    if len(texts) > SELECTORS_MAX_COUNT:
        raise ErrorResponse(
            f"X-Label-Selector is given more than {SELECTORS_MAX_COUNT} times. Join the selectors "
            "by commas.",
            param="X-Label-Selector",
        )
    return [_parse_selector(text) for text in texts]


@lru_cache(maxsize=64)
def _parse_selector(text: str) -> Selector:
    try:
        return label_selector(text)
    except ValueError as error:
        raise ErrorResponse(
            f"X-Label-Selector {quoted(text)} is not a valid label selector: {error}.",
            param="X-Label-Selector",
        ) from None


def parse_max_wait(values: list[bytes]) -> float | None:
    """Parse the X-KubeAI-Max-Wait headers of a request to seconds; None if there is none.

    ErrorResponse if there are several, or the value is not a duration as in the config.
    """
    if not values:
        return None
    text = values[0].decode("latin-1")
    problem = "is given more than once" if len(values) > 1 else ""
    try:
        wait_s = parse_duration(text)
    except ValueError:
        wait_s, problem = 0.0, problem or "is not a duration such as 30s or 1m30s"
    if wait_s < 0:
        problem = problem or "is negative"
    if problem:
        raise ErrorResponse(
            f"X-KubeAI-Max-Wait {quoted(text)} {problem}.", param="X-KubeAI-Max-Wait"
        )
    return wait_s
