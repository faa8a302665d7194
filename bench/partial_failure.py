"""Simulate requests while engines fail and recover: the tables in docs/explain/partial-failure.md.

    python bench/partial_failure.py [--write docs/explain/partial-failure.md]

Runs the retry and ejection policy, the ring and the load table that serve requests against
simulated engines in virtual time, for every subset of the engines that fails. The figures are the
same on every machine.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import looptime

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from fakes.partial_failure import Cluster, Report
from pages import filled

from kubeai.logs import setup_logging

SEEDS = (1, 2, 3)
MODES = {  # failure modes of one or more engines
    "reset": ("resets", "reset"),
    "503": ("answers 503", "answer 503"),
    "500": ("answers 500", "answer 500"),
    "slow": ("takes 2 s", "take 2 s"),
}
LOADS: dict[str, Callable[[Cluster], Awaitable[Report]]] = {
    "100 at once": lambda cluster: cluster.at_once(100),
    "400 at once": lambda cluster: cluster.at_once(400),
    "100 per second for 10 s": lambda cluster: cluster.steadily(100, 10),
}


class Row:
    """The worst value of several runs."""

    def __init__(self) -> None:
        self.answered = 100.0
        self.attempts = self.most_attempts = self.longest_s = 0.0

    def add(self, report: Report) -> None:
        requests = report.answered + report.failed
        self.answered = min(self.answered, 100 * report.answered / requests)
        self.attempts = max(self.attempts, 100 * report.attempts.total() / requests)
        self.most_attempts = max(self.most_attempts, report.most_attempts)
        self.longest_s = max(self.longest_s, report.longest_s)

    def cells(self) -> str:
        return (
            f"{self.answered:.0f} | {self.attempts:.0f} | {self.most_attempts:.0f} | "
            f"{self.longest_s:.2f}"
        )


async def failing(endpoints: int, count: int, mode: str, load: str) -> Row:
    row = Row()
    names = [f"e{number}" for number in range(endpoints)]
    for seed, subset in itertools.product(SEEDS, itertools.combinations(names, count)):
        cluster = Cluster(endpoints, seed=seed)
        cluster.behave(dict.fromkeys(subset, mode))
        row.add(await LOADS[load](cluster))
        await cluster.close()
    return row


async def recovering(endpoints: int, mode: str, load: str) -> Row:
    """The failed endpoints recover and others fail instead; at least one always works."""
    row = Row()
    names = [f"e{number}" for number in range(endpoints)]
    subsets = [s for n in range(1, endpoints) for s in itertools.combinations(names, n)]
    for seed, (first, second) in enumerate(itertools.product(subsets, repeat=2)):
        cluster = Cluster(endpoints, seed=seed)
        cluster.behave(dict.fromkeys(first, mode))
        await LOADS[load](cluster)
        await asyncio.sleep(0.5)
        cluster.behave(dict.fromkeys(second, mode))
        row.add(await LOADS[load](cluster))
        await cluster.close()
    return row


async def leaving(endpoints: int) -> Row:
    """An endpoint hangs and is removed from the routes 10 s later."""
    row = Row()
    for seed in SEEDS:
        cluster = Cluster(endpoints, seed=seed)
        cluster.behave({"e0": "hang"})
        asking = asyncio.create_task(cluster.at_once(100))
        await asyncio.sleep(10)
        cluster.route([name for name in cluster.names if name != "e0"])
        row.add(await asking)
        await cluster.close()
    return row


async def tables() -> list[str]:
    lines = [
        "| engines | failure | load | answered, % | attempts per 100 requests | most per request "
        "| longest, s |",
        "|--:|---|---|--:|--:|--:|--:|",
    ]

    def add(engines: int, what: str, load: str, row: Row) -> None:
        lines.append(f"| {engines} | {what} | {load} | {row.cells()} |")
        print(lines[-1], file=sys.stderr)

    for mode, load in itertools.product(MODES, LOADS):
        for engines, count in ((3, 1), (3, 2), (3, 3)):
            what = f"{count} {MODES[mode][count > 1]}"
            add(engines, what, load, await failing(engines, count, mode, load))
    for mode, load in itertools.product(("reset", "503", "500"), LOADS):
        what = f"others recover, 1 or 2 {MODES[mode][1]}"
        add(3, what, load, await recovering(3, mode, load))
    add(3, "1 hangs, leaves the routes after 10 s", "100 at once", await leaving(3))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, help="replace the table in this file")
    options = parser.parse_args()
    os.environ.setdefault("LOG_LEVEL", "error")  # failed attempts are expected here
    setup_logging()
    loop = looptime.new_event_loop(noop_cycles=0)
    lines = loop.run_until_complete(tables())
    loop.close()
    if options.write is None:
        print("\n".join(lines))
    else:
        options.write.write_text(filled(options.write.read_text(), "table", lines))


if __name__ == "__main__":
    main()
