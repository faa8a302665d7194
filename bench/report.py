"""Writes docs/performance.md from what the benchmarks found.

    python bench/report.py build/bench docs/performance.md [--only-control-plane]

The folder holds ``micro.json`` (pytest-benchmark) and ``gateway.json``, ``scale.json``,
``stall.json``, ``instructions.json`` and ``control.json``; a part that was not measured is named
as missing. With the option, all but the control plane's section stays as it was.
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

from instructions import shares

MICRO = "pytest bench --benchmark-enable --benchmark-only"
VS_NGINX = "python bench/gateway_vs_nginx.py"
SCALE = "python bench/gateway_at_scale.py --only "
INSTRUCTIONS = "python bench/instructions.py"
CONTROL = "python bench/control_plane.py --only "
CONTROL_HEADING = "## Control plane"

INTRODUCTION = """# Performance

Made by `make bench` (`bench/report.py`) on {where}.

Every figure about speed is a ratio: KubeAI and nginx beside each other in the same run, the proxy
on one core, load and mock engines on another. Both proxy to four engines with keep-alive; nginx has
buffering off, `client_body_buffer_size 1m` and no access log; KubeAI is one worker with PrefixHash,
all counters and limits on, and its figure counts the worker and the supervisor (whose operator is
replaced by a script that hands out the routes). CPU is from /proc. Medians of interleaved runs.

Absolute figures say as much about the machine, and what else ran on it, as about the proxies.
"""

CONTROL_INTRODUCTION = """`kubeai serve` with one worker on etcd, kube-apiserver, scheduler,
controller-manager and kwok ([tests/cluster](../tests/cluster/README.md)), all of it and the load on
the same {cores} cores, so times hold what the API takes. "Seen" is by a watch of the load's own.
Other work on these cores shows in the worst values and in the ratio: with several programs beside
it, the worst first request took 0.1 s, the p99 of a reconcile was 0.13 s while that of the load's
own calls to the API was 0.24 s, and the ratio of single pairs went from 0.8 to 2.1.
"""

# What, its bar, where the figure is in control.json, the most that it may be, its unit.
CONTROL_BARS = (
    (
        "first request on a cold Model → its pod is on the API, p50",
        "≤ 50 ms",
        "wake/created/p50_ms",
        50,
        " ms",
    ),
    ("the same, worst", "≤ 50 ms", "wake/created/worst_ms", 50, " ms"),
    (
        "pod seen ready → the engine has the request, p50",
        "≤ 20 ms",
        "wake/since_seen/p50_ms",
        20,
        " ms",
    ),
    ("the same, worst", "≤ 20 ms", "wake/since_seen/worst_ms", 20, " ms"),
    (
        "50 Models × 5 replicas at once → every status says 5 ready",
        "≤ 1.5 × a script",
        "burst/ratio",
        1.5,
        "×",
    ),
    (
        "pod seen terminating → route without it published, p99",
        "≤ 50 ms",
        "leaving/terminating/since_seen/p99_ms",
        50,
        " ms",
    ),
    (
        "pod seen not ready any more → route without it published, p99",
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

SAFETY = (
    (
        "SIGTERM during 50 streams: every one whole, unready ≤ 1 s, late requests served",
        "tests/hammer/test_safety.py -k drain",
    ),
    (
        "worker SIGKILLed: counts right ≤ 1 s, replaced ≤ 2 s (the test bears 4 s), "
        "queued connections kept",
        "tests/hammer/test_safety.py -k killed",
    ),
    (
        "2,000 requests ended anywhere by either side, workers SIGKILLed: every count 0 ≤ 2 s",
        "tests/hammer/test_hammer.py (`HAMMER_SEEDS=20`)",
    ),
    (
        "client gone: its engine's connection closes ≤ 1 s",
        "tests/unit/test_relay.py -k leaves",
    ),
    (
        "engine dies mid-stream: never a tidy end",
        "tests/unit/test_relay.py -k broken; tests/fuzz/test_fuzz_answers.py",
    ),
    (
        "head or body too slow, too big, too many: 408, 431, 413",
        'tests/unit/test_relay.py -k "too_"',
    ),
    (
        "a request to a model that cannot start: 503 with the reason, at once or after a grace",
        "tests/e2e/test_cannot_start.py; tests/unit/test_holding.py; tests/unit/test_blocks.py",
    ),
    (
        "an endpoint that keeps failing is ejected for all workers, and probed until it answers",
        "tests/hammer/test_safety.py -k ejected; "
        "tests/unit/test_exchange.py -k 'ejected or probe or keeps_failing'",
    ),
    (
        "retries within a budget, never after the first byte, none for who has killed an engine",
        "tests/unit/test_exchange.py -k 'few or killed'; tests/unit/test_attempts.py",
    ),
    (
        "connections, and the bytes of all bodies together, have a limit",
        "tests/unit/test_relay.py -k 'than_allowed or limit_together'; "
        "tests/unit/test_worker.py -k descriptors",
    ),
    (
        "only what is listed reaches an engine, however it is spelled",
        "tests/unit/test_openai.py -k 'spelling or reaches or listed'",
    ),
    (
        "malformed HTTP: 400 and close; framed as h11 and llhttp frame it, or refused",
        "tests/unit/test_relay.py -k malformed; tests/fuzz/test_fuzz_requests.py",
    ),
    (
        "names of models that do not exist: no metric series, no memory",
        "tests/hammer/test_safety.py -k names",
    ),
    (
        "ten minutes of mixed load, engines dying, stalling, resetting: memory flat",
        "tests/soak/soak.py (`make soak`)",
    ),
)


class Report:
    def __init__(self, folder: Path) -> None:
        self.found = {}
        for name in ("micro", "gateway", "scale", "instructions", "stall", "control"):
            path = folder / f"{name}.json"
            self.found[name] = json.loads(path.read_text()) if path.exists() else {}
        micro = self.found["micro"].get("benchmarks", [])
        self.micro = {each["name"]: each["stats"]["median"] for each in micro}
        self.rows: list[tuple[str, str, float | None, float, str, str]] = []

    def bar(
        self, what: str, bar: str, value: float | None, most: float, command: str, unit: str = "×"
    ) -> None:
        self.rows.append((what, bar, value, most, command, unit))

    def fill(self) -> None:
        gateway, scale = self.found["gateway"], self.found["scale"]

        def ratio(name: str) -> float | None:
            return gateway[name]["ratio"] if name in gateway else None

        chat = f"{VS_NGINX} --only "
        self.bar(
            "CPU a chat request of 800 bytes, 32 connections",
            "≤ 1.5 × nginx",
            ratio("chat"),
            1.5,
            chat + "chat",
        )
        self.bar(
            "CPU a stream of 64 chunks back to back",
            "≤ 1.1 × nginx",
            ratio("burst"),
            1.1,
            chat + "burst",
        )
        self.bar(
            "CPU a stream of 64 chunks, one each 20 ms",
            "≤ 1.25 × nginx",
            ratio("paced"),
            1.25,
            chat + "paced",
        )
        self.bar(
            "CPU a request with a 400 KB prompt",
            "≤ 2 × nginx",
            ratio("prompt"),
            2.0,
            chat + "prompt",
        )
        latency, streams, workers = (scale.get(k, {}) for k in ("latency", "streams", "workers"))
        self.bar(
            "p99 at half of our saturation, open loop",
            "≤ 1.5 × nginx",
            latency.get("p99_ratio"),
            1.5,
            SCALE + "latency",
        )
        count = streams.get("streams", 9500)
        size = streams["kubeai_bytes"] / 1024 if streams else None
        self.bar(
            f"memory a stream with {count:,} open", "≤ 16 KiB", size, 16, SCALE + "streams", " KiB"
        )
        self.bar(
            f"until none of {count:,} streams is counted",
            "0 counted",
            streams.get("to_zero_s"),
            2,
            SCALE + "streams",
            " s",
        )
        self.bar(
            "CPU a request, 2 workers, 256 connections",
            "≤ 1.1 × one",
            workers.get("ratio"),
            1.1,
            SCALE + "workers",
        )
        self.pick(
            "`pick` + `release` of a hashed key, 1,000 endpoints, from Python",
            "≤ 300 ns",
            "test_pick_hashed_and_release",
            300,
            1e9,
            " ns",
        )
        self.pick(
            "the same, from C (measured from Python, which costs more)",
            "≤ 150 ns",
            "test_pick_hashed_and_release",
            150,
            1e9,
            " ns",
        )
        self.pick(
            "`pick` + `release`, LeastLoad, 1,000 endpoints",
            "≤ 1 µs",
            "test_pick_least_and_release",
            1,
            1e6,
            " µs",
        )
        self.pick("build a ring of 1,000 endpoints × 256", "≤ 60 ms", "test_build", 60, 1e3, " ms")
        self.pick(
            "add and remove one endpoint of that ring",
            "≤ 2 ms",
            "test_add_and_remove_one",
            2,
            1e3,
            " ms",
        )
        held = [b for b in self.found["micro"].get("benchmarks", []) if "100_000" in b["name"]]
        self.bar(
            "100,000 keys over 100 endpoints, each pick held: the highest load over the mean",
            "≤ 1.25",
            held[0]["extra_info"]["mean, highest"][1] / 1000 if held else None,
            1.25,
            f"{MICRO} -k 100_000",
            "",
        )
        stall = max(self.found["stall"].values(), default=None)
        self.bar(
            "one body of 64 MiB, the worst of its kind, holds the loop",
            "≤ 50 ms",
            stall,
            50,
            "python bench/stall.py",
            " ms",
        )

    def pick(self, what: str, bar: str, test: str, most: float, factor: float, unit: str) -> None:
        found = [name for name in self.micro if name.split("[")[0] == test]
        value = self.micro[found[-1]] * factor / PER_ROUND.get(test, 1) if found else None
        self.bar(what, bar, value, most, f"{MICRO} -k {test}", unit)

    def text(self) -> str:
        self.fill()
        processor = platform.machine()
        where = f"{os.cpu_count()} shared {processor} cores, CPython {platform.python_version()}"
        parts = [INTRODUCTION.format(where=where), "## The bars\n"]
        parts.append(
            table(("what", "bar", "measured", "met", "command"), [self.cells(r) for r in self.rows])
        )
        parts += [self.gateway(), self.connections(), self.latency(), self.instructions()]
        parts += [self.control(), safety()]
        return "\n".join(part for part in parts if part).rstrip() + "\n"

    @staticmethod
    def cells(row: tuple) -> tuple[str, ...]:
        what, bar, value, most, command, unit = row
        if value is None:
            return what, bar, "not measured", "", f"`{command}`"
        met = "yes" if value <= most else "**no**"
        return what, bar, f"{value:.3g}{unit if unit != '×' else ' ×'}", met, f"`{command}`"

    def gateway(self) -> str:
        if not (found := self.found["gateway"]):
            return ""
        rows = [
            (
                name,
                *(
                    f"{each[f'{p}_us']:.1f} ({each[f'{p}_kernel']:.0%})"
                    for p in ("nginx", "kubeai")
                ),
                f"{each['ratio']:.2f}",
            )
            for name, each in found.items()
        ]
        head = ("scenario", "nginx, µs (in the kernel)", "KubeAI, µs (in the kernel)", "ratio")
        where = "\nOutside of the kernel: " + "; ".join(
            f"{name}: {outside(each, 'nginx'):.1f} and {outside(each, 'kubeai'):.1f} µs"
            for name, each in found.items()
        )
        lead = f"## CPU a request or stream\n\n`{VS_NGINX}`\n\n"
        return lead + table(head, rows) + where + ".\n"

    def connections(self) -> str:
        if not (found := self.found["scale"].get("connections")):
            return ""
        rows = [
            (
                count,
                *(f"{each[key]:.0f}" for key in ("nginx_us", "kubeai_us")),
                f"{each['ratio']:.2f}",
            )
            for count, each in found.items()
        ]
        head = ("connections", "nginx, µs", "KubeAI, µs", "ratio")
        return f"## CPU a chat request by connections\n\n`{SCALE}connections`\n\n" + table(
            head, rows
        )

    def latency(self) -> str:
        if not (found := self.found["scale"].get("latency")):
            return ""
        rows = [
            (
                name,
                f"{found[f'nginx_{name}_us']:.0f}",
                f"{found[f'kubeai_{name}_us']:.0f}",
                f"{found[f'{name}_ratio']:.2f}",
            )
            for name in ("p50", "p99")
        ]
        calm = [found[f"{name}_calm_p99_us"] for name in ("nginx", "kubeai")]
        ratio = f"{calm[1] / calm[0]:.2f}"
        rows.append(("p99, quietest fourth of runs", *(f"{us:.0f}" for us in calm), ratio))
        lead = (
            f"## Latency\n\n`{SCALE}latency`: {found['rate']:.0f} requests a second, half of the "
            f"{found['saturation']:.0f} that we answered at most (nginx: "
            f"{found['nginx_saturation']:.0f}); median of {found['pairs']} interleaved pairs. The "
            f"load itself was late by {found['kubeai_late_p99_us']:.0f} µs (p99). The machine "
            "stands still for a millisecond or more some times a second (its host, memory "
            "reclaim), whichever proxy runs. One request in a hundred or so meets that: the "
            "p99 of a run lies before the stalls or in them, and on one day the ratio went "
            "from 1.0 to 2.0 between runs of this part.\n\n"
        )
        return lead + table(("", "nginx, µs", "KubeAI, µs", "ratio"), rows)

    def instructions(self) -> str:
        if not (found := self.found["instructions"]):
            return ""
        rows = []
        for name, libraries in found.items():
            rows.append((name, f"{sum(libraries.values()):,.0f}", shares(libraries)))
        lead = (
            f"## Instructions\n\n`{INSTRUCTIONS}`: counted by callgrind, without sockets and event "
            "loop. CI counts them in each commit and in the one that it leaves, and fails at "
            "5 % more. libpython's part has what the benchmark itself needs to drive the two ends. "
            "`parser` is httptools, nearly all of it llhttp: since header lines are taken where "
            "they stand, what linking llhttp directly would save is under 2 % of a chat.\n\n"
        )
        return lead + table(("one", "instructions", "of which"), rows)

    def control(self) -> str:
        found = self.found["control"]
        scale = found.get("scale", {"models": 1000, "pods": 10_000})
        size = f"{scale['models']:,} Models, {scale['pods']:,} pods"
        rows = []
        for what, bar, path, most, unit in CONTROL_BARS:
            part, *keys = path.split("/")
            value: Any = found.get(part)
            for key in keys:
                value = None if value is None else value.get(key)
            rows.append(
                self.cells((what.format(size=size), bar, value, most, CONTROL + part, unit))
            )
        introduction = CONTROL_INTRODUCTION.format(cores=os.cpu_count())
        bars = table(("what", "bar", "measured", "met", "command"), rows)
        return f"{CONTROL_HEADING}\n\n{introduction}\n{bars}{control_notes(found)}"


# Calls in a round of a micro-benchmark, where it is more than one.
PER_ROUND = {"test_pick_hashed_and_release": 1000, "test_pick_least_and_release": 1000}


def outside(found: dict, proxy: str) -> float:
    return found[f"{proxy}_us"] * (1 - found[f"{proxy}_kernel"])


def control_notes(found: dict) -> str:
    notes = []
    if wake := found.get("wake"):
        times = wake["answered"]
        notes.append(
            f"From request to answer, with a pod that is ready as soon as it is seen: "
            f"{times['p50_ms']:.0f} ms (p50 of {times['n']}). From telling the API that the pod is "
            f"ready until the engine has the request: {wake['since_sent']['p50_ms']:.0f} ms."
        )
    if leaving := found.get("leaving"):
        told = " and ".join(
            f"{kind} {times['since_sent']['p50_ms']:.0f} ms (p50), "
            f"{times['since_sent']['p99_ms']:.0f} ms (p99)"
            for kind, times in leaving.items()
        )
        notes.append(f"From telling the API that a pod goes until the route is without it: {told}.")
    if burst := found.get("burst"):
        pairs = len(burst["runs"]["ours"])
        notes.append(
            f"The script creates {burst['models'] * burst['replicas']} pods, 16 requests at a "
            f"time, and waits until a watch has shown them ready: {burst['script_s']:.1f} s; ours: "
            f"{burst['ours_s']:.1f} s (medians of {pairs} pairs in turns; ratio of each pair)."
        )
    if scale := found.get("scale"):
        notes.append(
            f"{scale['models']:,} Models with {scale['pods']:,} pods: requests are taken "
            f"{scale['serving_s']:.1f} s after the start. CPU of the supervisor: "
            f"{scale['idle_cpu']:.1%} of a core while nothing changes, "
            f"{scale['changes_cpu']:.0%} at {scale['changes'] / scale['changes_s']:.0f} changes "
            f"of pods a second; a reconcile's p50 is {scale['reconcile']['p50_ms']:.2f} ms. "
            f"Meanwhile a call of the load's own to the API takes {scale['calls']['p50_ms']:.0f} "
            f"ms (p50) and {scale['calls']['p99_ms']:.0f} ms (p99). "
            f"Writes in {scale['idle_s']:.0f} s "
            f"without changes, by the audit log: {scale['idle_writes']}, and "
            f"{scale['idle_lease_writes']} of the lease."
        )
    if storm := found.get("storm"):
        answers = " + ".join(f"{n} × {code}" for code, n in sorted(storm["answers"].items()))
        state = "right" if storm["right"] else "**wrong**"
        notes.append(
            f"Storm of {storm['storm_s']:.0f} s ({answers}): the state is {state} "
            f"{storm['after_s']:.1f} s after its end."
        )
    return "".join(f"\n{note}\n" for note in notes)


def safety() -> str:
    rows = [(what, f"`{command}`" if "`" not in command else command) for what, command in SAFETY]
    lead = "## Safety\n\nEach holds or its test fails (`pytest …`).\n\n"
    return lead + table(("what", "shown by"), rows)


def table(head: tuple[object, ...], rows: list[tuple[object, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def main() -> int:
    folder, out = map(Path, sys.argv[1:3])
    report = Report(folder)
    if "--only-control-plane" in sys.argv[3:]:
        out.write_text(with_section(out.read_text(), report.control()))
    else:
        out.write_text(report.text())
    return 0


def with_section(text: str, section: str) -> str:
    """``text`` with its section on the control plane replaced, or put before that on safety."""
    old = re.compile(rf"^{CONTROL_HEADING}\n.*?(?=^## )", re.DOTALL | re.MULTILINE)
    text = old.sub("", text)
    return text.replace("## Safety\n", section + "\n## Safety\n", 1)


if __name__ == "__main__":
    sys.exit(main())
