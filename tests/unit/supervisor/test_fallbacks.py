"""Requests that fell back, as metrics."""

from prometheus_client import CollectorRegistry, generate_latest

from kubeai.routing.channel import FallbackCount, FallbackReport
from kubeai.supervisor.fallbacks import FallbackMetrics


def scrape(metrics: FallbackMetrics) -> list[str]:
    registry = CollectorRegistry()
    registry.register(metrics)
    text = generate_latest(registry).decode()
    return [line for line in text.splitlines() if not line.startswith("#")]


def test_reports_of_all_processes_add_up():
    metrics = FallbackMetrics(lambda: ["a", "b"])
    assert scrape(metrics) == []
    metrics.report(FallbackReport((FallbackCount("a", "b", "failing", 2),)))
    metrics.report(
        FallbackReport(
            (FallbackCount("a", "b", "failing", 3), FallbackCount("a", "b", "not_ready", 1))
        )
    )
    series = 'kubeai_fallbacks_total{fallback="b",reason="%s",request_model="a"} %s'
    assert scrape(metrics) == [series % ("failing", "5.0"), series % ("not_ready", "1.0")]


def test_series_are_removed_with_either_model():
    models = {"a", "b", "c"}
    metrics = FallbackMetrics(lambda: models)
    pairs = [("a", "b"), ("b", "c"), ("a", "c")]
    metrics.report(FallbackReport(tuple(FallbackCount(*pair, "blocked", 1) for pair in pairs)))
    assert len(scrape(metrics)) == 3
    models.discard("b")
    assert len(scrape(metrics)) == 1
    models.add("b")
    assert len(scrape(metrics)) == 1, "a Model of the same name begins at 0"
