"""Delays between retries."""

from __future__ import annotations

from kubeai.kube.backoff import Backoff, RestartBackoff


def test_the_back_off_grows_to_its_limit_with_jitter():
    low, high = Backoff(1.0, 30.0, lambda: 0.0), Backoff(1.0, 30.0, lambda: 1.0)
    assert [low.next_s() for _ in range(7)] == [0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 15.0]
    assert [high.next_s() for _ in range(7)] == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]
    high.reset()
    assert high.next_s() == 1.0


def test_a_process_is_restarted_at_once_unless_it_keeps_exiting():
    backoff = RestartBackoff(1.0, 4.0, settled_s=10.0)
    waits_s = [backoff.next_s(ran_s=0.1) for _ in range(5)]
    assert waits_s[0] == 0.0
    for wait_s, most_s in zip(waits_s[1:], (2.0, 4.0, 4.0, 4.0), strict=True):
        assert most_s / 2 <= wait_s <= most_s
    assert backoff.next_s(ran_s=10.0) == 0.0, "it had settled"
    assert backoff.next_s(ran_s=0.1) > 0.0
