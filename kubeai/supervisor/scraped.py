"""The base class of metrics that are read where they are kept, on each scrape."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.core import Metric
from prometheus_client.registry import Collector


class Scraped(Collector):
    """A collector that the registry does not call when it is registered."""

    def describe(self) -> Iterable[Metric]:
        """No metrics. Without this method, the registry collects once during registration."""
        return ()
