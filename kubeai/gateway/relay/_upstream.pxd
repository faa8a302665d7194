"""Declarations of ``_upstream.pyx``."""

from libc.stdint cimport int64_t

from kubeai.gateway.relay._exchange cimport Exchange, UpstreamEnd
from kubeai.gateway.relay._renaming cimport Renaming
from kubeai.gateway.relay._usage_filter cimport UsageFilter
from kubeai.gateway.relay._response_body cimport ResponseBody


cdef class Upstream(UpstreamEnd):
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
    cdef ResponseBody body
    cdef bint reusable
    cdef bytes refusal  # the body so far of a response that cannot continue an event stream
    cdef int _write_request(self, bytes body) except -1
    cdef bint _replay(self) except -1
    cdef int _take(self, bytes data) except -1
    cdef Py_ssize_t _take_head(self, bytes data, double now_s) except -2
    cdef bint _diverted(self, bytes data, Py_ssize_t at) except -1
    cdef bytes _response_head(self, bytes data)
    cdef int _continue_stream(self) except -1
    cdef Renaming _renaming(self)
    cdef UsageFilter _usage_filter(self)
    cdef bint _may_retry(self)
    cdef int _refuse(self, Exchange exchange) except -1
    cdef int _take_response_body(
        self, bytes prefix, bytes data, Py_ssize_t at, double came_s
    ) except -1
    cdef bytes _after(self, bytes prefix, bytes piece)
    cdef int _end_with_connection(self) except -1
    cdef int _complete(self) except -1
    cdef bint _is_clean(self)
    cdef int _release(self) except -1
    cdef int _broken(self, int failure) except -1
    cdef int _lose(self) except -1
