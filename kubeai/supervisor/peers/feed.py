"""Streams this KubeAI replica's own loads to the peers as they change.

Owns the stream of ``GET /loads``. It reads the load table every ``TICK_S``, but only while there
are listeners. A slow listener gets fewer and larger frames, never a longer queue.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import OrderedDict, deque
from collections.abc import Collection

from aiohttp import web

from kubeai._load import LoadTable
from kubeai._prefix import PrefixIndex
from kubeai._queue_table import QueueTable
from kubeai._readings import Readings
from kubeai.routing.publisher import Publisher, RowOwner
from kubeai.supervisor.peers import wire
from kubeai.supervisor.peers.key_uses import KeyFeed

TICK_S = 0.05
LISTENERS_MAX = 64
WRITE_TIMEOUT_S = 5.0
# Prompts that a tick reports: the newest of each worker, at most 1,280 per second and, at 10 blocks
# each, some 130 KB. A listener that is late or new gets the newest SENT_MAX. A prompt that is left
# out costs worse picks until a KubeAI replica sends a similar one itself.
SENT_PER_TICK_MAX = 64
SENT_MAX = 2048
GONE_MAX_ENDPOINTS = 10_000  # removed endpoints kept, so that listeners can be sent GONE


class Feed:
    """This KubeAI replica's loads by name, and in which frame each last changed."""

    def __init__(
        self,
        identity: str,
        table: LoadTable,
        index: PrefixIndex,
        publisher: Publisher,
        keys: KeyFeed | None = None,
        queues: QueueTable | None = None,
    ) -> None:
        """``keys``: None: keys are not required."""
        self._hello = wire.Hello(identity, secrets.token_hex(8))
        self._table = table
        self._index = index
        self._publisher = publisher
        self._keys = keys
        self._queues = queues
        self._heads: dict[int, wire.Head] = {}  # by row, as last read
        self._readings = Readings(table)
        self._frames = 0  # number of the latest frame with changes
        self._changed: OrderedDict[RowOwner, int] = OrderedDict()  # owner → frame, oldest first
        self._sent: deque[tuple[int, wire.SentPrompt]] = deque(maxlen=SENT_MAX)  # (frame, prompt)
        self._memo = (-1, -1, b"")  # (since, until, bytes), shared by listeners that keep up
        self._listeners = 0
        self._somebody = asyncio.Event()
        self._news = asyncio.Event()
        self._closed = False

    async def run(self) -> None:
        """Read the table forever."""
        while True:
            await self._somebody.wait()
            self.read()
            await asyncio.sleep(TICK_S)

    def close(self) -> None:
        """End every stream."""
        self._closed = True
        self._wake()

    # -- frames ----------------------------------------------------------------------------------

    def read(self) -> None:
        """Read the table now and send changes to the listeners."""
        owners = self._publisher.owners
        changed = [row for row, *_ in self._readings.changed()]
        changed += self._read_heads()
        sent, _ = self._index.take_log(SENT_PER_TICK_MAX)
        if sent:
            self._frames += 1
            for row, new_tokens, blocks in sent:
                if row in owners:
                    prompt = wire.SentPrompt(owners[row].endpoint, new_tokens, blocks)
                    self._sent.append((self._frames, prompt))
        if self._keys is not None and self._keys.read(self._frames + 1):
            self._frames += 1
            self._wake()
        self._note({owners[row] for row in changed if row in owners})  # other rows are free

    def _read_heads(self) -> list[int]:
        """Read the queues' first requests. Returns the rows whose first one has changed."""
        if self._queues is None:
            return []
        before, self._heads = self._heads, self._queues.firsts()
        rows = before.keys() | self._heads.keys()
        return [row for row in rows if before.get(row) != self._heads.get(row)]

    def freed(self, owners: Collection[RowOwner]) -> None:
        """A row of each owner was freed. An owner without rows is reported as gone."""
        if self._listeners:
            self._note(owners)
        else:
            for owner in owners:
                if owner not in self._publisher.rows_of:
                    self._changed.pop(owner, None)

    def key_changed(self, name: str) -> None:
        """A key was added, changed or removed."""
        if self._keys is not None and self._keys.key_changed(name, self._frames + 1):
            self._frames += 1
            self._wake()

    def _note(self, touched: Collection[RowOwner]) -> None:
        if not touched:
            return
        self._frames += 1
        for owner in touched:
            self._changed[owner] = self._frames
            self._changed.move_to_end(owner)
        if len(self._changed) - len(self._publisher.rows_of) > GONE_MAX_ENDPOINTS:
            for owner in self._changed.keys() - self._publisher.rows_of.keys():
                del self._changed[owner]
        self._wake()

    def _wake(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    def since(self, frame: int) -> wire.Loads:
        """The changes since a frame; since frame 0, everything."""
        keys, windows = ({}, None) if self._keys is None else self._keys.since(frame)
        loads = wire.Loads({}, {}, {}, self._sent_since(frame), keys, {}, windows)
        for owner in reversed(self._changed):
            if self._changed[owner] <= frame:
                break
            rows = self._publisher.rows_of.get(owner)
            if owner.endpoint:
                loads.endpoints[owner.endpoint] = self._in_flight(rows) if rows else wire.GONE
                if rows and (pending := self._pending(rows)):
                    loads.pending[owner.endpoint] = pending
            else:
                loads.models[owner.model] = self._counts(rows) if rows else None
                heads = [self._heads[row] for row in rows or () if row in self._heads]
                if heads:
                    loads.queues[owner.model] = heads[0]
        return loads

    def _sent_since(self, frame: int) -> list[wire.SentPrompt]:
        prompts = []
        for sent_in, prompt in reversed(self._sent):
            if sent_in <= frame:
                break
            prompts.append(prompt)
        return prompts[::-1]

    def _encoded_since(self, frame: int) -> bytes:
        if self._memo[:2] != (frame, self._frames):
            self._memo = (frame, self._frames, wire.encode(self.since(frame)))
        return self._memo[2]

    def _in_flight(self, rows: set[int]) -> int:
        return min(sum(self._table.in_flight_here(row) for row in rows), wire.COUNT_MAX)

    def _pending(self, rows: set[int]) -> int:
        return min(sum(self._table.pending_here(row) for row in rows), wire.TOKENS_MAX)

    def _counts(self, rows: set[int]) -> tuple[int, int]:
        active = sum(self._table.active(row) for row in rows)
        return min(active, wire.COUNT_MAX), sum(self._table.ended(row) for row in rows)

    # -- listeners -------------------------------------------------------------------------------

    async def serve(self, request: web.Request) -> web.StreamResponse:
        """Serve ``GET /loads`` until the listener disconnects."""
        if self._listeners >= LISTENERS_MAX:
            raise web.HTTPServiceUnavailable(text=f"too many listeners (max {LISTENERS_MAX})\n")
        response = web.StreamResponse(headers={"Content-Type": wire.CONTENT_TYPE})
        await response.prepare(request)
        self._listeners += 1
        self._somebody.set()
        try:
            self.read()
            await self._tell(response)
        except (ConnectionError, TimeoutError):
            pass  # it disconnected or does not read
        finally:
            self._listeners -= 1
            if not self._listeners:
                self._somebody.clear()
        return response

    async def _tell(self, response: web.StreamResponse) -> None:
        await self._write(response, wire.encode(self._hello))
        sent = 0
        while not self._closed:
            data, news = self._encoded_since(sent), self._news
            sent = self._frames
            await self._write(response, data)
            if self._frames > sent:
                continue
            try:
                async with asyncio.timeout(wire.HEARTBEAT_S):
                    await news.wait()
            except TimeoutError:
                pass  # send an empty frame as heartbeat

    async def _write(self, response: web.StreamResponse, data: bytes) -> None:
        async with asyncio.timeout(WRITE_TIMEOUT_S):
            await response.write(data)
