"""Exchanges load between the replicas of KubeAI, so that each sees the total.

The supervisor owns one :class:`Peers`. Peers' in-flight counts go into the supervisor's column of
the load table, where every pick sees them; the autoscaler reads their active requests. Promises: a
peer that is slow, hung, gone or misreporting affects nothing but its own numbers; its last report
is kept for a bounded time and then dropped; until all peers have reported, or have been silent for
long, the view is marked incomplete.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Collection, Iterable

import aiohttp
from aiohttp import web

from kubeai._key_table import KeyTable
from kubeai._load import LoadTable
from kubeai._prefix import PrefixIndex
from kubeai._queue_table import QueueTable
from kubeai.kube.backoff import Backoff
from kubeai.kube.client import Kube
from kubeai.logs import get_logger
from kubeai.routing.publisher import Publisher, RowOwner
from kubeai.supervisor.peers import wire
from kubeai.supervisor.peers.discovery import Discovery
from kubeai.supervisor.peers.feed import TICK_S, Feed
from kubeai.supervisor.peers.key_uses import KeyFeed, KeyRows, PeerUses
from kubeai.supervisor.peers.listener import OwnIdentity, PeerLost, listen
from kubeai.supervisor.peers.view import HOLD_S, Peer, View

log = get_logger(__name__)
LOADS_PATH = wire.PATH
METRICS_HEADERS = {wire.MARKER: wire.PATH}  # on every /metrics response, for peers
PEERS_MAX = 64
RETRY_FIRST_S, RETRY_MAX_S = 0.1, 2.0
AGE_INTERVAL_S = 1.0
# Each settling step (see _load) closes a quarter of the gap: a lag of 50 ms, like peers' reports.
SETTLE_INTERVAL_S = TICK_S / 4


class Peers:
    """``pod``: our own pod, whose labels select the peers; empty outside a cluster.

    ``keys``: the key table and the rows of keys; None: keys are not required.

    ``addresses``: further peers (``host:port``). They may include our own address, and servers that
    only have ``/metrics``.
    """

    def __init__(
        self,
        kube: Kube,
        namespace: str,
        identity: str,
        table: LoadTable,
        index: PrefixIndex,
        publisher: Publisher,
        *,
        pod: str = "",
        addresses: Iterable[str] = (),
        keys: tuple[KeyTable, KeyRows] | None = None,
        clock: Callable[[], float] = time.monotonic,
        queues: QueueTable | None = None,
    ) -> None:
        self._identity = identity
        self._table = table
        self._index = index
        self._publisher = publisher
        self._fixed = frozenset(addresses)
        self._clock = clock
        self._port = 0
        self._queues = queues
        self._feed = Feed(identity, table, index, publisher, keys and KeyFeed(*keys), queues)
        self._view = View(self._put, self._put_queue)
        self._uses = keys and PeerUses(*keys)
        self._discovery = Discovery(kube, namespace, pod, self._found)
        self._routed: dict[str, set[str]] = {}  # model → its endpoints
        self._models: dict[str, set[str]] = {}  # endpoint → models that route to it
        self._rows: dict[str, int] = {}  # endpoint → its row
        self._tasks: dict[str, asyncio.Task[None]] = {}  # by address
        self._session: aiohttp.ClientSession | None = None
        self._began_s = clock()

    # -- reading ---------------------------------------------------------------------------------

    def active(self, model: str) -> int:
        """A model's requests that peers have in flight or hold."""
        return self._view.active(model)

    def ended(self, model: str) -> int:
        """A model's requests that peers have reported as ended. Never falls."""
        return self._view.ended(model)

    def in_flight(self, endpoint: str) -> int:
        """Peers' in-flight requests at an endpoint."""
        return self._view.in_flight(endpoint)

    def routes(self, endpoint: str) -> bool:
        """Whether any peer may still send requests to an endpoint or has some there."""
        return self._view.routes(endpoint)

    def complete(self) -> bool:
        """Whether every peer has reported recently, or has been silent long enough to ignore."""
        now_s = self._clock()
        known = self._session is not None and self._discovery.listed
        known = known or now_s - self._began_s > HOLD_S
        return known and self._view.complete(now_s)

    def silences_s(self) -> dict[str, float]:
        """Seconds since each peer's last report, by address."""
        now_s = self._clock()
        return {
            address: peer.silent_s(now_s)
            for address, peer in self._view.peers.items()
            if not peer.is_self
        }

    # -- callbacks of the supervisor -------------------------------------------------------------

    def rerouted(self, model: str) -> None:
        """The model's route has changed: write the peers' counts for its new endpoints."""
        route = self._publisher.route(model)
        rows = {} if route is None else {each.name: each.row for each in route.endpoints}
        names = rows.keys()
        self._rows |= rows
        known = self._routed.pop(model, set())
        for name in known - names:
            self._models[name].remove(model)
            if not self._models[name]:
                del self._models[name], self._rows[name]
        for name in names - known:
            self._models.setdefault(name, set()).add(model)
        if names:
            self._routed[model] = set(names)
        self._put_model(model)
        self._put_queue(model)

    def key_changed(self, name: str) -> None:
        """A key was added, changed or removed: write what the peers have counted for it."""
        self._feed.key_changed(name)
        if self._uses is not None:
            self._uses.key_changed(name)

    def freed(self, owners: Collection[RowOwner]) -> None:
        """A load table row of each of these owners has been freed."""
        self._feed.freed(owners)

    async def serve(self, request: web.Request) -> web.StreamResponse:
        """Serve ``GET /loads``."""
        return await self._feed.serve(request)

    # -- life ------------------------------------------------------------------------------------

    async def run(self, port: int) -> None:
        """Follow all peers forever. ``port``: where every peer serves ``/loads``."""
        self._port = port
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            self._session = session
            for address in self._fixed:
                self._join(address)
            try:
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(self._feed.run())
                    tasks.create_task(self._discovery.run())
                    tasks.create_task(self._age())
                    tasks.create_task(self._settle())
            finally:
                listeners = list(self._tasks.values())
                for task in listeners:
                    task.cancel()
                await asyncio.gather(*listeners, return_exceptions=True)

    def close(self) -> None:
        """End all streams that this KubeAI replica serves."""
        self._feed.close()

    def _found(self, ips: set[str]) -> None:
        """Follow the peers at these IPs, and drop those that are gone."""
        hosts = (f"[{ip}]" if ":" in ip else ip for ip in ips)
        wanted = self._fixed | {f"{host}:{self._port}" for host in hosts}
        for address in self._tasks.keys() - wanted:
            self._tasks.pop(address).cancel()
            self._view.leave(address)
            if self._uses is not None:
                self._uses.leave(address)
        for address in wanted - self._tasks.keys():
            self._join(address)

    def _join(self, address: str) -> None:
        if len(self._tasks) >= PEERS_MAX:
            log.error("too many peers: peer ignored", peer=address, max=PEERS_MAX)
            return
        peer = self._view.join(address, self._clock())
        self._tasks[address] = asyncio.create_task(self._listen(address, peer))

    async def _listen(self, address: str, peer: Peer) -> None:
        assert self._session is not None, "running"
        backoff = Backoff(RETRY_FIRST_S, RETRY_MAX_S)
        logged: str | None = ""  # the last error, so that retries do not repeat it; None: connected
        while True:
            fixed = address in self._fixed
            words = listen(self._session, address, self._identity, metrics_first=fixed)
            try:
                async with contextlib.aclosing(words):
                    async for loads, whole, process in words:
                        self._view.take(peer, loads, self._clock(), whole)
                        if self._uses is not None:
                            self._uses.take(address, loads, whole=whole, process=process)
                        self._note(loads.prompts or ())
                        if logged is not None:
                            logged = None
                            log.info("peer connected", peer=address)
                            backoff.reset()
            except OwnIdentity:
                peer.is_self = True
                return
            except (PeerLost, wire.BadFrame) as error:
                if str(error) != logged:
                    logged = str(error)
                    log.info("peer lost", peer=address, error=logged)
            await asyncio.sleep(backoff.next_s())

    async def _settle(self) -> None:
        while True:
            self._table.peers = self._view.speaking
            self._index.silent = self._view.silent
            if self._table.peers:
                self._table.settle()
            await asyncio.sleep(SETTLE_INTERVAL_S if self._table.peers else AGE_INTERVAL_S)

    async def _age(self) -> None:
        while True:
            await asyncio.sleep(AGE_INTERVAL_S)
            now_s = self._clock()
            for address in self._view.age(now_s):
                log.warning("peer silent: its requests are no longer counted", peer=address)
            if self._uses is not None:
                for address, peer in self._view.peers.items():
                    if peer.silent_s(now_s) > HOLD_S:
                        self._uses.leave(address)
                self._uses.age()

    # -- the prefix index ------------------------------------------------------------------------

    def _note(self, prompts: Iterable[wire.SentPrompt]) -> None:
        """Note what a peer has sent, for endpoints that this KubeAI replica routes to as well."""
        for prompt in prompts:
            row = self._rows.get(prompt.endpoint)
            if row is not None:
                self._index.note(row, prompt.blocks, prompt.new_tokens)

    # -- the load table's column -------------------------------------------------------------------

    def _put(self, endpoints: set[str]) -> None:
        for model in set().union(*(self._models.get(name, ()) for name in endpoints)):
            self._put_model(model)

    def _put_model(self, model: str) -> None:
        """Write the cells of a model's endpoints, and their sum to the model's cell."""
        route = self._publisher.route(model)
        if route is None:
            return
        total = total_pending = 0
        for endpoint in route.endpoints:
            in_flight = self._view.in_flight(endpoint.name)
            pending = self._view.pending(endpoint.name)
            self._table.set_peers(endpoint.row, endpoint.generation, in_flight, pending)
            total += in_flight
            total_pending += pending
        self._table.set_peers(route.row, route.generation, total, total_pending)
        if self._queues is not None:
            self._queues.notify(route.row)  # there may be room

    # -- the queue table's column ------------------------------------------------------------------

    def _put_queue(self, model: str, is_live: bool = False) -> None:
        """Write the first request that waits for a model at the peers.

        ``is_live``: the peer that has it has just reported a change. Many tenants' first requests
        have the same start, so the head may be another request without looking different.
        """
        route = self._publisher.route(model)
        if route is None or self._queues is None:
            return
        head = self._view.queue(model)
        if head is None:
            self._queues.clear_peers(route.row)
            self._queues.notify(route.row)  # room was left free for it
            return
        priority, start, now = head
        self._queues.advance(route.row, now)
        self._queues.set_peers(route.row, priority, start, is_live)


__all__ = ["LOADS_PATH", "METRICS_HEADERS", "Peers"]
