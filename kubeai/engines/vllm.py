"""vLLM: text generation, embeddings, reranking; LoRA adapters loaded while it runs."""

from __future__ import annotations

from kubeai.api.model import Model, ModelURL
from kubeai.engines.server import MODEL_MOUNT, Server, literal, startup_probe

STARTUP_FAILURES = 5400  # 3 hours: the largest models take long to download and to load


def server(model: Model, url: ModelURL) -> Server:
    """vLLM's own OpenAI server."""
    source = {"pvc": MODEL_MOUNT, "s3": url.base}.get(url.scheme, url.ref)
    args = [f"--model={literal(source)}", f"--served-model-name={model.metadata.name}"]
    if url.scheme == "s3":
        args.append("--load-format=runai_streamer")  # streams weights from the bucket
    lora = bool(model.spec.adapters)
    return Server(
        command=["python3", "-m", "vllm.entrypoints.openai.api_server"],
        args=args,
        more_args=["--enable-lora"] if lora else [],
        env={"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"} if lora else {},
        startup_probe=startup_probe(failures=STARTUP_FAILURES),
    )
