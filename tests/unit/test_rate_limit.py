"""Rate limits of log events."""

from kubeai._rate_limit import RateLimit


def test_after_a_burst_events_are_logged_at_a_rate_and_the_others_counted():
    events = RateLimit(burst_max=3, per_s=2)
    assert [events.take(100.0) for _ in range(5)] == [0, 0, 0, None, None]
    assert [events.take(100.4), events.take(100.6), events.take(100.7)] == [None, 3, None]
    assert [events.take(101.2), events.take(101.3)] == [1, None]


def test_a_pause_allows_at_most_one_burst():
    events = RateLimit(burst_max=3, per_s=2)
    for _ in range(4):
        events.take(0.0)
    assert [events.take(1e6) for _ in range(5)] == [1, 0, 0, None, None]
