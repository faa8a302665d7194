"""The usage of keys as Prometheus metrics: this replica's requests since its process started.

Series exist for keys that exist, and are removed with them. The series of all replicas add up to
the usage of a key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector
from typing_extensions import override

from kubeai.supervisor.usage.ledger import UsageLedger

_LABELS = ("key", "tenant", "model")
_FAMILIES = (
    ("requests", "Total number of requests that have ended, by API key."),
    (
        "requests_estimated",
        "Total number of requests whose tokens are estimated, because no engine reported them.",
    ),
    ("prompt_tokens", "Total number of prompt tokens, by API key."),
    ("prompt_tokens_cached", "Total number of prompt tokens that engines had cached, by API key."),
    ("completion_tokens", "Total number of completion tokens, by API key."),
)


class UsageCollector(Collector):
    """A ledger's sums as metric families. ``failures``: attempts to store usage that failed."""

    def __init__(self, ledger: UsageLedger, failures: Callable[[], int]) -> None:
        self._ledger = ledger
        self._failures = failures

    def describe(self) -> Iterable[Metric]:
        """No metrics. Without this method, the registry collects once during registration."""
        return ()

    @override
    def collect(self) -> Iterable[Metric]:
        families = [
            CounterMetricFamily(f"kubeai_key_{name}", text, labels=_LABELS)
            for name, text in _FAMILIES
        ]
        for key, usage in self._ledger.totals.items():
            for model, counts in usage.models.items():
                values = (
                    counts.requests,
                    counts.estimated_requests,
                    counts.prompt_tokens,
                    counts.cached_tokens,
                    counts.completion_tokens,
                )
                for family, value in zip(families, values, strict=True):
                    family.add_metric((key, usage.tenant, model), value)
        yield from families
        yield CounterMetricFamily(
            "kubeai_usage_write_failures",
            "Total number of attempts to store the usage of keys that failed.",
            self._failures(),
        )
