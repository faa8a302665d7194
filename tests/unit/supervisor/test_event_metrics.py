"""Requests that fell back or were denied, as metrics."""

from prometheus_client import CollectorRegistry, generate_latest

from kubeai.routing.channel import EventCount, EventReport
from kubeai.supervisor.event_metrics import EventMetrics


def fell_back(model: str, fallback: str, reason: str, count: int) -> EventCount:
    return EventCount("fallback", (model, fallback, reason), count)


def scrape(metrics: EventMetrics) -> list[str]:
    registry = CollectorRegistry()
    registry.register(metrics)
    text = generate_latest(registry).decode()
    return [line for line in text.splitlines() if not line.startswith("#")]


def test_reports_of_all_processes_add_up():
    metrics = EventMetrics(lambda: ["a", "b"])
    assert scrape(metrics) == []
    metrics.report(EventReport((fell_back("a", "b", "failing", 2),)))
    metrics.report(
        EventReport((fell_back("a", "b", "failing", 3), fell_back("a", "b", "not_ready", 1)))
    )
    series = 'kubeai_fallbacks_total{fallback="b",reason="%s",request_model="a"} %s'
    assert scrape(metrics) == [series % ("failing", "5.0"), series % ("not_ready", "1.0")]


def test_series_are_removed_with_either_model():
    models = {"a", "b", "c"}
    metrics = EventMetrics(lambda: models)
    pairs = [("a", "b"), ("b", "c"), ("a", "c")]
    metrics.report(EventReport(tuple(fell_back(*pair, "blocked", 1) for pair in pairs)))
    assert len(scrape(metrics)) == 3
    models.discard("b")
    assert len(scrape(metrics)) == 1
    models.add("b")
    assert len(scrape(metrics)) == 1, "a Model of the same name begins at 0"


def test_denials_are_counted_by_code():
    metrics = EventMetrics(list)
    for _ in range(2):
        metrics.report(EventReport((EventCount("denial", ("invalid_api_key",), 3),)))
    assert scrape(metrics) == ['kubeai_denied_requests_total{code="invalid_api_key"} 6.0']
