"""One small scenario twice: in real time, and simulated. They must agree.

    python bench/simulated_and_real.py

Four mock engines behind the gateway (a worker under the real supervisor), driven by
``kubeai bench run``; and ``kubeai.simulation.cluster`` with the same engines, strategy and traffic.
Exits 1 when a mean time to the first token of 200 ms or more differs by more than 10 %, or a hit
rate by more than 2 points. Takes a minute, most of which is waiting; the figures in real time want
a machine that is not busy otherwise.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec

from kubeai.routing import Endpoint, Route
from kubeai.simulation import cluster, records, traffic
from kubeai.simulation.cluster import Setting
from kubeai.simulation.engine import EngineConfig
from kubeai.simulation.traffic import Shape

FLEET = Path(__file__).parents[1] / "tests" / "fakes" / "fleet.py"
ENGINE = EngineConfig(
    prefill_tokens_per_s=1_500.0, decode_tokens_per_s=40.0, cache_blocks=700, max_batch=16
)
SHAPE = Shape(conversations=60, turns=4, prompt_tokens=600, turn_tokens=150, reply_tokens=24)
CONCURRENCY = 24
SEED = 7
TTFT_FLOOR_MS, TTFT_SHARE, HITS_POINTS = 200.0, 0.10, 2.0
RUN_TIMEOUT_S = 300


@contextlib.contextmanager
def program(*command: str, **pipes: int) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(command, text=True, **pipes)
    try:
        yield process
    finally:
        if process.stdin is not None:  # it ends with that
            process.stdin.close()
        else:
            process.terminate()
        process.wait(30)


@contextlib.contextmanager
def gateway(setting: Setting) -> Iterator[str]:
    """The endpoint of a gateway with a setting's engines behind it."""
    with contextlib.ExitStack() as stack:
        endpoints = []
        for name in cluster.pod_names(setting):
            engine = stack.enter_context(
                program(
                    *(sys.executable, "-m", "kubeai", "mock-engine", "--port=0"),
                    "--served-model-name=m",
                    f"--prefill-tokens-per-second={ENGINE.prefill_tokens_per_s}",
                    f"--decode-tokens-per-second={ENGINE.decode_tokens_per_s}",
                    f"--cache-blocks={ENGINE.cache_blocks}",
                    f"--max-batch={ENGINE.max_batch}",
                    stderr=subprocess.PIPE,
                )
            )
            address = json.loads(engine.stderr.readline())["address"]
            endpoints.append(Endpoint(name, address))
        route = Route("m", "VLLM", strategy=setting.strategy, endpoints=tuple(endpoints))
        spec = {"workers": 1, "routes": [msgspec.to_builtins(route)]}
        fleet = stack.enter_context(
            program(
                *(sys.executable, str(FLEET), json.dumps(spec)),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
        )
        port = json.loads(fleet.stdout.readline())["port"]
        yield f"http://127.0.0.1:{port}/openai/v1"


def real(setting: Setting, folder: Path) -> dict:
    path = folder / f"{setting.strategy}.json"
    with gateway(setting) as url:
        subprocess.run(
            (
                *(sys.executable, "-m", "kubeai", "bench", "run", url, "--model=m"),
                *("--shape=chat", f"--seed={SEED}", f"--concurrency={CONCURRENCY}"),
                *(f"--conversations={SHAPE.conversations}", f"--turns={SHAPE.turns}"),
                f"--prompt-tokens={SHAPE.prompt_tokens}",
                f"--turn-tokens={SHAPE.turn_tokens}",
                *(f"--reply-tokens={SHAPE.reply_tokens}", "--json", str(path)),
            ),
            check=True,
            timeout=RUN_TIMEOUT_S,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    return records.read(path).summary


def simulated(setting: Setting) -> dict:
    outcome = cluster.play(setting, traffic.generate(SHAPE, SEED))
    return records.results("", {}, outcome.records, outcome.gaps).summary


def main() -> int:
    agree = True
    print(f"{'':12}{'TTFT mean, ms':>24}{'p90':>20}{'hit rate':>20}{'tokens/s':>20}")
    with tempfile.TemporaryDirectory() as folder:
        for strategy in ("LeastLoad", "PrefixHash"):
            setting = Setting(
                engines=4, engine=ENGINE, strategy=strategy, concurrency=CONCURRENCY, seed=SEED
            )
            pair = real(setting, Path(folder)), simulated(setting)
            line = f"{strategy:12}"
            for key, part, places in (
                ("ttft_ms", "mean", 0),
                ("ttft_ms", "p90", 0),
                ("hit_rate", "", 3),
                ("tokens_per_s", "", 0),
            ):
                values = [one[key][part] if part else one[key] for one in pair]
                line += f"{values[0]:>13.{places}f} /{values[1]:>8.{places}f}"
            print(line, flush=True)
            of_real, of_simulated = (one["ttft_ms"]["mean"] for one in pair)
            if of_real >= TTFT_FLOOR_MS:
                agree &= abs(of_simulated / of_real - 1) <= TTFT_SHARE
            agree &= abs(pair[0]["hit_rate"] - pair[1]["hit_rate"]) * 100 <= HITS_POINTS
    print(f"real / simulated; {'they agree' if agree else 'THEY DO NOT AGREE'}")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
