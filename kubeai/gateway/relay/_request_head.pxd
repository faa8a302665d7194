"""Declarations of ``_request_head.pyx``."""

from libc.stdint cimport int64_t, uint64_t

from kubeai.gateway.relay._head cimport Head


cdef class RequestHead(Head):
    cdef bytes method
    cdef bytes target
    cdef bytes host  # the Host header; None: there is none
    cdef bytes forwarded_for  # the client's X-Forwarded-For; None: there is none
    cdef bytes forwarded  # X-Forwarded-For, -Host and -Proto header lines
    cdef bytes request_id  # the X-Request-Id header line; None: there is none yet
    cdef bint http10
    cdef bint keep_alive
    cdef bint asks_websocket
    cdef bint expects  # Expect: 100-continue
    cdef bint has_host  # X-Forwarded-Host
    cdef bint has_proto  # X-Forwarded-Proto
    # of the connection
    cdef bytes usual_host
    cdef bytes usual_forwarded  # ``forwarded`` for ``usual_host``
    cdef bint parse(self, bytes data, Py_ssize_t at, Py_ssize_t end) except -1
    cdef int complete(self, bytes peer, bytes id_prefix, uint64_t number) except -1
    cdef int abandon(self, bytes data, Py_ssize_t at) except -1
    cdef bytes for_upstream(self, bytes path, bytes host_line, int64_t length, bytes body)
    cdef int _judge_line(self, const char *begin, const char *end) except -1
    cdef bytes _forwarded(self, bytes peer)


cdef str id_in(bytes line)
