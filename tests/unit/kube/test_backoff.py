"""Delays between retries."""

from __future__ import annotations

from kubeai.kube.backoff import Backoff


def test_the_back_off_grows_to_its_limit_with_jitter():
    low, high = Backoff(1.0, 30.0, lambda: 0.0), Backoff(1.0, 30.0, lambda: 1.0)
    assert [low.next_s() for _ in range(7)] == [0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 15.0]
    assert [high.next_s() for _ in range(7)] == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]
    high.reset()
    assert high.next_s() == 1.0
