"""SGLang: text generation, embeddings, reranking."""

from __future__ import annotations

from kubeai.api.model import Model
from kubeai.api.model_url import ModelURL
from kubeai.podspec.cache import weights
from kubeai.podspec.container import PORT, Server, literal, startup_probe

STARTUP_FAILURES = 5400  # 3 hours, as for vLLM
_EMBEDDING_FEATURES = ("TextEmbedding", "Reranking")


def server(model: Model, url: ModelURL, image: str = "") -> Server:
    """``sglang.launch_server``, whose /health answers 503 until the first request has run."""
    streamed = url.scheme == "s3" and not model.spec.cache_profile
    source = literal(url.base) if streamed else weights(model, url)
    args = [
        f"--model-path={source}",
        f"--served-model-name={model.metadata.name}",
        "--host=0.0.0.0",  # the default is 127.0.0.1, which only the pod itself reaches
        f"--port={PORT}",
    ]
    if streamed:
        args.append("--load-format=runai_streamer")  # streams weights from the bucket
    if any(feature in _EMBEDDING_FEATURES for feature in model.spec.features):
        # Detected only for some architectures: not for embeddings from a causal language model.
        args.append("--is-embedding")
    return Server(
        command=["python3", "-m", "sglang.launch_server"],
        args=args,
        startup_probe=startup_probe(failures=STARTUP_FAILURES),
    )
