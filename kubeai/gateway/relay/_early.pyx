# cython: language_level=3, nonecheck=True
"""A response that begins before an engine responds: an event stream, while its request is held.

Its head and comments keep the client and the proxies between from timing out. Attempts are then
made, and retried, as for other requests, because nothing of an engine's response has reached the
client. ``_upstream.pyx`` continues the stream with the body of the engine's event stream, and drops
its head. Any other end is an event that :meth:`EarlyStream.end` writes.
"""

from kubeai._clock cimport now
from kubeai.gateway.relay._chunked cimport one_chunk
from kubeai.gateway.relay._exchange cimport DownstreamEnd, Exchange
from kubeai.gateway.relay._response_head cimport event_stream_head


cdef class EarlyStream(Exchange):
    """An Exchange whose response may begin early."""

    def begin(self, bytes headers not None):
        """Write the head of an event stream. ``headers``: extra lines, each ending in CRLF."""
        cdef DownstreamEnd downstream = self.downstream
        cdef bint keep_alive
        if self.finished or self.answered or self.begun:
            return
        keep_alive = downstream._settle()
        if downstream.head.http10:  # the end of the connection ends the stream
            keep_alive = downstream.keep_alive = False
        # The stream is not compressed, so the engine's part of it must not be, either.
        self.set_header(b"accept-encoding", b"identity")
        if self.common_headers is not None:
            headers = headers + self.common_headers
        if downstream.cors is not None:
            headers = headers + downstream.cors
        self.begun = self.decided = True
        self.status = 200
        downstream._write(
            event_stream_head(
                headers + downstream.head.request_id, not downstream.head.http10, keep_alive
            )
        )

    def comment(self, bytes text not None):
        """Write a comment of one line, unless the client is slow to read. WebSockets have none."""
        cdef bint ended = self.finished or self.answered
        if self.begun and self.tunnel is None and not (ended or self.downstream.write_paused):
            self._part(b": " + text + b"\n\n", b"")

    def end(self, int status, bytes event not None):
        """End the stream with an event, or a WebSocket with frames.

        ``status``: what the request is recorded to end with.
        """
        cdef DownstreamEnd downstream = self.downstream
        if self.finished or self.answered or not self.begun:
            return
        self.answered = True
        self.status = status
        self.answered_s = now()
        self._detach()
        if self.tunnel is not None:
            downstream._write(event)
            downstream.input = b""  # so that the connection lingers
            # A client that had to wait for an engine has much left to send. Unread, it would reset
            # the connection, and the client could lose the event.
            downstream.transport.resume_reading()
        else:
            self._part(event, b"" if downstream.head.http10 else b"0\r\n\r\n")
        downstream._response_ended()

    cdef int _part(self, bytes data, bytes after) except -1:
        if not self.downstream.head.http10:
            data = one_chunk(data)
        self.downstream._write(data + after)
        return 0
