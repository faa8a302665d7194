"""Infinity: embeddings and reranking."""

from __future__ import annotations

from kubeai.api.model import Model
from kubeai.api.model_url import ModelURL
from kubeai.podspec.cache import weights
from kubeai.podspec.container import PORT, Server, startup_probe

STARTUP_FAILURES = 600  # 20 minutes


def server(model: Model, url: ModelURL, image: str = "") -> Server:
    """``infinity_emb v2``, configured by its environment."""
    return Server(
        args=["v2"],
        env={
            "INFINITY_MODEL_ID": weights(model, url),
            "INFINITY_SERVED_MODEL_NAME": model.metadata.name,
            "INFINITY_URL_PREFIX": "/v1",
            "INFINITY_ENGINE": "torch",
            "INFINITY_PORT": str(PORT),
        },
        startup_probe=startup_probe(failures=STARTUP_FAILURES),
    )
