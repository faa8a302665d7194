"""When a message is tried again."""

import pytest

from kubeai.messenger.message import Answer
from kubeai.messenger.policy import (
    ATTEMPTS_MAX_COUNT,
    FAILED_MAX_S,
    HELD_MAX_S,
    Attempts,
    Verdict,
    judge,
)


def answer(status, **headers):
    return Answer(status, {name.replace("_", "-"): value for name, value in headers.items()}, b"")


@pytest.mark.parametrize("status", [200, 204, 301, 400, 401, 404, 408, 413, 422, 501, 505])
def test_these_are_responses(status):
    assert judge(answer(status), held=False) is Verdict.DONE


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504, 529, 599])
def test_these_are_failed_attempts(status):
    assert judge(answer(status), held=False) is Verdict.FAILED


def crash(engines):
    return answer(502, x_should_retry="false", x_kubeai_crashed_engines=str(engines))


def test_a_request_that_crashed_its_engine_is_tried_once_more():
    assert judge(crash(1), held=False) is Verdict.FAILED
    attempts = Attempts(30.0)
    assert attempts.next_s(Verdict.FAILED, answer(500), 1.0, 0.0) is not None
    assert attempts.next_s(Verdict.FAILED, crash(1), 1.0, 0.0) is not None
    assert attempts.next_s(Verdict.FAILED, answer(500), 1.0, 0.0) is not None
    assert attempts.next_s(Verdict.FAILED, crash(1), 1.0, 0.0) is None


def test_a_request_that_crashed_two_engines_at_once_is_not_tried_on_a_third():
    assert judge(crash(2), held=False) is Verdict.FAILED
    assert Attempts(30.0).next_s(Verdict.FAILED, crash(2), 1.0, 0.0) is None


@pytest.mark.parametrize("status", [500, 502, 503])
def test_an_error_that_the_engine_regards_as_final_is_a_response(status):
    assert judge(answer(status, x_should_retry="false"), held=False) is Verdict.DONE


@pytest.mark.parametrize("status", [503, 504])
def test_a_request_that_was_held_has_not_failed(status):
    assert judge(answer(status), held=True) is Verdict.WAIT


def test_a_model_that_cannot_start_counts_as_a_failure():
    assert judge(answer(503, x_should_retry="false"), held=True) is Verdict.FAILED


def test_a_model_that_is_deleted_while_the_request_is_held_is_a_response():
    assert judge(answer(404), held=True) is Verdict.DONE


def test_failed_attempts_are_limited_in_number():
    attempts = Attempts(30.0)
    waits = [
        attempts.next_s(Verdict.FAILED, answer(500), 1.0, 0.0) for _ in range(ATTEMPTS_MAX_COUNT)
    ]
    assert waits.pop() is None
    assert all(wait is not None for wait in waits)
    assert waits == sorted(waits) or all(15 <= wait <= 30 for wait in waits[5:])


def test_failed_attempts_are_limited_in_the_time_that_they_take():
    attempts = Attempts(30.0)
    assert attempts.next_s(Verdict.FAILED, answer(504), FAILED_MAX_S - 1, 0.0) is not None
    assert attempts.next_s(Verdict.FAILED, answer(504), 1.0, 0.0) is None


def test_holds_use_up_no_attempts_until_their_own_limit():
    attempts = Attempts(30.0)
    held_s = 0.0
    while attempts.next_s(Verdict.WAIT, answer(504), 0.0, 600.0) is not None:
        held_s += 600.0
    assert HELD_MAX_S - 700 <= held_s <= HELD_MAX_S


def test_a_model_that_is_known_to_be_unavailable_is_given_up_after_the_same_time():
    attempts = Attempts(30.0)
    waited_s = 0.0
    while (wait_s := attempts.next_s(Verdict.WAIT, answer(503), 0.0, 0.0)) is not None:
        waited_s += wait_s
    assert HELD_MAX_S <= waited_s <= HELD_MAX_S + 30


def test_back_off_grows_to_the_configured_limit_and_has_jitter():
    attempts = Attempts(3.0)
    waits = [attempts.next_s(Verdict.WAIT, answer(503), 0.0, 0.0) for _ in range(200)]
    assert 0.5 <= waits[0] <= 1
    assert all(1.5 <= wait <= 3 for wait in waits[2:])
    assert len(set(waits)) > 100


def test_after_a_long_hold_the_next_attempt_is_soon():
    attempts = Attempts(30.0)
    for _ in range(10):
        attempts.next_s(Verdict.WAIT, answer(503), 0.0, 0.0)
    assert attempts.next_s(Verdict.WAIT, answer(504), 0.0, 600.0) <= 1


def test_retry_after_is_respected_up_to_the_limit():
    attempts = Attempts(30.0)
    assert attempts.next_s(Verdict.FAILED, answer(429, retry_after="20"), 1.0, 0.0) == 20
    assert attempts.next_s(Verdict.FAILED, answer(429, retry_after="3600"), 1.0, 0.0) == 30
    assert attempts.next_s(Verdict.FAILED, answer(429, retry_after="²"), 1.0, 0.0) <= 4
