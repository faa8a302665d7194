"""The engines: which Models are run on each, and what is checked of them.

The manifests are those of ``examples/real``, with weights made by ``make_weights.py`` in place of
real ones, and with what two cores need.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checks as c
import lifecycle as life
import yaml
from repository import REPOSITORY
from session import CLAIM, START_TIMEOUT_S, Check, Session

Manifest = dict[str, Any]
Prepare = Callable[[Path, Path], None]  # (the engine's environment, the weights)

OLLAMA_TIMEOUT_S = 60.0
MODELFILE = "FROM {weights}/gguf/{name}.gguf\nPARAMETER num_predict 256\n"


class Stage:
    """One Model. ``send`` is a request that starts it; ``rollout`` replaces it under traffic."""

    def __init__(
        self,
        manifest: Manifest,
        send: Check,
        checks: dict[str, Check],
        *,
        rollout: bool = False,
        last: dict[str, Check] | None = None,
    ) -> None:
        self.manifest, self.send, self.checks = manifest, send, checks
        self.rollout = rollout
        self.last = last or {}  # after the rollout
        self.name: str = manifest["metadata"]["name"]


class Suite:
    """An engine: ``stages`` makes its Models, given the directory with the weights."""

    def __init__(
        self,
        title: str,
        stages: Callable[[Path], list[Stage]],
        prepare: Prepare | None = None,
    ) -> None:
        self.title, self.stages, self.prepare = title, stages, prepare


def example(name: str, path: str, *, args: tuple[str, ...] = (), **spec: Any) -> Manifest:
    """A manifest of ``examples/real`` with the tiny weights at ``path`` of the claim.

    ``args`` are added to those of the manifest, ``env`` is merged, and other fields are replaced.
    """
    text = (REPOSITORY / "examples" / "real" / name).read_text()
    manifest: Manifest = yaml.safe_load(text)
    old = manifest["spec"]
    env = old.get("env", {}) | spec.pop("env", {})
    changes = {"url": f"pvc://{CLAIM}/{path}", "env": env, "resourceProfile": "cpu:1"}
    manifest["spec"] = old | changes | {"minReplicas": 0, "maxReplicas": 2} | spec
    manifest["spec"]["scaleDownDelaySeconds"] = 2
    if args or "args" in old:
        manifest["spec"]["args"] = [*old.get("args", ()), *args]
    return manifest


def renamed(manifest: Manifest, name: str) -> Manifest:
    return manifest | {"metadata": manifest["metadata"] | {"name": name}}


OPENAI_CHAT: dict[str, Check] = {
    "chat": c.chat,
    "chat, streamed": c.chat_streamed,
    "completions": c.completions,
    "compressed request": c.compressed,
}
EVERY_ENGINE: dict[str, Check] = {
    "list of models": c.listed,
    "operator's routes are not served": c.operator_routes,
}

# -- vLLM ------------------------------------------------------------------------------------------

# Several replicas share two cores, and each may use 1 GiB for keys and values.
VLLM_ENV = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}


def vllm(_: Path) -> list[Stage]:
    generation = example(
        "qwen-vllm-cpu.yaml",
        "llama",
        args=("--enforce-eager", "--max-model-len=2048", "--block-size=32", "--max-lora-rank=8"),
        env=VLLM_ENV | {"VLLM_ENABLE_RESPONSES_API_STORE": "1"},
        adapters=[{"name": "one", "url": f"pvc://{CLAIM}/lora-1"}],
        loadBalancing={"strategy": "PrefixCache"},
    )
    embedding = example(
        "bge-embed-infinity-cpu.yaml",
        "minilm",
        engine="VLLM",
        args=("--runner=pooling", "--enforce-eager"),
        env=VLLM_ENV,
    )
    ranking = example(
        "bge-rerank-infinity-cpu.yaml",
        "reranker",
        engine="VLLM",
        args=("--runner=pooling", "--enforce-eager"),
        env=VLLM_ENV,
    )
    return [
        Stage(
            generation,
            c.chat,
            {
                **OPENAI_CHAT,
                "structured output": c.structured_output,
                "responses": c.responses,
                "stored responses": c.stored_responses,
                "cancelled response": c.cancelled_response,
                "messages (Anthropic)": c.messages,
                "count_tokens (Anthropic)": c.count_tokens,
                "tokenize, detokenize": c.vllm_tokens,
                "errors pass through": c.errors,
                **EVERY_ENGINE,
                "adapter from a claim": life.adapter,
                "adapters come and go": life.adapters_change,
                "client disconnects": life.disconnect("vllm:num_requests_running", 1500, n=16),
            },
            rollout=True,
            last={"prefix cache, two replicas": life.prefix_cache},
        ),
        Stage(
            embedding,
            c.embeddings,
            {"embeddings": c.embeddings, "embed (Cohere)": c.embed_v2, "pooling": c.pooling},
        ),
        Stage(ranking, c.rerank, {"rerank": c.rerank, "score": c.score, "classify": c.classify}),
    ]


# -- SGLang ----------------------------------------------------------------------------------------


def sglang(_: Path) -> list[Stage]:
    generation = example(
        "qwen-sglang-l4.yaml",
        "llama",
        args=(
            "--device=cpu",
            "--attention-backend=torch_native",
            "--context-length=2048",
            "--max-total-tokens=16384",
            "--enable-metrics",
        ),
        env={"SGLANG_USE_CPU_ENGINE": "1", "HF_HUB_OFFLINE": "1"},
    )
    checks = {
        **OPENAI_CHAT,
        "structured output": c.structured_output,
        "responses": c.responses,
        "messages (Anthropic)": c.messages,
        "count_tokens (Anthropic)": c.count_tokens,
        "tokenize, detokenize": c.sglang_tokens,
        "Ollama's chat and generate": c.ollama_chat,
        "errors pass through": c.errors,
        **EVERY_ENGINE,
        "client disconnects": life.disconnect("sglang:num_running_reqs", 1900),
    }
    return [Stage(generation, c.chat, checks, rollout=True)]


# -- Ollama ----------------------------------------------------------------------------------------


def ollama(_: Path) -> list[Stage]:
    generation = example("gemma-ollama-cpu.yaml", "ollama?model=tiny", targetRequests=1)
    embedding = example("gemma-ollama-cpu.yaml", "ollama?model=minilm", features=["TextEmbedding"])
    return [
        Stage(
            generation,
            c.chat,
            {
                **OPENAI_CHAT,
                "responses": c.responses,
                "messages (Anthropic)": c.messages,
                "Ollama's chat and generate": c.ollama_chat,
                "Ollama's list": c.ollama_list,
                "errors pass through": c.errors,
                **EVERY_ENGINE,
                "client disconnects": life.disconnect_by_queue,
            },
            rollout=True,
        ),
        Stage(
            renamed(embedding, "minilm"),
            c.embeddings,
            {"embeddings": c.embeddings, "Ollama's embed": c.ollama_embed},
        ),
    ]


def prepare_ollama(environment: Path, weights: Path) -> None:
    """Create the models in a store of Ollama's own, as ``ollama create`` does."""
    store = weights / "ollama"
    if (store / "manifests").exists():
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    variables = {"OLLAMA_HOST": address, "OLLAMA_MODELS": str(store), "HOME": str(weights)}
    program = str(environment / "bin" / "ollama")
    options: Any = {
        "env": os.environ | variables,
        "stdout": subprocess.DEVNULL,
        "stderr": subprocess.DEVNULL,
    }
    server = subprocess.Popen([program, "serve"], **options)
    try:
        _wait_for(address)
        for name, file in (("tiny", "llama"), ("minilm", "minilm")):
            recipe = weights / f"Modelfile.{name}"
            recipe.write_text(MODELFILE.format(weights=weights, name=file))
            command = [program, "create", name, "-f", str(recipe)]
            subprocess.run(command, check=True, timeout=OLLAMA_TIMEOUT_S, **options)
    finally:
        server.terminate()
        server.wait(OLLAMA_TIMEOUT_S)


def _wait_for(address: str) -> None:
    """Wait until something listens."""
    host, _, port = address.partition(":")

    async def connect() -> None:
        while True:
            try:
                _, writer = await asyncio.open_connection(host, int(port))
            except OSError:
                await asyncio.sleep(0.1)
            else:
                writer.close()
                return

    async def within() -> None:
        async with asyncio.timeout(OLLAMA_TIMEOUT_S):
            await connect()

    asyncio.run(within())


# -- llama.cpp -------------------------------------------------------------------------------------


def llama_cpp(_: Path) -> list[Stage]:
    def stage_manifest(name: str, file: str, *args: str, **spec: Any) -> Manifest:
        manifest = example("qwen-llamacpp-cpu.yaml", f"gguf?model={file}", **spec)
        manifest["spec"]["args"] = list(args)
        return renamed(manifest, name)

    return [
        Stage(
            stage_manifest("tiny", "llama.gguf", "--ctx-size", "16384", "--parallel", "2"),
            c.chat,
            {
                **OPENAI_CHAT,
                "structured output": c.structured_output,
                "responses": c.responses,
                "messages (Anthropic)": c.messages,
                "count_tokens (Anthropic)": c.count_tokens,
                "tokenize, detokenize": c.llama_cpp_tokens,
                **EVERY_ENGINE,
                # b10434 completes a response that is not streamed, with and without a gateway.
                "client disconnects": life.disconnect(
                    "llamacpp:requests_processing", 8000, streams=(True,)
                ),
            },
            rollout=True,
        ),
        Stage(
            stage_manifest("minilm", "minilm.gguf", features=["TextEmbedding"]),
            c.embeddings,
            {"embeddings": c.embeddings},
        ),
        Stage(
            stage_manifest("reranker", "reranker.gguf", features=["Reranking"]),
            c.rerank_v1,
            {"rerank": c.rerank_v1},
        ),
    ]


# -- Infinity, FasterWhisper -----------------------------------------------------------------------


def infinity(_: Path) -> list[Stage]:
    env = {"HF_HUB_OFFLINE": "1", "INFINITY_ANONYMOUS_USAGE_STATS": "0"}
    return [
        Stage(
            example("bge-embed-infinity-cpu.yaml", "minilm", env=env),
            c.embeddings,
            {"embeddings": c.embeddings, **EVERY_ENGINE},
            rollout=True,
        ),
        Stage(
            example("bge-rerank-infinity-cpu.yaml", "reranker", env=env),
            c.rerank_v1,
            {"rerank": c.rerank_v1},
        ),
    ]


def faster_whisper(_: Path) -> list[Stage]:
    checks = {
        "transcription": c.transcription,
        "transcription, formats": c.transcription_formats,
        "translation": c.translation,
        "realtime (WebSocket)": c.realtime,
        **EVERY_ENGINE,
    }
    return [Stage(example("whisper-cpu.yaml", "whisper"), c.transcription, checks, rollout=True)]


SUITES: dict[str, Suite] = {
    "VLLM": Suite("vLLM", vllm),
    "SGLang": Suite("SGLang", sglang),
    "OLlama": Suite("Ollama", ollama, prepare_ollama),
    "LlamaCpp": Suite("llama.cpp", llama_cpp),
    "Infinity": Suite("Infinity", infinity),
    "FasterWhisper": Suite("speaches", faster_whisper),
}


async def run_stage(s: Session, stage: Stage) -> None:
    """Start a Model from zero, check it, and let it go back to zero."""
    s.model = stage.name
    kind = "" if stage.rollout else f", {stage.name}"

    async def start(s: Session) -> None:
        await stage.send(s)

    s.openai = s.openai.with_options(timeout=START_TIMEOUT_S)
    if await s.check(f"start from zero{kind}", start, START_TIMEOUT_S):
        await s.patch(minReplicas=1)
        for name, check in stage.checks.items():
            await s.check(name, check)
        if stage.rollout:
            await s.check("rollout under traffic", life.rollout(stage.send), 2 * START_TIMEOUT_S)
        for name, check in stage.last.items():
            await s.check(name, check, 2 * START_TIMEOUT_S)
    else:
        s.show_logs()
    await s.check(f"scale to zero{kind}", life.scale_to_zero)
