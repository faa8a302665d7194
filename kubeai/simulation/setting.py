"""The parameters of a simulated cluster, apart from its traffic."""

from __future__ import annotations

import random
from typing import Literal

import msgspec

from kubeai.simulation.engine import EngineConfig

Strategy = Literal["Service", "RoundRobin", "LeastLoad", "PrefixHash", "PrefixCache", "Oracle"]
STRATEGIES: tuple[Strategy, ...] = (
    "Service",
    "RoundRobin",
    "LeastLoad",
    "PrefixHash",
    "PrefixCache",
    "Oracle",
)
# Parts of PrefixCache: what was sent where, the pending tokens, the learned slowness of endpoints.
Part = Literal["index", "work", "rates"]
GATEWAY_STRATEGIES = ("LeastLoad", "PrefixHash", "PrefixCache")


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """The parameters of a simulation, apart from the traffic."""

    engines: int = 8
    engine: EngineConfig = EngineConfig()
    strategy: Strategy = "PrefixHash"
    mean_load_factor: int = 125
    replication: int = 20
    prefix_char_length: int = 100
    replicas: int = 1  # of KubeAI; a pick counts at once locally, and in others when they hear it
    shared: bool = True  # whether the replicas exchange their loads
    # Whether they report to each other which prompts they have sent.
    shares_prompts: bool = True
    without: tuple[Part, ...] = ()  # parts of PrefixCache that are left out, to measure their worth
    expected: bool = True  # whether a replica assumes that its peers pick as it does itself
    share_interval_s: float = 0.05
    concurrency: int = 32  # concurrent conversations, for those without a start time
    in_flight_max: int = 0  # limit on requests in flight at the client; 0: unlimited
    paced_per_s: float = 0.0  # maximum rate at which requests are due; 0: unlimited
    client_per_s: float = 0.0  # maximum rate at which the client can send; 0: unlimited
    network_s: float = 0.0005  # one way: between client and engine, and between replicas
    seed: int = 1

    @property
    def name(self) -> str:
        """The setting's name in reports."""
        name: str = self.strategy
        if self.strategy == "PrefixHash":
            name += f" {self.mean_load_factor} % x{self.replication}"
        if self.replicas > 1 and self.strategy in GATEWAY_STRATEGIES:
            name += f", {self.replicas} replicas"
        return name

    @property
    def pod_names(self) -> list[str]:
        """Realistic pod names: an engine's position on the ring depends on its name."""
        source = random.Random(f"{self.seed} pods")
        letters = "bcdfghjklmnpqrstvwxz2456789"
        return [f"model-m-{''.join(source.choices(letters, k=5))}" for _ in range(self.engines)]
