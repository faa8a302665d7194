"""Declarations of ``_renaming.pyx``."""

from kubeai.gateway.relay._text cimport Text


cdef enum Mode:
    # of a line in an event stream
    LINE_START  # its field's name
    LINE_REST  # ignored up to its end
    # of JSON
    BETWEEN  # outside of strings
    KEY  # a member's name that may be one of those looked for
    NAME  # a value that has been equal to the old name so far
    STRING
    STRING_ESCAPE
    COPYING  # nothing more is replaced


cdef class Renaming:
    cdef bytes old  # the name in the engine's response, as JSON
    cdef bytes new
    cdef bint is_events
    cdef bint is_single  # the body is one JSON value
    cdef Mode mode
    cdef Py_ssize_t matched  # of the field's name, the key or the old name
    cdef int keys  # the keys that the current one may be
    cdef int key  # of the current member; 0: another one
    cdef int depth  # of open objects and lists
    cdef bint is_object  # the outermost value
    cdef bint is_nested  # the value at depth 2 is an object with a model
    cdef bint expects_key
    cdef bint expects_value  # of the member ``key``
    cdef bint skips  # the event is malformed: nothing is replaced until its end
    cdef bint after_cr
    cdef Text out
    cdef void begin(self, bint is_events, bint is_single) noexcept
    cdef bytes feed(self, bytes data, bint complete)
    cdef void _begin_value(self) noexcept
    cdef const char *_line_start(self, const char *at, const char *end) noexcept
    cdef void _punctuation(self, char c) noexcept
    cdef void _open(self, bint is_object) noexcept
    cdef void _string(self) noexcept
    cdef void _key(self, char c) noexcept
    cdef void _line_end(self, char c) noexcept
