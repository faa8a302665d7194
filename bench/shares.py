"""Simulate the strategies by request rate and by the share of a prompt that has been sent before.

Writes bench/results/shares.json and docs/explain/routing/plot.json.

    python bench/shares.py                 # make bench-shares

Each request is one document, drawn from 200 by Zipf's law, and a question that nobody else asks.
All prompts have the same mean length; the document's share of it varies. The picks are made by the
gateway's own compiled code, in virtual time (kubeai/simulation): the same code writes the same
figures on every machine.
"""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ProcessPoolExecutor

import plot_data
from routing import STRATEGIES, Case, Run, measure

from kubeai.simulation.traffic import Shape

RESULTS = plot_data.RESULTS / "shares.json"
PROMPT_TOKENS = 2_000
REPLY_TOKENS = 150
REQUESTS = 2_000
SHARES = (0.0, 0.25, 0.5, 0.75, 0.9)
RATES_PER_S = (4, 8, 12, 16, 20, 28, 36, 48)


def traffic(share: float) -> Shape:
    """Requests whose prompts consist, by this share, of a document that others ask about too."""
    document_tokens = round(PROMPT_TOKENS * share)
    return Shape(
        conversations=REQUESTS,
        turns=1,
        documents=200 if document_tokens else 0,
        document_tokens=document_tokens,
        prompt_tokens=PROMPT_TOKENS - document_tokens,
        reply_tokens=REPLY_TOKENS,
    )


def runs() -> list[Run]:
    return [
        Run("shares", Case(f"{rate}/s", traffic(share), per_s=rate), strategy, {}, f"{share:g}")
        for share in SHARES
        for rate in RATES_PER_S
        for strategy in STRATEGIES
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    figures = []
    with ProcessPoolExecutor(options.processes) as pool:
        for run, one in zip(runs(), pool.map(measure, runs()), strict=True):
            print(
                f"{one.label:5} {one.case:6} {one.strategy:12} mean {one.mean:9,.0f} ms "
                f"p99 {one.p99:9,.0f} ms {one.hit_rate:.0%}",
                flush=True,
            )
            figures.append(
                {
                    "share": float(one.label),
                    "per_s": run.case.per_s,
                    "strategy": one.strategy,
                    **{metric: getattr(one, metric) for metric in plot_data.METRICS},
                }
            )
    RESULTS.write_text(json.dumps(figures, indent=1) + "\n")
    plot_data.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
