"""Run traffic in real time and in simulation, with each strategy, and check that they agree.

    python bench/simulated_and_real.py
    python bench/simulated_and_real.py --vllm 127.0.0.1:8801 127.0.0.1:8802 127.0.0.1:8803

The real run puts engines behind the gateway (a worker under the real supervisor) and drives them
with ``kubeai bench run``. The simulated run uses ``kubeai.simulation.cluster`` with the same engine
parameters, strategy and traffic. By default the engines are four mock engines, started here; the
exit status is 1 if a mean time to first token of 200 ms or more differs by more than 10 %, or a hit
rate by more than 2 percentage points. With ``--vllm``, the engines are running vLLM servers with
the model name ``m`` and the speed of ``--preset``, whose caches have the preset's size
(``--num-gpu-blocks-override`` is one more), and the difference is only printed. They need
``VLLM_SERVER_DEV_MODE=1``, so that their caches can be emptied before each run: each strategy then
has the same traffic.

Takes three minutes, most of it waiting; ten with vLLM. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from kubeai.routing.routes import Endpoint, Route
from kubeai.simulation import cluster, results, traffic
from kubeai.simulation.engine import EngineConfig
from kubeai.simulation.presets import PRESETS
from kubeai.simulation.setting import Setting, Strategy
from kubeai.simulation.traffic import Shape

FLEET = Path(__file__).parents[1] / "tests" / "fakes" / "fleet.py"
MOCK = EngineConfig(
    prefill_tokens_per_s=1_500.0, decode_tokens_per_s=40.0, cache_blocks=700, max_batch=16
)
CONCURRENCY_PER_ENGINE = 6
# Latency from a client to an engine through the gateway, and half of it for the response.
NETWORK_S = 0.001
STRATEGIES: tuple[Strategy, ...] = ("LeastLoad", "PrefixHash", "PrefixCache")
SEED = 7
CHAT = Shape(conversations=160, turns=4, prompt_tokens=600, turn_tokens=150, reply_tokens=24)
# What small engines on CPUs can do: a cache holds 12,800 tokens, and they compute 3,000 a second.
SHAPES = {
    "chat": msgspec.structs.replace(CHAT, conversations=60),
    "assistant": Shape(
        conversations=60, turns=4, system_tokens=600, prompt_tokens=60, reply_tokens=24
    ),
    "rag": Shape(
        conversations=90,
        turns=2,
        documents=24,
        document_tokens=1000,
        prompt_tokens=40,
        reply_tokens=24,
    ),
    "agent": Shape(
        conversations=24,
        turns=8,
        systems=4,
        system_tokens=600,
        prompt_tokens=60,
        turn_tokens=80,
        reply_tokens=12,
    ),
}
OPTIONS = ("conversations", "turns", "systems", "system_tokens", "documents", "document_tokens")
OPTIONS += ("prompt_tokens", "turn_tokens", "reply_tokens")
TTFT_FLOOR_MS, TTFT_SHARE, HITS_POINTS = 200.0, 0.10, 2.0
RUN_TIMEOUT_S = 300
COLUMNS = (("ttft_ms", "mean", 0), ("ttft_ms", "p50", 0), ("ttft_ms", "p90", 0))
COLUMNS += (("tpot_ms", "mean", 1), ("hit_rate", "", 3), ("tokens_per_s", "", 0))


@contextlib.contextmanager
def program(*command: str, **pipes: int) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(command, text=True, **pipes)
    try:
        yield process
    finally:
        if process.stdin is not None:  # closing stdin ends the process
            process.stdin.close()
        else:
            process.terminate()
        process.wait(30)


@contextlib.contextmanager
def mock_engines(config: EngineConfig, count: int) -> Iterator[list[str]]:
    """Start mock engines; yields their addresses."""
    command = (
        *(sys.executable, "-m", "kubeai", "mock-engine", "--port=0", "--served-model-name=m"),
        f"--prefill-tokens-per-second={config.prefill_tokens_per_s}",
        f"--decode-tokens-per-second={config.decode_tokens_per_s}",
        *(f"--cache-blocks={config.cache_blocks}", f"--max-batch={config.max_batch}"),
    )
    with contextlib.ExitStack() as stack:
        engines = [
            stack.enter_context(program(*command, stderr=subprocess.PIPE)) for _ in range(count)
        ]
        yield [json.loads(engine.stderr.readline())["address"] for engine in engines]


@contextlib.contextmanager
def gateway(setting: Setting, addresses: Sequence[str]) -> Iterator[str]:
    """Run a gateway with these engines under the simulated pods' names; yields its URL."""
    endpoints = tuple(map(Endpoint, setting.pod_names, addresses))
    route = Route("m", "VLLM", ("TextGeneration",), strategy=setting.strategy, endpoints=endpoints)
    spec = {"workers": 1, "routes": [msgspec.to_builtins(route)], "reads_cache_sizes": True}
    command = (sys.executable, str(FLEET), json.dumps(spec))
    quiet = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with program(*command, **quiet) as fleet:
        yield f"http://127.0.0.1:{json.loads(fleet.stdout.readline())['port']}/openai/v1"


def prefixes(addresses: Sequence[str]) -> tuple[float, float]:
    """Prompt tokens that the engines looked up in their caches, and those found."""
    sums = {"vllm:prefix_cache_queries_total": 0.0, "vllm:prefix_cache_hits_total": 0.0}
    for address in addresses:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
            for line in answer.read().decode().splitlines():
                name = line.partition("{")[0].partition(" ")[0]
                if name in sums:
                    sums[name] += float(line.split()[-1])
    queries, hits = sums.values()
    return queries, hits


def real(setting: Setting, addresses: Sequence[str], shape: Shape) -> dict[str, Any]:
    before = prefixes(addresses)
    with tempfile.TemporaryDirectory() as folder, gateway(setting, addresses) as url:
        path = Path(folder) / "r.json"
        subprocess.run(
            (
                *(sys.executable, "-m", "kubeai", "bench", "run", url, "--model=m"),
                *("--shape=chat", f"--seed={setting.seed}"),
                *(f"--concurrency={setting.concurrency}", "--json", str(path)),
                *(f"--{name.replace('_', '-')}={getattr(shape, name)}" for name in OPTIONS),
                '--body={"ignore_eos": true, "temperature": 0}',
            ),
            check=True,
            timeout=RUN_TIMEOUT_S,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        (run,) = results.read(path).runs
    after = prefixes(addresses)
    return run.summary | {"hit_rate": (after[1] - before[1]) / (after[0] - before[0])}


def simulated(setting: Setting, shape: Shape) -> dict[str, Any]:
    run = cluster.simulate(setting, traffic.generate(shape, setting.seed))
    return results.summarize("", {}, run.measurements, run.gaps).summary


def agree(of_real: dict[str, Any], of_simulated: dict[str, Any]) -> bool:
    ttft, other = (one["ttft_ms"]["mean"] for one in (of_real, of_simulated))
    near = ttft < TTFT_FLOOR_MS or abs(other / ttft - 1) <= TTFT_SHARE
    return near and abs(of_real["hit_rate"] - of_simulated["hit_rate"]) * 100 <= HITS_POINTS


def forget(addresses: Sequence[str]) -> None:
    """Empty the caches of vLLM servers."""
    for address in addresses:
        reset = urllib.request.Request(f"http://{address}/reset_prefix_cache", method="POST")
        with urllib.request.urlopen(reset, timeout=30) as answer:
            if json.loads(answer.read() or b"{}").get("success") is False:
                sys.exit(f"{address} has requests in flight: its cache cannot be emptied")


def slower(config: EngineConfig, factor: float) -> EngineConfig:
    return msgspec.structs.replace(
        config,
        prefill_tokens_per_s=config.prefill_tokens_per_s / factor,
        attention_pairs_per_s=config.attention_pairs_per_s / factor,
        weights_s=config.weights_s * factor,
    )


def compare(
    addresses: Sequence[str],
    config: EngineConfig,
    shapes: dict[str, Shape],
    seeds: Sequence[int],
    start: Callable[[Sequence[str]], None] = lambda _: None,
) -> bool:
    """Print a table of all shapes and strategies. ``start`` is called before each real run."""
    alike = True
    print(
        "| traffic | strategy | TTFT mean, ms | TTFT p50, ms | TTFT p90, ms | time per token, ms "
        "| hit rate | tokens/s |"
    )
    print("|---|---|--:|--:|--:|--:|--:|--:|")
    for name, shape in shapes.items():
        for strategy, seed in zip(STRATEGIES, seeds, strict=True):
            setting = Setting(
                engines=len(addresses),
                engine=config,
                strategy=strategy,
                concurrency=CONCURRENCY_PER_ENGINE * len(addresses),
                network_s=NETWORK_S,
                seed=seed,
            )
            start(addresses)
            pair = real(setting, addresses, shape), simulated(setting, shape)
            print(f"| {name} | {strategy} | {' | '.join(_cells(*pair))} |", flush=True)
            alike &= agree(*pair)
    print("real / simulated")
    return alike


def _cells(*pair: dict[str, Any]) -> Iterator[str]:
    for key, part, places in COLUMNS:
        values = (one[key][part] if part else one[key] for one in pair)
        yield " / ".join(f"{value:,.{places}f}" for value in values)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--vllm", nargs="+", metavar="ADDRESS", help="host:port of running vLLM servers"
    )
    parser.add_argument("--preset", default="tiny-cpu", help="the speed of the vLLM servers")
    parser.add_argument(
        "--slowdown",
        type=float,
        default=1.0,
        help="how much slower than the preset the servers are, because they share the cores",
    )
    parser.add_argument("--seed", type=int, default=SEED, help="for other traffic of the same kind")
    parser.add_argument("--shapes", default=",".join(SHAPES), help="traffic for the vLLM servers")
    asked = parser.parse_args()
    if asked.vllm:
        shapes = {name: SHAPES[name] for name in asked.shapes.split(",")}
        config = slower(PRESETS[asked.preset], asked.slowdown)
        compare(asked.vllm, config, shapes, [asked.seed] * len(STRATEGIES), forget)
        return 0
    with mock_engines(MOCK, 4) as addresses:
        # Different seeds, because the engines have cached the prompts of the runs before.
        seeds = [SEED + number for number in range(len(STRATEGIES))]
        alike = compare(addresses, MOCK, {"chat": CHAT}, seeds)
    print("they agree" if alike else "THEY DO NOT AGREE")
    return 0 if alike else 1


if __name__ == "__main__":
    sys.exit(main())
