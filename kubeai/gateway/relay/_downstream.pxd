"""Declarations of ``_downstream.pyx``."""

from libc.stdint cimport int64_t

from kubeai.gateway.relay._exchange cimport DownstreamEnd


cdef class Downstream(DownstreamEnd):
    cdef bint head_started  # a head is incomplete and its timeout is running
    cdef bint reading
    cdef bint pumping
    cdef int _append(self, bytes data) except -1
    cdef void _use(self, Py_ssize_t until) noexcept
    cdef int _pump(self) except -1
    cdef bint _take_head(self) except -1
    cdef bint _begin(self, Py_ssize_t end) except -1
    cdef bint _buffer(self, int64_t size) except -1
    cdef int _collect(self) except -1
    cdef int _body_whole(self, bytes body) except -1
    cdef bytes _own_response(self, int status, bytes body, bytes headers, bint keep_alive)
    cdef bint _refuse(self, int status, str message) except -1
    cdef int _refuse_body(self) except -1
    cdef int _finish(self) except -1
    cdef int _linger(self) except -1
    cdef int _close(self) except -1
