"""Simulates tenants that share a Model, in virtual time: who waits how long for a first token?

The queue, the pick and the load table are the gateway's own code and the engines are the mock
engine's; only time and sockets are simulated. :func:`simulate` runs one mix of tenants under one
policy. Deterministic. Used by bench/tenants.py and the queue's tests.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Iterable
from typing import Any, Literal

import msgspec

from kubeai._counts import Reservation
from kubeai._load import LoadTable
from kubeai._pick import Picker
from kubeai._prompt import Prompt
from kubeai._queue_table import QueueTable
from kubeai._ring import Ring
from kubeai.routing.fair_queue import FairQueue, LocalAccounts
from kubeai.simulation.engine import Engine, EngineConfig

# engine: requests go to an engine at once, and wait in its own queue. fifo: they wait in the
# gateway, first come, first served. fair: they wait there in the order of priority and tenant.
Policy = Literal["engine", "fifo", "fair"]
REQUEST_TOKENS = 256  # of work, besides the prompt; as in the gateway


class Tenant(msgspec.Struct, frozen=True, kw_only=True):
    """A tenant's requests: ``at_once`` at ``from_s``, then ``per_s`` on average.

    Lengths are means, with a lognormal distribution.
    """

    name: str
    at_once: int = 0
    per_s: float = 0.0
    from_s: float = 0.0
    prompt_tokens: int = 500
    output_tokens: int = 100
    priority: int = 0
    spread: float = 0.6  # standard deviation of the logarithm of lengths; 0: all equal


class Mix(msgspec.Struct, frozen=True, kw_only=True):
    """What is simulated, apart from the policy."""

    tenants: tuple[Tenant, ...]
    engines: int = 2
    engine: EngineConfig = EngineConfig()
    capacity: int = 16  # requests in flight per engine
    ready_s: float = 0.0  # when the engines can serve; later than the first request: a cold Model
    until_s: float = 60.0  # tenants with a rate send until then
    seed: int = 1


class Ask(msgspec.Struct, eq=False):
    """One request, and when it came, was sent to an engine, had a first token, and was done."""

    tenant: str
    priority: int
    prompt_tokens: int
    output_tokens: int
    came_s: float
    sent_s: float = math.nan
    first_s: float = math.nan
    done_s: float = math.nan
    reservation: Reservation | None = None

    @property
    def ttft_s(self) -> float:
        """The time to the first token."""
        return self.first_s - self.came_s


def asks_of(mix: Mix) -> list[Ask]:
    """The requests of all tenants in the order of their arrival."""
    asks = []
    for tenant in mix.tenants:
        source = random.Random(f"{mix.seed} {tenant.name}")
        times = [tenant.from_s] * tenant.at_once
        now_s = tenant.from_s
        while tenant.per_s and (now_s := now_s + source.expovariate(tenant.per_s)) < mix.until_s:
            times.append(now_s)
        for at_s in times:
            prompt_tokens = _length(source, tenant.prompt_tokens, tenant.spread)
            output_tokens = _length(source, tenant.output_tokens, tenant.spread)
            asks.append(Ask(tenant.name, tenant.priority, prompt_tokens, output_tokens, at_s))
    return sorted(asks, key=lambda ask: ask.came_s)


def _length(source: random.Random, mean: int, spread: float) -> int:
    drawn = source.lognormvariate(math.log(mean) - spread * spread / 2, spread)
    return max(1, min(round(drawn), 20 * mean))


def simulate(mix: Mix, policy: Policy) -> list[Ask]:
    """Serve all requests of a mix. Returns them with their times."""
    run = _Run(mix, policy)
    try:
        return run.run(asks_of(mix))
    finally:
        run.close()


class _Place:
    """A request in the queue. Unless the queue is fair, all requests are of one tenant."""

    def __init__(self, ask: Ask, is_fair: bool) -> None:
        self.ask = ask
        self.tenant = ask.tenant if is_fair else ""
        self.priority = ask.priority if is_fair else 0
        self.work = ask.prompt_tokens + REQUEST_TOKENS
        self.adapter: str | None = None
        self.number = 0


_ARRIVE, _STEP, _READY = range(3)


class _Run:
    def __init__(self, mix: Mix, policy: Policy) -> None:
        self._policy = policy
        self._now_s = 0.0
        self._engines = [Engine(mix.engine) for _ in range(mix.engines)]
        self._stepping = [False] * mix.engines
        self._table = LoadTable.create(mix.engines + 1, 1)
        self._table.column = 0
        self._queues = QueueTable.create(mix.engines + 1, 1)
        self._queues.column = 0
        lives = [self._table.open_row(row) for row in range(mix.engines + 1)]
        self._lives = lives
        self._ring = Ring(self._table, 0, lives[0], clock=lambda: self._now_s)
        self._picker = Picker(self._ring)
        self._picker.limit(0 if policy == "engine" else mix.capacity, self._queues)
        self._queue: FairQueue[_Place] = FairQueue(LocalAccounts())
        self._events: list[tuple[float, int, int, Any]] = []
        self._order = itertools.count()
        self._at(mix.ready_s, _READY, None)

    def close(self) -> None:
        """Release the shared memory."""
        self._queues.close()
        self._table.close()

    def run(self, asks: Iterable[Ask]) -> list[Ask]:
        """Process all events."""
        asks = list(asks)
        for ask in asks:
            self._at(ask.came_s, _ARRIVE, ask)
        while self._events:
            self._now_s, _, kind, subject = heapq.heappop(self._events)
            if kind == _ARRIVE:
                self._queue.push(_Place(subject, self._policy == "fair"))
            elif kind == _STEP:
                self._step(subject)
            else:
                for number in range(len(self._engines)):
                    self._ring.set(f"e{number}", number + 1, self._lives[number + 1], target=number)
            self._dispatch()
        return asks

    def _at(self, when_s: float, kind: int, subject: Any) -> None:
        heapq.heappush(self._events, (when_s, next(self._order), kind, subject))

    def _dispatch(self) -> None:
        while (head := self._queue.head()) is not None:
            place, _ = head
            reservation = self._picker.pick(Prompt(place.ask.prompt_tokens, streams=True))
            if reservation is None:
                return
            self._queue.take(place)
            self._send(place.ask, reservation)

    def _send(self, ask: Ask, reservation: Reservation) -> None:
        ask.sent_s = self._now_s
        ask.reservation = reservation
        number = reservation.target
        assert isinstance(number, int)
        self._engines[number].submit(
            self._now_s, ask.prompt_tokens, ask.output_tokens, (), owner=ask
        )
        if not self._stepping[number]:
            self._step(number)

    def _step(self, number: int) -> None:
        step = self._engines[number].step(self._now_s)
        self._stepping[number] = step.next_s is not None
        if step.next_s is not None:
            self._at(step.next_s, _STEP, number)
        for sequence in step.advanced:
            ask = sequence.owner
            assert isinstance(ask, Ask)
            assert ask.reservation is not None, "sent"
            if sequence.produced == 1:
                ask.first_s = self._now_s
                ask.reservation.prefilled(self._now_s)
            if sequence.done:
                ask.done_s = self._now_s
                ask.reservation.release()
