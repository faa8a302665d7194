"""Relay HTTP/1.1 between clients' connections and engines; knows nothing of models."""

import asyncio
from collections.abc import Callable
from typing import Any, Protocol, final

CONNECT: int  # why an attempt failed: the connection failed or timed out
LOST: int  # the connection ended before the response head was complete
INVALID: int  # the response is not valid HTTP
TIMEOUT: int  # no first byte in time
STATUS: int  # a response that the Exchange may not want to pass on

RETRY_AFTER_S: int  # Retry-After of the relay's own 503 responses

class Connecting(Protocol):
    """A pending connection."""

    def cancel(self) -> object: ...

class Connections:
    """The connection pool of one upstream.

    Subclasses create the connections: see :meth:`connect`.
    """

    relay: Relay
    host: str  # for the Host header
    first_byte_timeout_s: float  # 0: no limit
    between_bytes_timeout_s: float  # 0: no limit
    idle_timeout_s: float
    failing: bool  # the upstream has failed since its last complete response
    trial: bool  # the upstream is ejected; requests to it are probes
    answered_s: float  # start of the last good response (CLOCK_MONOTONIC); 0: never
    answers: int  # good responses that have begun

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
        """Number of idle connections."""
    def connect(self, exchange: Exchange) -> Connecting:
        """Open a connection; then call the exchange's ``connected`` or ``connect_failed``."""
    def take(self) -> Upstream | None:
        """The most recently returned connection, or one past half its idle timeout, or None."""
    def give(self, upstream: Upstream) -> None:
        """Keep a connection for the next request if there is room; otherwise close it."""
    def note_failure(self, failure: int) -> None:
        """Record that an attempt failed or its response broke off."""
    def note_answer(self, status: int) -> None:
        """Record a response head. Some statuses count as a failure of the upstream."""
    def note_end(self, status: int) -> None:
        """Record that a response is complete."""
    def failed(self, failure: int) -> None:
        """Hook: an attempt failed, or a response broke off."""
    def restored(self) -> None:
        """Hook: a probe has received a good response head."""
    def recovered(self) -> None:
        """Hook: the first response since a failure or an ejection is complete."""
    def waiting(self, sent_before_s: float) -> list[Exchange]:
        """Exchanges that sent their request before then and received no byte of a response."""
    def forget(self, upstream: Upstream) -> None:
        """Remove an idle connection that has ended."""
    def close(self) -> None:
        """Close idle connections and keep none in future: the upstream was removed or has moved."""

@final
class Relay:
    """All connections of one worker, their limits and timers."""

    owner: Any  # shared by all exchanges
    downstreams: set[Downstream]
    upstreams: set[Upstream]
    exchanges: int  # requests between their head and the end of their response
    requests: int  # since the start
    buffered_bytes: int  # by request bodies that are collected or being collected
    draining: bool  # responses carry Connection: close

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
        """``refusal(status, message, target, request_id)`` returns the JSON body and extra header
        lines of an error response of the relay's own. ``target`` is empty and ``request_id`` None
        if the request head was not read that far.

        ``stall_timeout_s``: how long a client may leave pending response data unread.
        ``connections_max``: client connections; further ones get 503. ``buffer_max_bytes``: of all
        collected request bodies; requests beyond it get 503.
        ``tick_s``: how late an expired deadline may be noticed.
        """
    @property
    def connections(self) -> int:
        """Number of open downstream connections."""
    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start the timers."""
    def stop(self) -> None:
        """Abort all open connections and stop the timers."""
    def downstream(self) -> Downstream:
        """Create the protocol for an accepted connection (for ``loop.create_server``)."""
    def close_idle(self) -> None:
        """Start draining: close connections once they have been idle for a second."""

@final
class Downstream(asyncio.Protocol):
    """One client connection. Created by :meth:`Relay.downstream`."""

class Exchange:
    """One request and its response. Subclasses decide how it is handled.

    The relay calls the hooks (``on_…``, ``wants_retry``, ``retry``, ``give_up``). Hooks call the
    actions (``collect``, ``stream``, ``send``, ``answer``), at once or later until the exchange is
    ``finished``. An action after the client has disconnected does nothing.
    """

    method: str
    target: str
    body: bytes  # once collected
    answered: bool  # a response head has been written
    status: int  # of that response, or 0
    answered_s: float  # when its head was written (CLOCK_MONOTONIC); 0: not yet
    answer_bytes: int  # written to the client, including heads and framing
    broken: bool  # the response was cut short
    peer: str  # the client's address, without the port
    request_bytes: int  # size of the request body
    whole: bool  # the response has been written completely
    finished: bool

    def __init__(self, downstream: Downstream) -> None: ...
    @property
    def owner(self) -> Any: ...
    def headers(self, name: bytes) -> list[bytes]:
        """The values of a header, in order; ``name`` in lower case. Excludes hop-by-hop ones."""
    @property
    def request_id(self) -> str:
        """The client's X-Request-Id, or a generated one."""
    @property
    def asks_websocket(self) -> bool:
        """Whether the client requests a WebSocket upgrade. HTTP/1.0 has no upgrades."""
    def drop_header(self, name: bytes) -> None:
        """Remove a header from the upstream request; ``name`` in lower case."""
    def set_header(self, name: bytes, value: bytes) -> None:
        """Replace a header in the upstream request; ``name`` in lower case."""
    # actions
    def collect(self, max_bytes: int) -> None:
        """Read the whole body, then call ``on_body``."""
    def stream(self, pool: Connections, path: bytes, max_bytes: int) -> None:
        """Stream the request to an upstream and its response back. No retries."""
    def send(self, pool: Connections, path: bytes, body: bytes) -> None:
        """Start an attempt: send the request with this body and relay the response."""
    def answer(self, status: int, body: bytes, headers: bytes = b"") -> None:
        """Respond with JSON, without an upstream. ``headers``: extra lines, each ending in CRLF."""
    def detach(self) -> None:
        """Abandon the current attempt, if any, and close its upstream connection.

        ``send`` or ``answer`` must follow.
        """
    # called by pools
    def connected(self, upstream: Upstream) -> None:
        """The connection requested with ``pool.connect`` is established."""
    def connect_failed(self) -> None: ...
    # hooks
    def on_head(self) -> None:
        """The head is complete: call ``collect``, ``stream`` or ``answer``."""
    def on_body(self) -> None:
        """``body`` is complete: call ``send`` or ``answer``, now or later."""
    def wants_retry(self, failure: int, status: int) -> bool:
        """Whether to make another attempt: True calls ``retry``, False ``give_up``.

        Nothing has reached the client. ``status``: of the response, if ``failure`` is STATUS;
        False then passes that response on.
        """
    def retry(self) -> None:
        """Call ``send`` again or ``answer``, now or later."""
    def give_up(self, failure: int) -> None:
        """Respond with an error."""
    def attempt_elsewhere(self) -> None:
        """The upstream is not expected to respond: make another attempt if possible."""
    def on_end(self) -> None:
        """The exchange is over, answered or not: release its resources. Called once."""

@final
class Upstream(asyncio.Protocol):
    """One connection to an engine; idle in its pool, or serving one Exchange."""

    def __init__(self, pool: Connections) -> None: ...
    def usable(self) -> bool:
        """Whether a request can be written: the connection is not known to be closed."""
    def close(self) -> None:
        """Close the connection at once. Its current exchange fails."""

def unchunk(*pieces: bytes) -> tuple[bytes, int, bool]:
    """Parse chunked framing given in pieces: (data, bytes used, ended). ValueError if malformed.

    For tests and fuzzers only: the relay itself never joins pieces.
    """
