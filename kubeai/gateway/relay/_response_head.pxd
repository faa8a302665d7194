"""Declarations of ``_response_head.pyx``."""

from kubeai.gateway.relay._head cimport Head
from kubeai.gateway.relay._text cimport Bytes, Text


cdef class ResponseHead(Head):
    cdef int status
    cdef bint keep_alive  # the engine keeps its connection open after the response
    cdef Py_ssize_t begin  # where the head begins in the input, after interim responses
    cdef Py_ssize_t take(self, bytes data, Py_ssize_t max_bytes) except -2
    cdef bytes for_client(
        self,
        bytes data,
        bytes request_id,
        bytes extra,
        bint is_rechunked,
        bint http10,
        bint keep_alive,
    )
    cdef int drop_cors(self) except -1
    cdef str content_type(self)
    cdef bint is_compressed(self)
    cdef bint _parse(self, bytes head, const char *line, const char *line_end) except -1


cdef bytes json_response(int status, bytes headers, bytes body, bint is_head)
cdef bytes event_stream_head(bytes headers, bint is_chunked, bint keep_alive)
cdef bytes response_head(
    Bytes line,
    const Text *text,
    bytes request_id,
    bytes extra,
    const char *framing,
    Py_ssize_t framing_size,
)
