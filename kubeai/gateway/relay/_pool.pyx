# cython: language_level=3, nonecheck=True
"""The idle connections to one upstream, and what its responses say about its health."""

from kubeai._clock cimport coarse_now
from kubeai.gateway.relay._exchange cimport Pool, UpstreamEnd
from kubeai.gateway.relay._relay cimport Relay

from kubeai.gateway.relay._exchange import STATUS as _STATUS


cdef inline bint is_failure(int status) noexcept:
    """Whether a response status counts as a failure of the upstream."""
    return status in (500, 502, 503, 504)


cdef class ConnectionPool(Pool):
    """The connection pool of one upstream.

    Subclasses create the connections: ``connect(exchange)`` returns an object with ``cancel()`` and
    eventually calls the exchange's ``connected`` or ``connect_failed``.
    """

    def __init__(
        self,
        Relay relay not None,
        str host not None,
        *,
        double idle_timeout_s,
        Py_ssize_t max_idle,
        double first_byte_timeout_s=0,
        double between_bytes_timeout_s=0,
    ):
        self.relay = relay
        self.host = host
        self.idle_timeout_s = idle_timeout_s
        self.max_idle = max_idle
        self.first_byte_timeout_s = first_byte_timeout_s
        self.between_bytes_timeout_s = between_bytes_timeout_s
        self.idle_connections = []

    @property
    def idle(self):
        """Number of idle connections."""
        return len(self.idle_connections)

    cdef UpstreamEnd take(self):
        """The most recently returned connection, or None.

        A connection past half its idle timeout goes first: connections opened for a burst then stay
        open while requests are frequent enough, and need not be reopened in the next burst.
        """
        cdef UpstreamEnd upstream
        while self.idle_connections:
            upstream = self.idle_connections[0]
            if upstream.deadline - coarse_now() < self.idle_timeout_s / 2:
                del self.idle_connections[0]
            else:
                upstream = self.idle_connections.pop()
            if upstream.usable():
                return upstream
            upstream.close()
        return None

    cdef int give(self, UpstreamEnd upstream) except -1:
        """Keep a connection for the next request if there is room; otherwise close it."""
        if self.closed or len(self.idle_connections) >= self.max_idle:
            upstream.close()
        else:
            self.idle_connections.append(upstream)
        return 0

    def keep(self, UpstreamEnd upstream not None):
        """See the stub."""
        self.give(upstream)

    cdef int note_failure(self, int failure) except -1:
        """Record that an attempt failed or its response broke off."""
        self.failing = True
        self.failed(failure)
        return 0

    cdef int note_answer(self, int status, double now_s) except -1:
        """See Pool."""
        if is_failure(status):
            return self.note_failure(_STATUS)
        self.answers += 1
        self.answered_s = now_s
        if self.probing:
            self.restored()
        return 0

    cdef int note_end(self, int status) except -1:
        """Record that a response is complete."""
        if (self.failing or self.probing) and not is_failure(status):
            self.failing = self.probing = False
            self.recovered()
        return 0

    def failed(self, int failure):
        """Hook: an attempt failed, or a response broke off."""

    def restored(self):
        """Hook: a probe has received a good response head."""

    def recovered(self):
        """Hook: the first response since a failure or an ejection is complete."""

    def waiting(self, double sent_before_s):
        """Exchanges that sent their request before then and received no byte of a response."""
        cdef UpstreamEnd upstream
        cdef list found = []
        for upstream in self.relay.upstreams:
            if (
                upstream.pool is self
                and upstream.exchange is not None
                and not upstream.touched
                and upstream.sent_s < sent_before_s
            ):
                found.append(upstream.exchange)
        return found

    def forget(self, upstream):
        """Remove an idle connection that has ended."""
        if upstream in self.idle_connections:
            self.idle_connections.remove(upstream)

    def close(self):
        """Close idle connections and keep none in future: the upstream was removed or has moved."""
        self.closed = True
        while self.idle_connections:
            self.idle_connections.pop().close()
