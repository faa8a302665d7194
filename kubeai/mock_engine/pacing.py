"""Runs a simulated engine in real time and writes its tokens to clients.

There is one timer per engine step, not one per token or request: the end of a step calls every
stream that got a token, and each writes its event immediately. One core serves thousands of
streams.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import NamedTuple

from typing_extensions import override

from kubeai.mock_engine.formats.base import ApiFormat, Usage, pieces
from kubeai.simulation.engine import Engine
from kubeai.simulation.engine import Sequence as Running
from kubeai.simulation.text import Reply

# A timer later than this shifts the schedule; smaller delays are caught up.
LAG_MAX_S = 0.05


class Pacer:
    """Runs the simulated engine in real time.

    The ``owner`` of each sequence is called (``advanced(sequence)``) for every token.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.Handle | None = None

    def submit(
        self, prompt_tokens: int, output_tokens: int, hashes: Sequence[int], owner: SequenceGroup
    ) -> Running:
        """Queue a sequence and start the engine if it is idle."""
        now = self._loop.time()
        sequence = self.engine.submit(now, prompt_tokens, output_tokens, hashes, owner)
        if self._timer is None:
            # Deferred, so that requests arriving in the same loop iteration share the first step.
            self._timer = self._loop.call_soon(self._tick, now)
        return sequence

    def _tick(self, due: float) -> None:
        now = self._loop.time()
        step = self.engine.step(due if now - due < LAG_MAX_S else now)
        for sequence in step.advanced:
            owner = sequence.owner
            assert isinstance(owner, SequenceGroup)
            owner.advanced(sequence)
        if step.next_s is None:
            self._timer = None
        else:
            self._timer = self._loop.call_at(step.next_s, self._tick, step.next_s)


class Job(NamedTuple):
    """One sequence to run: its prompt and output lengths in tokens."""

    prompt_tokens: int
    output_tokens: int = 0
    hashes: Sequence[int] = ()


class SequenceGroup:
    """The sequences of one request; ``await run(...)`` returns when all of them are done.

    Cancellation (the client disconnected) removes them from the engine.
    """

    def __init__(self, pacer: Pacer) -> None:
        self._pacer = pacer
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.sequences: list[Running] = []
        self.left = 0

    async def run(self, jobs: Sequence[Job]) -> None:
        """Run one sequence per job until all are done."""
        self.left = len(jobs)
        self.sequences = [self._pacer.submit(*job, self) for job in jobs]
        try:
            await self._done
        finally:
            for sequence in self.sequences:
                self._pacer.engine.cancel(sequence)

    def advanced(self, sequence: Running) -> None:
        """Handle a new token of a sequence, or the end of a prompt-only sequence."""
        if sequence.done:
            self.left -= 1
            if not self.left and not self._done.done():
                self._done.set_result(None)

    def usage(self) -> Usage:
        """Token counts of all sequences so far."""
        return Usage(
            sum(sequence.prompt_tokens for sequence in self.sequences),
            sum(sequence.cached_tokens for sequence in self.sequences),
            sum(sequence.produced for sequence in self.sequences),
        )


class StreamingGroup(SequenceGroup):
    """A SequenceGroup whose tokens are written to the client as they are generated.

    Tokens are written directly to the transport: waking a task per token and stream would cost
    three times as much. The response is already prepared; ``chunked``: how its body is framed.
    The handler sends the last event (``last_event``) together with the end of the body.
    """

    def __init__(
        self,
        pacer: Pacer,
        api: ApiFormat,
        replies: list[Reply],
        transport: asyncio.WriteTransport,
        chunked: bool,
    ) -> None:
        super().__init__(pacer)
        self.last_event = b""
        self._api = api
        self._replies = replies
        self._pieces = [[piece.encode() for piece in pieces(reply)] for reply in replies]
        self._index: dict[int, int] = {}
        self._transport = transport
        self._chunked = chunked
        self._opened = False

    @override
    def advanced(self, sequence: Running) -> None:
        super().advanced(sequence)
        index = self._index_of(sequence)
        number = sequence.produced - 1
        piece = self._pieces[index][number]
        if sequence.done:
            event = self._api.last_token(index, piece.decode(), self._replies[index])
        else:
            event = self._api.token(index, number, piece)
        if not self._opened:
            self._opened = True
            event = self._api.opening(self.usage()) + event
        if not self.left:
            self.last_event = event
        elif self._transport.is_closing():
            pass  # the client disconnected; the handler is about to be cancelled
        elif self._chunked:
            self._transport.write(b"%x\r\n%b\r\n" % (len(event), event))
        else:
            self._transport.write(event)

    def _index_of(self, sequence: Running) -> int:
        if len(self.sequences) == 1:
            return 0
        if not self._index:
            self._index = {id(one): index for index, one in enumerate(self.sequences)}
        return self._index[id(sequence)]
