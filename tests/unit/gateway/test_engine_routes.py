"""Which Models may replace each other on a route."""

import re

import pytest
from doc_pages import rows, sections

from kubeai.gateway.engine_routes import can_replace, engines_with
from kubeai.openai.routes import Kind
from kubeai.routing.routes import Route


def documented() -> dict[str, set[str]]:
    """The engines with each route, from the table in docs/reference/engines/index.md."""
    head, _, *below = rows(sections("reference/engines/index.md")["Routes"])
    found = {}
    for row in below:
        path = re.fullmatch("`(.+)`", row[1])
        assert path is not None, row
        cells = zip(head[2:], row[2:], strict=True)
        found[path[1]] = {engine for engine, cell in cells if cell == "yes"}
    return found


@pytest.mark.parametrize("kind", [k for k in Kind if not (k.is_local or k.is_stored)])
def test_the_table_is_the_documented_one(kind):
    assert engines_with(kind) == documented()[kind.value]


def test_another_engine_needs_the_route_and_the_same_engine_does_not():
    vllm, other, infinity = Route("a", "VLLM"), Route("b", "VLLM"), Route("c", "Infinity")
    assert can_replace(Kind.CHAT_BATCH, vllm, other)
    assert can_replace(Kind.IMAGE_VARIATIONS, vllm, other), "an image of the user's own"
    assert can_replace(Kind.EMBEDDINGS, vllm, infinity)
    assert not can_replace(Kind.CHAT, vllm, infinity)


def test_a_feature_that_the_model_declares_is_needed():
    text, embeds, none = (
        Route("a", "VLLM", features=("TextGeneration",)),
        Route("b", "VLLM", features=("TextEmbedding",)),
        Route("c", "VLLM"),
    )
    assert not can_replace(Kind.CHAT, text, embeds)
    assert can_replace(Kind.EMBEDDINGS, text, embeds)
    assert can_replace(Kind.CHAT, none, embeds)
    assert not can_replace(Kind.CHAT, text, none)
