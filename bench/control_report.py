"""The section of docs/explain/performance.md about the control plane, from ``control.json``."""

from __future__ import annotations

import os
from typing import Any

from bars import Bar, table_of

HEADING = "## Control plane"
COMMAND = "python bench/control_plane.py --only "
INTRODUCTION = """`kubeai serve` with one worker on etcd, kube-apiserver, scheduler,
controller-manager and kwok ([tests/cluster](../../tests/cluster/README.md)), all of it and the load
on the same {cores} cores, so times include the API's. "Observed" means observed by the load
generator's own watch. Other work on these cores affects the worst values and the ratio: with
several other programs running, the worst first request took 0.1 s, the p99 of a reconcile was
0.13 s while that of the load generator's own API calls was 0.24 s, and the ratios of single pairs
ranged from 0.8 to 2.1.
"""

# Measure, limit as text, path in the results, limit as number, unit.
BARS = (
    (
        "first request on a cold Model → its pod is on the API, p50",
        "≤ 50 ms",
        "wake/created/p50_ms",
        50,
        " ms",
    ),
    ("the same, worst", "≤ 50 ms", "wake/created/worst_ms", 50, " ms"),
    (
        "pod observed ready → the engine has the request, p50",
        "≤ 20 ms",
        "wake/since_seen/p50_ms",
        20,
        " ms",
    ),
    ("the same, worst", "≤ 20 ms", "wake/since_seen/worst_ms", 20, " ms"),
    (
        "50 Models × 5 replicas at once → every status shows 5 ready",
        "≤ 1.5 × a script",
        "burst/ratio",
        1.5,
        " ×",
    ),
    (
        "pod observed terminating → route without it published, p99",
        "≤ 50 ms",
        "leaving/terminating/since_seen/p99_ms",
        50,
        " ms",
    ),
    (
        "pod observed not ready → route without it published, p99",
        "≤ 50 ms",
        "leaving/not ready/since_seen/p99_ms",
        50,
        " ms",
    ),
    ("{size}: start to synced", "≤ 20 s", "scale/synced_s", 20, " s"),
    (
        "{size}: one reconcile without waiting for the API, p99",
        "≤ 50 ms",
        "scale/reconcile_own/p99_ms",
        50,
        " ms",
    ),
    (
        "{size}: one reconcile, waiting for the API included, p99",
        "≤ 50 ms",
        "scale/reconcile/p99_ms",
        50,
        " ms",
    ),
    ("{size}: RSS of the supervisor", "≤ 500 MB", "scale/resident_mb", 500, " MB"),
    ("{size}: writes while nothing changes", "0 but the lease", "scale/idle_writes", 0, ""),
    (
        "writes to one object in any second of a storm of 409, 429 and 500",
        "≤ 2",
        "storm/a_second",
        2,
        "",
    ),
    ("take-over after SIGKILL of the leader, worst", "≤ 19 s", "takeover/killed/worst_s", 19, " s"),
    ("take-over after SIGTERM of the leader, worst", "≤ 3 s", "takeover/ended/worst_s", 3, " s"),
)


def section(found: dict[str, Any]) -> str:
    """The section; without results, its bars are "not measured"."""
    introduction = INTRODUCTION.format(cores=os.cpu_count())
    return f"{HEADING}\n\n{introduction}\n{table_of(_bars(found))}{_notes(found)}"


def _bars(found: dict[str, Any]) -> list[Bar]:
    scale = found.get("scale", {"models": 1000, "pods": 10_000})
    size = f"{scale['models']:,} Models, {scale['pods']:,} pods"
    bars = []
    for what, limit, path, most, unit in BARS:
        part, *keys = path.split("/")
        value: Any = found.get(part)
        for key in keys:
            value = None if value is None else value.get(key)
        bars.append(Bar(what.format(size=size), limit, value, most, COMMAND + part, unit))
    return bars


def _notes(found: dict[str, Any]) -> str:
    """What the bars leave out, for each part that was measured."""
    notes = {
        "wake": _wake,
        "leaving": _leaving,
        "burst": _burst,
        "scale": _scale,
        "storm": _storm,
    }
    return "".join(f"\n{note(found[part])}\n" for part, note in notes.items() if found.get(part))


def _wake(wake: dict[str, Any]) -> str:
    times = wake["answered"]
    return (
        "Time from request to answer, with a pod that becomes ready as soon as it is observed: "
        f"{times['p50_ms']:.0f} ms (p50 of {times['n']}). Time from the write of the pod's "
        "readiness to the API until the engine has the request: "
        f"{wake['since_sent']['p50_ms']:.0f} ms."
    )


def _leaving(leaving: dict[str, Any]) -> str:
    kinds = " and ".join(
        f"{kind} {times['since_sent']['p50_ms']:.0f} ms (p50), "
        f"{times['since_sent']['p99_ms']:.0f} ms (p99)"
        for kind, times in leaving.items()
    )
    return (
        f"Time from the write of a pod's change to the API until the route is without it: {kinds}."
    )


def _burst(burst: dict[str, Any]) -> str:
    pairs = len(burst["runs"]["ours"])
    return (
        f"The script creates {burst['models'] * burst['replicas']} pods, 16 requests at a "
        f"time, and waits until a watch has shown them ready: {burst['script_s']:.1f} s; "
        f"KubeAI: {burst['ours_s']:.1f} s (medians of {pairs} interleaved pairs; ratio per "
        "pair)."
    )


def _scale(scale: dict[str, Any]) -> str:
    return (
        f"{scale['models']:,} Models with {scale['pods']:,} pods: requests are accepted "
        f"{scale['serving_s']:.1f} s after the start. CPU of the supervisor: "
        f"{scale['idle_cpu']:.1%} of a core while nothing changes, "
        f"{scale['changes_cpu']:.0%} at {scale['changes'] / scale['changes_s']:.0f} changes "
        f"of pods per second; a reconcile's p50 is {scale['reconcile']['p50_ms']:.2f} ms. "
        f"Meanwhile an API call of the load takes {scale['calls']['p50_ms']:.0f} "
        f"ms (p50) and {scale['calls']['p99_ms']:.0f} ms (p99). "
        f"Writes in {scale['idle_s']:.0f} s "
        f"without changes, by the audit log: {scale['idle_writes']}, and "
        f"{scale['idle_lease_writes']} of the lease."
    )


def _storm(storm: dict[str, Any]) -> str:
    answers = " + ".join(f"{n} × {code}" for code, n in sorted(storm["answers"].items()))
    state = "correct" if storm["right"] else "**wrong**"
    return (
        f"Storm of {storm['storm_s']:.0f} s ({answers}): the state is {state} "
        f"{storm['after_s']:.1f} s after its end."
    )
