"""Which failures are repeated, and where: the policy that every kind of request has in common."""

import pytest

from kubeai.gateway.attempts import NO_ANSWER, RETRY_PAUSE_S, Retries


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
    retries, pauses = Retries(3), []
    for name in "abc":
        retries.failed(name)
        pauses.append(retries.pause_s)
    assert pauses == [RETRY_PAUSE_S, 2 * RETRY_PAUSE_S, 4 * RETRY_PAUSE_S]
