"""Declarations of ``_exchange.pyx``: a request, and the abstract ends of its path."""

from libc.stdint cimport int64_t

from kubeai.gateway.relay._relay cimport Connection, Relay
from kubeai.gateway.relay._renaming cimport Renaming
from kubeai.gateway.relay._usage_filter cimport UsageFilter
from kubeai.gateway.relay._request_body cimport RequestBody
from kubeai.gateway.relay._request_head cimport RequestHead
from kubeai.gateway.relay._response_head cimport ResponseHead


cdef enum State:
    IDLE  # no request, or an incomplete head
    BODY  # the head is complete, its body is not
    BUSY  # the request is complete, its response is not
    LEAVING  # flushing what is written; received data is discarded
    CLOSED


cdef class DownstreamEnd(Connection):  # implemented by _downstream
    cdef State state
    cdef Exchange exchange
    cdef bytes input  # received data; not yet consumed from ``used`` on
    cdef Py_ssize_t used
    cdef bytes peer
    # of the request
    cdef RequestHead head
    cdef RequestBody body
    cdef bytes cors  # header lines for all responses to it; None: there are none
    cdef bint keep_alive  # the connection, after the response
    cdef int64_t buffered_bytes  # the request's share of the relay's
    cdef int _set_reading(self) except -1
    cdef int _expect_body(self) except -1
    cdef int _take_body(self) except -1
    cdef bytes _piece(self)
    cdef int _write(self, bytes data) except -1
    cdef bint _settle(self) except -1
    cdef int _respond(self, int status, bytes body, bytes headers) except -1
    cdef int _refuse_length(self) except -1
    cdef int _crashed(self, Exchange exchange, object error) except -1
    cdef int _response_ended(self) except -1
    cdef int _cut(self, bint looks_complete) except -1


cdef class UpstreamEnd(Connection):  # implemented by _upstream
    cdef Exchange exchange
    cdef Pool pool
    cdef ResponseHead head
    cdef double sent_s  # when the request was written (CLOCK_MONOTONIC)
    cdef bint touched  # a byte of a response has been received
    cpdef bint usable(self)
    cpdef close(self)
    cdef int _start(self, Exchange exchange) except -1
    cdef int _write(self, bytes data) except -1
    cdef int _pause(self) except -1
    cdef int _resume(self) except -1


cdef class Pool:  # implemented by _pool
    cdef readonly Relay relay
    cdef readonly str host  # for the Host header
    cdef readonly double first_byte_timeout_s  # 0: no limit
    cdef readonly double between_bytes_timeout_s  # 0: no limit
    cdef readonly double idle_timeout_s
    cdef public bint failing  # the upstream has failed since its last complete response
    cdef public bint probing  # the upstream is ejected; requests to it are probes
    cdef UpstreamEnd take(self)
    cdef int give(self, UpstreamEnd upstream) except -1
    cdef int note_failure(self, int failure) except -1
    cdef int note_answer(self, int status, double now_s) except -1
    cdef int note_end(self, int status) except -1


cdef class Exchange:
    cdef DownstreamEnd downstream
    cdef UpstreamEnd upstream
    cdef object connecting  # a pending connection; cancel() aborts it
    cdef Pool pool
    cdef bytes path
    cdef bytes sending
    cdef bint decided
    cdef bint collecting
    cdef bint streaming
    cdef bint receiving
    cdef bint in_pieces  # the upstream request's body: written with ``write``
    cdef int64_t sending_bytes  # its size
    cdef bint replayed
    cdef readonly bint begun  # an event stream was begun before there is a response; see _early
    cdef readonly bint answered  # a response head has been written; if begun, a response's body
    cdef readonly int status  # of that response
    cdef readonly double answered_s  # when its head was written (CLOCK_MONOTONIC); 0: not yet
    cdef readonly int64_t answer_bytes  # written to the client, including heads and framing
    cdef object tunnel  # of a WebSocket handshake; see _tunnel
    cdef public Renaming renaming  # of the model in the response; None: it is not renamed
    cdef public UsageFilter usage_filter  # removes the report of usage; None: nothing is removed
    cdef bytes extra_headers  # lines that are added to the upstream's response
    cdef bytes common_headers  # lines that are added to the gateway's own responses, too
    cdef bint body_came  # the first byte of the response's body has been received
    cdef readonly bint broken  # the response was cut short
    cdef readonly bint whole  # the response has been written completely
    cdef readonly bint finished
    cdef readonly bytes body  # once collected
    cdef int _begun(self) except -1
    cdef int _collected(self) except -1
    cdef int _body_came(self, double now_s) except -1
    cdef int _body_ended(self, const char *tail, Py_ssize_t size) except -1
    cdef int _ended(self) except -1
    cpdef collect(self, int64_t max_bytes)
    cpdef send(self, Pool pool, bytes path, bytes body)
    cdef int _add_common_headers(self, bytes lines) except -1
    cdef bint _accept_body(self, int64_t max_bytes) except -1
    cdef int _attempt_at(self, Pool pool, bytes path) except -1
    cdef int _hook(self, hook) except -1
    cdef int _failed(self, int failure) except -1
    cdef int _retry(self) except -1
    cpdef detach(self)
    cdef int _detach(self) except -1
