"""A worker's server: accepts connections and drains them.

:class:`Front` owns the relay with the config's limits, the connections to the local routes
(pages.py), and draining: the worker becomes unready at once, serves new requests with
``Connection: close`` for a while, then closes the listener and gives open requests time to finish.
The worker creates one.
"""

from __future__ import annotations

import asyncio
import resource
import socket
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from kubeai.api.config.system import GatewayConfig
from kubeai.gateway.context import Gateway
from kubeai.gateway.endpoint_pool import PagesPool, Pool
from kubeai.gateway.proxy import PLANS, Exchange
from kubeai.gateway.relay._relay import Relay
from kubeai.logs import get_logger
from kubeai.openai.errors import relay_error
from kubeai.routing.table import Endpoint, RoutedModel

if TYPE_CHECKING:
    from kubeai.gateway.access_log import Observers

log = get_logger(__name__)

LISTEN_BACKLOG = 4_096
DRAIN_POLL_S = 0.02
RESERVED_DESCRIPTORS = 128  # for idle upstream connections and everything else


def connections_possible() -> int:
    """The number of clients that the descriptor limit allows, with one upstream each."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return sys.maxsize
    return max(1, (limit - RESERVED_DESCRIPTORS) // 2)


class Front:
    """One worker's listener, connections and drain; the ``owner`` of its exchanges.

    Created before the routing table, which gets its endpoints' pools from :meth:`pool`. Starts
    accepting connections with :meth:`serve`.
    """

    gateway: Gateway
    pages: PagesPool

    def __init__(
        self, config: GatewayConfig, observers: Observers | None = None, *, tick_s: float = 0.25
    ) -> None:
        self.config = config
        self.plans = PLANS
        self.observers = observers
        self.relay = Relay(
            self,
            Exchange,
            relay_error,
            head_max_bytes=config.head_max_bytes,
            head_max_count=config.head_max_count,
            head_timeout_s=config.head_timeout_s,
            body_timeout_s=config.body_timeout_s,
            keep_alive_timeout_s=config.keep_alive_timeout_s,
            stall_timeout_s=config.between_bytes_timeout_s,
            connections_max=min(config.connections_max, connections_possible()),
            buffer_max_bytes=config.buffer_max_bytes,
            tick_s=tick_s,
        )
        self._tick_s = tick_s
        self._server: asyncio.Server | None = None
        self._watch: asyncio.TimerHandle | None = None

    def pool(self, routed: RoutedModel, endpoint: Endpoint) -> Pool:
        """Create the upstream that the routing table keeps for an endpoint."""
        return Pool(self.relay, routed, endpoint, self.config)

    async def serve(
        self, gateway: Gateway, pages: Callable[[], asyncio.BaseProtocol], sock: socket.socket
    ) -> None:
        """Accept on a listening socket. ``pages``: the aiohttp application's protocol factory."""
        loop = asyncio.get_running_loop()
        self.gateway = gateway
        self.pages = PagesPool(self.relay, pages)
        gateway.relay = self.relay
        self.relay.start(loop)
        self._server = await loop.create_server(
            self.relay.downstream, sock=sock, backlog=LISTEN_BACKLOG
        )
        self._watch_ejections()

    def _watch_ejections(self) -> None:
        loop = asyncio.get_running_loop()
        self._watch = loop.call_later(self._tick_s, self._watch_ejections)
        self.gateway.table.move_off_ejected()

    async def drain(self, accept_s: float, timeout_s: float) -> None:
        """Drain as described in the module, for at most ``accept_s`` plus ``timeout_s``."""
        self.gateway.draining = True
        self.relay.draining = True
        log.info("draining", exchanges=self.relay.exchanges, connections=self.relay.connections)
        await asyncio.sleep(accept_s)
        if self._server is not None:
            self._server.close()
        self.relay.close_idle()
        deadline_s = asyncio.get_running_loop().time() + timeout_s
        while self.relay.connections:
            if asyncio.get_running_loop().time() > deadline_s:
                log.warning("drain timed out", exchanges=self.relay.exchanges)
                break
            await asyncio.sleep(DRAIN_POLL_S)

    def close(self) -> None:
        """Close all connections, including those with open requests."""
        if self._watch is not None:
            self._watch.cancel()
        if self._server is not None:
            self._server.close()
        self.pages.close()
        self.relay.stop()
        if self.observers is not None:
            self.observers.close()
