"""Declarations of ``_usage_filter.pyx``."""

from kubeai.gateway.relay._text cimport Text


cdef class UsageFilter:
    cdef bint keeps_null
    cdef Text held  # what has been received of the current event
    cdef Py_ssize_t scanned  # of ``held``: how far the end of the event was looked for
    cdef bint at_line  # a line begins there
    cdef bint after_cr  # the line before ended with CR alone
    cdef bint passes_on  # the current event is too long to be held
    cdef bint drops_lf  # an event that was removed ended with CR, and LF may follow
    cdef Text out
    cdef void begin(self) noexcept
    cdef bint passes(self, const char *data, Py_ssize_t size) noexcept
    cdef bytes feed(self, bytes data, bint complete)
    cdef Py_ssize_t _event_end(self, bint complete) noexcept
    cdef bint _take_event(self, const char *at, const char *end) except -1
