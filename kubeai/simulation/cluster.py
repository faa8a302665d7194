"""Simulates a Model's engines behind KubeAI in virtual time, for ``kubeai bench simulate``.

The hash ring, the load table and the request keys are the gateway's own code and the engines are
the mock engine's; only time and sockets are simulated. Deterministic: the same setting and traffic
give the same measurements on every machine.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol

import msgspec
from typing_extensions import override

from kubeai._counts import Reservation
from kubeai._load import LoadTable
from kubeai._pick import Picker
from kubeai._prefix import PrefixIndex
from kubeai._prompt import Prompt, sample_ends
from kubeai._ring import Ring
from kubeai.openai.request import read as read_request
from kubeai.openai.routes import Kind
from kubeai.simulation import text
from kubeai.simulation.engine import Engine, EngineConfig, Sequence
from kubeai.simulation.results import Gaps, Measurement
from kubeai.simulation.traffic import Conversation

Strategy = Literal["Service", "RoundRobin", "LeastLoad", "PrefixHash", "PrefixCache", "Oracle"]
STRATEGIES: tuple[Strategy, ...] = (
    "Service",
    "RoundRobin",
    "LeastLoad",
    "PrefixHash",
    "PrefixCache",
    "Oracle",
)
GATEWAY_STRATEGIES = ("LeastLoad", "PrefixHash", "PrefixCache")
# Parts of PrefixCache: what was sent where, the pending tokens, the learned slowness of endpoints.
Part = Literal["index", "work", "rates"]
MODEL_ROW = 0
INDEX_ENTRIES = 1 << 20
SENT_MAX = 512  # prompts per report
Sent = tuple[int, int, bytes]  # row, new tokens, blocks
Load = tuple[int, int]  # requests in flight, prompt tokens pending
REPLY_TOKENS = 48  # for turns without a length


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
    told: bool = True  # whether they tell each other which prompts they have sent
    without: tuple[Part, ...] = ()  # parts of PrefixCache that are left out, to measure their worth
    expected: bool = True  # whether a replica assumes that its peers pick as it does itself
    share_interval_s: float = msgspec.field(default=0.05, name="tell_interval_s")
    concurrency: int = 32  # concurrent conversations, for those without a start time
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


class SimulationRun(NamedTuple):
    """The result of a simulation."""

    measurements: list[Measurement]
    gaps: Gaps
    preemptions: int
    ended_s: float


# -- routing ---------------------------------------------------------------------------------------


class Clock(Protocol):
    """Schedules callbacks in virtual time."""

    def __call__(self, when_s: float, callback: Callable[[float], None]) -> None:
        """Call ``callback`` at ``when_s`` with that time."""


class Request(NamedTuple):
    """What a router may know of a request."""

    key: int
    tokens: int  # of the prompt
    hashes: list[int]  # of its full blocks


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
    """One KubeAI replica: a ring and a load table, with the other replicas' last reported loads."""

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
        self._block_tokens = setting.engine.block_tokens
        self._told_index = PrefixIndex.create(setting.engines + 1, INDEX_ENTRIES)
        self._index = PrefixIndex.attach(self._told_index.fd, 0)
        for row in range(1, setting.engines + 1):
            self._index.set_cache(row, setting.engine.cache_blocks * self._block_tokens)
        if setting.shared and not setting.told:
            self._told_index.silent = setting.replicas - 1
        self._without = setting.without
        self._picker = Picker(self._ring, None if "index" in setting.without else self._index)
        strategy = setting.strategy
        assert strategy in ("LeastLoad", "PrefixHash", "PrefixCache"), "the gateway's"
        self._picker.configure(strategy, setting.prefix_char_length)
        self._peer_loads: dict[int, list[Load]] = {}

    def pick(self, request: Request) -> Reservation | None:
        """Pick an engine with the gateway's own code."""
        reservation = self._picker.pick(self._prompt(request))
        if reservation is not None and "work" in self._without:
            reservation.prefilled(0.0)
        return reservation

    def _prompt(self, request: Request) -> Prompt:
        """The prompt with its sampled blocks, as the gateway finds them in a text."""
        block_bytes = self._block_tokens * text.TOKEN_BYTES
        ends = sample_ends(len(request.hashes) * block_bytes)
        counts = sorted({end // block_bytes for end in ends} - {0})
        hashes = [request.hashes[count - 1] for count in counts]
        depths = [count * self._block_tokens for count in counts]
        learns = not {"rates", "work"} & set(self._without)
        return Prompt(request.tokens, hashes, depths, key=request.key, streams=learns)

    def loads(self) -> list[Load]:
        """This replica's load per engine."""
        return [
            (self._table.in_flight_here(row), self._table.pending_here(row))
            for row in range(1, len(self._lives))
        ]

    def hear(self, number: int, loads: list[Load], sent: list[Sent]) -> None:
        """Take a report of another replica."""
        self.set_peer_loads(number, loads)
        self.note_sent(sent)

    def set_peer_loads(self, number: int, loads: list[Load]) -> None:
        """Record another replica's load per engine."""
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
        entries, _ = self._told_index.take_log(SENT_MAX)
        return entries

    def note_sent(self, sent: list[Sent]) -> None:
        """Note what another replica has sent."""
        for row, new_tokens, blocks in sent:
            self._told_index.note(row, blocks, new_tokens)

    def settle(self) -> None:
        """Move the settled counts, which predict the peers' loads, towards the current loads."""
        self._supervisor.settle()

    def close(self) -> None:
        """Close the load table."""
        self._index.close()
        self._told_index.close()
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
        self._tells = setting.told
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
            _repeat(at, self._random.random() * settle_s, settle_s, lambda _, r=replica: r.settle())  # type: ignore[misc]

    def _share_loads(self, at: Clock, number: int, now_s: float) -> None:
        loads = self._replicas[number].loads()
        sent = self._replicas[number].take_sent() if self._tells else []
        for other in self._replicas:
            if other is not self._replicas[number]:
                arrival_s = now_s + self._network_delay_s
                at(arrival_s, lambda _, to=other: to.hear(number, loads, sent))  # type: ignore[misc]

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
        self._block = setting.engine.block_tokens

    @override
    def pick(self, request: Request) -> tuple[int, Reservation | None]:
        loads = [engine.running + engine.waiting for engine in self._engines]
        bound = max(2.0, self._factor * (sum(loads) + 1) / len(loads))
        within = [number for number, load in enumerate(loads) if load + 1 <= bound]

        def rank(number: int) -> tuple[int, int]:
            found = self._engines[number].cache.match(request.hashes, len(request.hashes))
            return found, -loads[number]

        return max(within or range(len(loads)), key=rank), None


def _router(setting: Setting, engines: list[Engine], now_s: Callable[[], float]) -> Router:
    match setting.strategy:
        case "Service" | "RoundRobin":
            return Service(setting)
        case "Oracle":
            return Oracle(setting, engines)
        case _:
            return Replicas(setting, now_s)


# -- conversations ---------------------------------------------------------------------------------


class _Session:
    """A conversation in progress: its tokens so far and its hash key."""

    __slots__ = ("_blocks", "_random", "_reply", "conversation", "key", "number", "turn")

    def __init__(self, number: int, conversation: Conversation, setting: Setting) -> None:
        self.number = number
        self.conversation = conversation
        self.turn = 0
        self.key = _key(conversation, setting.prefix_char_length)
        self._random = random.Random(f"{setting.seed} answers {number}")
        self._reply = b""
        self._blocks = text.Blocks(setting.engine.block_tokens)
        for role, content in conversation.history:
            self._blocks.add(text.message(role, content))

    def next_request(self) -> tuple[int, int, list[int]]:
        """(prompt tokens, output tokens, block hashes of both) of the next turn."""
        turn = self.conversation.turns[self.turn]
        if self.conversation.kind == "embeddings":
            return max(1, text.count(text.pack(turn.text))), 0, []
        self._blocks.add(text.message("user", turn.text))
        prompt = self._blocks.then(text.OPENING)
        output = turn.reply_tokens or REPLY_TOKENS
        reply = text.pack(text.words(self._random, output))
        # The history may have a given reply instead of the engine's.
        kept = reply if turn.reply is None else text.pack(turn.reply)
        self._reply = text.OPENING + kept + text.END
        return prompt.tokens, output, prompt.then(reply).hashes

    def complete_turn(self) -> None:
        self._blocks.add(self._reply)
        self.turn += 1

    @property
    def is_over(self) -> bool:
        return self.turn == len(self.conversation.turns)


def _key(conversation: Conversation, prefix_char_length: int) -> int:
    """The hash key, which is the same for all turns: it depends on the first message."""
    if conversation.kind == "embeddings":
        body: dict[str, Any] = {"input": conversation.turns[0].text}
        kind = Kind.EMBEDDINGS
    else:
        messages = conversation.prompt(0, ())
        body = {"messages": [{"role": role, "content": content} for role, content in messages]}
        kind = Kind.CHAT
    request = read_request(kind, msgspec.json.encode({"model": "m"} | body))
    return request.key(prefix_char_length)


class _Pace:
    """A rate limit of ``per_s`` events per second; 0: unlimited."""

    def __init__(self, per_s: float) -> None:
        self._apart_s = 1 / per_s if per_s else 0.0
        self._free_s = 0.0

    def next_s(self, now_s: float) -> float:
        at_s = max(now_s, self._free_s)
        self._free_s = at_s + self._apart_s
        return at_s


class _InFlight(NamedTuple):
    """An in-flight request, the owner of its sequence."""

    session: _Session
    measurement: Measurement
    reservation: Reservation | None


# -- the run ---------------------------------------------------------------------------------------

ARRIVE, SEND, STEP, CALL = range(4)
Watch = Callable[[float, list[Engine]], None]


class Cluster:
    """One run of a setting. ``watch(now_s, engines)`` is called after each request is sent."""

    def __init__(self, setting: Setting, watch: Watch | None = None) -> None:
        self._setting = setting
        self._watch = watch
        self._engines = [Engine(setting.engine) for _ in range(setting.engines)]
        self._names = [f"engine-{number}" for number in range(setting.engines)]
        self._now_s = 0.0
        self._router = _router(setting, self._engines, lambda: self._now_s)
        self._stepping = [False] * setting.engines
        self._ended_s = [0.0] * setting.engines  # end of the last step
        self._events: list[tuple[float, int, int, Any]] = []  # heap of (time, order, kind, subject)
        self._order = itertools.count()
        self._numbers = itertools.count()
        self._active = 0  # conversations started or scheduled
        self._waiting: Iterator[Conversation] = iter(())
        self._paced = _Pace(setting.paced_per_s)
        self._client = _Pace(setting.client_per_s)
        self._measurements: list[Measurement] = []
        self._gaps = Gaps()

    def run(self, conversations: Iterable[Conversation]) -> SimulationRun:
        """Run all conversations, each at its start time or else when another ends."""
        self._waiting = iter(conversations)
        for _ in range(self._setting.concurrency):
            if not self._begin(0.0):
                break
        now_s = 0.0
        events = self._events
        self._router.start(lambda when_s, callback: self._at(when_s, CALL, callback))
        try:
            while self._active:
                now_s, _, kind, subject = heapq.heappop(events)
                self._now_s = now_s
                if kind == STEP:
                    self._step(subject, now_s)
                elif kind == SEND:
                    self._send(subject, now_s)
                elif kind == ARRIVE:
                    self._schedule_turn(subject, now_s)
                else:
                    subject(now_s)
        finally:
            self._router.close()
        preemptions = sum(engine.preemptions for engine in self._engines)
        return SimulationRun(self._measurements, self._gaps, preemptions, now_s)

    def _at(self, when_s: float, kind: int, subject: Any) -> None:
        heapq.heappush(self._events, (when_s, next(self._order), kind, subject))

    def _begin(self, now_s: float) -> bool:
        """Start the next conversation; returns whether another may start at the same time."""
        conversation = next(self._waiting, None)
        if conversation is None:
            return False
        self._active += 1
        session = _Session(next(self._numbers), conversation, self._setting)
        if conversation.at_s is None:
            self._schedule_turn(session, now_s)
            return True
        self._at(conversation.at_s, ARRIVE, session)
        return False  # its arrival starts the next one

    def _schedule_turn(self, session: _Session, now_s: float) -> None:
        """A turn is due: send it, subject to the rate limits."""
        if session.conversation.at_s is not None and not session.turn:
            self._begin(now_s)
        due_s = self._paced.next_s(now_s)
        sent_s = self._client.next_s(due_s)
        measurement = Measurement(session.number, session.turn, due_s, sent_s)
        self._measurements.append(measurement)
        self._at(sent_s + self._setting.network_s, SEND, (session, measurement))

    def _send(self, subject: tuple[_Session, Measurement], now_s: float) -> None:
        session, measurement = subject
        prompt, output, hashes = session.next_request()
        blocks = hashes[: prompt // self._block]
        number, reservation = self._router.pick(Request(session.key, prompt, blocks))
        measurement.prompt_tokens, measurement.endpoint = prompt, self._names[number]
        request = _InFlight(session, measurement, reservation)
        try:
            self._engines[number].submit(now_s, prompt, output, hashes, request)
        except ValueError:
            measurement.error, measurement.ended_s = (
                "status 400",
                now_s,
            )  # exceeds the engine's KV cache
            self._end_turn(request, now_s)
            return
        if not self._stepping[number]:
            self._step(number, now_s)
        if self._watch is not None:
            self._watch(now_s, self._engines)

    @property
    def _block(self) -> int:
        return self._setting.engine.block_tokens

    def _step(self, number: int, now_s: float) -> None:
        step = self._engines[number].step(now_s)
        self._stepping[number] = step.next_s is not None
        if step.next_s is not None:
            self._at(step.next_s, STEP, number)
        if not step.advanced:
            return
        # All decoding sequences waited for this step, ignoring preemptions in between.
        decoded = sum(1 for sequence in step.advanced if sequence.produced > 1)
        if decoded:
            self._gaps.add(now_s - self._ended_s[number], decoded)
        self._ended_s[number] = now_s
        for sequence in step.advanced:
            if sequence.produced == 1 and (reservation := sequence.owner.reservation) is not None:  # type: ignore[attr-defined]
                reservation.prefilled(now_s)
            if sequence.done:
                self._complete(sequence, now_s)

    def _complete(self, sequence: Sequence, now_s: float) -> None:
        request = sequence.owner
        assert isinstance(request, _InFlight)
        measurement, back_s = request.measurement, self._setting.network_s
        first_s = sequence.first_token_s if sequence.output_tokens else now_s
        measurement.first_s, measurement.ended_s = first_s + back_s, now_s + back_s
        measurement.cached_tokens, measurement.output_tokens = (
            sequence.cached_tokens,
            sequence.produced,
        )
        self._end_turn(request, now_s)

    def _end_turn(self, request: _InFlight, now_s: float) -> None:
        session = request.session
        if request.reservation is not None:
            request.reservation.release()
        session.complete_turn()
        back_s = now_s + self._setting.network_s
        if not session.is_over:
            think_s = session.conversation.turns[session.turn].think_s
            self._at(back_s + think_s, ARRIVE, session)
            return
        self._active -= 1
        if session.conversation.at_s is None:
            self._begin(back_s)


def simulate(
    setting: Setting, conversations: Iterable[Conversation], watch: Watch | None = None
) -> SimulationRun:
    """Simulate a setting; see :class:`Cluster`."""
    return Cluster(setting, watch).run(conversations)
