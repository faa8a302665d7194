"""Simulate tenants that share a Model: the table in docs/explain/tenants.md.

    python bench/tenants.py [--write docs/explain/tenants.md]

Simulates the same requests under three policies, with the gateway's own queue, pick and load table
and engines that follow vLLM's scheduler, in virtual time: all requests go to the engines at once;
they wait in the gateway, first come, first served; or they wait there in the order of priority and
tenant. The figures are the same on every machine.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import msgspec
from pages import filled

from kubeai.simulation.presets import PRESETS
from kubeai.simulation.tenants import Ask, Mix, Policy, Tenant, simulate

ENGINE = PRESETS["llama-3.1-8b-fp8-l4"]
BATCH = Tenant(name="batch", at_once=10_000)
CHAT = Tenant(name="chat", per_s=0.5, from_s=10.0)
REPORTS = Tenant(name="reports", at_once=200, prompt_tokens=6000, from_s=10.0)
ENGINES: dict[str, Any] = {"engines": 2, "engine": ENGINE, "capacity": 100, "until_s": 130.0}
MIXES = {
    "saturated": (
        "10,000 requests of `batch` at once, then one of `chat` every 2 s, for 2 min",
        Mix(tenants=(BATCH, CHAT), **ENGINES),
    ),
    "cold": (
        "the same, and the replicas are ready after 60 s",
        Mix(tenants=(BATCH, CHAT), ready_s=60.0, **ENGINES),
    ),
    "long prompts": (
        "10,000 requests of `batch`, and 200 of `reports` with prompts of 6,000 tokens on average",
        Mix(tenants=(BATCH, REPORTS, CHAT), **ENGINES),
    ),
    "priorities": (
        "the same; `chat` has priority 10, `reports` -10",
        Mix(
            tenants=(
                BATCH,
                msgspec.structs.replace(REPORTS, priority=-10),
                msgspec.structs.replace(CHAT, priority=10),
            ),
            **ENGINES,
        ),
    ),
}
POLICIES: dict[Policy, str] = {
    "engine": "none: engines queue",
    "fifo": "first come, first served",
    "fair": "fair",
}


def row(name: str, policy: Policy, asks: list[Ask], tenant: str) -> str:
    """A line of the table: a tenant's times to the first token, and when all were done."""
    times = sorted(ask.ttft_s for ask in asks if ask.tenant == tenant)
    p99 = times[math.ceil(0.99 * len(times)) - 1]
    ended_s = max(ask.done_s for ask in asks)
    cells = [name, POLICIES[policy], f"`{tenant}`", f"{len(times):,}"]
    cells += [f"{value:,.1f} s" for value in (statistics.median(times), p99, ended_s)]
    return f"| {' | '.join(cells)} |"


def table() -> list[str]:
    """The table and its legend."""
    lines = [
        "| mix | queue | tenant | requests | median TTFT | p99 | all served after |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, (_, mix) in MIXES.items():
        for policy in POLICIES:
            asks = simulate(mix, policy)
            lines += [row(name, policy, asks, tenant.name) for tenant in mix.tenants]
    legend = "; ".join(f"{name}: {text}" for name, (text, _) in MIXES.items())
    return [*lines, "", f"Mixes: {legend}."]


def main() -> int:
    """Print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, help="page whose table is replaced")
    options = parser.parse_args()
    lines = table()
    if options.write is None:
        print("\n".join(lines))
    else:
        options.write.write_text(filled(options.write.read_text(), "tenants", lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
