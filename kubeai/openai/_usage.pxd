"""Declarations of ``_usage.pyx``."""

from libc.stdint cimport uint32_t

cdef enum:
    UNKNOWN_TOKENS = 0xFFFFFFFF


cdef struct Usage:  # UNKNOWN_TOKENS: not reported
    uint32_t prompt_tokens
    uint32_t cached_tokens  # of the prompt
    uint32_t output_tokens


cdef void forget_usage(Usage *usage) noexcept nogil
cdef bint find_usage(const char *begin, Py_ssize_t size, Usage *usage) noexcept nogil
