"""A worker's queue of the requests that wait for one model.

Requests wait here while the model has no endpoint (it is cold), or while all of its endpoints have
as many requests in flight as they can serve well, the route's ``capacity`` (it is saturated).
:class:`ModelQueue` gives each of them its Reservation when it is its turn, in the order of
``fair_queue``. With a capacity, the queues of all workers together have this order: a worker serves
its head only if no other worker's comes first (``_queue_table``), and otherwise wakes that worker.

A dispatch happens when a request arrives, when the route changes, when this worker is woken because
an endpoint has room, and on each tick of the server, in case a wake-up was lost. If a worker does
not serve its head (it is stopped or hangs), the head is blocked on the second tick: all workers
pass it until its worker publishes it again.

Peers learn of this KubeAI replica's first request with a delay, and of free capacity too. While a
peer's request comes first, room for one request is left free for it, until the second tick at the
latest, when its head is blocked until it changes.

RoutedModel owns one queue; holding.py waits in it.
"""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING

from kubeai._queue_table import WORK_MAX_TOKENS, QueueTable
from kubeai.routing.fair_queue import FairQueue

if TYPE_CHECKING:
    from kubeai._counts import Reservation
    from kubeai._prompt import Prompt
    from kubeai.routing.routes import Block
    from kubeai.routing.table import RoutedModel

# What a request counts as, besides its prompt; the same as in the load table.
REQUEST_TOKENS = 256
# How often the places of all requests are computed, for comments.
PLACES_AGE_MAX_S = 1.0


class Unserved(Exception):
    """The wait of a request has ended without a Reservation."""


class NoEndpoint(Unserved):
    """The request's turn did not come before its deadline."""


class ModelGone(Unserved):
    """The model was deleted while the request waited."""


class Displaced(Unserved):
    """The queue is full, and the request made room for another."""


class Blocked(Unserved):
    """No endpoint can serve the request, and waiting longer would not help."""

    def __init__(self, block: Block) -> None:
        super().__init__(block.message)
        self.block = block


def work_of(prompt: Prompt) -> int:
    """How much work a request is, in tokens."""
    return min(prompt.tokens + REQUEST_TOKENS, WORK_MAX_TOKENS)


class Waiting:
    """A request that waits, or is about to."""

    __slots__ = (
        "adapter",
        "block",
        "entered_s",
        "error",
        "number",
        "priority",
        "prompt",
        "reservation",
        "tenant",
        "turn",
        "work",
    )

    def __init__(
        self, prompt: Prompt, adapter: str | None = None, tenant: str = "", priority: int = 0
    ) -> None:
        self.prompt = prompt
        self.adapter = adapter
        self.tenant = tenant
        self.priority = priority
        self.work = work_of(prompt)
        self.number = 0  # see fair_queue.Entry
        self.entered_s = 0.0
        self.reservation: Reservation | None = None  # once it is its turn
        self.error: Exception | None = None  # ends the wait
        self.block: Block | None = None  # as it was when the request last looked
        self.turn: asyncio.Future[None] | None = None

    def wake(self) -> None:
        """Wake the request, which then checks whether it can be served."""
        if self.turn is not None and not self.turn.done():
            self.turn.set_result(None)


class _SharedAccounts:
    """The tenants' accounts at one model, in the queue table."""

    def __init__(self, table: QueueTable, row: int, generation: int) -> None:
        self._table = table
        self._row = row
        self._generation = generation

    def floor(self, priority: int) -> int:
        """The current time, or the earliest start of another worker's requests."""
        now = self._table.round(self._row)
        earliest = self._table.earliest(self._row, priority)
        return now if earliest is None else min(now, earliest)

    def start(self, tenant: str, floor: int) -> int:
        account = self._table.account(self._row, self._generation, tenant)
        return self._table.start(self._row, account, floor)

    def charge(self, tenant: str, start: int, work: int) -> int:
        account = self._table.account(self._row, self._generation, tenant)
        return self._table.charge(self._row, account, start, work)


class ModelQueue:
    """See the module."""

    def __init__(self, routed: RoutedModel, table: QueueTable, row: int, generation: int) -> None:
        self._routed = routed
        self._table = table
        self._row = row
        self._queue: FairQueue[Waiting] = FairQueue(_SharedAccounts(table, row, generation))
        # Columns and their heads that came before ours at the last tick, and could be served then.
        self._late: dict[int, int] = {}
        self._places: dict[Waiting, int] = {}
        self._places_s = -math.inf  # when they were computed

    def __len__(self) -> int:
        return len(self._queue)

    async def wait(self, waiting: Waiting, deadline_s: float) -> Reservation:
        """Return the request's Reservation when it is its turn.

        NoEndpoint at ``deadline_s`` (the loop's time), ModelGone, Blocked once the model's block
        fails requests, or Displaced.
        """
        loop = asyncio.get_running_loop()
        waiting.entered_s = loop.time()
        self._table.enter(self._row, waiting.priority)
        self._queue.push(waiting)
        served_s = -1.0
        try:
            self.dispatch()
            while not self._is_served(waiting):
                self._check(waiting, deadline_s, loop.time())
                await self._change(waiting, deadline_s)
            served_s = loop.time() - waiting.entered_s
            reservation, waiting.reservation = waiting.reservation, None
            assert reservation is not None, "served"
            return reservation
        finally:
            self._table.leave(self._row, waiting.priority, served_s)
            if waiting.reservation is not None:  # it has ended just before its turn
                waiting.reservation.release()
            if waiting in self._queue:
                self._queue.remove(waiting)
                self.dispatch()
            if not self._queue:
                self._places = {}

    def _is_served(self, waiting: Waiting) -> bool:
        """Whether the request has a Reservation of an endpoint that is still in the route."""
        reservation = waiting.reservation
        if reservation is None or self._routed.serves(reservation.name):
            return reservation is not None
        waiting.reservation = None
        reservation.release()
        self._queue.push(waiting)
        self.dispatch()
        return waiting.reservation is not None

    def _check(self, waiting: Waiting, deadline_s: float, now_s: float) -> None:
        """Raise if the request need not wait any longer."""
        if self._routed.is_gone:
            raise ModelGone
        if waiting.error is not None:
            raise waiting.error
        waiting.block = self._block(waiting)
        if waiting.block is not None and waiting.block.fails_at_s <= now_s:
            raise Blocked(waiting.block)
        if deadline_s <= now_s:
            raise NoEndpoint

    async def _change(self, waiting: Waiting, deadline_s: float) -> None:
        """Return when the request is woken, or at ``deadline_s``, or when its block fails it."""
        waiting.turn = asyncio.get_running_loop().create_future()
        until_s = deadline_s
        if waiting.block is not None:
            until_s = min(until_s, waiting.block.fails_at_s)
        try:
            async with asyncio.timeout_at(until_s):
                await waiting.turn
        except TimeoutError:
            pass
        finally:
            waiting.turn = None

    def _block(self, waiting: Waiting) -> Block | None:
        """Why no endpoint can serve a request; None if one can, or it is unknown."""
        if self._routed.can_serve(waiting.adapter):
            return None
        return self._routed.block(waiting.adapter)

    def displace(self, waiting: Waiting) -> bool:
        """Make room for a new request; False if no other one comes after it."""
        refused = self._queue.refusable(waiting.priority, waiting.tenant)
        if refused is None:
            return False
        self._fail(refused, Displaced())
        return True

    def _fail(self, waiting: Waiting, error: Exception) -> None:
        self._queue.remove(waiting)
        waiting.error = error
        waiting.wake()

    def place(self, waiting: Waiting) -> tuple[int, int]:
        """A request's place, and how many wait for the model in all workers of this KubeAI replica.

        The place is up to ``PLACES_AGE_MAX_S`` old. With several workers it is an estimate: the
        others' requests are assumed to be in between evenly.
        """
        now_s = asyncio.get_running_loop().time()
        if now_s - self._places_s > PLACES_AGE_MAX_S:
            self._places, self._places_s = self._queue.places(), now_s
        total = max(1, sum(self._table.waiting(self._row)))
        here = max(1, len(self._queue))
        place = self._places.get(waiting, here)
        return min(-(-place * total // here), total), total

    # -- dispatching -------------------------------------------------------------------------------

    def dispatch(self, *, is_tick: bool = False) -> None:
        """Give Reservations to the requests whose turn it is, while endpoints can serve them."""
        limited = self._routed.picker.capacity > 0
        if is_tick and limited:
            self._pass_late()
        blocked: set[str | None] = set()
        while (head := self._queue.head(blocked)) is not None:
            waiting, start = head
            if limited and not self._is_first(waiting, start, is_tick=is_tick):
                return
            try:
                reservation = self._routed.pick(waiting.prompt, waiting.adapter)
            except Exception as error:  # a fault ends this request, not the dispatch
                self._fail(waiting, error)
                continue
            if reservation is not None:
                self._queue.take(waiting)
                waiting.reservation = reservation
                waiting.wake()
                continue
            blocked.add(waiting.adapter)
            if waiting.adapter is None:  # no endpoint is free, so none with an adapter is
                break
        self._publish_rest(limited, blocked)

    def _is_first(self, waiting: Waiting, start: int, *, is_tick: bool) -> bool:
        """Publish our head. If another's comes first, wake that worker and return False."""
        table, row = self._table, self._row
        table.publish(row, waiting.priority, start)
        best = table.best(row)
        if best == table.columns - 1 and self._routed.picker.has_room(waiting.adapter, 2):
            best = table.best(row, 1 << best)  # room for one is left to the peer
        if best in (-1, table.column):
            return True
        if self._routed.picker.has_room(waiting.adapter):
            if is_tick:
                self._late[best] = table.head(row, best)
            table.wake(best)
        return False

    def _pass_late(self) -> None:
        """Block the heads that could have been served since the last tick, but were not.

        While there is no room, none could.
        """
        late, self._late = self._late, {}
        if self._routed.picker.has_room():
            for column, head in late.items():
                self._table.block(self._row, column, head)

    def _publish_rest(self, limited: bool, blocked: set[str | None]) -> None:
        """Publish what is left: requests that no endpoint can serve now."""
        head = self._queue.head() if limited else None
        if head is None:
            if self._table.head(self._row, self._table.column):
                self._table.withdraw(self._row)
                self._table.notify(self._row)  # others may have deferred to us
            return
        waiting, start = head
        # Without requests for the model itself, those of other workers may pass.
        self._table.publish(self._row, waiting.priority, start, None not in blocked)

    def route_changed(self) -> None:
        """Dispatch, and wake the requests whose block has changed."""
        self.dispatch()
        for waiting in list(self._queue):
            if self._block(waiting) != waiting.block:
                waiting.wake()

    def end(self) -> None:
        """The model was deleted: wake all requests."""
        for waiting in list(self._queue):
            self._queue.remove(waiting)
            waiting.wake()
        self._table.withdraw(self._row)
