"""Several replicas of KubeAI before one set of engines, in virtual time: what they do not see.

A pick counts in its own replica at once, and in the others when they are told, a moment later.
This plays conversations over replicas with the ring and the load table that serve requests, and
simulated engines behind them, and measures how unevenly the engines are loaded and how much of the
prompts they find in their caches. Deterministic: a seed gives the same figures everywhere.

``bench/replicas.py`` makes the table in docs/several-replicas.md from it.
"""

from __future__ import annotations

import heapq
import itertools
import random
import statistics
from collections.abc import Callable
from functools import partial
from typing import Literal

import msgspec

from kubeai._load import LoadTable, Reservation
from kubeai._ring import Ring
from kubeai.simulation.engine import Engine, EngineConfig, Sequence

MODEL_ROW = 0


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """What is played."""

    replicas: int = 1
    engines: int = 8
    strategy: Literal["LeastLoad", "PrefixHash"] = "LeastLoad"
    shared: bool = True  # whether replicas tell each other their loads
    expected: bool = True  # whether they expect of each other what they do themselves
    tick_s: float = 0.05  # how often each tells
    travel_s: float = 0.005  # until it is heard
    conversations: int = 128  # at the same time
    think_s: float = 2.0  # mean time between an answer and the next turn
    turns: int = 8
    prompt_tokens: int = 600  # of a first turn; each further one adds ``turn_tokens``
    turn_tokens: int = 60
    reply_tokens: int = 120  # on average
    mean_load_factor: int = 125
    replication: int = 100
    duration_s: float = 120.0
    warm_up_s: float = 20.0
    seed: int = 1
    engine: EngineConfig = EngineConfig(cache_blocks=1600)


class Outcome(msgspec.Struct, frozen=True):
    """``imbalance``: requests on the engine that has the most, over the mean of all engines."""

    imbalance_mean: float
    imbalance_p99: float
    hit_rate: float  # of prompt tokens, found in a cache
    first_token_p50_s: float
    first_token_p99_s: float
    requests: int


class Gateway:
    """One replica: its own table, with the others' loads in it as far as it has heard of them."""

    def __init__(self, setting: Setting, phase: int) -> None:
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
        )
        for row in range(1, setting.engines + 1):
            self._ring.set(f"engine-{row}", row, self._lives[row], target=row - 1)
        self._heard: dict[int, list[int]] = {}
        self._hashes = setting.strategy == "PrefixHash"

    def pick(self, key: int) -> Reservation:
        pick = self._ring.pick_hashed(key) if self._hashes else self._ring.pick_least()
        assert pick is not None, "there are engines"
        return pick

    def in_flight(self) -> list[int]:
        """Of each engine, by this replica."""
        return [self._table.in_flight_here(row) for row in range(1, len(self._lives))]

    def hear(self, other: Gateway, told: list[int]) -> None:
        """What another has in flight with each engine."""
        self._heard[id(other)] = told
        sums = [sum(counts) for counts in zip(*self._heard.values(), strict=True)]
        for row, count in enumerate(sums, 1):
            self._supervisor.set_peers(row, self._lives[row], count)
        self._supervisor.set_peers(MODEL_ROW, self._lives[MODEL_ROW], sum(sums))

    def settle(self) -> None:
        self._supervisor.settle()

    def close(self) -> None:
        self._table.close()
        self._supervisor.close()


class Conversation(msgspec.Struct):
    key: int
    hashes: list[int]  # of its blocks so far
    tokens: int
    turn: int = 0


class _Turn(msgspec.Struct):
    """A request under way: the owner of its sequence."""

    conversation: Conversation
    reservation: Reservation
    engine: int


class Play:
    """One run of a setting."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._random = random.Random(setting.seed)
        self._gateways = [
            Gateway(setting, self._random.getrandbits(32)) for _ in range(setting.replicas)
        ]
        self._engines = [Engine(setting.engine) for _ in range(setting.engines)]
        self._next_step_s: list[float | None] = [None] * setting.engines
        self._order = itertools.count()
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._imbalances: list[float] = []
        self._first_tokens_s: list[float] = []
        self._warm = (0, 0)  # prompt tokens looked up and found by the end of the warm-up

    def run(self) -> Outcome:
        setting = self._setting
        for _ in range(setting.conversations):
            self._at(self._random.random() * setting.think_s, self._begin)
        if setting.shared and setting.replicas > 1:
            for gateway in self._gateways:
                self._at(self._random.random() * setting.tick_s, partial(self._tell, gateway))
                self._at(self._random.random() * setting.tick_s, partial(self._settle, gateway))
        self._at(setting.warm_up_s, self._warmed_up)
        while self._events[0][0] < setting.duration_s:
            now_s, _, happen = heapq.heappop(self._events)
            happen(now_s)
        outcome = self._outcome()
        self._events.clear()  # and with them the reservations
        for gateway in self._gateways:
            gateway.close()
        return outcome

    def _at(self, when_s: float, happen: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (when_s, next(self._order), happen))

    # -- what happens ----------------------------------------------------------------------------

    def _begin(self, now_s: float) -> None:
        conversation = Conversation(self._random.getrandbits(64), [], 0)
        self._ask(conversation, now_s)

    def _ask(self, conversation: Conversation, now_s: float) -> None:
        setting = self._setting
        conversation.tokens += setting.turn_tokens if conversation.turn else setting.prompt_tokens
        conversation.turn += 1
        reply = max(1, round(self._random.expovariate(1 / setting.reply_tokens)))
        reply = min(reply, 10 * setting.reply_tokens)
        blocks = (conversation.tokens + reply) // setting.engine.block_tokens
        while len(conversation.hashes) < blocks:
            conversation.hashes.append(self._random.getrandbits(63))
        pick = self._random.choice(self._gateways).pick(conversation.key)
        engine = pick.target
        assert isinstance(engine, int)
        turn = _Turn(conversation, pick, engine)
        self._engines[engine].submit(
            now_s, conversation.tokens, reply, tuple(conversation.hashes), turn
        )
        if self._next_step_s[engine] is None:
            self._step(engine, now_s)
        if now_s >= setting.warm_up_s:
            self._look()

    def _step(self, engine: int, now_s: float) -> None:
        step = self._engines[engine].step(now_s)
        self._next_step_s[engine] = step.next_s
        if step.next_s is not None:
            self._at(step.next_s, lambda then_s: self._step(engine, then_s))
        for sequence in step.advanced:
            if sequence.done:
                self._answered(sequence, now_s)

    def _answered(self, sequence: Sequence, now_s: float) -> None:
        turn = sequence.owner
        assert isinstance(turn, _Turn)
        turn.reservation.release()
        conversation = turn.conversation
        conversation.tokens += sequence.output_tokens
        if sequence.arrived_s >= self._setting.warm_up_s:
            self._first_tokens_s.append(sequence.first_token_s - sequence.arrived_s)
        then_s = now_s + self._random.expovariate(1 / self._setting.think_s)
        if conversation.turn < self._setting.turns:
            self._at(then_s, lambda at_s: self._ask(conversation, at_s))
        else:
            self._at(then_s, self._begin)

    def _tell(self, gateway: Gateway, now_s: float) -> None:
        told = gateway.in_flight()
        for other in self._gateways:
            if other is not gateway:
                self._at(
                    now_s + self._setting.travel_s,
                    lambda _, other=other: other.hear(gateway, told),  # type: ignore[misc]
                )
        self._at(now_s + self._setting.tick_s, partial(self._tell, gateway))

    def _settle(self, gateway: Gateway, now_s: float) -> None:
        gateway.settle()
        self._at(now_s + self._setting.tick_s / 4, partial(self._settle, gateway))

    # -- what is measured ------------------------------------------------------------------------

    def _look(self) -> None:
        loads = [
            sum(counts) for counts in zip(*(g.in_flight() for g in self._gateways), strict=True)
        ]
        self._imbalances.append(max(loads) * len(loads) / sum(loads))

    def _prefixes(self) -> tuple[int, int]:
        return (
            sum(engine.prefix_queries for engine in self._engines),
            sum(engine.prefix_hits for engine in self._engines),
        )

    def _warmed_up(self, _: float) -> None:
        self._warm = self._prefixes()

    def _outcome(self) -> Outcome:
        queries, hits = self._prefixes()
        first_tokens_s = sorted(self._first_tokens_s)
        imbalances = sorted(self._imbalances)
        return Outcome(
            imbalance_mean=statistics.fmean(imbalances),
            imbalance_p99=imbalances[len(imbalances) * 99 // 100],
            hit_rate=(hits - self._warm[1]) / max(1, queries - self._warm[0]),
            first_token_p50_s=first_tokens_s[len(first_tokens_s) // 2],
            first_token_p99_s=first_tokens_s[len(first_tokens_s) * 99 // 100],
            requests=len(first_tokens_s),
        )


def play(setting: Setting) -> Outcome:
    """The figures of a setting. Takes some seconds of real time for a minute of virtual time."""
    return Play(setting).run()
