"""What it costs to be several: the table in docs/several-replicas.md.

    python bench/replicas.py [--write docs/several-replicas.md]

Plays the same conversations over 1, 2, 4 and 8 replicas of KubeAI with the ring and the load table
that serve requests, simulated engines and virtual time: with the shared view of load, with a view
in which others' unseen picks are not expected, and with none. The figures are the same everywhere.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from pathlib import Path

from kubeai.simulation.engine import EngineConfig
from kubeai.simulation.replicas import Outcome, Setting, play

SEEDS = (1, 2, 3, 4)
REPLICAS = (1, 2, 4, 8)
BEGIN, END = "<!-- bench/replicas.py -->", "<!-- end -->"
FAST = EngineConfig(cache_blocks=1600, prefill_tokens_per_s=40000.0, decode_tokens_per_s=100.0)
TRAFFIC = {
    "few": ("24 conversations, answers of 2.4 s", {"conversations": 24, "duration_s": 80.0}),
    "many": ("128 conversations, answers of 2.4 s and longer", {"duration_s": 80.0}),
    "fast": (
        "160 conversations, 500 requests a second of 0.2 s",
        {
            "conversations": 160,
            "duration_s": 18.0,
            "warm_up_s": 3.0,
            "think_s": 0.1,
            "prompt_tokens": 100,
            "turn_tokens": 20,
            "reply_tokens": 10,
            "engine": FAST,
        },
    ),
}
VIEWS = {
    "shared": {},
    "shared, nothing expected": {"expected": False},
    "none": {"shared": False},
}


def figures(**setting: object) -> dict[str, float]:
    """Means over the seeds."""
    outcomes = [play(Setting(seed=seed, **setting)) for seed in SEEDS]  # type: ignore[arg-type]
    return {
        name: statistics.fmean(getattr(outcome, name) for outcome in outcomes)
        for name in Outcome.__struct_fields__
    }


def rows() -> list[str]:
    lines = [
        "| traffic | strategy | view of load | 1 | 2 | 4 | 8 |",
        "|---|---|---|---|---|---|---|",
    ]
    for traffic, (_, fields) in TRAFFIC.items():
        for strategy in ("LeastLoad", "PrefixHash"):
            for view, options in VIEWS.items():
                if strategy == "PrefixHash" and "expected" in options:
                    continue  # keys spread: nothing is expected there
                cells = []
                for replicas in REPLICAS:
                    if replicas == 1 and view != "shared":
                        cells.append("")
                        continue
                    found = figures(replicas=replicas, strategy=strategy, **fields, **options)
                    cells.append(
                        f"{found['imbalance_mean']:.2f} / {found['imbalance_p99']:.2f} / "
                        f"{found['hit_rate']:.0%}"
                    )
                    print(traffic, strategy, view, replicas, cells[-1], file=sys.stderr)
                lines.append(f"| {traffic} | {strategy} | {view} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, help="replace the table in this file")
    options = parser.parse_args()
    what = [f"{name}: {text}" for name, (text, _) in TRAFFIC.items()]
    table = "\n".join([*rows(), "", f"Traffic: {'; '.join(what)}; 8 engines."])
    if options.write is None:
        print(table)
        return
    text = options.write.read_text()
    pattern = re.escape(BEGIN) + ".*?" + re.escape(END)
    text = re.sub(pattern, lambda _: f"{BEGIN}\n{table}\n{END}", text, flags=re.DOTALL)
    options.write.write_text(text)


if __name__ == "__main__":
    main()
