"""Which format the mock engine serves at which path."""

from __future__ import annotations

from kubeai.mock_engine.formats.base import ApiFormat
from kubeai.mock_engine.formats.completions import Chat, ChatBatch, Completions
from kubeai.mock_engine.formats.computed import ComputedRequest
from kubeai.mock_engine.formats.decisions import DecisionRequest
from kubeai.mock_engine.formats.embeddings import (
    ClassifyRequest,
    CohereEmbedRequest,
    EmbeddingRequest,
    GenerativeScoringRequest,
    PoolingRequest,
    RerankRequest,
    ScoreRequest,
)
from kubeai.mock_engine.formats.media import ImageRequest, SpeechRequest
from kubeai.mock_engine.formats.messages import AnthropicMessages
from kubeai.mock_engine.formats.ollama import (
    OllamaChat,
    OllamaEmbeddingsRequest,
    OllamaEmbedRequest,
    OllamaGenerate,
)
from kubeai.mock_engine.formats.responses import Responses
from kubeai.mock_engine.formats.tokens import (
    CountTokensRequest,
    DetokenizeRequest,
    TokenizeRequest,
)

GENERATED: dict[str, type[ApiFormat]] = {
    "/v1/chat/completions": Chat,
    "/v1/chat/completions/batch": ChatBatch,
    "/v1/completions": Completions,
    "/v1/responses": Responses,
    "/v1/messages": AnthropicMessages,
    "/api/chat": OllamaChat,
    "/api/generate": OllamaGenerate,
}
COMPUTED: dict[str, type[ComputedRequest]] = {
    "/v1/embeddings": EmbeddingRequest,
    "/v2/embed": CohereEmbedRequest,
    "/pooling": PoolingRequest,
    "/classify": ClassifyRequest,
    "/v1/rerank": RerankRequest,
    "/rerank": RerankRequest,
    "/v1/score": ScoreRequest,
    "/generative_scoring": GenerativeScoringRequest,
    "/v1/systemone": DecisionRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
    "/v1/messages/count_tokens": CountTokensRequest,
    "/v1/audio/speech": SpeechRequest,
    "/v1/images/generations": ImageRequest,
    "/api/embed": OllamaEmbedRequest,
    "/api/embeddings": OllamaEmbeddingsRequest,
}
