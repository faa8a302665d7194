"""Declarations of ``_upstream.pyx``."""

from libc.stdint cimport int64_t

from kubeai.gateway.relay._exchange cimport DownstreamEnd, Exchange, Relay, UpstreamEnd
from kubeai.gateway.relay._http1 cimport Chunks, Text


cdef enum Framing:
    NOTHING
    LENGTH
    CHUNKED
    UNTIL_CLOSE


cdef class Upstream(UpstreamEnd):
    cdef Relay relay
    cdef bytes host_line
    cdef double first_byte_timeout_s
    cdef double between_bytes_timeout_s
    cdef bint ended  # closed by either side
    cdef bint idle
    cdef bint paused
    cdef Py_ssize_t served
    cdef int64_t unsent_bytes  # of a body that is written in pieces
    # of the response
    cdef bytes input  # an incomplete head
    cdef bint head_done
    cdef bytes tail  # the last buffer with part of the body that is not short; None: there is none
    cdef Py_ssize_t tail_at  # where the body's part in it begins
    cdef Py_ssize_t tail_size
    cdef bint reusable
    cdef int status
    cdef Framing framing
    cdef bint unchunk  # for an HTTP/1.0 client, which does not support chunked encoding, or to rename
    cdef bint rechunk  # for a response that is delimited by the end of its connection, or to rename
    cdef bint renames  # the Exchange's renaming applies to this response
    cdef bytes refusal  # the body so far of a response that cannot continue an event stream
    cdef int64_t left
    cdef Chunks chunks
    cdef Text grown
    cdef int _write_request(self, Exchange exchange, DownstreamEnd downstream, bytes body) except -1
    cdef bint _replay(self) except -1
    cdef int _take(self, bytes data) except -1
    cdef Py_ssize_t _take_head(self, bytes data) except -2
    cdef bint _parse_head(self, bytes head, const char *line, const char *line_end) except -1
    cdef bint _diverted(self, bytes data, Py_ssize_t at) except -1
    cdef bytes _response_head(self, bytes data)
    cdef int _continue_stream(self) except -1
    cdef int _rename(self) except -1
    cdef bytes _recoded(self, bytes piece, bint complete)
    cdef int _refuse(self, Exchange exchange) except -1
    cdef int _take_response_body(self, bytes prefix, bytes data, Py_ssize_t at) except -1
    cdef int _forward(self, DownstreamEnd downstream, bytes prefix, bytes piece) except -1
    cdef int _complete(self) except -1
    cdef bint _is_clean(self)
    cdef int _release(self) except -1
    cdef int _broken(self, int failure) except -1
    cdef int _lose(self) except -1
