"""Which failures are repeated, and where: the policy that every kind of request has in common."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kubeai.gateway.attempts import (
    BUDGET_WINDOW_S,
    NO_ANSWER,
    RETRY_PAUSE_S,
    Retries,
    RetryBudget,
)


class Replicas:
    """Stands in for a RoutedModel: the first of its endpoints that is not excluded."""

    def __init__(self, names):
        self.names = names

    def pick(self, key, adapter, exclude=()):
        return next((name for name in self.names if name not in exclude), None)


@pytest.mark.parametrize("status", [NO_ANSWER, 502, 503, 504])
def test_what_another_replica_may_mend_is_repeated_up_to_the_limit(status):
    retries = Retries(2)
    for number in range(2):
        assert retries.wants(status)
        retries.failed(f"pod-{number}")
    assert not retries.wants(status)


@pytest.mark.parametrize("status", [200, 302, 400, 401, 404, 413, 422, 429, 501, 505])
def test_what_repeating_cannot_mend_passes_through(status):
    assert not Retries(3).wants(status)


def test_a_500_is_repeated_once_whatever_comes_between():
    retries = Retries(5)
    assert retries.wants(500)
    retries.failed("a")
    assert retries.wants(503)
    retries.failed("b")
    assert not retries.wants(500)


def test_no_retries_are_none():
    assert not any(Retries(0).wants(status) for status in (NO_ANSWER, 500, 502))


def test_an_endpoint_that_failed_comes_again_only_when_no_other_is_left():
    retries, replicas = Retries(9), Replicas("ab")
    retries.failed("a")
    assert retries.elsewhere(replicas, 1, None) == "b"
    retries.failed("b")
    assert retries.elsewhere(replicas, 1, None) is None
    assert retries.anywhere(replicas, 1, None) == "a", "b failed last"
    assert retries.anywhere(Replicas("b"), 1, None) == "b", "there is no other"
    assert retries.anywhere(Replicas(""), 1, None) is None


def test_each_pause_is_twice_the_one_before():
    retries, pauses = Retries(3, random=lambda: 0.5), []
    for name in "abc":
        retries.failed(name)
        pauses.append(retries.pause_s)
    assert pauses == [RETRY_PAUSE_S, 2 * RETRY_PAUSE_S, 4 * RETRY_PAUSE_S]


def test_pauses_differ_by_up_to_half():
    pauses = []
    for chance in (0.0, 1.0):
        retries = Retries(3, random=lambda chance=chance: chance)
        retries.failed("a")
        pauses.append(retries.pause_s)
    assert pauses == [0.5 * RETRY_PAUSE_S, 1.5 * RETRY_PAUSE_S]


def test_the_budget_is_asked_last_and_bounds_every_retry():
    asked = []

    def budget():
        asked.append(1)
        return len(asked) < 2

    retries = Retries(3, budget)
    assert not retries.wants(404)
    assert asked == []
    assert retries.wants(503)
    retries.failed("a")
    assert not retries.wants(503)
    assert not Retries(3, budget).wants(500)


def test_a_request_is_to_blame_that_died_with_its_engine_alone_or_twice():
    assert Retries(3).killed(alone=True)
    retries = Retries(3)
    assert not retries.killed(alone=False), "somebody else may be"
    assert retries.killed(alone=False)


def took(budget, times, answered, now_s):
    return sum(budget.take(answered, now_s) for _ in range(times))


def test_where_nothing_is_answered_only_the_least_count_is_retried():
    budget = RetryBudget(percent=20, min_count=3)
    assert took(budget, 100, 0, 0.0) == 3
    assert took(budget, 100, 0, 0.1) == 0
    assert took(budget, 100, 0, BUDGET_WINDOW_S + 0.1) == 3, "the window has passed"


def test_a_share_of_what_is_answered_may_be_retried():
    budget = RetryBudget(percent=20, min_count=0)
    assert took(budget, 10, 5_000, 0.0) == 0, "nobody knows when those were"
    assert took(budget, 1_000, 5_500, 1.0) == 100
    assert took(budget, 1_000, 5_500, 1.0) == 0


def test_answers_of_long_ago_give_nothing():
    budget = RetryBudget(percent=50, min_count=0)
    took(budget, 1, 0, 0.0)
    # 1,000 answers in ten windows: a hundred of them are recent.
    assert took(budget, 1_000, 1_000, 10 * BUDGET_WINDOW_S) == 50
    assert took(budget, 1_000, 1_000, 30 * BUDGET_WINDOW_S) == 0


@given(
    st.lists(st.tuples(st.floats(0, 30), st.integers(0, 50)), min_size=1, max_size=50),
    st.integers(0, 100),
    st.integers(0, 5),
)
def test_retries_never_exceed_the_share_of_all_answers(steps, percent, min_count):
    budget, now_s, answered, taken = RetryBudget(percent, min_count), 0.0, 0, 0
    for since_s, more in steps:
        now_s += since_s
        answered += more
        taken += took(budget, 100, answered, now_s)
    windows = 1 + now_s / BUDGET_WINDOW_S
    assert taken <= min_count * windows + percent / 100 * answered + 1e-6
