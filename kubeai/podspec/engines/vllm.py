"""vLLM: text generation, embeddings, reranking; LoRA adapters loaded while it runs."""

from __future__ import annotations

from kubeai.api.model import Model
from kubeai.api.model_url import ModelURL
from kubeai.podspec.cache import weights
from kubeai.podspec.container import Server, literal, startup_probe

STARTUP_FAILURES = 5400  # 3 hours: the largest models take long to download and to load


def server(model: Model, url: ModelURL) -> Server:
    """vLLM's own OpenAI server."""
    streamed = url.scheme == "s3" and not model.spec.cache_profile
    source = literal(url.base) if streamed else weights(model, url)
    args = [f"--model={source}", f"--served-model-name={model.metadata.name}"]
    if streamed:
        args.append("--load-format=runai_streamer")  # streams weights from the bucket
    lora = bool(model.spec.adapters)
    return Server(
        command=["python3", "-m", "vllm.entrypoints.openai.api_server"],
        args=args,
        more_args=["--enable-lora"] if lora else [],
        env={"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"} if lora else {},
        startup_probe=startup_probe(failures=STARTUP_FAILURES),
    )
