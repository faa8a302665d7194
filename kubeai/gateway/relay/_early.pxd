"""Declarations of ``_early.pyx``."""

from kubeai.gateway.relay._exchange cimport Exchange


cdef class EarlyStream(Exchange):
    cdef int _part(self, bytes data, bytes after) except -1
