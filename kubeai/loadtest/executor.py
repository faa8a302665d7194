"""Starts a generator's conversations or requests when they are due and measures the responses.

In a closed loop each slot runs one conversation at a time; in an open loop each conversation, or
each request, starts at its scheduled time, however many are in flight. Latencies are measured from
when a request was due, so that delays in this process are included (no coordinated omission). A
request that waits for the limit on requests in flight is due when a place becomes free. Times in
measurements are seconds since the start.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import resource
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from time import monotonic
from typing import NamedTuple, Protocol

import msgspec

from kubeai.loadtest import sse
from kubeai.loadtest.client import Response
from kubeai.loadtest.messages import Batch
from kubeai.loadtest.scenario import ClosedLoop, RequestLoop, Scenario
from kubeai.simulation.results import Gaps, Measurement
from kubeai.simulation.traffic import Conversation, Turn
from kubeai.simulation.turns import WaitingTurns

AHEAD = 512  # conversations generated before they are due
REFILL_INTERVAL_S = 0.02
BEAT_S = 0.1
# Timers have a resolution of 1 ms: a request is sent up to half of that early or late.
EARLY_S = 0.0005
# Slots, and requests that all start at once, are staggered: 2,000 simultaneous connections would
# exceed a server's backlog.
SLOT_STAGGER_S = 0.0005
# Pause after a failure: without it, a slot whose requests fail immediately would spin.
FAILED_PAUSE_S = 0.5


class Sender(Protocol):
    """What sends requests: over HTTP or by message."""

    @property
    def readers(self) -> set[sse.Reader]:
        """Of streams in flight."""

    @property
    def counts(self) -> Mapping[str, int]:
        """What only the sender knows, such as duplicate responses, since the start."""

    def request(self, method: str, path: str, body: bytes = b"") -> bytes:
        """Encode a request; ``path`` is relative to the endpoint's."""

    async def send(self, request: bytes, reader: sse.Reader | None = None) -> Response:
        """Send a request and wait for its response or failure, which `Response.error` reports."""


class Prepared(NamedTuple):
    """A conversation whose first request is encoded before it is due."""

    number: int
    conversation: Conversation
    request: bytes  # the first turn's


class Talk:
    """A conversation in progress."""

    __slots__ = ("one", "ready_s", "replies", "turn")

    def __init__(self, one: Prepared) -> None:
        self.one = one
        self.turn = 0  # number of the next turn
        self.replies: list[str] = []
        self.ready_s = 0.0  # when the next turn may be sent

    @property
    def next_turn(self) -> Turn | None:
        """The next turn; None when the conversation is over."""
        turns = self.one.conversation.turns
        return turns[self.turn] if self.turn < len(turns) else None


class Places:
    """A limit on requests in flight; None: no limit. Places are granted in the order of calls."""

    def __init__(self, free_s: list[float] | None) -> None:
        self._free: asyncio.Queue[float] | None = None
        if free_s is not None:
            self._free = asyncio.Queue()
            for each_s in free_s:
                self._free.put_nowait(each_s)

    async def take(self) -> float:
        """Wait for a place; returns since when it is free."""
        return 0.0 if self._free is None else await self._free.get()

    async def release(self, ended_s: float, *, failed: bool) -> None:
        """Free a place, after a pause if its request failed."""
        if self._free is None:
            return
        if failed:
            await asyncio.sleep(FAILED_PAUSE_S)
            ended_s += FAILED_PAUSE_S
        self._free.put_nowait(ended_s)


class Executor:
    """One generator's share of a scenario.

    Call `prepare`, then `run` once; `take` returns the measurements since the previous call.
    """

    def __init__(self, scenario: Scenario, to: Sender) -> None:
        self._scenario, self._client = scenario, to
        self._source: Iterator[tuple[int, Conversation]] = iter(())
        self._ahead: deque[Prepared] = deque()
        self._start_s = 0.0
        self._before_s = (0.0, 0.0)  # CPU time used before the start
        self._left = (
            None if scenario.requests_max is None else scenario.share(scenario.requests_max)
        )
        self._places = Places(self._free_places())
        self._turns: WaitingTurns[Talk] = WaitingTurns(self._begin)
        self._turn_ready = asyncio.Event()
        self._talks = 0  # conversations with a request in flight, in a `RequestLoop`
        self._in_flight = 0
        self._dropped = 0
        self._used_up = False
        # Since the last take:
        self._measurements: list[Measurement] = []
        self._gaps = Gaps()
        self._beats_late_s: list[float] = []
        self._error_messages: dict[str, str] = {}
        # For ended requests:
        self._known: set[str] = set()
        self._counts: Counter[str] = Counter()

    def prepare(self) -> None:
        """Load or generate the first conversations; TrafficError if that fails."""
        self._source = self._scenario.conversations()
        self._ahead.extend(itertools.islice(map(self._prepared, self._source), AHEAD))

    async def run(self, start_s: float) -> None:
        """Run until every started conversation has ended; cancellation drops those in flight."""
        self._start_s, self._before_s = start_s, _cpu_s()
        helpers = [asyncio.create_task(self._refill()), asyncio.create_task(self._beat())]
        try:
            async with asyncio.TaskGroup() as group:
                if isinstance(self._scenario.load, ClosedLoop):
                    for slot in range(self._scenario.share(self._scenario.load.concurrency)):
                        group.create_task(self._run_slot(self._number(slot)))
                elif isinstance(self._scenario.load, RequestLoop):
                    await self._run_requests(group, at_once=self._scenario.load.arrivals is None)
                else:
                    await self._run_open_loop(group)
        finally:
            for task in helpers:
                task.cancel()
            await asyncio.gather(*helpers, return_exceptions=True)

    def take(self, *, last: bool = False) -> Batch:
        """The measurements since the previous call, and the state of those in flight."""
        open_streams = self._client.readers
        tokens = sum(reader.tokens for reader in open_streams)
        others = sum(reader.others for reader in open_streams)
        cpu_s, kernel_s = _cpu_s()
        batch = Batch(
            at_s=monotonic() - self._start_s,
            measurements=self._measurements,
            gaps=self._gaps,
            in_flight=self._in_flight,
            tokens=self._counts["tokens"] + tokens,
            chunks=self._counts["chunks"] + tokens + others,
            cpu_s=cpu_s - self._before_s[0],
            kernel_s=kernel_s - self._before_s[1],
            beats_late_s=self._beats_late_s,
            error_messages=self._error_messages,
            last=last,
            dropped=self._dropped,
            used_up=self._used_up,
            message_counts=dict(self._client.counts),
        )
        self._measurements, self._gaps = [], Gaps()
        self._beats_late_s, self._error_messages = [], {}
        return batch

    # -- schedule ----------------------------------------------------------------------------------

    def _number(self, number: int) -> int:
        """The number of this generator's slot or request among those of all generators."""
        return number * self._scenario.generators + self._scenario.generator

    def _free_places(self) -> list[float] | None:
        if self._scenario.in_flight_max is None:
            return None
        count = self._scenario.share(self._scenario.in_flight_max)
        return [self._number(place) * SLOT_STAGGER_S for place in range(count)]

    async def _run_slot(self, number: int) -> None:
        due_s = number * SLOT_STAGGER_S
        while self._may_start(due_s) and (talk := self._begin()) is not None:
            due_s = await self._run_conversation(talk, due_s)

    async def _run_open_loop(self, group: asyncio.TaskGroup) -> None:
        while (talk := self._begin()) is not None:
            due_s = talk.one.conversation.at_s or 0.0
            if not self._may_start(due_s):
                break
            await self._sleep_until(due_s)
            group.create_task(self._run_conversation(talk, due_s))

    async def _run_requests(self, group: asyncio.TaskGroup, *, at_once: bool) -> None:
        staggered = at_once and self._scenario.in_flight_max is None
        for number, time_s in enumerate(self._scenario.request_times()):
            arrival_s = self._number(number) * SLOT_STAGGER_S if staggered else time_s
            if not self._may_start(arrival_s):
                break
            await self._sleep_until(arrival_s)
            free_s = await self._places.take()
            talk = await self._next_talk()
            if talk is None:
                break
            due_s = max(arrival_s, free_s, talk.ready_s)
            if not self._may_start(due_s):
                break
            self._talks += 1
            group.create_task(self._run_request(talk, due_s, due_s - arrival_s))

    async def _run_request(self, talk: Talk, due_s: float, queued_s: float) -> None:
        """Send a conversation's next turn and make the one after it available."""
        await self._sleep_until(due_s)
        measurement = await self._send_turn(talk, due_s, queued_s)
        self._talks -= 1
        if not measurement.error and (turn := talk.next_turn) is not None:
            talk.ready_s = measurement.ended_s + turn.think_s
            self._turns.add(talk, talk.ready_s)
        self._turn_ready.set()
        await self._places.release(measurement.ended_s, failed=bool(measurement.error))

    async def _next_talk(self) -> Talk | None:
        """The conversation that the next request belongs to; None if there are no more."""
        while (talk := self._turns.take(monotonic() - self._start_s)) is None:
            next_s = self._turns.next_s
            if next_s is None and not self._talks:
                return None
            self._turn_ready.clear()
            delay_s = None if next_s is None else self._start_s + next_s - monotonic()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay_s):
                    await self._turn_ready.wait()
        return talk

    def _may_start(self, due_s: float) -> bool:
        return due_s < self._scenario.begin_until_s and self._left != 0

    async def _sleep_until(self, due_s: float) -> None:
        while (left_s := self._start_s + due_s - monotonic()) > EARLY_S:  # noqa: ASYNC110
            await asyncio.sleep(left_s)

    def _begin(self) -> Talk | None:
        """The next conversation; None if there are no more."""
        if self._ahead:
            return Talk(self._ahead.popleft())
        one = next(self._source, None)
        self._used_up = one is None
        return None if one is None else Talk(self._prepared(one))

    async def _refill(self) -> None:
        while True:
            while len(self._ahead) < AHEAD and (one := next(self._source, None)) is not None:
                self._ahead.append(self._prepared(one))
                await asyncio.sleep(0)
            await asyncio.sleep(REFILL_INTERVAL_S)

    async def _beat(self) -> None:
        due_s = monotonic()
        while True:
            due_s += BEAT_S
            await asyncio.sleep(due_s - monotonic())
            now_s = monotonic()
            self._beats_late_s.append(max(0.0, now_s - due_s))
            due_s = max(due_s, now_s - BEAT_S)

    # -- requests ----------------------------------------------------------------------------------

    async def _run_conversation(self, talk: Talk, due_s: float) -> float:
        """Run all turns, until one fails. Returns the time at which the next one may start."""
        while (turn := talk.next_turn) is not None:
            if talk.turn:
                due_s += turn.think_s
            if not self._may_start(due_s):
                break
            await self._sleep_until(due_s)
            free_s = await self._places.take()
            if not self._may_start(max(due_s, free_s)):  # the limit was reached meanwhile
                await self._places.release(free_s, failed=False)
                break
            queued_s = max(0.0, free_s - due_s)
            measurement = await self._send_turn(talk, due_s + queued_s, queued_s)
            due_s = measurement.ended_s
            await self._places.release(due_s, failed=bool(measurement.error))
            if measurement.error:
                return due_s + FAILED_PAUSE_S
        return due_s

    async def _send_turn(self, talk: Talk, due_s: float, queued_s: float) -> Measurement:
        """Send a conversation's next turn and move on to the one after it."""
        if self._left is not None:
            self._left -= 1
        number, turn = talk.turn, talk.next_turn
        talk.turn += 1
        assert turn is not None
        keep = talk.next_turn is not None and turn.reply is None
        measurement, reply = await self._send_request(talk.one, number, due_s, talk.replies, keep)
        measurement.queued_s = queued_s
        talk.replies.append(reply)
        return measurement

    async def _send_request(
        self, one: Prepared, turn: int, due_s: float, replies: list[str], keep: bool
    ) -> tuple[Measurement, str]:
        """Send one request; returns its measurement and, with ``keep``, the text of the reply."""
        chat = one.conversation.kind == "chat"
        request = self._request(one.conversation, turn, replies) if turn else one.request
        reader = sse.Reader(keep=keep) if chat and self._scenario.stream else None
        measurement = Measurement(one.number, turn, due_s, monotonic() - self._start_s)
        self._in_flight += 1
        try:
            response = await self._client.send(request, reader)
        except asyncio.CancelledError:
            self._dropped += 1
            raise
        finally:
            self._in_flight -= 1
        measurement.ended_s = response.ended_s - self._start_s
        measurement.endpoint, measurement.error = response.endpoint, response.error
        if reader is not None:
            self._note_stream(measurement, reader)
            reply = reader.text if keep else ""
        else:
            reply = self._note_response(measurement, response.body)
        self._measurements.append(measurement)
        if measurement.error and measurement.error not in self._known:
            self._known.add(measurement.error)
            self._error_messages[measurement.error] = response.error_message
        return measurement, reply

    def _note_stream(self, measurement: Measurement, reader: sse.Reader) -> None:
        times_s = reader.times_s
        self._counts["tokens"] += len(times_s)
        self._counts["chunks"] += len(times_s) + reader.others
        measurement.output_tokens = len(times_s)
        if times_s:
            measurement.first_s = times_s[0] - self._start_s
        if not measurement.error and measurement.due_s >= self._scenario.warm_up_s:
            self._gaps.add_stream(times_s)
        self._note_usage(measurement, reader.usage)

    def _note_response(self, measurement: Measurement, body: bytes) -> str:
        self._counts["chunks"] += 1
        if measurement.error:
            return ""
        try:
            completion = sse.decode_completion(body)
        except msgspec.DecodeError:
            measurement.error = "invalid response"
            return ""
        if completion.error is not None:
            measurement.error = "error"
        self._note_usage(measurement, completion.usage)
        self._counts["tokens"] += measurement.output_tokens
        return completion.text

    def _note_usage(self, measurement: Measurement, usage: sse.ReportedUsage | None) -> None:
        if usage is not None:
            measurement.prompt_tokens, measurement.cached_tokens = (
                usage.prompt_tokens,
                usage.cached_tokens,
            )
            if usage.completion_tokens >= 0:
                measurement.output_tokens = usage.completion_tokens

    def _prepared(self, one: tuple[int, Conversation]) -> Prepared:
        return Prepared(*one, self._request(one[1], 0, []))

    def _request(self, conversation: Conversation, turn: int, replies: list[str]) -> bytes:
        message = conversation.turns[turn]
        body = {"model": self._scenario.model, **self._scenario.extra_body}
        if conversation.kind == "embeddings":
            body["input"] = message.text
            return self._client.request("POST", "/embeddings", msgspec.json.encode(body))
        body["messages"] = [
            {"role": role, "content": text} for role, text in conversation.prompt(turn, replies)
        ]
        if message.reply_tokens:
            body["max_tokens"] = message.reply_tokens
        if self._scenario.stream:
            body["stream"] = True
            body["stream_options"] = {"include_usage": True}
        return self._client.request("POST", "/chat/completions", msgspec.json.encode(body))


def _cpu_s() -> tuple[float, float]:
    """CPU time of this process: total and kernel."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime, used.ru_stime
