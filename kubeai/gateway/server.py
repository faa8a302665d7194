"""A worker's server: accepts connections and drains them.

:class:`Server` owns the relay with the config's limits, the connections to the local routes
(local_routes.py), and draining: the worker becomes unready at once, serves new requests with
``Connection: close`` for a while, then closes the listener and gives open requests time to finish.
The worker creates one.
"""

from __future__ import annotations

import asyncio
import resource
import socket
import sys
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from kubeai._load import LoadTable
from kubeai._prefix import PrefixIndex
from kubeai._queue_table import QueueTable
from kubeai.gateway._fast_path import end_revoked
from kubeai.gateway.context import Context
from kubeai.gateway.endpoint_pool import (
    ConsolePool,
    EndpointPool,
    LocalRoutesPool,
    hand_over,
)
from kubeai.gateway.proxy import Proxy
from kubeai.gateway.relay._downstream import Downstream
from kubeai.gateway.relay._relay import Relay
from kubeai.logs import get_logger
from kubeai.openai.errors import relay_error
from kubeai.routing.keys import KeyDelta, KeySnapshot
from kubeai.routing.routes import Endpoint
from kubeai.routing.table import RoutedModel, RoutingTable

log = get_logger(__name__)

T = TypeVar("T", bound=asyncio.BaseProtocol)

LISTEN_BACKLOG = 4_096
DRAIN_POLL_S = 0.02
RESERVED_DESCRIPTORS = 128  # for idle upstream connections and everything else


def connections_possible() -> int:
    """The number of clients that the descriptor limit allows, with one upstream each."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return sys.maxsize
    return max(1, (limit - RESERVED_DESCRIPTORS) // 2)


class Server:
    """One worker's listener, connections and drain.

    It creates the routing table, whose endpoints have their connection pools here. Starts accepting
    connections with :meth:`serve`.
    """

    def __init__(
        self,
        context: Context,
        loads: LoadTable,
        index: PrefixIndex | None = None,
        queues: QueueTable | None = None,
        *,
        tick_s: float = 0.25,
    ) -> None:
        config = context.config
        self._context = context
        self.relay = Relay(
            context,
            Proxy,
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
        self.routes = context.routes = RoutingTable(
            loads, self._endpoint_pool, index=index, queues=queues
        )
        context.models = self.routes.models
        context.aliases = self.routes.aliases
        context.canaried = self.routes.canaried
        self._tick_s = tick_s
        self._wake_fd = -1 if queues is None else queues.wake_fds[queues.column]
        self._server: asyncio.Server | None = None
        self._timer: asyncio.TimerHandle | None = None

    def _endpoint_pool(self, routed: RoutedModel, endpoint: Endpoint) -> EndpointPool:
        return EndpointPool(self.relay, routed, endpoint, self._context.config)

    async def serve(
        self,
        local_routes: Callable[[], asyncio.BaseProtocol],
        sock: socket.socket | None,
        console_path: str = "",
    ) -> None:
        """Accept on a listening socket; None: only the connections of :meth:`connect`.

        ``local_routes``: creates the protocol of a connection to the aiohttp application.
        ``console_path``: of the console's socket; empty: not served.
        """
        loop = asyncio.get_running_loop()
        self._context.local_routes = LocalRoutesPool(self.relay, local_routes)
        if console_path:
            self._context.console = ConsolePool(self.relay, console_path)
        self.relay.start(loop)
        if self._wake_fd >= 0:
            loop.add_reader(self._wake_fd, self.routes.dispatch)
        if sock is not None:
            self._server = await loop.create_server(
                partial(Downstream, self.relay), sock=sock, backlog=LISTEN_BACKLOG
            )
        self._tick()

    async def connect(self, client: Callable[[], T]) -> T:
        """Connect a client of this process to the relay, and return the client's protocol.

        The connection is a socket pair, so there is no address that others could connect to.
        """
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.setblocking(False)
        served = loop.connect_accepted_socket(partial(Downstream, self.relay), theirs)
        await hand_over(served, theirs, ours)
        _, protocol = await hand_over(loop.create_unix_connection(client, sock=ours), ours)
        return protocol

    def apply_keys(self, message: KeySnapshot | KeyDelta) -> None:
        """Apply a change of the API keys and acknowledge it. Ends requests with revoked keys."""
        keys = self._context.key_table
        if keys is not None and keys.apply(message):
            end_revoked(self.relay)
            self._context.background_responses.end_revoked()
        self.routes.advance(message.version)

    def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self._tick_s, self._tick)
        self.routes.move_off_ejected()
        self.routes.expire()
        self.routes.dispatch(is_tick=True)

    async def drain(self, accept_s: float, timeout_s: float) -> None:
        """Drain as described in the module, for at most ``accept_s`` plus ``timeout_s``."""
        self._context.draining = True
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
        if self._timer is not None:
            self._timer.cancel()
        if self._server is not None:
            self._server.close()
        self._context.local_routes.close()
        if self._context.console is not None:
            self._context.console.close()
        if self._wake_fd >= 0:
            asyncio.get_running_loop().remove_reader(self._wake_fd)
        self.relay.stop()
        self.routes.close()
        if self._context.observers is not None:
            self._context.observers.close()
