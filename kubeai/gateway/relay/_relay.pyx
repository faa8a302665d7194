# cython: language_level=3, nonecheck=True
"""The relay of one worker: all its connections, their limits and timers.

A :class:`Connection` is to a client or to an engine. Here it is only what has a deadline and can be
aborted, so that this module imports nothing of what passes through it.
"""

from libc.stdint cimport int64_t

from kubeai._clock cimport coarse_now

from os import urandom

RETRY_AFTER_S = 5  # Retry-After of the relay's own 503 responses

cdef enum:
    CLOSING_IDLE_MAX_S = 1  # clients often send the next request right after a response


cdef class Connection:
    """A connection of the relay, with its deadline."""

    cdef int _abort(self) except -1:
        """Close at once, discarding unsent data."""
        raise NotImplementedError

    cdef int _expired(self) except -1:
        """The deadline has passed."""
        raise NotImplementedError

    cdef int _drain(self, double sooner_s) except -1:
        """If it is idle, close it ``sooner_s`` before its deadline."""
        raise NotImplementedError


cdef class Relay:
    """All connections of one worker, their limits and timers.

    ``exchange(downstream)`` creates the Exchange of a request. ``context`` is for the exchanges;
    the relay does not use it. ``refusal(status, message, target, request_id)`` returns the JSON
    body and extra header lines of an error response of the relay's own. ``target`` is empty and
    ``request_id`` None if the request head was not read that far.

    ``stall_timeout_s``: how long a client may leave pending response data unread.
    ``connections_max``: client connections; further ones get 503. ``buffer_max_bytes``: of all
    collected request bodies; requests beyond it get 503. ``tick_s``: how late an expired deadline
    may be noticed.
    """

    def __init__(
        self,
        context,
        exchange,
        refusal,
        *,
        Py_ssize_t head_max_bytes,
        int head_max_count,
        double head_timeout_s,
        double body_timeout_s,
        double keep_alive_timeout_s,
        double stall_timeout_s,
        Py_ssize_t connections_max,
        int64_t buffer_max_bytes,
        double tick_s=0.25,
    ):
        self.context = context
        self.exchange = exchange
        self.refusal = refusal
        self.head_max_bytes = head_max_bytes
        self.head_max_count = head_max_count
        self.head_timeout_s = head_timeout_s
        self.body_timeout_s = body_timeout_s
        self.keep_alive_timeout_s = keep_alive_timeout_s
        self.stall_timeout_s = stall_timeout_s
        self.connections_max = connections_max
        self.buffer_max_bytes = buffer_max_bytes
        self.id_prefix = urandom(8).hex().encode("ascii")
        self.tick_s = tick_s
        self.downstreams = set()
        self.upstreams = set()

    def start(self, loop):
        """Start the timers."""
        self.loop = loop
        self.timer = loop.call_later(self.tick_s, self._tick)

    def stop(self):
        """Abort all open connections and stop the timers."""
        cdef Connection connection
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        for connection in [*self.downstreams, *self.upstreams]:
            connection._abort()

    def close_idle(self):
        """Start draining: close connections once they have been idle for a second.

        Not at once: after a response without ``Connection: close`` the client may be about to send
        its next request, and the response to that one carries the header.
        """
        cdef Connection downstream
        cdef double sooner_s = max(0.0, self.keep_alive_timeout_s - CLOSING_IDLE_MAX_S)
        self.draining = True
        self.keep_alive_timeout_s -= sooner_s
        for downstream in list(self.downstreams):
            downstream._drain(sooner_s)

    @property
    def connections(self):
        """Number of open downstream connections."""
        return len(self.downstreams)

    def _tick(self):
        cdef Connection connection
        cdef double time = coarse_now()
        for connection in [*self.downstreams, *self.upstreams]:
            if 0 < connection.deadline < time:
                connection._expired()
        self.timer = self.loop.call_later(self.tick_s, self._tick)

    cdef void _report(self, str what, object error) noexcept:
        try:
            self.loop.call_exception_handler({"message": what, "exception": error})
        except BaseException:  # a failing handler must not break the relay
            pass
