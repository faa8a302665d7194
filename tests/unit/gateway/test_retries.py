"""Which failures are retried, where, and how often: the policy for all kinds of requests."""

import asyncio
import sys

import pytest
from fakes.time import FAKE_TIME
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from kubeai.gateway.retries import (
    BUDGET_WINDOW_S,
    NO_ANSWER,
    RETRY_PAUSE_S,
    TIMED_OUT,
    Retries,
    RetryBudget,
)
from kubeai.openai.errors import ErrorResponse
from kubeai.routing.routes import Route


class Upstream:
    """The part of an endpoint that Retries uses."""

    def __init__(self):
        self.is_trusted = True
        self.is_down = False
        self.answered_s = 0.0
        self.probes_left = 0

    def is_proven(self, since_s):
        return self.answered_s > since_s

    def take_probe(self):
        self.probes_left -= 1
        return self.probes_left >= 0


class Pick(str):
    """Stands in for a Reservation: compares as its endpoint's name."""

    @property
    def name(self):
        return str(self)

    @property
    def target(self):
        return sys.intern(str(self))

    def release(self):
        pass


class Model:
    """Stands in for a RoutedModel: a pick returns the first endpoint that can be picked."""

    def __init__(self, names):
        self.upstreams = {name: Upstream() for name in names}
        self.route = Route("m", "VLLM")

    def pick(self, key, adapter, exclude=()):
        return next((Pick(name) for name in self.upstreams if name not in exclude), None)

    def pick_among(self, fits, key, adapter, exclude=()):
        unfit = [name for name, upstream in self.upstreams.items() if not fits(upstream)]
        return self.pick(key, adapter, (*exclude, *unfit))

    def can_serve(self, adapter, exclude=()):
        return self.pick(None, adapter, exclude) is not None

    def first(self, fits, adapter=None, exclude=()):
        name = self.pick_among(fits, None, adapter, exclude)
        return None if name is None else self.upstreams[name]


def refused(likely):
    return False


@pytest.mark.parametrize("status", [NO_ANSWER, 502, 503, 504])
def test_failures_that_another_replica_may_avoid_are_retried_up_to_the_limit(status):
    retries = Retries(2)
    for number in range(2):
        assert retries.wants(status, f"pod-{number}", Model("ab"))
    assert not retries.wants(status, "pod-2", Model("ab"))
    assert retries.count == 2


@pytest.mark.parametrize("status", [200, 302, 400, 401, 404, 413, 422, 429, 501, 505])
def test_responses_that_every_replica_would_give_pass_through(status):
    assert not Retries(3).wants(status, "a", Model("ab"))


def test_a_500_is_retried_only_once_regardless_of_other_failures():
    retries, model = Retries(5), Model("abc")
    assert retries.wants(500, "a", model)
    assert retries.wants(503, "b", model)
    assert not retries.wants(500, "c", model)


def test_a_limit_of_zero_disables_retries():
    assert not any(Retries(0).wants(status, "a", Model("ab")) for status in (NO_ANSWER, 500, 502))


def test_a_first_byte_timeout_is_retried_only_if_configured_and_only_elsewhere():
    assert not Retries(3).wants(TIMED_OUT, "a", Model("ab"))
    assert Retries(3, timeouts=True).wants(TIMED_OUT, "a", Model("ab"))
    assert not Retries(3, timeouts=True).wants(TIMED_OUT, "a", Model("a"))


@FAKE_TIME
async def test_a_failed_endpoint_is_retried_only_when_no_other_is_left():
    retries, model = Retries(9), Model("ab")
    assert retries.wants(503, "a", model)
    assert retries.elsewhere(model, 1, None) == "b"
    assert retries.wants(503, "b", model)
    assert retries.elsewhere(model, 1, None) is None
    assert await retries.later(model, 1, None) == "a", "b failed last"
    assert await retries.later(Model("b"), 1, None) == "b", "there is no other endpoint"
    assert await retries.later(Model(""), 1, None) is None


def test_a_trusted_endpoint_is_preferred_over_others():
    retries, model = Retries(9), Model("abc")
    model.upstreams["b"].is_trusted = False
    assert retries.wants(503, "a", model)
    assert retries.elsewhere(model, 1, None) == "c"
    assert retries.wants(503, "c", model)
    assert retries.elsewhere(model, 1, None) == "b"


def test_the_back_off_doubles():
    retries, pauses = Retries(3, random=lambda: 0.5), []
    for name in "abc":
        retries.wants(503, name, Model("abc"))
        pauses.append(retries.pause_s)
    assert pauses == [RETRY_PAUSE_S, 2 * RETRY_PAUSE_S, 4 * RETRY_PAUSE_S]


def test_the_back_off_has_up_to_50_percent_jitter():
    pauses = []
    for chance in (0.0, 1.0):
        retries = Retries(3, random=lambda chance=chance: chance)
        retries.wants(503, "a", Model("a"))
        pauses.append(retries.pause_s)
    assert pauses == [0.5 * RETRY_PAUSE_S, 1.5 * RETRY_PAUSE_S]


def test_the_budget_is_checked_last_and_with_the_likelihood_of_success():
    asked = []

    def budget(likely):
        asked.append(likely)
        return True

    model = Model("abc")
    assert not Retries(3, budget).wants(404, "a", model)
    assert asked == []
    assert Retries(3, budget).wants(503, "a", model)
    model.upstreams["b"].is_down = model.upstreams["c"].is_down = True
    assert Retries(3, budget).wants(500, "a", model)
    assert asked == [True, False]


def test_beyond_the_budget_nothing_is_retried_if_every_other_endpoint_is_down():
    model = Model("ab")
    assert not Retries(3, refused).wants(503, "a", Model("a"))
    model.upstreams["b"].is_down = True
    assert not Retries(3, refused).wants(503, "a", model)


@FAKE_TIME
async def test_beyond_the_budget_a_retry_waits_until_an_endpoint_responds(event_loop_clock):
    now_s, wait_until = event_loop_clock
    retries, model = Retries(3, refused, clock=now_s), Model("abc")
    assert retries.wants(503, "a", model)
    assert retries.elsewhere(model, 1, None) is None
    wait_until(0.05, lambda: setattr(model.upstreams["c"], "answered_s", now_s()))
    assert await retries.later(model, 1, None) == "c"
    assert 0.05 < now_s() < 0.2


@FAKE_TIME
async def test_beyond_the_budget_a_silent_endpoint_without_failures_is_picked(
    event_loop_clock,
):
    now_s, _ = event_loop_clock
    retries, model = Retries(3, refused, clock=now_s), Model("ab")
    assert retries.wants(503, "a", model)
    assert await retries.later(model, 1, None) == "b"
    assert 0.3 < now_s() < 1.0


@FAKE_TIME
@pytest.mark.parametrize(
    ("status", "becomes", "code"),
    [
        (500, 500, "bad_gateway"),
        (502, 502, "bad_gateway"),
        (503, 503, "model_unavailable"),
        (504, 504, "timeout"),
        (NO_ANSWER, 502, "bad_gateway"),
        (TIMED_OUT, 504, "timeout"),
    ],
)
async def test_beyond_the_budget_the_failure_is_returned_once_all_others_are_down(
    event_loop_clock, status, becomes, code
):
    now_s, wait_until = event_loop_clock
    retries, model = Retries(3, refused, timeouts=True, clock=now_s), Model("ab")
    assert retries.wants(status, "a", model)
    other = model.upstreams["b"]
    wait_until(0.05, lambda: other.__dict__.update(is_down=True, is_trusted=False))
    with capture_logs() as logs, pytest.raises(ErrorResponse) as caught:
        await retries.later(model, 1, None)
    assert (caught.value.status, caught.value.code) == (becomes, code)
    assert [line["endpoint"] for line in logs if line["log_level"] == "warning"] == ["a"]
    assert now_s() < 0.2


@FAKE_TIME
async def test_beyond_the_budget_one_request_probes_an_endpoint_that_has_failed(event_loop_clock):
    now_s, _ = event_loop_clock
    model = Model("ab")
    other = model.upstreams["b"]
    other.is_trusted, other.probes_left = False, 1
    probing, waiting = (Retries(3, refused, clock=now_s) for _ in range(2))
    assert probing.wants(503, "a", model)
    assert waiting.wants(503, "a", model)
    assert probing.elsewhere(model, 1, None) == "b"
    assert waiting.elsewhere(model, 1, None) is None


@pytest.fixture
def event_loop_clock():
    """Return (the fake time, a function that schedules actions), within the test's own loop."""

    def now_s():
        return asyncio.get_running_loop().time()

    def at(when_s, act):
        asyncio.get_running_loop().call_at(when_s, act)

    return now_s, at


def test_a_move_counts_as_an_attempt():
    retries, model = Retries(1), Model("abc")
    model.upstreams["a"].is_trusted = False
    assert retries.move(Pick("a"), model, 1, None) == "b"
    assert retries.trusted(model, 1, None) == "b"
    assert retries.move(Pick("b"), model, 1, None) is None
    assert not retries.wants(503, "b", model)


def test_a_request_does_not_move_to_where_it_is():
    retries, model = Retries(3), Model("a")
    assert retries.move(Pick("a"), model, 1, None) is None
    assert retries.count == 0


def test_a_request_that_was_alone_or_twice_on_a_crashing_engine_is_blamed():
    assert Retries(3).killed(alone=True)
    retries = Retries(3)
    assert not retries.killed(alone=False), "another request may be to blame"
    assert retries.killed(alone=False)
    assert retries.crashes == 2


def took(budget, times, answered, now_s, likely=True):
    return sum(budget.take(answered, now_s, likely=likely) for _ in range(times))


def test_without_responses_only_the_minimum_is_retried():
    budget = RetryBudget(percent=20, min_count=3)
    assert took(budget, 100, 0, 0.0) == 3
    assert took(budget, 100, 0, 0.1) == 0
    assert took(budget, 100, 0, BUDGET_WINDOW_S + 0.1) == 3, "the window has passed"


def test_the_retry_budget_is_a_share_of_the_responses():
    budget = RetryBudget(percent=20, min_count=0)
    assert took(budget, 10, 5_000, 0.0) == 0, "the time of those responses is unknown"
    assert took(budget, 1_000, 5_500, 1.0) == 100
    assert took(budget, 1_000, 5_500, 1.0) == 0


def test_retries_that_are_likely_to_fail_get_only_the_minimum():
    budget = RetryBudget(percent=20, min_count=3)
    assert took(budget, 1, 0, 0.0) == 1
    assert took(budget, 100, 500, 1.0, likely=False) == 3
    assert took(budget, 200, 500, 1.0) == 99, (
        "103 less the ones taken before, which have decayed a little"
    )


def test_old_responses_do_not_count_for_the_budget():
    budget = RetryBudget(percent=50, min_count=0)
    took(budget, 1, 0, 0.0)
    # 1,000 responses over ten windows: one hundred of them are recent.
    assert took(budget, 1_000, 1_000, 10 * BUDGET_WINDOW_S) == 50
    assert took(budget, 1_000, 1_000, 30 * BUDGET_WINDOW_S) == 0


@given(
    st.lists(st.tuples(st.floats(0, 30), st.integers(0, 50)), min_size=1, max_size=50),
    st.integers(0, 100),
    st.integers(0, 5),
)
def test_retries_never_exceed_their_share_of_all_responses(steps, percent, min_count):
    budget, now_s, answered, taken = RetryBudget(percent, min_count), 0.0, 0, 0
    for since_s, more in steps:
        now_s += since_s
        answered += more
        taken += took(budget, 100, answered, now_s)
    windows = 1 + now_s / BUDGET_WINDOW_S
    assert taken <= min_count * windows + percent / 100 * answered + 1e-6
