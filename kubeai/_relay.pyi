"""HTTP/1.1 between a client's connection and the engine that answers it; knows no models."""

import asyncio
from collections.abc import Callable
from typing import Any, Protocol, final

CONNECT: int  # why an attempt failed: no connection, or not in time
LOST: int  # the connection ended before an answer's head was whole
INVALID: int  # what came is not an HTTP answer
TIMEOUT: int  # no first byte in time
STATUS: int  # an answer that the Exchange may not want to pass on

RETRY_AFTER_S: int  # what a client is told that gets a 503 of ours

class Connecting(Protocol):
    """A connection that is being made."""

    def cancel(self) -> object: ...

class Connections:
    """The connections to one upstream, of which those without a request rest here.

    Subclasses make them: see :meth:`connect`.
    """

    relay: Relay
    host: str  # for the Host header
    first_byte_timeout_s: float  # 0: no limit
    between_bytes_timeout_s: float  # 0: no limit
    idle_timeout_s: float
    failing: bool  # it has failed since its last complete answer
    trial: bool  # it is ejected; requests there are probes
    answered_s: float  # when a good answer last began (CLOCK_MONOTONIC); 0: never
    answers: int  # good answers that have begun

    def __init__(
        self,
        relay: Relay,
        host: str,
        *,
        idle_timeout_s: float,
        max_idle: int,
        first_byte_timeout_s: float = 0,
        between_bytes_timeout_s: float = 0,
    ) -> None: ...
    @property
    def idle(self) -> int:
        """Connections that wait for a request."""
    def connect(self, exchange: Exchange) -> Connecting:
        """Make a connection for an exchange, which then is told so, or that there is none."""
    def take(self) -> Upstream | None:
        """The connection that was given back last, or one whose time is half over, or None."""
    def give(self, upstream: Upstream) -> None:
        """Keep a connection for the next request, while there is room."""
    def note_failure(self, failure: int) -> None:
        """An attempt failed, or its answer broke."""
    def note_answer(self, status: int) -> None:
        """An answer's head has come: some say that the upstream is not well."""
    def note_end(self, status: int) -> None:
        """An answer is whole."""
    def failed(self, failure: int) -> None:
        """An attempt failed, or an answer broke."""
    def restored(self) -> None:
        """A probe has begun to be answered."""
    def recovered(self) -> None:
        """An answer is complete, the first since a failure or an ejection."""
    def waiting(self, sent_before_s: float) -> list[Exchange]:
        """Exchanges that sent their request here before then and got no byte of an answer."""
    def forget(self, upstream: Upstream) -> None:
        """An idle connection has ended."""
    def close(self) -> None:
        """The upstream is gone or has moved: no connection is kept any longer."""

@final
class Relay:
    """All connections of one worker, their limits and their clock."""

    owner: Any  # what the exchanges share
    downstreams: set[Downstream]
    upstreams: set[Upstream]
    exchanges: int  # requests between their head and the end of their answer
    requests: int  # since the start
    buffered_bytes: int  # by bodies that are being read whole, or have been
    draining: bool  # answers say Connection: close

    def __init__(
        self,
        owner: Any,
        exchange: Callable[[Downstream], Exchange],
        refusal: Callable[[int, str, bytes, str | None], tuple[bytes, bytes]],
        *,
        head_max_bytes: int,
        head_max_count: int,
        head_timeout_s: float,
        body_timeout_s: float,
        keep_alive_timeout_s: float,
        stall_timeout_s: float,
        connections_max: int,
        buffer_max_bytes: int,
        tick_s: float = 0.25,
    ) -> None:
        """``refusal(status, message, target, request_id)``: the JSON of one of the relay's own
        refusals, and header lines that go with it. ``target`` is empty, ``request_id`` None, where
        the head has not come that far.


        ``stall_timeout_s``: how long a client may read nothing of what is ready for it.
        ``connections_max``: of clients; the next gets 503. ``buffer_max_bytes``: of all bodies that
        are collected; whoever sends more gets 503.
        ``tick_s``: how late a deadline may be noticed.
        """
    @property
    def connections(self) -> int:
        """Downstream connections that are open."""
    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start the clock."""
    def stop(self) -> None:
        """Cut whatever is still open, and stop the clock."""
    def downstream(self) -> Downstream:
        """The protocol of one accepted connection (for ``loop.create_server``)."""
    def close_idle(self) -> None:
        """From here on a connection without a request is closed once it was idle for a second."""

@final
class Downstream(asyncio.Protocol):
    """One client's connection. Made by :meth:`Relay.downstream`."""

class Exchange:
    """One request and its answer. Subclasses say what becomes of it.

    The hooks (``on_…``, ``wants_retry``, ``retry``, ``give_up``) are called by the relay; the
    actions (``collect``, ``stream``, ``send``, ``answer``) by the hooks, or later while the
    exchange is not ``finished``. An action after the client has left does nothing.
    """

    method: str
    target: str
    body: bytes  # once collected
    answered: bool  # the head of an answer has been written
    status: int  # of that answer, or 0
    answered_s: float  # when its head was written, by CLOCK_MONOTONIC; 0: not yet
    answer_bytes: int  # written to the client, heads and framing included
    broken: bool  # the answer ended before its end
    peer: str  # the client's address, without its port
    request_bytes: int  # of the request's body
    whole: bool  # the answer has been written to its end
    finished: bool

    def __init__(self, downstream: Downstream) -> None: ...
    @property
    def owner(self) -> Any: ...
    def headers(self, name: bytes) -> list[bytes]:
        """The values of a header, in order; ``name`` in lower case. Hop-by-hop ones are gone."""
    @property
    def request_id(self) -> str:
        """The client's X-Request-Id, or the one that was made for it."""
    @property
    def asks_websocket(self) -> bool:
        """Whether the client asks for an upgrade to WebSocket. HTTP/1.0 has no upgrades."""
    def drop_header(self, name: bytes) -> None:
        """Do not send this header to the upstream; ``name`` in lower case."""
    def set_header(self, name: bytes, value: bytes) -> None:
        """Send this header to the upstream, in place of the client's; ``name`` in lower case."""
    # actions
    def collect(self, max_bytes: int) -> None:
        """Read the whole body; then comes ``on_body``."""
    def stream(self, pool: Connections, path: bytes, max_bytes: int) -> None:
        """Relay the request to an upstream while it comes, and the answer back. No retries."""
    def send(self, pool: Connections, path: bytes, body: bytes) -> None:
        """Attempt: send the request with this body to an upstream, relay its answer."""
    def answer(self, status: int, body: bytes, headers: bytes = b"") -> None:
        """Answer without an upstream: JSON. ``headers``: more of them, each ending in CRLF."""
    def detach(self) -> None:
        """Abandon the attempt under way, if any; the upstream connection is closed.

        ``send`` or ``answer`` must follow.
        """
    # from pools
    def connected(self, upstream: Upstream) -> None:
        """The connection that ``pool.connect`` was asked for is there."""
    def connect_failed(self) -> None: ...
    # hooks
    def on_head(self) -> None:
        """The head is whole: call ``collect``, ``stream`` or ``answer``."""
    def on_body(self) -> None:
        """The body is whole, in ``body``: call ``send`` or ``answer``, now or later."""
    def wants_retry(self, failure: int, status: int) -> bool:
        """Whether to make another attempt (``retry`` follows) rather than ``give_up``.

        Nothing has reached the client. ``status``: of the answer, where ``failure`` is STATUS;
        False then passes that answer on.
        """
    def retry(self) -> None:
        """Make another attempt, or ``answer``, now or later."""
    def give_up(self, failure: int) -> None:
        """Answer for a failure."""
    def attempt_elsewhere(self) -> None:
        """The upstream is not expected to answer: make another attempt, if one is possible."""
    def on_end(self) -> None:
        """It is over, answered or not: give back what was taken. Called once."""

@final
class Upstream(asyncio.Protocol):
    """One connection to an engine; idle in its pool, or at work for one Exchange."""

    def __init__(self, pool: Connections) -> None: ...
    def usable(self) -> bool:
        """Whether a request can be written to it: not seen closed."""
    def close(self) -> None:
        """Close it, now. What it is at work for fails."""

def unchunk(*pieces: bytes) -> tuple[bytes, int, bool]:
    """Walk chunked framing given in pieces: (data, bytes used, ended); ValueError when it is bad.

    For tests and fuzzers: the relay itself never joins pieces.
    """
