"""One view of load: what the other replicas of KubeAI serve, and what we tell them.

The supervisor owns one :class:`Peers`. What others have in flight goes into the supervisor's column
of the load table, where every pick sees it; what they have active is asked for by the autoscaler.
Promises: a peer that is slow, hung, gone or lying costs the others nothing but its own numbers; its
last word holds for a bounded time and is then forgotten; and until all have spoken, or have been
silent for long, the view says that it is incomplete.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Collection, Iterable

from kubeai._load import LoadTable
from kubeai.http import aiohttp, web
from kubeai.kube import Backoff, Kube
from kubeai.logs import get_logger
from kubeai.peers import wire
from kubeai.peers.discovery import Discovery
from kubeai.peers.feed import TICK_S, Feed
from kubeai.peers.listener import Ourselves, PeerLost, listen
from kubeai.peers.view import HOLD_S, Peer, View
from kubeai.routing import Owner, Publisher

log = get_logger(__name__)
LOADS_PATH = wire.PATH
METRICS_HEADERS = {wire.MARKER: wire.PATH}  # of each response of /metrics, for peers
PEERS_MAX = 64
HEARD = "peer heard"
RETRY_FIRST_S, RETRY_MAX_S = 0.1, 2.0
AGE_INTERVAL_S = 1.0
# What is settled (see _load) follows by a fourth each time: 50 ms late, as what peers tell is.
SETTLE_INTERVAL_S = TICK_S / 4
CELL_MAX = 1 << 30


class Peers:
    """``pod``: our own, by whose labels the others are found; empty where there is none.

    ``addresses``: further ones (``host:port``), which may be our own, or those of servers that
    have nothing but ``/metrics``.
    """

    def __init__(
        self,
        kube: Kube,
        namespace: str,
        identity: str,
        table: LoadTable,
        publisher: Publisher,
        *,
        pod: str = "",
        addresses: Iterable[str] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._identity = identity
        self._table = table
        self._publisher = publisher
        self._fixed = frozenset(addresses)
        self._clock = clock
        self._port = 0
        self._feed = Feed(identity, table, publisher)
        self._view = View(self._put)
        self._discovery = Discovery(kube, namespace, pod, self._found)
        self._routed: dict[str, set[str]] = {}  # model → its endpoints
        self._models: dict[str, set[str]] = {}  # endpoint → whose it is
        self._tasks: dict[str, asyncio.Task[None]] = {}  # by address
        self._session: aiohttp.ClientSession | None = None
        self._began_s = clock()

    # -- what is asked ---------------------------------------------------------------------------

    def active(self, model: str) -> int:
        """Requests of a model that other replicas serve or hold."""
        return self._view.active(model)

    def ended(self, model: str) -> int:
        """Requests of a model of whose end they told; it never falls."""
        return self._view.ended(model)

    def in_flight(self, endpoint: str) -> int:
        """Requests that an endpoint serves for them."""
        return self._view.in_flight(endpoint)

    def routes(self, endpoint: str) -> bool:
        """Whether one of them may still send requests to an endpoint, or has some there."""
        return self._view.routes(endpoint)

    def complete(self) -> bool:
        """Whether all that are there have spoken lately, or not for long."""
        now_s = self._clock()
        known = self._session is not None and self._discovery.listed
        known = known or now_s - self._began_s > HOLD_S
        return known and self._view.complete(now_s)

    def silences_s(self) -> dict[str, float]:
        """How long ago each was heard, by address."""
        now_s = self._clock()
        return {
            address: peer.silent_s(now_s)
            for address, peer in self._view.peers.items()
            if not peer.ourselves
        }

    # -- what the supervisor tells ---------------------------------------------------------------

    def rerouted(self, model: str) -> None:
        """The model's route is a new one: its endpoints' cells must say what peers have there."""
        route = self._publisher.route(model)
        names = set() if route is None else {endpoint.name for endpoint in route.endpoints}
        known = self._routed.pop(model, set())
        for name in known - names:
            self._models[name].remove(model)
            if not self._models[name]:
                del self._models[name]
        for name in names - known:
            self._models.setdefault(name, set()).add(model)
        if names:
            self._routed[model] = names
        self._put_model(model)

    def freed(self, owners: Collection[Owner]) -> None:
        """A row of the table is free that was theirs."""
        self._feed.freed(owners)

    async def serve(self, request: web.Request) -> web.StreamResponse:
        """``GET /loads``."""
        return await self._feed.serve(request)

    # -- life ------------------------------------------------------------------------------------

    async def run(self, port: int) -> None:
        """Listen to all, for ever. ``port``: where peers tell their loads, as we do there."""
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
        """Tell nobody anything any more."""
        self._feed.close()

    def _found(self, ips: set[str]) -> None:
        """The other replicas' pods are at these addresses."""
        hosts = (f"[{ip}]" if ":" in ip else ip for ip in ips)
        wanted = self._fixed | {f"{host}:{self._port}" for host in hosts}
        for address in self._tasks.keys() - wanted:
            self._tasks.pop(address).cancel()
            self._view.leave(address)
        for address in wanted - self._tasks.keys():
            self._join(address)

    def _join(self, address: str) -> None:
        if len(self._tasks) >= PEERS_MAX:
            log.error("too many replicas: one is not listened to", peer=address, max=PEERS_MAX)
            return
        peer = self._view.join(address, self._clock())
        self._tasks[address] = asyncio.create_task(self._listen(address, peer))

    async def _listen(self, address: str, peer: Peer) -> None:
        assert self._session is not None, "running"
        backoff = Backoff(RETRY_FIRST_S, RETRY_MAX_S)
        said = ""  # of it in the log; not at each try
        while True:
            fixed = address in self._fixed
            words = listen(self._session, address, self._identity, metrics_first=fixed)
            try:
                async with contextlib.aclosing(words):
                    async for loads, whole in words:
                        self._view.take(peer, loads, self._clock(), whole)
                        if said != HEARD:
                            said = HEARD
                            log.info(said, peer=address)
                            backoff.reset()
            except Ourselves:
                peer.ourselves = True
                return
            except (PeerLost, wire.BadFrame) as error:
                if str(error) != said:
                    said = str(error)
                    log.info("peer lost", peer=address, error=said)
            await asyncio.sleep(backoff.next_s())

    async def _settle(self) -> None:
        while True:
            self._table.peers = self._view.speaking
            if self._table.peers:
                self._table.settle()
            await asyncio.sleep(SETTLE_INTERVAL_S if self._table.peers else AGE_INTERVAL_S)

    async def _age(self) -> None:
        while True:
            await asyncio.sleep(AGE_INTERVAL_S)
            for address in self._view.age(self._clock()):
                log.warning("peer silent for long: its requests are not counted", peer=address)

    # -- the column of the load table --------------------------------------------------------------

    def _put(self, endpoints: set[str]) -> None:
        for model in set().union(*(self._models.get(name, ()) for name in endpoints)):
            self._put_model(model)

    def _put_model(self, model: str) -> None:
        """Write the cells of a model's endpoints, and of the model: their sum."""
        route = self._publisher.route(model)
        if route is None:
            return
        total = 0
        for endpoint in route.endpoints:
            in_flight = min(self._view.in_flight(endpoint.name), CELL_MAX)
            self._table.set_peers(endpoint.row, endpoint.generation, in_flight)
            total += in_flight
        self._table.set_peers(route.row, route.generation, min(total, CELL_MAX))


__all__ = ["LOADS_PATH", "METRICS_HEADERS", "Peers"]
