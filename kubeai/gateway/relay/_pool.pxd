"""Declarations of ``_pool.pyx``."""

from libc.stdint cimport uint64_t

from kubeai.gateway.relay._exchange cimport Pool


cdef class ConnectionPool(Pool):
    cdef Py_ssize_t max_idle
    cdef readonly double answered_s  # start of the last good response (CLOCK_MONOTONIC); 0: never
    cdef readonly uint64_t answers  # good responses that have begun
    cdef list idle_connections
    cdef bint closed
