"""Declarations of ``_relay.pyx``."""

from libc.stdint cimport int64_t, uint64_t


cdef class Connection:
    cdef Relay relay
    cdef object transport
    cdef double deadline  # CLOCK_MONOTONIC; 0: none
    cdef int fd  # of the socket; -1: the transport writes by itself
    cdef bint write_paused  # the transport has unsent data
    cdef int _abort(self) except -1
    cdef int _expired(self) except -1
    cdef int _drain(self, double sooner_s) except -1


cdef class Relay:
    cdef readonly object context
    cdef readonly set downstreams
    cdef readonly set upstreams
    cdef readonly Py_ssize_t exchanges
    cdef readonly uint64_t requests  # since the start
    cdef public bint draining  # responses carry Connection: close
    cdef object exchange
    cdef object refusal
    cdef object loop
    cdef object timer
    cdef double tick_s
    cdef Py_ssize_t head_max_bytes
    cdef int head_max_count
    cdef double head_timeout_s
    cdef double body_timeout_s
    cdef double keep_alive_timeout_s
    cdef double stall_timeout_s
    cdef Py_ssize_t connections_max
    cdef int64_t buffer_max_bytes
    cdef readonly int64_t buffered_bytes  # by request bodies that are collected or being collected
    cdef bytes id_prefix  # random; 16 hexadecimal digits that generated request ids begin with
    cdef void _report(self, str what, object error) noexcept
