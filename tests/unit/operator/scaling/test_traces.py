"""The simulator that the autoscaler's constants come from, and its results for the rule."""

from __future__ import annotations

import importlib
import re
import sys

import pytest
from repository import REPOSITORY

from kubeai.operator.scaling import autoscaler
from kubeai.simulation.fleet import Fleet, Observation, run
from kubeai.simulation.rules import Knative, MovingAverage
from kubeai.simulation.traces import Trace, traces

FLEET = Fleet(target_requests=10, service_s=5.0, startup_s=60.0)


@pytest.fixture(scope="module")
def bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REPOSITORY / "bench"))  # it imports its neighbours
        module = importlib.import_module("autoscaling")
    assert "matplotlib" not in sys.modules, "only the plots need it"
    return module


class Fixed:
    """A rule that wants a fixed number from a given time on."""

    def __init__(self, replicas, from_s=0.0):
        self.replicas, self.from_s = replicas, from_s

    def decide(self, observation):
        return self.replicas if observation.now_s >= self.from_s else None


def trace(offered, duration_s=600.0, closed=False, most=8.0):
    return Trace(name="t", duration_s=duration_s, offered=offered, most=most, closed=closed)


# -- the simulator -------------------------------------------------------------------------------


def test_no_request_waits_if_there_are_enough_replicas():
    figures = run(trace(lambda _: 2.1), Fixed(6), FLEET).figures()
    assert figures.wait_p99_s == 0.0
    assert figures.replica_hours == pytest.approx(6 * 600 / 3600)
    assert figures.served == pytest.approx(2.1 * 10 / 5 * 600, rel=0.1)


def test_a_replica_serves_after_its_start_up_time():
    ticks = run(trace(lambda _: 1.0), Fixed(3, from_s=100.0), FLEET).ticks
    assert {tick.ready for tick in ticks if tick.now_s < 160.0} == {1}
    assert {tick.ready for tick in ticks if tick.now_s > 160.0} == {3}


def test_excess_requests_wait_and_are_served_eventually():
    played = run(trace(lambda t: 4.0 if t < 60 else 0.5), Fixed(1), FLEET)
    assert max(tick.waiting for tick in played.ticks) > 200
    assert played.ticks[-1].waiting == 0
    assert played.figures().wait_p99_s > 60.0


def test_the_first_request_activates_one_replica():
    played = run(trace(lambda t: 0.0 if t < 100 else 0.5), Fixed(0, from_s=1e9), FLEET)
    assert played.ticks[50].replicas == 0
    assert played.ticks[-1].ready == 1
    assert played.figures().wait_p99_s == pytest.approx(60.0, abs=10.0)


def test_clients_send_again_only_after_a_response():
    played = run(trace(lambda _: 3.0, closed=True), Fixed(1, from_s=0.0), FLEET)
    assert {tick.waiting for tick in played.ticks if tick.now_s > 120.0} == {20}


def test_a_removed_replica_finishes_its_requests():
    played = run(trace(lambda t: 2.0 if t < 300 else 0.0), Fixed(1, from_s=300.0), FLEET)
    assert played.ticks[-1].waiting == 0
    assert played.figures().changes == 1


def test_the_same_seed_gives_the_same_run():
    one, again, other = (
        run(trace(lambda _: 1.5), Fixed(2), FLEET, seed).figures() for seed in (1, 1, 2)
    )
    assert one == again != other


# -- the other rules -----------------------------------------------------------------------------


def see(rule, active, replicas, ready=None, seconds=1, begin_s=0.0):
    """The last decision after ``seconds`` of constant load."""
    wanted = None
    for n in range(seconds):
        ready = replicas if ready is None else ready
        observation = Observation(begin_s + n + 1.0, active, 0, ready, replicas)
        decided = rule.decide(observation)
        wanted = wanted if decided is None else decided
    return wanted


def test_upstream_follows_a_step_only_after_the_whole_window():
    assert see(MovingAverage(10), 80, 8, seconds=300) == 4
    assert see(MovingAverage(10), 80, 8, seconds=600) == 8


def test_upstream_scales_down_after_the_number_of_intervals_in_the_delay():
    rule = MovingAverage(10, window_s=10.0)
    assert see(rule, 5, 3, seconds=30) is None
    assert see(rule, 5, 3, seconds=10, begin_s=30.0) == 1


def test_knative_panics_at_twice_the_ready_capacity_and_then_does_not_scale_down():
    rule = Knative(10, utilization=1.0)
    assert see(rule, 10, 1, seconds=60) == 1
    assert see(rule, 80, 1, seconds=6, begin_s=60.0) == 8
    assert see(rule, 10, 8, seconds=20, begin_s=66.0) == 8
    assert see(rule, 10, 8, seconds=80, begin_s=86.0) == 4, "at most half at a time"


def test_knative_keeps_the_last_replica_for_its_grace_period():
    rule = Knative(10)
    see(rule, 5, 1, seconds=60)
    assert see(rule, 0, 1, seconds=80, begin_s=60.0) == 1
    assert see(rule, 0, 1, seconds=20, begin_s=140.0) == 0


# -- results for our rule ------------------------------------------------------------------------


def test_after_a_step_fewer_requests_wait_at_fewer_replica_hours_than_upstream(bench):
    step = trace(lambda t: 0.9 if t < 120 or t > 900 else 7.8, duration_s=1500.0)
    ours, upstream = (
        run(step, bench.rules(step, FLEET)[rule], FLEET).figures()
        for rule in ("KubeAI", "upstream")
    )
    assert ours.waits_s < 0.7 * upstream.waits_s
    assert ours.replica_hours < upstream.replica_hours
    assert ours.too_many <= 6 < upstream.too_many


def test_noise_causes_fewer_changes_than_upstream(bench):
    noisy = next(one for one in traces() if one.name == "steady")
    ours, upstream = (
        run(noisy, bench.rules(noisy, Fleet())[rule], Fleet()).figures()
        for rule in ("KubeAI", "upstream")
    )
    assert ours.reversals < upstream.reversals
    assert ours.waited < upstream.waited


@pytest.mark.parametrize("service_s", [0.5, 2.0, 8.0])
def test_a_growing_number_of_clients_gets_replicas_within_a_few_start_times(bench, service_s):
    """Even with short requests, when clients show only the load that the replicas can serve."""
    fleet = Fleet(target_requests=10, service_s=service_s, startup_s=60.0)
    more = trace(lambda t: min(8.0, 1.0 + 7.0 * max(0.0, t - 60) / 30), 400.0, closed=True)
    ticks = run(more, bench.Ours(fleet, 10.0), fleet).ticks
    assert next(tick.now_s for tick in ticks if tick.replicas >= 8) <= 60 + 4 * 60
    assert max(tick.replicas for tick in ticks) == 8


def test_the_documented_constants_equal_the_code():
    page = (REPOSITORY / "docs/explain/autoscaling.md").read_text()
    table = page.split("## Constants")[1].split("##")[0]
    told = dict(re.findall(r"^\| `([A-Z_]+)` \| ([0-9.]+) \|", table, re.MULTILINE))
    assert told.keys() == {
        *("SHORT_INTERVALS", "TOLERANCE", "TOLERANCE_MIN", "SLACK", "HOLD"),
        *("DRAIN_S", "GROWTH_MAX", "EARLY_S", "SERVICE_S"),
    }
    assert {name: float(value) for name, value in told.items()} == {
        name: getattr(autoscaler, name) for name in told
    }


def test_every_trace_has_its_plot_and_figures():
    page = (REPOSITORY / "docs/explain/autoscaling.md").read_text()
    for one in traces():
        plot = REPOSITORY / f"docs/explain/autoscaling/{one.name}.svg"
        assert plot.stat().st_size < 150_000
        assert f"(autoscaling/{one.name}.svg)" in page
        assert re.search(rf"^\| {one.name} \| KubeAI \|", page, re.MULTILINE)
