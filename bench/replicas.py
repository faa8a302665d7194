"""Simulate the cost of several KubeAI replicas: the table in docs/explain/several-replicas.md.

    python bench/replicas.py [--write docs/explain/several-replicas.md]

Simulates the same conversations with 1, 2, 4 and 8 replicas of KubeAI, which use the gateway's own
ring and load table, in virtual time: with shared loads, with shared loads but without anticipating
the peers' latest picks, and without sharing. The figures are the same on every machine.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from pathlib import Path

from autoscaling import filled

from kubeai.simulation.engine import EngineConfig
from kubeai.simulation.replicas import Experiment
from kubeai.simulation.setting import Strategy
from kubeai.simulation.traffic import Shape

SEEDS = (1, 2, 3, 4)
REPLICAS = (1, 2, 4, 8)
FAST = EngineConfig(cache_blocks=1600, prefill_tokens_per_s=40000.0, decode_tokens_per_s=100.0)
SLOW = Shape(prompt_tokens=600, turn_tokens=60, reply_tokens=120, think_s=2.0)
TRAFFIC = {
    "few": ("24 conversations, answers of 2.4 s", Experiment(shape=SLOW, concurrency=24)),
    "many": (
        "128 conversations, answers of 2.4 s and longer",
        Experiment(shape=SLOW, concurrency=128),
    ),
    "fast": (
        "160 conversations, 500 requests a second of 0.2 s",
        Experiment(
            shape=Shape(prompt_tokens=100, turn_tokens=20, reply_tokens=10, think_s=0.1),
            concurrency=160,
            engine=FAST,
            from_s=3.0,
            until_s=18.0,
        ),
    ),
}
VIEWS: dict[str, dict[str, bool]] = {
    "shared": {},
    "shared, no assumption": {"expected": False},
    "none": {"shared": False},
}


def cell(replicas: int, strategy: Strategy, experiment: Experiment, view: str) -> str:
    if replicas == 1 and view != "shared":
        return ""  # no peer to share loads with
    played = [
        experiment.run(replicas=replicas, strategy=strategy, seed=seed, **VIEWS[view])
        for seed in SEEDS
    ]
    mean, p99, hit_rate = (statistics.fmean(values) for values in zip(*played, strict=True))
    return f"{mean:.2f} / {p99:.2f} / {hit_rate:.0%}"


def rows() -> list[str]:
    lines = [
        "| traffic | strategy | view of load | 1 | 2 | 4 | 8 |",
        "|---|---|---|---|---|---|---|",
    ]
    strategies: tuple[Strategy, ...] = ("LeastLoad", "PrefixHash")
    for traffic, strategy, view in itertools.product(TRAFFIC, strategies, VIEWS):
        if strategy == "PrefixHash" and "expected" in VIEWS[view]:
            continue  # hash keys spread the load: nothing to anticipate
        cells = [cell(replicas, strategy, TRAFFIC[traffic][1], view) for replicas in REPLICAS]
        lines.append(f"| {traffic} | {strategy} | {view} | {' | '.join(cells)} |")
        print(lines[-1], file=sys.stderr)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, help="replace the table in this file")
    options = parser.parse_args()
    what = "; ".join(f"{name}: {text}" for name, (text, _) in TRAFFIC.items())
    lines = [*rows(), "", f"Traffic: {what}; 8 engines."]
    if options.write is None:
        print("\n".join(lines))
    else:
        options.write.write_text(filled(options.write.read_text(), "replicas", lines))


if __name__ == "__main__":
    main()
