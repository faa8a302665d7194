"""Routers pick the engine for each simulated request: KubeAI, or what it is compared with.

The hash ring, the load table, the prefix index and the picks are the gateway's own compiled code.
``cluster`` creates a :class:`Router` per run and closes it.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

from typing_extensions import override

from kubeai._counts import Reservation
from kubeai._load import LoadTable
from kubeai._pick import Picker
from kubeai._prefix import PrefixIndex
from kubeai._prompt import Prompt
from kubeai._ring import Ring
from kubeai.simulation.engine import Engine
from kubeai.simulation.setting import Setting

MODEL_ROW = 0
INDEX_ENTRIES = 1 << 20
SENT_MAX = 512  # prompts per report
Sent = tuple[int, int, bytes]  # row, new tokens, blocks
Load = tuple[int, int]  # requests in flight, prompt tokens pending


class Clock(Protocol):
    """Schedules callbacks in virtual time."""

    def __call__(self, when_s: float, callback: Callable[[float], None]) -> None:
        """Call ``callback`` at ``when_s`` with that time."""


class Request(NamedTuple):
    """What a router may know of a request."""

    prompt: Prompt  # what the gateway knows
    hashes: list[int]  # of the prompt's full blocks


class Router:
    """Selects the engine for each request."""

    def pick(self, request: Request) -> tuple[int, Reservation | None]:
        """An engine's number, and the reservation to release when it has responded."""
        raise NotImplementedError

    def start(self, at: Clock) -> None:
        """Schedule periodic work."""

    def close(self) -> None:
        """Release resources."""


class Service(Router):
    """A Kubernetes Service in front of the engines: random, or round-robin (IPVS)."""

    def __init__(self, setting: Setting) -> None:
        self._turns = itertools.cycle(range(setting.engines))
        self._random = random.Random(f"{setting.seed} service")
        self._engines = setting.engines
        self._in_turn = setting.strategy == "RoundRobin"

    @override
    def pick(self, request: Request) -> tuple[int, Reservation | None]:
        if self._in_turn:
            return next(self._turns), None
        return self._random.randrange(self._engines), None


class Replica:
    """One KubeAI replica: a ring and a load table, with the peers' last reported loads."""

    def __init__(self, setting: Setting, phase: int, now_s: Callable[[], float]) -> None:
        self._supervisor = LoadTable.create(setting.engines + 1, 1)
        self._supervisor.phase = phase
        if setting.shared and setting.expected:
            self._supervisor.peers = setting.replicas - 1
        self._table = LoadTable.attach(self._supervisor.fd, 0)
        self._lives = [self._supervisor.open_row(row) for row in range(setting.engines + 1)]
        self._ring = Ring(
            self._table,
            MODEL_ROW,
            self._lives[MODEL_ROW],
            replication=setting.replication,
            mean_load_factor=setting.mean_load_factor,
            clock=now_s,
        )
        for row, name in enumerate(setting.pod_names, 1):
            self._ring.set(name, row, self._lives[row], target=row - 1)
        self._shared_index = PrefixIndex.create(setting.engines + 1, INDEX_ENTRIES)
        self._index = PrefixIndex.attach(self._shared_index.fd, 0)
        for row in range(1, setting.engines + 1):
            self._index.set_cache(row, setting.engine.cache_blocks * setting.engine.block_tokens)
        if setting.shared and not setting.shares_prompts:
            self._shared_index.silent = setting.replicas - 1
        self._without = setting.without
        self._picker = Picker(self._ring, None if "index" in setting.without else self._index)
        strategy = setting.strategy
        assert strategy in ("LeastLoad", "PrefixHash", "PrefixCache"), "the gateway's"
        self._picker.configure(strategy, setting.prefix_char_length)
        self._peer_loads: dict[int, list[Load]] = {}

    def pick(self, request: Request) -> Reservation | None:
        """Pick an engine with the gateway's own code."""
        reservation = self._picker.pick(request.prompt)
        if reservation is not None and "work" in self._without:
            reservation.prefilled(0.0)
        return reservation

    def loads(self) -> list[Load]:
        """This KubeAI replica's load per engine."""
        return [
            (self._table.in_flight_here(row), self._table.pending_here(row))
            for row in range(1, len(self._lives))
        ]

    def hear(self, number: int, loads: list[Load], sent: list[Sent]) -> None:
        """Take a report of a peer."""
        self.set_peer_loads(number, loads)
        self.note_sent(sent)

    def set_peer_loads(self, number: int, loads: list[Load]) -> None:
        """Record a peer's load per engine."""
        self._peer_loads[number] = loads
        total_in_flight = total_pending = 0
        for row, counts in enumerate(zip(*self._peer_loads.values(), strict=True), 1):
            in_flight = sum(count for count, _ in counts)
            pending = sum(tokens for _, tokens in counts)
            self._supervisor.set_peers(row, self._lives[row], in_flight, pending)
            total_in_flight += in_flight
            total_pending += pending
        self._supervisor.set_peers(
            MODEL_ROW, self._lives[MODEL_ROW], total_in_flight, total_pending
        )

    def take_sent(self) -> list[Sent]:
        """The prompts sent since the last call."""
        entries, _ = self._shared_index.take_log(SENT_MAX)
        return entries

    def note_sent(self, sent: list[Sent]) -> None:
        """Note what a peer has sent."""
        for row, new_tokens, blocks in sent:
            self._shared_index.note(row, blocks, new_tokens)

    def settle(self) -> None:
        """Move the settled counts, which predict the peers' loads, towards the current loads."""
        self._supervisor.settle()

    def close(self) -> None:
        """Close the load table."""
        self._index.close()
        self._shared_index.close()
        self._table.close()
        self._supervisor.close()


class Replicas(Router):
    """KubeAI's replicas; each request goes to a random one."""

    def __init__(self, setting: Setting, now_s: Callable[[], float]) -> None:
        self._random = random.Random(f"{setting.seed} gateway")
        self._replicas = [
            Replica(setting, self._random.getrandbits(32), now_s) for _ in range(setting.replicas)
        ]
        self._shares_loads = setting.shared and setting.replicas > 1
        self._shares_prompts = setting.shares_prompts
        self._interval_s, self._network_delay_s = setting.share_interval_s, setting.network_s

    @override
    def pick(self, request: Request) -> tuple[int, Reservation | None]:
        several = len(self._replicas) > 1
        replica = self._random.choice(self._replicas) if several else self._replicas[0]
        pick = replica.pick(request)
        assert pick is not None, "there are engines"
        return pick.target, pick  # type: ignore[return-value]

    @override
    def start(self, at: Clock) -> None:
        if not self._shares_loads:
            return
        for number, replica in enumerate(self._replicas):
            share = partial(self._share_loads, at, number)
            _repeat(at, self._random.random() * self._interval_s, self._interval_s, share)
            settle_s = self._interval_s / 4
            _repeat(
                at,
                self._random.random() * settle_s,
                settle_s,
                lambda _, r=replica: r.settle(),  # type: ignore[misc]
            )

    def _share_loads(self, at: Clock, number: int, now_s: float) -> None:
        loads = self._replicas[number].loads()
        sent = self._replicas[number].take_sent() if self._shares_prompts else []
        for other in self._replicas:
            if other is not self._replicas[number]:
                at(
                    now_s + self._network_delay_s,
                    lambda _, to=other: to.hear(number, loads, sent),  # type: ignore[misc]
                )

    @override
    def close(self) -> None:
        for replica in self._replicas:
            replica.close()


def _repeat(
    at: Clock, first_s: float, interval_s: float, callback: Callable[[float], None]
) -> None:
    def fire(now_s: float) -> None:
        callback(now_s)
        at(now_s + interval_s, fire)

    at(first_s, fire)


class Oracle(Router):
    """An ideal router that knows every cache, as an upper bound.

    Picks the engine with the longest cached prefix among those within PrefixHash's load bound.
    """

    def __init__(self, setting: Setting, engines: list[Engine]) -> None:
        self._engines = engines
        self._factor = setting.mean_load_factor / 100

    @override
    def pick(self, request: Request) -> tuple[int, Reservation | None]:
        loads = [engine.running + engine.waiting for engine in self._engines]
        bound = max(2.0, self._factor * (sum(loads) + 1) / len(loads))
        within = [number for number, load in enumerate(loads) if load + 1 <= bound]

        def rank(number: int) -> tuple[int, int]:
            found = self._engines[number].cache.match(request.hashes, len(request.hashes))
            return found, -loads[number]

        return max(within or range(len(loads)), key=rank), None


def make_router(setting: Setting, engines: list[Engine], now_s: Callable[[], float]) -> Router:
    """The router of the setting's strategy. ``now_s``: the virtual time."""
    match setting.strategy:
        case "Service" | "RoundRobin":
            return Service(setting)
        case "Oracle":
            return Oracle(setting, engines)
        case _:
            return Replicas(setting, now_s)
