"""Measures the effect of several KubeAI replicas not seeing each other's picks immediately.

``bench/replicas.py`` generates the table in docs/explain/several-replicas.md with it.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from kubeai.simulation.cluster import simulate
from kubeai.simulation.engine import Engine, EngineConfig
from kubeai.simulation.setting import Setting, Strategy
from kubeai.simulation.traffic import Conversation, Shape, generate


class Balance(NamedTuple):
    """``imbalance``: requests on the busiest engine relative to the mean of all engines."""

    imbalance_mean: float
    imbalance_p99: float
    hit_rate: float  # share of prompt tokens found in a cache


class Experiment(msgspec.Struct, frozen=True, kw_only=True):
    """An endless stream of conversations; requests sent from ``from_s`` to ``until_s`` count."""

    shape: Shape
    concurrency: int
    engine: EngineConfig = EngineConfig(cache_blocks=1600)
    from_s: float = 20.0
    until_s: float = 80.0

    def run(
        self,
        *,
        replicas: int = 1,
        strategy: Strategy = "LeastLoad",
        seed: int = 1,
        shared: bool = True,
        expected: bool = True,
    ) -> Balance:
        """Simulate; a minute of virtual time takes a few seconds."""
        imbalances: list[float] = []
        now_s = 0.0

        def watch(sent_s: float, engines: list[Engine]) -> None:
            nonlocal now_s
            now_s = sent_s
            if self.from_s <= sent_s < self.until_s:
                loads = [engine.running + engine.waiting for engine in engines]
                imbalances.append(max(loads) * len(loads) / sum(loads))

        def conversations() -> Iterator[Conversation]:
            endless = msgspec.structs.replace(self.shape, conversations=1 << 30)
            return itertools.takewhile(lambda _: now_s < self.until_s, generate(endless, seed))

        setting = Setting(
            engine=self.engine,
            strategy=strategy,
            replicas=replicas,
            shared=shared,
            expected=expected,
            replication=100,
            concurrency=self.concurrency,
            seed=seed,
        )
        measurements = simulate(setting, conversations(), watch).measurements
        counted = [one for one in measurements if self.from_s <= one.sent_s < self.until_s]
        imbalances.sort()
        return Balance(
            imbalance_mean=statistics.fmean(imbalances),
            imbalance_p99=imbalances[len(imbalances) * 99 // 100],
            hit_rate=sum(one.cached_tokens for one in counted)
            / sum(one.prompt_tokens for one in counted),
        )
