"""Declarations of ``_tunnel.pyx``."""

from kubeai.gateway.relay._exchange cimport DownstreamEnd, Exchange, UpstreamEnd


cdef class Tunnel:
    cdef Exchange exchange
    cdef DownstreamEnd downstream
    cdef UpstreamEnd upstream  # None: there is no engine yet
    cdef object client  # its transport; None: it has no 101 yet
    cdef object engine  # its transport
    cdef double idle_timeout_s
    cdef object session  # what reads ``early``: its ``wake()`` is called
    cdef public bytearray early  # frames that came before there is an engine
    cdef Py_ssize_t reserved  # of ``early``, as buffered
    cdef bytes greeting  # the engine's first frame, so far; None: frames are passed on
    cdef int _open(self, bytes head) except -1
    cdef int _take_input(self) except -1
    cdef int _connect(self, UpstreamEnd upstream) except -1
    cdef int _touch(self) except -1
    cdef bint _stalls(self) noexcept
    cdef int _from_client(self, bytes data) except -1
    cdef bint _reserve(self, Py_ssize_t size) except -1
    cdef int _from_engine(self, bytes data) except -1
    cdef int _client_left(self, bint is_reset) except -1
    cdef int _engine_left(self, bint is_reset) except -1
    cdef int _client_stalls(self, bint stalls) except -1
    cdef int _engine_stalls(self, bint stalls) except -1
    cdef int _set_deadline(self) except -1
