"""How many requests have fallen back, for ``/metrics``.

:class:`FallbackMetrics` adds up what the workers and the messenger report each second. What a
process counted after its last report is lost when it is killed. Owned by the supervisor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable

from prometheus_client.core import CounterMetricFamily, Metric
from typing_extensions import override

from kubeai.routing.channel import FallbackReason, FallbackReport
from kubeai.supervisor.scraped import Scraped


class FallbackMetrics(Scraped):
    """See the module. ``models``: the names of all Models; counts of others are dropped."""

    def __init__(self, models: Callable[[], Collection[str]]) -> None:
        self._models = models
        self._counts: Counter[tuple[str, str, FallbackReason]] = Counter()

    def report(self, report: FallbackReport) -> None:
        """Take in a process's report."""
        for one in report.counts:
            self._counts[one.model, one.fallback, one.reason] += one.count

    @override
    def collect(self) -> Iterable[Metric]:
        models = set(self._models())
        gone = [names for names in self._counts if not models.issuperset(names[:2])]
        for names in gone:
            del self._counts[names]
        family = CounterMetricFamily(
            "kubeai_fallbacks",
            "Total number of requests that left a model for a fallback, by reason.",
            labels=("request_model", "fallback", "reason"),
        )
        for names, count in sorted(self._counts.items()):
            family.add_metric(names, count)
        yield family
