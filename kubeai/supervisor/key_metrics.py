"""Metrics of the limits of API keys, read from the key table on each scrape.

Created by the supervisor, read by metrics.py. A key has series while it exists and something was
counted for it.
"""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from typing_extensions import override

from kubeai._key_table import KeyTable
from kubeai.supervisor.peers.key_uses import KeyRows
from kubeai.supervisor.scraped import Scraped


class KeyLimits(Scraped):
    """The key table's cells as metric families, by the name of the key's Secret."""

    def __init__(self, table: KeyTable, keys: KeyRows) -> None:
        self._table = table
        self._keys = keys

    @override
    def collect(self) -> Iterable[Metric]:
        in_flight = GaugeMetricFamily(
            "kubeai_key_requests_in_flight",
            "This KubeAI replica's requests of a key with limits that are held or served.",
            labels=("key",),
        )
        refused = CounterMetricFamily(
            "kubeai_key_requests_limited",
            "Total number of requests that exceeded a limit of their key.",
            labels=("key",),
        )
        for name, (row, _) in self._keys.rows.items():
            refusals = self._table.refused(row)
            if refusals or self._table.is_counted(row):
                in_flight.add_metric((name,), self._table.use_here(row).in_flight)
                refused.add_metric((name,), refusals)
        return in_flight, refused
