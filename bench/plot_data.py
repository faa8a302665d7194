"""The data of the interactive plot in docs/explain/routing.md, from the results of the benchmarks.

    python bench/plot_data.py [--check]

Reads bench/results/routing.json and shares.json and writes docs/explain/routing/plot.json;
bench/routing.py and bench/shares.py call it. ``--check``: exit with 1 if the file is not what the
results give, and write nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
DATA = ROOT / "docs" / "explain" / "routing" / "plot.json"
METRICS = ("mean", "p50", "p99", "hit_rate", "tokens_per_s")


def series(points: Iterable[tuple[float, dict[str, Any]]]) -> dict[str, list[dict[str, float]]]:
    """For each strategy, its points in the order of ``x``."""
    found: dict[str, list[dict[str, float]]] = {}
    for x, figures in sorted(points, key=lambda point: point[0]):
        point = {"x": x} | {metric: figures[metric] for metric in METRICS}
        found.setdefault(figures["strategy"], []).append(point)
    return found


def plot() -> dict[str, Any]:
    """``traffics``: what can be chosen. Each has the unit of ``x`` and, for each choice of the
    share of a prompt that was sent before ("" if it cannot be chosen), the series."""
    shares = json.loads((RESULTS / "shares.json").read_text())
    levels = [
        one for one in json.loads((RESULTS / "routing.json").read_text()) if one["part"] == "levels"
    ]
    by_share = {
        f"{share:.0%}": series((one["per_s"], one) for one in shares if one["share"] == share)
        for share in sorted({one["share"] for one in shares})
    }
    traffics = [
        {"name": "documents", "unit": "requests per second", "shares": by_share},
    ]
    for name in dict.fromkeys(one["case"].split(", ")[0] for one in levels):
        points = [
            (float(one["case"].split(", ")[1].rstrip("%")), one)
            for one in levels
            if one["case"].startswith(f"{name}, ")
        ]
        traffics.append({"name": name, "unit": "% of saturation", "shares": {"": series(points)}})
    return {"traffics": traffics}


def text() -> str:
    return json.dumps(plot(), separators=(",", ":")) + "\n"


def write() -> None:
    DATA.parent.mkdir(exist_ok=True)
    DATA.write_text(text())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="exit with 1 if the file is outdated")
    if not parser.parse_args().check:
        write()
    elif DATA.read_text() != text():
        print(f"{DATA.relative_to(ROOT)} is outdated: run python bench/plot_data.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
