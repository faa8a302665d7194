"""The usage of keys as Prometheus metrics: this KubeAI replica's, since its process started.

Series exist for keys that exist, and are removed with them. The series of all KubeAI replicas
add up to the usage of a key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector
from typing_extensions import override

from kubeai.supervisor.scraped import Scraped
from kubeai.supervisor.usage.ledger import UsageLedger

_LABELS = ("key", "tenant", "model")
_FAMILIES = (  # in the order of UsageCounts
    ("requests", "Total number of requests that have ended, by API key."),
    (
        "requests_estimated",
        "Total number of requests whose tokens are estimated, because no engine reported them.",
    ),
    ("prompt_tokens", "Total number of prompt tokens, by API key."),
    ("prompt_tokens_cached", "Total number of prompt tokens that engines had cached, by API key."),
    ("completion_tokens", "Total number of completion tokens, by API key."),
)


class UsageCollector:
    """A ledger's sums as metric families. ``failures``: attempts to store usage that failed."""

    def __init__(self, ledger: UsageLedger, failures: Callable[[], int]) -> None:
        self._ledger = ledger
        self._failures = failures

    def frozen(self) -> Collector:
        """A collector of the present values, which a thread may use."""
        rows = [
            (key, usage.tenant, model, *msgspec.structs.astuple(counts)[: len(_FAMILIES)])
            for key, usage in self._ledger.totals.items()
            for model, counts in usage.models.items()
        ]
        return _Frozen(rows, self._failures())


class _Frozen(Scraped):
    """``rows``: the labels, then the values of the families."""

    def __init__(self, rows: Sequence[tuple[Any, ...]], failures: int) -> None:
        self._rows = rows
        self._failures = failures

    @override
    def collect(self) -> Iterable[Metric]:
        for at, (name, text) in enumerate(_FAMILIES, len(_LABELS)):
            family = CounterMetricFamily(f"kubeai_key_{name}", text, labels=_LABELS)
            for row in self._rows:
                family.add_metric(row[: len(_LABELS)], row[at])
            yield family
        yield CounterMetricFamily(
            "kubeai_usage_write_failures",
            "Total number of attempts to store the usage of keys that failed.",
            self._failures,
        )
