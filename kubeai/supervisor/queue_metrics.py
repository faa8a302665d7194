"""Metrics of the queues of waiting requests, read from the queue table on each scrape."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate

from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily, Metric
from typing_extensions import override

from kubeai._queue_table import CLASS_NAMES, WAIT_BUCKETS_S, QueueTable
from kubeai.routing.publisher import Publisher
from kubeai.supervisor.scraped import Scraped

_BOUNDS = [*map(str, WAIT_BUCKETS_S), "+Inf"]


class QueueCollector(Scraped):
    """The queue table's counts as metric families, by class of priority."""

    def __init__(self, queues: QueueTable, publisher: Publisher) -> None:
        self._queues = queues
        self._publisher = publisher

    @override
    def collect(self) -> Iterable[Metric]:
        length = GaugeMetricFamily(
            "kubeai_queue_requests",
            "Number of requests that wait for a model, by class of priority.",
            labels=("request_model", "priority"),
        )
        waits = HistogramMetricFamily(
            "kubeai_queue_wait_seconds",
            "Seconds that requests waited before they were sent, by class of priority.",
            labels=("request_model", "priority"),
        )
        for route in self._publisher.snapshot().routes:
            waiting = self._queues.waiting(route.row)
            waited = self._queues.waited(route.row)
            for name, count, (counts, sum_s) in zip(CLASS_NAMES, waiting, waited, strict=True):
                length.add_metric((route.model, name), count)
                if name == "normal" or count or any(counts):
                    buckets = list(zip(_BOUNDS, map(float, accumulate(counts)), strict=True))
                    waits.add_metric((route.model, name), buckets, sum_s)
        return length, waits
