"""How many replicas are wanted: samples in, decisions out, time passed in."""

from __future__ import annotations

import math
from itertools import pairwise
from random import Random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kubeai.operator.scaling.autoscaler import HOLD, Autoscaler, Sample

INTERVAL_S, WINDOW_S = 10.0, 60.0


def sample(active, replicas, target=10, low=0, high=None, delay_s=30.0, **fields):
    """A sample of a Model whose replicas are all ready, unless given otherwise."""
    return Sample(
        active=active,
        replicas=replicas,
        target_requests=target,
        min_replicas=low,
        max_replicas=high,
        scale_down_delay_s=delay_s,
        **{"ready": replicas, "ended": 0, **fields},
    )


class Clock:
    """Steps an autoscaler and applies its decisions to one model."""

    def __init__(self, replicas=0, window_s=WINDOW_S, **spec):
        self.core = Autoscaler(INTERVAL_S, window_s)
        self.now_s = 1000.0
        self.replicas = replicas
        self.spec = spec
        self.average = 0.0

    def sample(self, active, **fields):
        return {"m": sample(active, self.replicas, **{**self.spec, **fields})}

    def step(self, active, **fields):
        decision = self.core.step(self.sample(active, **fields), self.now_s)["m"]
        self.replicas = decision.replicas
        self.average = decision.average
        self.now_s += INTERVAL_S
        return self.replicas

    def steps(self, *actives, **fields):
        return [self.step(active, **fields) for active in actives]

    def interval(self, active, **fields):
        """Feed one interval of samples, one per second, and decide at its end."""
        for _ in range(9):
            self.now_s += 1.0
            self.core.observe(self.sample(active, **fields), self.now_s)
        self.now_s += 1.0
        self.step(active, **fields)
        self.now_s -= INTERVAL_S
        return self.replicas


# -- as upstream ---------------------------------------------------------------------------------


def test_wanted_is_the_mean_over_the_window_divided_by_the_target_rounded_up():
    clock = Clock()
    assert clock.steps(10, 12, 14) == [1, 2, 2]
    assert clock.average == 12.0


def test_samples_within_an_interval_have_equal_weight():
    clock = Clock(replicas=9)
    for active in (10, 40):
        clock.core.observe(clock.sample(active), clock.now_s)
        clock.now_s += 1.0
    clock.step(70)
    clock.step(20)
    assert clock.average == 30.0


def test_samples_older_than_the_window_are_dropped():
    clock, averages = Clock(delay_s=0.0), []
    clock.steps(*[60] * 6)
    for _ in range(6):
        clock.step(0)
        averages.append(clock.average)
    assert averages == [50.0, 40.0, 30.0, 20.0, 10.0, 0.0]
    assert clock.replicas == 0


def test_bounds_hold_in_both_directions():
    assert Clock(low=2, high=4).steps(0, 1000, 1000) == [2, 4, 4]
    assert Clock(replicas=9, high=4).step(0) == 4
    assert Clock(replicas=0, low=1).step(0) == 1


def test_scale_up_is_immediate_and_scale_down_waits_for_the_delay():
    clock = Clock(replicas=1, window_s=INTERVAL_S)
    assert clock.step(50) == 5
    # the replicas had grown at the next sample; none is removed for 30 s from there
    assert clock.steps(0, 0, 0, 0) == [5, 5, 5, 0]


def test_scale_down_goes_to_the_highest_value_wanted_during_the_delay():
    clock = Clock(replicas=5, window_s=INTERVAL_S)
    assert clock.steps(19, 19, 39, 19, 19, 19, 19) == [5, 5, 5, 4, 4, 4, 2]


def test_activation_from_zero_between_two_steps_restarts_the_delay():
    clock = Clock(replicas=1, window_s=INTERVAL_S)
    assert clock.steps(0, 0, 0, 0) == [1, 1, 1, 0]
    clock.core.shrunk("m", 0)
    clock.replicas = 1
    assert clock.steps(0, 0, 0, 0) == [1, 1, 1, 0]


def test_a_short_lull_removes_no_replica():
    clock = Clock(replicas=5, window_s=INTERVAL_S)
    clock.steps(50, 50, 50, 50)
    assert clock.steps(0, 0, 50, 0, 0, 50) == [5] * 6


def test_replicas_added_manually_stay_for_the_delay():
    clock = Clock(replicas=1, window_s=INTERVAL_S)
    clock.steps(5, 5, 5, 5, 5)
    clock.replicas = 4
    assert clock.steps(5, 5, 5, 5) == [4, 4, 4, 1]


def test_one_request_keeps_one_replica():
    clock = Clock(replicas=1)
    assert clock.steps(*[1, *[0] * 5]) == [1] * 6
    assert clock.steps(0, 0, 0, 0) == [1, 1, 1, 0]  # 30 s after the window has emptied


def test_the_state_of_a_deleted_model_is_dropped():
    clock = Clock()
    clock.steps(100, 100)
    clock.core.step({}, clock.now_s)
    clock.replicas = 0
    assert clock.step(10) == 1


def test_models_are_scaled_independently():
    core = Autoscaler(INTERVAL_S, WINDOW_S)
    decisions = core.step({"a": sample(100, 0), "b": sample(0, 0)}, 0.0)
    assert {name: d.replicas for name, d in decisions.items()} == {"a": 10, "b": 0}


@given(
    st.lists(st.integers(0, 500), min_size=1, max_size=40),
    st.integers(1, 50),
    st.integers(0, 3),
    st.one_of(st.none(), st.integers(3, 20)),
    st.sampled_from([0.0, 10.0, 35.0, 100.0]),
    st.lists(st.booleans(), min_size=40, max_size=40),
    st.integers(0, 200),
)
def test_the_result_is_within_bounds_and_never_below_the_need_of_the_mean(
    actives, target, low, high, delay_s, complete, ended
):
    clock = Clock(target=target, low=low, high=high, delay_s=delay_s)
    for n, active in enumerate(actives):
        replicas = clock.step(active, complete=complete[n], ended=n * ended)
        assert replicas >= low
        assert high is None or replicas <= high
        enough = replicas * target >= clock.average - 0.01
        assert enough or replicas == high


@given(st.lists(st.tuples(st.integers(0, 500), st.integers(0, 99)), max_size=30))
def test_without_overload_the_average_is_the_mean_of_the_active_requests(seen):
    clock = Clock(replicas=50, low=50, window_s=100.0)
    for n, (active, ended) in enumerate(seen, start=1):
        clock.step(active, ended=ended * n)
        recent = [active for active, _ in seen[:n]][-10:]
        assert clock.average == pytest.approx(sum(recent) / len(recent), abs=0.001)


@given(st.integers(0, 500), st.integers(1, 50), st.integers(0, 60))
def test_replicas_settle_under_steady_load(active, target, start):
    clock = Clock(replicas=start, target=target)
    clock.steps(*[active] * 14)
    needed = -(-active // target)
    assert clock.replicas == needed
    assert clock.steps(*[active] * 5) == [needed] * 5


@given(
    st.lists(st.integers(0, 300), min_size=1, max_size=20),
    st.lists(st.integers(0, 100), min_size=20, max_size=20),
    st.integers(0, 40),
)
def test_more_load_never_reduces_the_wanted_replicas(actives, more, replicas):
    less, greater = Clock(), Clock()
    for n, active in enumerate(actives):
        less.replicas = greater.replicas = replicas
        assert greater.step(active + more[n], ready=40) >= less.step(active, ready=40)


# -- fast path -----------------------------------------------------------------------------------


@given(
    st.integers(2, 20),
    st.integers(1, 100),
    st.integers(0, 9),
    st.sampled_from([None, 0.5, 2.0, 8.0, 40.0]),
    st.floats(0.0, 1.0),
)
def test_replicas_follow_a_step_within_three_intervals_and_stay(
    times, target, phase, service_s, low
):
    """Clients each wait for their response; new replicas are not ready yet."""
    clock = Clock(replicas=1, target=target, window_s=600.0)
    before, after, ended = round(low * target), times * target, 0.0
    for _ in range(30):
        ended += before * INTERVAL_S / service_s if service_s else 0.0
        clock.interval(before, ended=int(ended))
    for n in range(phase, 60):
        ended += target / service_s if service_s else 0.0
        seen = clock.sample(after, ended=int(ended), ready=1)
        clock.now_s += 1.0
        if n % 10 == 9:
            clock.replicas = clock.core.step(seen, clock.now_s)["m"].replicas
            assert clock.replicas <= math.ceil(1.1 * times)
        else:
            clock.core.observe(seen, clock.now_s)
        if n >= phase + 30:
            assert clock.replicas >= times
    for _ in range(20):  # they are ready, and the long average is still low
        assert clock.interval(after) == times


def test_replicas_follow_a_step_at_the_third_interval():
    clock = Clock(replicas=1, window_s=600.0)
    clock.steps(*[5] * 60)
    assert [clock.interval(80, ready=1) for _ in range(3)] == [1, 8, 8]


@given(st.integers(0, 999), st.integers(1, 12), st.sampled_from([20, 100]))
@example(240, 10, 20)
def test_noise_around_a_threshold_causes_few_changes(seed, replicas, target):
    """An hour at the load of a whole number of replicas, with the noise of random arrivals."""
    random = Random(seed)
    clock = Clock(replicas=replicas, target=target, window_s=600.0)
    load, seen = replicas * target, [replicas]
    for _ in range(360):
        noise = random.gauss(0.0, math.sqrt(load) / 3)  # standard deviation of an interval's mean
        seen.append(clock.step(max(0, round(load + noise)), ended=0))
    changes = sum(a != b for a, b in pairwise(seen))
    assert changes <= 6, "one for each window of the average"
    assert set(seen) <= {replicas, replicas + 1}


def test_noise_does_not_scale_up():
    clock = Clock(replicas=8, target=100, window_s=600.0)
    clock.steps(*[780] * 60)
    assert clock.steps(780, 816, 816, 816, 770, 816) == [8] * 6


def test_a_spike_shorter_than_an_interval_is_ignored():
    clock = Clock(replicas=1, window_s=600.0)
    assert clock.steps(*[5] * 10, 40, *[5] * 10) == [1] * 21


def test_replicas_from_the_short_average_stay_for_a_share_of_the_window():
    clock = Clock(replicas=1, window_s=600.0, delay_s=30.0)
    clock.steps(*[5] * 60)
    clock.steps(80, 80)
    assert clock.replicas == 8
    held = int(HOLD * 600.0 / INTERVAL_S)
    assert clock.steps(*[5] * held) == [8] * held
    assert clock.steps(5) == [1 + (clock.average + 1 > 10)]


def test_both_averages_respect_a_long_delay():
    clock = Clock(replicas=8, window_s=600.0, delay_s=300.0)
    clock.steps(*[5] * 60)
    clock.replicas = 8
    clock.steps(*[5] * 20, *[80] * 2)
    assert clock.steps(*[5] * 29) == [8] * 29


@given(
    st.lists(st.integers(0, 200), min_size=2, max_size=60),
    st.sampled_from([0.0, 10.0, 30.0, 90.0]),
)
def test_no_replica_is_removed_within_the_delay_after_a_scale_up(actives, delay_s):
    clock = Clock(delay_s=delay_s)
    grown_s, before = -math.inf, 0
    for active in actives:
        now_s = clock.now_s
        replicas = clock.step(active)
        if replicas < before:
            assert now_s - grown_s > delay_s
        if replicas > before:
            grown_s = now_s
        before = replicas


# -- overload ------------------------------------------------------------------------------------


class Queue(Clock):
    """Requests arrive at a rate for replicas that start slowly; fractions of requests count."""

    def __init__(self, rate, service_s=5.0, target=100, startup_s=60.0):
        super().__init__(replicas=1, target=target, window_s=600.0)
        self.service_s, self.target, self.startup_s = service_s, target, startup_s
        self.rate, self.active, self.ended, self.ready = rate, rate * service_s, 0.0, 1
        self.starting = []

    def second(self):
        self.ready += sum(at_s <= self.now_s for at_s in self.starting)
        self.starting = [at_s for at_s in self.starting if at_s > self.now_s]
        done = min(self.active, self.ready * self.target) / self.service_s
        self.ended += done
        self.active += self.rate - done
        self.now_s += 1.0
        seen = self.sample(round(self.active), ended=int(self.ended), ready=self.ready)
        if self.now_s % INTERVAL_S:
            self.core.observe(seen, self.now_s)
            return
        before = self.replicas
        self.replicas = self.core.step(seen, self.now_s)["m"].replicas
        self.starting += [self.now_s + self.startup_s] * (self.replicas - before)
        if self.replicas < self.ready:
            self.ready = self.replicas

    def seconds(self, count):
        most = 0
        for _ in range(count):
            self.second()
            most = max(most, self.replicas)
        return most


@pytest.mark.parametrize("service_s", [1.0, 5.0, 20.0])
def test_a_backlog_does_not_count_as_demand(service_s):
    """Load for eight replicas arrives; they take a minute to start while requests pile up."""
    queue = Queue(rate=50.0 / service_s, service_s=service_s)
    queue.seconds(600)
    queue.rate = 760.0 / service_s
    assert queue.seconds(round(30 + service_s)) <= 9
    assert queue.seconds(round(service_s)) >= 8
    piled = 0.0
    most = queue.replicas
    for _ in range(600):
        queue.second()
        piled, most = max(piled, queue.active), max(most, queue.replicas)
    assert piled > 16 * queue.target
    assert most <= 12  # part of this is for the backlog, which is gone afterwards
    assert queue.active <= queue.ready * queue.target
    queue.seconds(900)
    assert queue.replicas == 8


def test_requests_that_pile_up_during_a_cold_start_do_not_count_as_demand():
    """Nothing has completed yet, so the duration of a request is unknown."""
    queue = Queue(rate=18.0, service_s=5.0)
    queue.active, queue.ready, queue.starting = 0.0, 0, [queue.now_s + 60.0]
    assert queue.seconds(60) <= 3
    assert queue.active > 10 * queue.target
    assert queue.seconds(600) <= 4
    queue.seconds(900)
    assert queue.replicas == 1


def test_a_cold_start_for_many_simultaneous_requests_scales_for_all_of_them():
    clock = Clock(replicas=1, target=100, window_s=600.0)
    for _ in range(3):
        clock.interval(600, ready=0)
    assert clock.replicas == 6


def test_requests_that_do_not_complete_count_in_full():
    clock = Clock(replicas=1, target=100, window_s=600.0)
    for n in range(1, 9):
        clock.interval(100 * n, ready=1)
    assert clock.replicas == 7  # the lower one of the last two intervals


def test_queued_clients_eventually_get_their_replicas():
    """Their number grew too slowly to be noticed, and there is no remembered peak."""
    clock = Clock(replicas=1, target=100, window_s=600.0)
    ended, seen = 0, []
    for n in range(90):
        ended += 10 * 100 * clock.replicas // 2
        seen.append(clock.interval(min(800, 50 + 15 * n), ended=ended))
    assert seen[-1] == 8
    assert max(seen) == 8


def test_no_replica_is_removed_while_the_ready_ones_are_overloaded():
    clock = Clock(replicas=8, target=100, window_s=60.0)
    ended = 0
    for _ in range(30):
        ended += 500
        assert clock.interval(150, ready=1, ended=ended) == 8
    assert clock.steps(*[150] * 6, ended=ended)[-1] == 2


def test_a_peer_that_disappears_does_not_lower_the_completion_count():
    clock = Clock(replicas=2, target=100, window_s=600.0)
    ended = 10_000
    for n in range(60):
        ended = ended + 300 if n != 30 else 1_000
        clock.interval(150, ended=ended)
    assert clock.average == 150.0
    for _ in range(3):  # a later overload is still told apart from demand
        ended += 400
        clock.interval(5_000, ended=ended, ready=2)
    assert clock.replicas >= 2


# -- what is not known ---------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(0, 300), st.booleans()), min_size=1, max_size=60),
    st.sampled_from([0.0, 30.0]),
)
def test_an_incomplete_view_never_scales_down(seen, delay_s):
    clock = Clock(delay_s=delay_s)
    for active, complete in seen:
        before = clock.replicas
        replicas = clock.step(active, complete=complete)
        assert complete or replicas >= before


def test_unseen_load_is_no_evidence_for_scaling_down():
    clock = Clock(replicas=8, window_s=600.0)
    clock.steps(*[75] * 60)
    clock.steps(*[0] * 60, complete=False)
    assert (clock.replicas, clock.average) == (8, 75.0)
    assert clock.steps(*[75] * 30) == [8] * 30


def test_an_incomplete_view_may_scale_up():
    clock = Clock(replicas=1, window_s=600.0)
    clock.steps(*[5] * 10)
    assert clock.steps(80, 80, complete=False)[-1] == 8


def test_restored_averages_count_as_constant_over_the_window():
    clock = Clock(replicas=3, delay_s=0.0)
    clock.core.observe(clock.sample(0), clock.now_s)
    clock.core.restore({"m": 30.0})
    assert clock.step(0) == 3
    assert clock.average == 25.0
    assert clock.steps(*[0] * 5)[-1] == 0


@given(st.integers(0, 200), st.integers(0, 200), st.integers(1, 12))
def test_a_new_leader_prefers_its_own_samples_over_the_saved_state(seen, written, steps):
    clock = Clock(replicas=30, low=30)
    clock.steps(*[seen] * steps)
    clock.core.restore({"m": float(written)})
    clock.step(seen)
    own = min(6, steps + 1)
    assert clock.average == pytest.approx((own * seen + (6 - own) * written) / 6, abs=0.001)


@pytest.mark.parametrize("followed", [True, False])
def test_a_change_of_leader_removes_no_replica_early(followed):
    """The window is short: what was wanted during the delay must be known or waited for."""
    old, new = Clock(replicas=8, window_s=INTERVAL_S), Clock(replicas=8, window_s=INTERVAL_S)
    for _ in range(20):
        old.step(75)
        if followed:
            new.step(75)
    new.now_s = old.now_s
    old.step(15)
    new.core.observe(new.sample(15), new.now_s)
    new.core.restore({"m": old.average})
    assert new.steps(15, 15, 15)[:2] == [8, 8]
    assert new.steps(15, 15) == [2, 2]
