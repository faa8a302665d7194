"""The search of `kubeai bench sweep`, and sweeps on simulated engines."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import msgspec
import pytest

from kubeai.loadtest import arguments, options, simulate, sweep
from kubeai.loadtest.arguments import OptionError
from kubeai.loadtest.reports.output import Outputs
from kubeai.loadtest.scenario import Exact
from kubeai.loadtest.simulate import Simulation
from kubeai.loadtest.sweep import POINTS_MAX, Search, SweepPlan
from kubeai.simulation.results import Limit, read
from kubeai.simulation.traffic import Arrivals, RandomLengths

SLO = "ttft:p99:500ms"


def plan(**fields: Any) -> SweepPlan:
    limits = (Limit("ttft", "p99", most=500.0),)
    return SweepPlan(**({"limits": limits, "arrivals": Arrivals(per_s=1.0)} | fields))


def searched(plan: SweepPlan, capacity: float) -> tuple[list[float], Search]:
    """The rates that are tried if all up to the capacity hold."""
    search, tried = Search(plan), []
    while search.rate is not None:
        tried.append(search.rate)
        search.note(held=search.rate <= capacity)
    return tried, search


def test_the_rate_is_doubled_until_it_breaks_and_the_interval_is_then_halved():
    tried, search = searched(plan(start=1.0, precision=0.1), 10.0)
    assert tried[:5] == [1.0, 2.0, 4.0, 8.0, 16.0]
    assert tried[5:] == [11.3, 9.51, 10.4]
    assert (search.held, search.broke) == (9.51, 10.4)


@pytest.mark.parametrize("capacity", [0.3, 1.0, 7.7, 63.0, 900.0])
def test_the_limit_is_known_to_the_precision(capacity):
    _, search = searched(plan(precision=0.05), capacity)
    assert search.held <= capacity < search.broke <= search.held * 1.05


def test_a_search_ends_at_the_highest_rate_and_when_no_rate_holds():
    tried, search = searched(plan(highest=6.0), 100.0)
    assert tried == [1.0, 2.0, 4.0, 6.0]
    assert (search.held, search.broke) == (6.0, None)
    tried, search = searched(plan(start=64.0), 0.0)
    assert tried == [64.0, 32.0, 16.0, 8.0, 4.0, 2.0, 1.0]
    assert (search.held, search.broke) == (None, 1.0)
    tried, _ = searched(plan(precision=1e-9, highest=1e9), 1e6 / 3)
    assert len(tried) <= POINTS_MAX


def test_given_rates_are_tried_in_order_until_one_breaks():
    tried, search = searched(plan(rates=(1.0, 5.0, 7.0, 9.0)), 6.0)
    assert tried == [1.0, 5.0, 7.0]
    assert (search.held, search.broke) == (5.0, 7.0)


def made(**fields: Any) -> SweepPlan:
    given = {"slo": [SLO]} | fields
    return sweep.plan(arguments.Rates(**given), options.limits(given["slo"]))


def test_each_rate_lasts_as_long_as_the_duration_unless_a_number_of_requests_is_given():
    assert made().prompts(10.0) == 300
    assert made(duration="2s").prompts(100.0) == 200
    assert made(duration="2s").prompts(1.0) == 20, "at least"
    assert made(num_prompts=7).prompts(100.0) == 7
    load = made(burstiness=0.5, request_rates="2,1").load(3.0)
    assert load.arrivals == Arrivals(per_s=3.0, burstiness=0.5)
    assert made(request_rates="2,1").rates == (1.0, 2.0)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"start_rate": 0.0}, "--start-rate: must be more than 0"),
        ({"max_rate": 0.5}, "--max-rate: must not be less than --start-rate"),
        ({"precision": -1.0}, "--precision: "),
        ({"request_rates": "1,x"}, "--request-rates: '1,x' is not a list"),
        ({"num_prompts": 5, "duration": "5s"}, "--duration: cannot be combined"),
        ({"slo": ["ttft"]}, "--slo: 'ttft' is not"),
    ],
)
def test_an_invalid_plan_is_refused(fields, words):
    with pytest.raises(OptionError, match=words):
        made(**fields)


def simulation(strategies: str) -> Simulation:
    settings = simulate.settings(
        preset="llama-3.1-8b-fp8-l4",
        cache_blocks=None,
        engines=2,
        strategies=strategies,
        concurrencies=[1],
    )
    traffic = Exact(RandomLengths(input_len=1000, output_len=5), 1)
    load = made().load(1.0)
    return Simulation(
        traffic=traffic, load=load, preset="l4", settings=settings, seed=1, requests_max=None
    )


def test_a_simulated_sweep_finds_the_rate_that_engines_can_compute():
    """Two engines compute 5,000 tokens per second each: ten prompts of 1,000 tokens."""
    found = sweep.simulate_strategy(made(duration="20s"), simulation("LeastLoad"), 0)
    assert found.name == "LeastLoad"
    assert 5 < found.held < found.broke <= 10
    assert found.broke <= found.held * 1.1
    by_rate = dict(zip(found.rates, found.runs, strict=True))
    assert by_rate[found.held].summary["ttft_ms"]["p99"] <= 500
    assert by_rate[found.broke].summary["ttft_ms"]["p99"] > 500


def test_a_target_that_is_overloaded_at_any_rate_holds_none():
    limits = [Limit("ttft", "p99", most=1.0)]
    found = sweep.simulate_strategy(
        msgspec.structs.replace(made(num_prompts=5), limits=tuple(limits)),
        simulation("LeastLoad"),
        0,
    )
    assert found.held is None
    runs, summary = sweep.collected(made(), [found])
    assert summary.held == {"LeastLoad": None}
    assert summary.rates["LeastLoad"] == sorted(summary.rates["LeastLoad"])
    assert [run.name for run in runs] == [
        f"LeastLoad, {rate:g} requests/s" for rate in summary.rates["LeastLoad"]
    ]


def test_strategies_are_swept_on_simulated_engines(tmp_path):
    files = Outputs(tmp_path / "r.json", tmp_path / "r.csv", tmp_path / "r.html")
    done = subprocess.run(
        (
            *(sys.executable, "-m", "kubeai", "bench", "sweep", "--slo", SLO, "--engines=2"),
            *("--strategies=Service,LeastLoad", "--request-rates=2,4,100", "--num-prompts=60"),
            *("--input-len=1000", "--output-len=5"),
            *("--json", str(files.json), "--csv", str(files.csv), "--html", str(files.html)),
        ),
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert done.returncode == 0, done.stderr
    assert "LeastLoad holds TTFT p99 ≤ 500 ms and errors ≤ 1 % up to 4 requests/s." in done.stdout
    found = read(files.json)
    assert found.sweep.held["LeastLoad"] == 4.0
    assert found.sweep.broke["LeastLoad"] == 100.0
    assert len(found.runs) == len(files.csv.read_text().splitlines()) - 1
    assert "up to 4 requests/s" in files.html.read_text()
