"""Starts a worker's conversations when they are due and measures the responses.

In a closed loop each slot runs one conversation at a time; in an open loop each conversation starts
at its scheduled time, however many are in flight. Latencies are measured from when a request was
due, so that delays in this process are included (no coordinated omission). Times in records are
seconds since the start.
"""

from __future__ import annotations

import asyncio
import itertools
import resource
from collections import Counter, deque
from collections.abc import Iterator
from time import monotonic
from typing import NamedTuple

import msgspec

from kubeai.loadtest import client, sse
from kubeai.loadtest.plan import Batch, ClosedLoop, Plan
from kubeai.simulation.records import Gaps, Record
from kubeai.simulation.traffic import Conversation

AHEAD = 512  # conversations generated before they are due
REFILL_INTERVAL_S = 0.02
BEAT_S = 0.1
# Timers have a resolution of 1 ms: a request is sent up to half of that early or late.
EARLY_S = 0.0005
# Slots start staggered: 2,000 simultaneous connections would exceed a server's backlog.
SLOT_STAGGER_S = 0.0005
# Pause after a failure: without it, a slot whose requests fail immediately would spin.
FAILED_PAUSE_S = 0.5


class Prepared(NamedTuple):
    number: int
    conversation: Conversation
    request: bytes  # the first turn's


class Driver:
    """One worker's share of a plan. Call `prepare`, then `run` once; `take` returns a batch."""

    def __init__(self, plan: Plan, to: client.Client) -> None:
        self._plan, self._client = plan, to
        self._source: Iterator[tuple[int, Conversation]] = iter(())
        self._ahead: deque[Prepared] = deque()
        self._start_s = 0.0
        self._before_s = (0.0, 0.0)  # CPU time used before the start
        self._left = None if plan.requests_max is None else plan.share(plan.requests_max)
        self._in_flight = 0
        self._dropped = 0
        self._used_up = False
        # Since the last take:
        self._records: list[Record] = []
        self._gaps = Gaps()
        self._beats_late_s: list[float] = []
        self._said: dict[str, str] = {}
        # For ended requests:
        self._known: set[str] = set()
        self._counts: Counter[str] = Counter()

    def prepare(self) -> None:
        """Load or generate the first conversations; TrafficError if that fails."""
        self._source = self._plan.conversations()
        self._ahead.extend(itertools.islice(map(self._prepared, self._source), AHEAD))

    async def run(self, start_s: float) -> None:
        """Run until every started conversation has ended; cancellation drops those in flight."""
        self._start_s, self._before_s = start_s, _cpu_s()
        helpers = [asyncio.create_task(self._refill()), asyncio.create_task(self._beat())]
        try:
            async with asyncio.TaskGroup() as group:
                if isinstance(self._plan.load, ClosedLoop):
                    for slot in range(self._plan.share(self._plan.load.concurrency)):
                        group.create_task(self._slot(slot * self._plan.workers + self._plan.worker))
                else:
                    await self._begin(group)
        finally:
            for task in helpers:
                task.cancel()
            await asyncio.gather(*helpers, return_exceptions=True)

    def take(self, *, last: bool = False) -> Batch:
        open_streams = self._client.readers
        tokens = sum(reader.tokens for reader in open_streams)
        others = sum(reader.others for reader in open_streams)
        cpu_s, kernel_s = _cpu_s()
        batch = Batch(
            at_s=monotonic() - self._start_s,
            records=self._records,
            gaps=self._gaps,
            in_flight=self._in_flight,
            tokens=self._counts["tokens"] + tokens,
            chunks=self._counts["chunks"] + tokens + others,
            cpu_s=cpu_s - self._before_s[0],
            kernel_s=kernel_s - self._before_s[1],
            beats_late_s=self._beats_late_s,
            said=self._said,
            last=last,
            dropped=self._dropped,
            used_up=self._used_up,
        )
        self._records, self._gaps = [], Gaps()
        self._beats_late_s, self._said = [], {}
        return batch

    # -- schedule ----------------------------------------------------------------------------------

    async def _slot(self, number: int) -> None:
        due_s = number * SLOT_STAGGER_S
        while self._may_begin(due_s) and (one := self._next()) is not None:
            due_s = await self._converse(one, due_s)

    async def _begin(self, group: asyncio.TaskGroup) -> None:
        while (one := self._next()) is not None:
            due_s = one.conversation.at_s or 0.0
            if not self._may_begin(due_s):
                break
            await self._until(due_s)
            group.create_task(self._converse(one, due_s))

    def _may_begin(self, due_s: float) -> bool:
        return due_s < self._plan.begin_until_s and self._left != 0

    async def _until(self, due_s: float) -> None:
        while (left_s := self._start_s + due_s - monotonic()) > EARLY_S:  # noqa: ASYNC110
            await asyncio.sleep(left_s)

    def _next(self) -> Prepared | None:
        if self._ahead:
            return self._ahead.popleft()
        one = next(self._source, None)
        self._used_up = one is None
        return None if one is None else self._prepared(one)

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

    async def _converse(self, one: Prepared, due_s: float) -> float:
        """Run all turns, until one fails. Returns the time at which the next one may start."""
        replies: list[str] = []
        turns = one.conversation.turns
        for turn, said in enumerate(turns):
            if turn:
                due_s += said.think_s
            if not self._may_begin(due_s):
                break
            await self._until(due_s)
            if self._left is not None:
                if not self._left:
                    break
                self._left -= 1
            keep = turn + 1 < len(turns) and said.reply is None
            record, reply = await self._ask(one, turn, due_s, replies, keep)
            due_s = record.ended_s
            if record.error:
                return due_s + FAILED_PAUSE_S
            replies.append(reply)
        return due_s

    async def _ask(
        self, one: Prepared, turn: int, due_s: float, replies: list[str], keep: bool
    ) -> tuple[Record, str]:
        """Send one request; returns its record and, with ``keep``, the text of the reply."""
        chat = one.conversation.kind == "chat"
        request = self._request(one.conversation, turn, replies) if turn else one.request
        reader = sse.Reader(keep=keep) if chat and self._plan.stream else None
        record = Record(one.number, turn, due_s, monotonic() - self._start_s)
        self._in_flight += 1
        try:
            answer = await self._client.send(request, reader)
        except asyncio.CancelledError:
            self._dropped += 1
            raise
        finally:
            self._in_flight -= 1
        record.ended_s = answer.ended_s - self._start_s
        record.endpoint, record.error = answer.endpoint, answer.error
        if reader is not None:
            self._note_stream(record, reader)
            reply = reader.text if keep else ""
        else:
            reply = self._note_whole(record, answer.body, chat)
        self._records.append(record)
        if record.error and record.error not in self._known:
            self._known.add(record.error)
            self._said[record.error] = answer.said
        return record, reply

    def _note_stream(self, record: Record, reader: sse.Reader) -> None:
        times_s = reader.times_s
        self._counts["tokens"] += len(times_s)
        self._counts["chunks"] += len(times_s) + reader.others
        record.output_tokens = len(times_s)
        if times_s:
            record.first_s = times_s[0] - self._start_s
        if not record.error and record.due_s >= self._plan.warm_up_s:
            self._gaps.add_stream(times_s)
        self._note_usage(record, reader.usage)

    def _note_whole(self, record: Record, body: bytes, chat: bool) -> str:
        self._counts["chunks"] += 1
        if record.error:
            return ""
        try:
            answer = sse.decode_answer(body)
        except msgspec.DecodeError:
            record.error = "invalid response"
            return ""
        if answer.error is not None:
            record.error = "error"
        if not chat:
            record.first_s = record.ended_s
        self._note_usage(record, answer.usage)
        self._counts["tokens"] += record.output_tokens
        return answer.text

    def _note_usage(self, record: Record, usage: sse.Usage | None) -> None:
        if usage is not None:
            record.prompt_tokens, record.cached_tokens = usage.prompt_tokens, usage.cached_tokens
            if usage.completion_tokens >= 0:
                record.output_tokens = usage.completion_tokens

    def _prepared(self, one: tuple[int, Conversation]) -> Prepared:
        return Prepared(*one, self._request(one[1], 0, []))

    def _request(self, conversation: Conversation, turn: int, replies: list[str]) -> bytes:
        said = conversation.turns[turn]
        asked = {"model": self._plan.model, **self._plan.more}
        if conversation.kind == "embeddings":
            asked["input"] = said.text
            return self._client.request("POST", "/embeddings", msgspec.json.encode(asked))
        asked["messages"] = [
            {"role": role, "content": text} for role, text in conversation.prompt(turn, replies)
        ]
        if said.reply_tokens:
            asked["max_tokens"] = said.reply_tokens
        if self._plan.stream:
            asked["stream"] = True
            asked["stream_options"] = {"include_usage": True}
        return self._client.request("POST", "/chat/completions", msgspec.json.encode(asked))


def _cpu_s() -> tuple[float, float]:
    """CPU time of this process: total and kernel."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime, used.ru_stime
