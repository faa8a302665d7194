"""How many replicas are wanted: samples in, decisions out, time handed in."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kubeai.operator.autoscaler import Autoscaler, Sample

INTERVAL_S, WINDOW_S = 10.0, 60.0


def sample(active, replicas, target=10, low=0, high=None, delay_s=30.0):
    return Sample(active, replicas, target, low, high, delay_s)


class Clock:
    """Steps an autoscaler and applies its decisions to one model."""

    def __init__(self, replicas=0, window_s=WINDOW_S, **spec):
        self.core = Autoscaler(INTERVAL_S, window_s)
        self.now_s = 1000.0
        self.replicas = replicas
        self.spec = spec
        self.average = 0.0

    def step(self, active):
        samples = {"m": sample(active, self.replicas, **self.spec)}
        decision = self.core.step(samples, self.now_s)["m"]
        self.replicas = decision.replicas
        self.average = decision.average
        self.now_s += INTERVAL_S
        return self.replicas

    def steps(self, *actives):
        return [self.step(active) for active in actives]


def test_wanted_is_the_mean_over_the_window_by_the_target_rounded_up():
    clock = Clock()
    assert clock.steps(10, 12, 14) == [1, 2, 2]
    assert clock.average == 12.0


def test_samples_older_than_the_window_are_forgotten():
    clock = Clock(delay_s=0.0)
    clock.steps(*[60] * 6)
    assert clock.steps(*[0] * 6) == [5, 4, 3, 2, 1, 0]
    assert clock.average == 0.0


def test_bounds_hold_in_both_directions():
    assert Clock(low=2, high=4).steps(0, 1000, 1000) == [2, 4, 4]
    assert Clock(replicas=9, high=4).step(0) == 4
    assert Clock(replicas=0, low=1).step(0) == 1


def test_up_is_at_once_and_down_only_after_the_delay_of_wanting_less():
    clock = Clock(replicas=1, window_s=INTERVAL_S)
    assert clock.step(50) == 5
    # the replicas have grown at the next look; 30 s from there nothing goes
    assert clock.steps(0, 0, 0, 0) == [5, 5, 5, 0]


def test_down_goes_to_the_most_that_was_wanted_during_the_delay():
    clock = Clock(replicas=5, window_s=INTERVAL_S)
    assert clock.steps(20, 20, 40, 20, 20, 20, 20) == [5, 5, 5, 4, 4, 4, 2]


def test_a_model_that_is_woken_between_two_steps_has_its_delay_again():
    clock = Clock(replicas=1, window_s=INTERVAL_S)
    assert clock.steps(0, 0, 0, 0) == [1, 1, 1, 0]
    clock.core.shrunk("m", 0)
    clock.replicas = 1
    assert clock.steps(0, 0, 0, 0) == [1, 1, 1, 0]


def test_a_short_lull_takes_nothing_away():
    clock = Clock(replicas=5, window_s=INTERVAL_S)
    clock.steps(50, 50, 50, 50)
    assert clock.steps(0, 0, 50, 0, 0, 50) == [5] * 6


def test_replicas_raised_by_hand_stay_for_the_delay():
    clock = Clock(replicas=1, window_s=INTERVAL_S)
    clock.steps(5, 5, 5, 5, 5)
    clock.replicas = 4
    assert clock.steps(5, 5, 5, 5) == [4, 4, 4, 1]


def test_one_request_keeps_one_replica():
    clock = Clock(replicas=1)
    assert clock.steps(*[1, *[0] * 5]) == [1] * 6
    assert clock.steps(0, 0, 0, 0) == [1, 1, 1, 0]  # 30 s after the window is empty


def test_averages_are_restored_as_if_they_had_held_for_the_window():
    clock = Clock(replicas=3, delay_s=0.0)
    clock.core.restore({"m": 30.0}, clock.now_s)
    assert clock.step(0) == 3
    assert clock.average == 25.0
    assert clock.steps(*[0] * 5)[-1] == 0


def test_a_model_that_is_gone_is_forgotten():
    clock = Clock()
    clock.steps(100, 100)
    clock.core.step({}, clock.now_s)
    clock.replicas = 0
    assert clock.step(10) == 1


def test_models_do_not_disturb_each_other():
    core = Autoscaler(INTERVAL_S, WINDOW_S)
    decisions = core.step({"a": sample(100, 0), "b": sample(0, 0)}, 0.0)
    assert {name: d.replicas for name, d in decisions.items()} == {"a": 10, "b": 0}


@given(
    st.lists(st.integers(0, 500), min_size=1, max_size=40),
    st.integers(1, 50),
    st.integers(0, 3),
    st.one_of(st.none(), st.integers(3, 20)),
    st.sampled_from([0.0, 10.0, 35.0, 100.0]),
)
def test_never_out_of_bounds_never_below_what_the_mean_needs(actives, target, low, high, delay_s):
    clock = Clock(target=target, low=low, high=high, delay_s=delay_s)
    for active in actives:
        replicas = clock.step(active)
        assert replicas >= low
        assert high is None or replicas <= high
        enough = replicas * target >= clock.average - 0.01
        assert enough or replicas == high


@given(st.integers(0, 500), st.integers(1, 50), st.integers(0, 60))
def test_steady_load_settles_and_stays(active, target, start):
    clock = Clock(replicas=start, target=target)
    clock.steps(*[active] * 12)
    settled = clock.replicas
    assert settled == -(-active // target)
    assert clock.steps(*[active] * 5) == [settled] * 5
