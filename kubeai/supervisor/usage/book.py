"""The usage of API keys in one KubeAI replica, from the workers' reports to metrics and ConfigMaps.

The supervisor owns one :class:`UsageBook`. It stores what is new every ``FLUSH_INTERVAL_S`` and
when the supervisor ends, so a KubeAI replica that is killed loses at most that much.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Collection

from kubeai.kube.client import Kube
from kubeai.logs import get_logger
from kubeai.routing.usage import UsageReport
from kubeai.supervisor.usage.ledger import UsageLedger
from kubeai.supervisor.usage.metrics import UsageCollector
from kubeai.supervisor.usage.store import UsageStore, day_of

log = get_logger(__name__)

FLUSH_INTERVAL_S = 30.0
FLUSH_JITTER = 1.1  # times the interval, at most
TIDY_INTERVAL_S = 3600.0
LAST_FLUSH_TIMEOUT_S = 10.0


class UsageBook:
    """See the module.

    ``keys``: the names of the keys that exist; None: not known yet. ``models``: the names of the
    Models that exist.
    """

    def __init__(
        self,
        kube: Kube,
        namespace: str,
        identity: str,
        *,
        keys: Callable[[], Collection[str] | None],
        models: Callable[[], Collection[str]],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._clock = clock
        self._keys = keys
        self._models = models
        self.ledger = UsageLedger()
        self._store = UsageStore(kube, namespace, identity, self.ledger, clock)
        self.collector = UsageCollector(self.ledger, lambda: self._store.failures)

    def add(self, report: UsageReport) -> None:
        """Count a worker's report."""
        self.ledger.add(report.rows, day_of(self._clock()))

    async def run(self) -> None:
        """Store what is new, and forget what is old, until cancelled."""
        loop = asyncio.get_running_loop()
        tidied_s = -TIDY_INTERVAL_S
        while True:
            # KubeAI replicas that start together do not write together.
            await asyncio.sleep(FLUSH_INTERVAL_S * random.uniform(1, FLUSH_JITTER))
            await self._store.flush()
            known = self._keys()
            if known is None:
                continue
            keys, models = set(known), set(self._models())
            self.ledger.retain(keys, models)
            if loop.time() - tidied_s >= TIDY_INTERVAL_S:
                tidied_s = loop.time()
                await self._store.tidy(keys, models)

    async def close(self) -> None:
        """Store what is left. Call it when no worker runs, and after `run` has been cancelled."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_FLUSH_TIMEOUT_S):
                if await self._store.flush():
                    return
        log.error("usage of API keys is lost", message="the last counts could not be stored")
