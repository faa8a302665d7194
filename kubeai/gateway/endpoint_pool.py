"""Connection pools: open a connection if none is idle. ``ConnectionPool`` keeps idle ones.

An endpoint's :class:`EndpointPool` is the target of its Reservations. The worker's aiohttp
application is another upstream (:class:`LocalRoutesPool`), and so is the supervisor's console
(:class:`ConsolePool`). Idle connections are reused last in,
first out, so that surplus ones stay idle. The relay's timer closes them after ``idle_timeout_s``,
before an engine would. Created by server.py; called by the relay, the exchange, attempts.py,
fallback.py and retries.py.
"""

from __future__ import annotations

import asyncio
import math
import socket
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

from typing_extensions import override

from kubeai.gateway.health import Health
from kubeai.gateway.relay._exchange import LOST, STATUS
from kubeai.gateway.relay._pool import ConnectionPool
from kubeai.gateway.relay._upstream import Upstream
from kubeai.logs import get_logger
from kubeai.routing.table import EndpointConnections

if TYPE_CHECKING:
    from kubeai.api.config.system import GatewayConfig
    from kubeai.gateway.relay._exchange import Exchange
    from kubeai.gateway.relay._relay import Relay
    from kubeai.routing.routes import Endpoint
    from kubeai.routing.table import RoutedModel

log = get_logger(__name__)
T = TypeVar("T")

# The connections that a crashing engine loses are all noticed within this time.
LOST_TOGETHER_S = 1.0


class _DialingPool(ConnectionPool):
    """Opens a new connection in a task. Subclasses implement ``_dial``."""

    _connect_timeout_s: float

    def connect(self, exchange: Exchange) -> asyncio.Task[None]:
        """Open a connection for an exchange; calls its ``connected`` or ``connect_failed``."""
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


class EndpointPool(_DialingPool, EndpointConnections):
    """The connections to one endpoint, and its health."""

    def __init__(
        self, relay: Relay, routed: RoutedModel, endpoint: Endpoint, config: GatewayConfig
    ) -> None:
        super().__init__(
            relay,
            endpoint.address,
            idle_timeout_s=config.upstream_idle_timeout_s,
            max_idle=config.upstream_max_idle,
            first_byte_timeout_s=config.first_byte_timeout_s,
            between_bytes_timeout_s=config.between_bytes_timeout_s,
        )
        self._health = Health(routed, endpoint.name, config)
        self._routed = routed
        self._endpoint = endpoint.name
        self._connect_timeout_s = config.connect_timeout_s
        self._losses_s = (-math.inf, -math.inf)  # when the last two connections were lost
        # Requests for which a connection is made; since when (CLOCK_MONOTONIC).
        self._connecting: dict[asyncio.Task[None], tuple[Exchange, float]] = {}
        ip, _, port = endpoint.address.rpartition(":")
        self._ip = ip.strip("[]")
        self._port = int(port)

    @override
    def connect(self, exchange: Exchange) -> asyncio.Task[None]:
        connecting = super().connect(exchange)
        self._connecting[connecting] = exchange, time.monotonic()
        connecting.add_done_callback(self._connecting.pop)
        return connecting

    async def _dial(self, upstream: Upstream) -> None:
        loop = asyncio.get_running_loop()
        await loop.create_connection(lambda: upstream, self._ip, self._port)

    # -- health --------------------------------------------------------------------------------

    @override
    def failed(self, failure: int) -> None:
        if failure == LOST:
            self._losses_s = (self._losses_s[1], time.monotonic())
        probe, self.probing = self.probing, False
        for_s = self._health.failed(unreachable=failure != STATUS, probe=probe)
        if for_s is not None:
            log.warning(
                "endpoint ejected",
                model=self._routed.route.model,
                endpoint=self._endpoint,
                for_s=for_s,
            )

    @override
    def restored(self) -> None:
        if self._health.restored():
            model = self._routed.route.model
            log.info("endpoint returned to service", model=model, endpoint=self._endpoint)

    @override
    def recovered(self) -> None:
        self.restored()
        self._health.recovered()

    @property
    @override
    def is_trusted(self) -> bool:
        return self._health.is_trusted(self.answers)

    @property
    @override
    def is_down(self) -> bool:
        return self._health.is_down(self.answered_s)

    @override
    def take_probe(self) -> bool:
        return self._health.take_probe(self.answered_s)

    @override
    def is_proven(self, since_s: float) -> bool:
        return self._health.is_proven(self.answered_s, since_s)

    # -- requests that wait for the first byte of a response -------------------------------------

    @property
    @override
    def is_waited_on(self) -> bool:
        return bool(self._connecting or self.waiting(math.inf))

    @override
    def move_waiting(self, sent_before_s: float = math.inf) -> None:
        for exchange in [*self.waiting(sent_before_s), *self._being_connected(sent_before_s)]:
            exchange.attempt_elsewhere()

    def _being_connected(self, sent_before_s: float) -> list[Exchange]:
        return [
            exchange
            for connecting, (exchange, since_s) in self._connecting.items()
            if since_s < sent_before_s and not connecting.cancelling()
        ]

    @property
    def lost_one_alone(self) -> bool:
        """Whether the connection that was just lost had the endpoint's only request: no worker has
        another one there, and none was lost in the preceding ``LOST_TOGETHER_S``."""
        before_s, last_s = self._losses_s
        return last_s - before_s > LOST_TOGETHER_S and not self._routed.in_flight(self._endpoint)

    async def listens(self) -> bool:
        """Whether the endpoint accepts connections; True if that is unknown after the timeout."""
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                _, writer = await asyncio.open_connection(self._ip, self._port)
        except ConnectionRefusedError:
            return False
        except (OSError, TimeoutError):
            return True
        writer.close()
        return True


class LocalRoutesPool(_DialingPool):
    """Connections to the worker's own aiohttp application (local_routes.py).

    Each connection is a socket pair, so that there is no address that another process could connect
    to. ``serve`` creates the application's protocol for one connection. There are no response
    timeouts, because the application has its own and may hold requests like the gateway.
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
        await hand_over(loop.connect_accepted_socket(self._serve, theirs), theirs, ours)
        await hand_over(loop.create_unix_connection(lambda: upstream, sock=ours), ours)


class ConsolePool(_DialingPool):
    """Connections to the console, which the supervisor serves on a Unix socket at ``path``.

    There are no response timeouts: its streams may be silent.
    """

    def __init__(self, relay: Relay, path: str) -> None:
        super().__init__(relay, "localhost", idle_timeout_s=30.0, max_idle=8)
        self._connect_timeout_s = 5.0
        self._path = path

    async def _dial(self, upstream: Upstream) -> None:
        loop = asyncio.get_running_loop()
        await loop.create_unix_connection(lambda: upstream, self._path)


async def hand_over(connecting: Awaitable[T], *sockets: socket.socket) -> T:
    """Attach a socket to the event loop; close all given sockets if that fails."""
    try:
        return await connecting
    except BaseException:
        for each in sockets:
            each.close()
        raise
