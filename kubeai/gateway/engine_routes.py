"""Which engines have which routes: docs/reference/engines/index.md. A test compares the two.

A request is sent to the engine of its Model whether or not the engine is listed here. The table
counts only for a Model that is to replace another one (fallback.py).
"""

from __future__ import annotations

from kubeai.openai.routes import Kind
from kubeai.routing.routes import Feature, Route

_ENGINES = {
    "V": "VLLM",
    "S": "SGLang",
    "O": "OLlama",
    "L": "LlamaCpp",
    "F": "FasterWhisper",
    "I": "Infinity",
}
# Which engines have a route, and the feature that it belongs to: docs/reference/engines/index.md.
_SERVED: dict[Kind, tuple[str, Feature | None]] = {
    Kind.CHAT: ("VSOL", "TextGeneration"),
    Kind.CHAT_BATCH: ("V", "TextGeneration"),
    Kind.COMPLETIONS: ("VSOL", "TextGeneration"),
    Kind.RESPONSES: ("VSOL", "TextGeneration"),
    Kind.MESSAGES: ("VSOL", "TextGeneration"),
    Kind.COUNT_TOKENS: ("VSL", "TextGeneration"),
    Kind.SYSTEM_ONE: ("VSL", "TextGeneration"),
    Kind.GENERATIVE_SCORING: ("V", "TextGeneration"),
    Kind.TOKENIZE: ("VSL", "TextGeneration"),
    Kind.DETOKENIZE: ("VSL", "TextGeneration"),
    Kind.OLLAMA_CHAT: ("SO", "TextGeneration"),
    Kind.OLLAMA_GENERATE: ("SO", "TextGeneration"),
    Kind.EMBEDDINGS: ("VSOLI", "TextEmbedding"),
    Kind.EMBED_V2: ("V", "TextEmbedding"),
    Kind.POOLING: ("V", "TextEmbedding"),
    Kind.OLLAMA_EMBED: ("O", "TextEmbedding"),
    Kind.OLLAMA_EMBEDDINGS: ("O", "TextEmbedding"),
    Kind.RERANK: ("VSLI", "Reranking"),
    Kind.SCORE: ("VS", "Reranking"),
    Kind.CLASSIFY: ("VS", "Reranking"),
    Kind.TRANSCRIPTIONS: ("VSF", "SpeechToText"),
    Kind.TRANSLATIONS: ("VF", "SpeechToText"),
    Kind.REALTIME: ("VSF", "SpeechToText"),
    Kind.SPEECH: ("F", None),
    Kind.IMAGES: ("O", None),
    Kind.IMAGE_EDITS: ("O", None),
    Kind.IMAGE_VARIATIONS: ("", None),
}


def engines_with(kind: Kind) -> frozenset[str]:
    """The engines that are known to have a route."""
    return frozenset(_ENGINES[letter] for letter in _SERVED.get(kind, ("", None))[0])


def can_replace(kind: Kind, asked: Route, other: Route) -> bool:
    """Whether a Model has the route of a request for another Model.

    It has if its engine does, or is the other's, and if it has the route's feature or the other
    does not declare that either.
    """
    feature = _SERVED.get(kind, ("", None))[1]
    if feature in asked.features and feature not in other.features:
        return False
    return other.engine == asked.engine or other.engine in engines_with(kind)
