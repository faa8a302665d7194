"""How many requests have fallen back, and how many were denied, for ``/metrics``.

:class:`EventMetrics` adds up what the workers and the messenger report each second. What a process
counted after its last report is lost when it is killed. Owned by the supervisor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable

from prometheus_client.core import CounterMetricFamily, Metric
from typing_extensions import override

from kubeai.routing.channel import CountedEvent, EventReport
from kubeai.supervisor.scraped import Scraped

FAMILIES: dict[CountedEvent, tuple[str, str, tuple[str, ...]]] = {
    "fallback": (
        "kubeai_fallbacks",
        "Total number of requests that left a model for a fallback, by reason.",
        ("request_model", "fallback", "reason"),
    ),
    "denial": (
        "kubeai_denied_requests",
        "Total number of requests that were denied to a client with or without a key, by code.",
        ("code",),
    ),
}


class EventMetrics(Scraped):
    """See the module. ``models``: the names of all Models; fallbacks of others are dropped."""

    def __init__(self, models: Callable[[], Collection[str]]) -> None:
        self._models = models
        self._counts: dict[CountedEvent, Counter[tuple[str, ...]]] = {
            event: Counter() for event in FAMILIES
        }

    def report(self, report: EventReport) -> None:
        """Take in a process's report."""
        for one in report.counts:
            self._counts[one.event][one.labels] += one.count

    @override
    def collect(self) -> Iterable[Metric]:
        fallbacks, models = self._counts["fallback"], set(self._models())
        for labels in [each for each in fallbacks if not models.issuperset(each[:2])]:
            del fallbacks[labels]
        for event, (name, description, label_names) in FAMILIES.items():
            family = CounterMetricFamily(name, description, labels=label_names)
            for labels, count in sorted(self._counts[event].items()):
                family.add_metric(labels, count)
            yield family
