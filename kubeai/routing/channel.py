"""The channel between the supervisor and one worker, over a socket pair.

The supervisor sends routes and keys; the worker reports that it is ready, that its event loop runs,
and which models have held requests. The messenger, which is a worker without a listener, also
reports the state of its streams. Loads are shared through the load table instead. Messages are
msgpack, each preceded by its length (4 bytes, big-endian). A worker that loses the channel drains.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from typing import Any, Literal, cast

import msgspec
from typing_extensions import override

from kubeai.api.config.system import GatewayConfig, Messaging
from kubeai.framing import FrameTooLong, frame, take_frames
from kubeai.routing.keys import KeyDelta as KeyDelta
from kubeai.routing.keys import KeySnapshot as KeySnapshot
from kubeai.routing.routes import Delta as Delta
from kubeai.routing.routes import Snapshot as Snapshot
from kubeai.routing.usage import UsageReport

MESSAGE_MAX_BYTES = 256 << 20
SETTINGS_VARIABLE = "KUBEAI_WORKER"  # the environment variable with a worker's settings, JSON
# Linux limits a variable, with its name, to 128 KiB. The rest is for the numbers of descriptors.
SETTINGS_MAX_BYTES = 127 << 10


class WorkerSettings(msgspec.Struct, frozen=True):
    """What the supervisor passes to a worker when it starts it. It inherits the descriptors."""

    column: int  # of the load table
    table_fd: int
    index_fd: int  # of the prefix index
    listen_fd: int  # -1: the process has no listener
    channel_fd: int
    gateway: GatewayConfig
    journal_fd: int = -1  # -1: requests are not recorded
    key_table_fd: int = -1  # -1: keys are not required
    console_path: str = ""  # of the Unix socket where the supervisor serves the console; "": none
    messaging: Messaging | None = None  # the messenger's
    queue_fd: int = -1  # of the queue table; -1: the process shares no queues
    wake_fds: tuple[int, ...] = ()  # the eventfds of all workers, by column

    @property
    def descriptors(self) -> tuple[int, ...]:
        """The file descriptors to inherit."""
        numbers = (
            *(self.table_fd, self.index_fd, self.channel_fd, self.listen_fd, self.journal_fd),
            *(self.key_table_fd, self.queue_fd, *self.wake_fds),
        )
        return tuple(number for number in numbers if number >= 0)

    @property
    def environment(self) -> dict[str, str]:
        """The environment variable from which the worker reads them."""
        return {SETTINGS_VARIABLE: msgspec.json.encode(self).decode()}


class Drain(msgspec.Struct, frozen=True, tag="drain", array_like=True):
    """Drain, then exit.

    New requests are served with ``Connection: close`` for ``accept_s``, then the listener is
    closed. Connections that are still open after another ``timeout_s`` are closed.
    """

    accept_s: float
    timeout_s: float


class Ready(msgspec.Struct, frozen=True, tag="ready", array_like=True):
    """The worker has a routing table and accepts connections."""

    pid: int


class Heartbeat(msgspec.Struct, frozen=True, tag="heartbeat", array_like=True):
    """The worker's event loop runs. Sent every HEARTBEAT_INTERVAL_S."""


class Demand(msgspec.Struct, frozen=True, tag="demand", array_like=True):
    """A request is held for a model without an endpoint: check the load table now."""

    model: str


# The outcomes by which answered messages are counted: classes of status.
OUTCOMES = ("2xx", "3xx", "4xx", "5xx")


class Side(msgspec.Struct, frozen=True, array_like=True):
    """The state of a stream's connection to the broker of its requests, or of its responses."""

    connected: bool = False
    connections: int = 0  # made so far
    problem: str = ""  # why it is not connected; without credentials


class StreamReport(msgspec.Struct, frozen=True, array_like=True):
    """A message stream's counts since the messenger started, and its state."""

    requests: Side = Side()
    responses: Side = Side()
    received: int = 0  # deliveries
    redelivered: int = 0  # those of messages that had been delivered before
    retried: int = 0  # attempts that failed and were repeated
    dead: int = 0  # messages given up: answered with the last attempt's error
    publish_failures: int = 0
    answered: dict[str, int] = {}  # by outcome
    in_hand: int = 0  # received, and not yet answered
    held: int = 0  # those that wait for an endpoint of their model
    lag: int | None = None  # messages that wait in the broker; None: unknown


class Streams(msgspec.Struct, frozen=True, tag="streams", array_like=True):
    """The messenger's streams, in the config's order. Sent at least every REPORT_INTERVAL_S."""

    reports: tuple[StreamReport, ...]


FallbackReason = Literal["not_ready", "blocked", "failing", "saturated"]


CountedEvent = Literal["fallback", "denial"]


class EventCount(msgspec.Struct, frozen=True, array_like=True):
    """How many events of one kind there were with the same labels.

    Labels of a fallback: the Model, the one that it left for, the FallbackReason. Of a denial: the
    error's code.
    """

    event: CountedEvent
    labels: tuple[str, ...]
    count: int


class EventReport(msgspec.Struct, frozen=True, tag="events", array_like=True):
    """A worker's events since its last report."""

    counts: tuple[EventCount, ...]


REPORT_INTERVAL_S = 1.0
HEARTBEAT_INTERVAL_S = 1.0
# Makes a worker dump its stack. SIGABRT would leave a core file, with prompts and keys.
STACK_SIGNAL = signal.SIGUSR1

Down = Snapshot | Delta | KeySnapshot | KeyDelta | Drain
Up = Ready | Heartbeat | Demand | Streams | UsageReport | EventReport


class Channel(asyncio.Protocol):
    """One end of the channel. ``message``: the union that it receives, ``Down`` or ``Up``."""

    def __init__(
        self,
        message: Any,
        received: Callable[[object], None],
        closed: Callable[[], None],
    ) -> None:
        self._decoder: msgspec.msgpack.Decoder[object] = msgspec.msgpack.Decoder(message)
        self._encoder = msgspec.msgpack.Encoder()
        self._received = received
        self._closed = closed
        self.ended = asyncio.Event()  # all that the other end has sent has been received
        self._buffer = bytearray()
        self._transport: asyncio.WriteTransport | None = None

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # A cast, because uvloop's transports are not subclasses of asyncio's.
        self._transport = cast(asyncio.WriteTransport, transport)

    @override
    def data_received(self, data: bytes) -> None:
        self._buffer += data
        try:
            for body in take_frames(self._buffer, MESSAGE_MAX_BYTES):
                self._received(self._decoder.decode(body))
        except FrameTooLong:
            self.close()

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self.ended.set()
        self._closed()

    def send(self, message: Down | Up) -> None:
        """Queue a message. Dropped if the other end is gone; ``closed`` has then been called."""
        if self._transport is None:
            return
        self._transport.write(frame(self._encoder.encode(message)))

    def close(self) -> None:
        """Close the connection."""
        if self._transport is not None:
            self._transport.close()
