"""Declarations of ``_head.pyx``."""

from libc.stdint cimport int64_t

from kubeai.gateway.relay._text cimport Bytes, Text


cdef enum HeaderKind:
    PLAIN
    HOST
    CONNECTION
    CONTENT_LENGTH
    TRANSFER_ENCODING
    EXPECT
    FORWARDED_FOR
    FORWARDED_HOST
    FORWARDED_PROTO
    REQUEST_ID
    DROPPED  # hop-by-hop


cdef struct Scan:
    Py_ssize_t at  # scanned up to here
    Py_ssize_t line  # start of the current line
    Py_ssize_t first_end  # the first line's CR
    int lines


cdef class Head:
    cdef Text text  # the headers to forward, each as "name: value\r\n"
    cdef Scan scan  # of the input that the head is in
    cdef object feed_data  # of llhttp's parser; None: to be created
    cdef int64_t length  # Content-Length, or -1
    cdef bint chunked
    cdef bint says_close  # Connection: close
    cdef bint says_keep  # Connection: keep-alive
    cdef bytes named  # other tokens of Connection, lower case
    cdef str fault
    cdef void begin_scan(self, Py_ssize_t at) noexcept
    cdef void shift_scan(self, Py_ssize_t by) noexcept
    cdef int skip_body(self, bytes data) except -1
    cdef list values(self, bytes name)
    cdef int drop(self, set names) except -1
    cdef int replace(self, bytes name, bytes value) except -1
    cdef int _feed(self, bytes head) except -1
    cdef void _clear(self) noexcept
    cdef int _take_lines(self, const char *at, const char *end) except -1
    cdef int _header(self, HeaderKind kind, Bytes name, Bytes value) except -1
    cdef int _framing(self, HeaderKind kind, Bytes value) except -1
    cdef int _take_tokens(self, bytes value) except -1


cdef Py_ssize_t find_head_end(Scan *scan, const char *data, Py_ssize_t size) noexcept
cdef char *put_length(char *to, int64_t length) noexcept
