"""Connections to one upstream: made when none is idle. ``_relay.Connections`` keeps those.

An endpoint's :class:`Pool` is what its Reservations carry as their target. The worker's aiohttp
application is one more upstream (:class:`PagesPool`). Idle connections are taken last in, first
out, so that few stay warm; they are closed after ``idle_timeout_s`` (the relay's clock sees to
that), sooner than an engine would. Called by the relay and the exchange.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import structlog

from kubeai._relay import Connections, Upstream

if TYPE_CHECKING:
    from kubeai._relay import Connecting, Exchange, Relay

log = structlog.get_logger(__name__)


class _Pool(Connections):
    """Makes a new connection in a task. Subclasses know how to dial."""

    _connect_timeout_s: float

    def connect(self, exchange: Exchange) -> Connecting:
        """Make a connection for an exchange, which then is told so, or that there is none."""
        return asyncio.get_running_loop().create_task(self._connect(exchange))

    async def _connect(self, exchange: Exchange) -> None:
        upstream = Upstream(self)
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                await self._dial(upstream)
        except (OSError, TimeoutError) as error:
            upstream.close()
            log.info("cannot connect", upstream=self.host, error=str(error) or type(error).__name__)
            exchange.connect_failed()
        except asyncio.CancelledError:
            upstream.close()
            raise
        else:
            exchange.connected(upstream)

    async def _dial(self, upstream: Upstream) -> None:
        raise NotImplementedError


class Pool(_Pool):
    """The connections to one endpoint, ``address`` "ip:port"."""

    def __init__(
        self,
        relay: Relay,
        address: str,
        *,
        connect_timeout_s: float,
        idle_timeout_s: float,
        max_idle: int,
        first_byte_timeout_s: float,
        between_bytes_timeout_s: float,
    ) -> None:
        super().__init__(
            relay,
            address,
            idle_timeout_s=idle_timeout_s,
            max_idle=max_idle,
            first_byte_timeout_s=first_byte_timeout_s,
            between_bytes_timeout_s=between_bytes_timeout_s,
        )
        self._connect_timeout_s = connect_timeout_s
        ip, _, port = address.rpartition(":")
        self._ip = ip.strip("[]")
        self._port = int(port)

    async def _dial(self, upstream: Upstream) -> None:
        loop = asyncio.get_running_loop()
        await loop.create_connection(lambda: upstream, self._ip, self._port)


class PagesPool(_Pool):
    """The way to the worker's own aiohttp application.

    Each connection is a socket pair: there is no name in the file system or elsewhere that another
    process could connect to. ``serve`` makes the application's protocol for one connection. The
    application has its own clocks, and may hold a request as long as the gateway may.
    """

    def __init__(self, relay: Relay, serve: Callable[[], asyncio.BaseProtocol]) -> None:
        super().__init__(relay, "localhost", idle_timeout_s=30.0, max_idle=64)
        self._connect_timeout_s = 5.0
        self._serve = serve

    async def _dial(self, upstream: Upstream) -> None:
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.setblocking(False)
        await _hand_over(loop.connect_accepted_socket(self._serve, theirs), theirs, ours)
        await _hand_over(loop.create_unix_connection(lambda: upstream, sock=ours), ours)


async def _hand_over(connecting: Awaitable[object], *sockets: socket.socket) -> None:
    """Give a socket to the loop; it (and others) are closed should that fail."""
    try:
        await connecting
    except BaseException:
        for each in sockets:
            each.close()
        raise
