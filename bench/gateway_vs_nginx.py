"""Compare the CPU that a KubeAI worker and an nginx worker spend on the same requests.

    python bench/gateway_vs_nginx.py [--rounds 5] [--seconds 3] [--only chat] [--keys 10000]
        [--json FILE]

Both proxies run on one core, the load generator and the mock engines on another. Both proxy to
four engines (on 127.0.0.1 to 127.0.0.4). nginx uses ``proxy_pass`` with keep-alive upstream
connections, response buffering off, ``client_body_buffer_size 1m`` and no access log. KubeAI runs
the supervisor and one worker with a PrefixHash model and all limits and counters on; the
supervisor's CPU is included. There is no operator: a script provides the routes.

A closed loop of connections sends the same bodies to each proxy in turn, nginx first in even
rounds. CPU is the on-CPU time of all the proxy's processes from /proc/PID/task/*/schedstat, and the
kernel's share is from /proc/PID/stat; figures are medians over the rounds. Streams are counted by
their chunks, so that a stream which is open at the start or end of the measurement counts in part.

With ``--keys N``, KubeAI requires an API key, and each request has the next one of N keys that have
all limits. nginx gets the same requests and checks nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import uvloop
from closed_loop import ANSWERS, CHUNKS, SCENARIOS, Scenario, run_engines, run_load
from pinned_proxies import find_nginx, free_port, kubeai, nginx, process


@dataclass
class Usage:
    total_us: float
    user_ticks: int
    system_ticks: int


def usage(pids: list[int]) -> Usage:
    total_ns = user = system = 0
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").iterdir():
            total_ns += int((task / "schedstat").read_text().split()[0])
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        user += int(fields[11])
        system += int(fields[12])
    return Usage(total_ns / 1000, user, system)


@dataclass
class Run:
    us: float  # CPU time per request or stream
    kernel_share: float
    rate: float  # per second


def measure(
    scenario: Scenario,
    pids: list[int],
    port: int,
    core: int,
    connections: int,
    seconds: float,
    keys: int = 0,
) -> Run:
    command = [sys.executable, __file__, "--load", scenario.name, "--load-port", str(port)]
    command += ["--connections", str(connections), "--seconds", str(seconds), "--keys", str(keys)]
    with process(command, core, stdout=subprocess.PIPE, text=True) as load:
        if load.stdout.readline() != "begin\n":
            raise SystemExit(f"{scenario.name}: the load generator failed")
        before = usage(pids)
        line = load.stdout.readline()
        after = usage(pids)
        if not line:
            raise SystemExit(f"{scenario.name}: the load generator failed")
    counted = json.loads(line)
    streamed = scenario.engine != "whole"
    done = counted["chunks"] / CHUNKS if streamed else counted["answers"]
    user = after.user_ticks - before.user_ticks
    system = after.system_ticks - before.system_ticks
    return Run(
        us=(after.total_us - before.total_us) / done,
        kernel_share=system / max(1, user + system),
        rate=done / counted["took_s"],
    )


def compare(options: argparse.Namespace) -> dict[str, dict]:
    scenarios = [s for s in SCENARIOS if not options.only or s.name in options.only]
    runs: dict[tuple[str, str], list[Run]] = {}
    proxy_core, load_core = options.cores
    engines = {answer: free_port() for answer in ANSWERS}
    with ExitStack() as stack:
        command = [sys.executable, __file__, "--engines", json.dumps(engines)]
        mock = stack.enter_context(process(command, load_core, stdout=subprocess.PIPE, text=True))
        if mock.stdout.readline() != "ready\n":
            raise SystemExit("the mock engines did not start")
        ours = stack.enter_context(
            kubeai(proxy_core, engines, options.mean_load_factor, keys=options.keys)
        )
        proxies = {
            "nginx": stack.enter_context(nginx(proxy_core, engines)),
            "kubeai": (ours.pids, ours.ports),
        }
        for turn in range(options.rounds):
            for scenario in scenarios:
                for name in sorted(proxies, reverse=turn % 2 == 0):
                    pids, ports = proxies[name]
                    run = measure(
                        scenario,
                        pids,
                        ports[scenario.engine],
                        load_core,
                        options.connections,
                        options.seconds,
                        options.keys,
                    )
                    runs.setdefault((scenario.name, name), []).append(run)
    return {
        scenario.name: summary(runs[scenario.name, "nginx"], runs[scenario.name, "kubeai"])
        for scenario in scenarios
    }


def summary(nginx_runs: list[Run], kubeai_runs: list[Run]) -> dict:
    median = statistics.median
    both = {"nginx": nginx_runs, "kubeai": kubeai_runs}
    return {
        **{f"{name}_us": median(run.us for run in runs) for name, runs in both.items()},
        **{f"{name}_rate": median(run.rate for run in runs) for name, runs in both.items()},
        **{f"{name}_kernel": median(run.kernel_share for run in r) for name, r in both.items()},
        # The ratio per round: disturbances longer than a run affect both runs of a round.
        "ratio": median(k.us / n.us for n, k in zip(nginx_runs, kubeai_runs, strict=True)),
        "runs": {name: [asdict(run) for run in runs] for name, runs in both.items()},
    }


def show(results: dict[str, dict]) -> None:
    print(
        f"{'µs of CPU (kernel share), rate per second':44}{'nginx':>20}{'kubeai':>20}{'ratio':>8}"
    )
    for scenario in SCENARIOS:
        if result := results.get(scenario.name):
            cells = (
                f"{result[f'{name}_us']:.1f} ({result[f'{name}_kernel']:.0%}) "
                f"{result[f'{name}_rate']:.0f}"
                for name in ("nginx", "kubeai")
            )
            print(f"{scenario.unit:44}{next(cells):>20}{next(cells):>20}{result['ratio']:8.2f}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="duration of each run")
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument(
        "--keys",
        type=int,
        default=0,
        metavar="N",
        help="require an API key of KubeAI's clients, and use N keys with all limits",
    )
    parser.add_argument(
        "--mean-load-factor",
        type=int,
        default=125,
        metavar="PERCENT",
        help="mean load factor of KubeAI's ring; at 125, a closed loop moves and logs many"
        " requests",
    )
    parser.add_argument("--quick", action="store_true", help="run a sample: 2 rounds of 1 second")
    parser.add_argument("--only", action="append", choices=[s.name for s in SCENARIOS])
    parser.add_argument(
        "--cores",
        type=int,
        nargs=2,
        default=(0, 1),
        help="CPU cores of the proxies and of the load",
    )
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--engines", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--load", help=argparse.SUPPRESS)
    parser.add_argument("--load-port", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    options = parse_arguments()
    if options.engines:
        uvloop.run(run_engines(options.engines))
        return 0
    if options.load:
        scenario = next(s for s in SCENARIOS if s.name == options.load)
        load = run_load(
            scenario, options.load_port, options.connections, options.seconds, options.keys
        )
        uvloop.run(load)
        return 0
    if find_nginx() is None:
        print("nginx is not installed: nothing to compare with (Debian: apt install nginx-light)")
        return 0
    if not set(options.cores) <= os.sched_getaffinity(0):
        print(f"cores {options.cores}: this process may not run on both (--cores)")
        return 2
    if options.quick:
        options.rounds, options.seconds = 2, 1.0
    results = compare(options)
    show(results)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
