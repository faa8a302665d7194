# cython: language_level=3, nonecheck=True
"""The head of a client's request: read, and written again for an upstream; sans I/O.

The head for an upstream is written from scratch: one framing header, no hop-by-hop headers, the
X-Forwarded-* headers and an X-Request-Id.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memchr, memcmp, memcpy

from kubeai.gateway.relay._head cimport (
    DROPPED,
    EXPECT,
    FORWARDED_FOR,
    FORWARDED_HOST,
    FORWARDED_PROTO,
    HOST,
    PLAIN,
    REQUEST_ID,
    Head,
    HeaderKind,
    put_length,
)
from kubeai.gateway.relay._text cimport (
    Bytes,
    cut,
    is_same,
    is_value,
    put,
    put_bytes,
    text_add_header,
)

from httptools import HttpRequestParser

cdef enum:
    REQUEST_ID_MAX_BYTES = 128

# A proxy may add it to limit what its clients can use. It must not be theirs to remove by naming it
# in Connection, which some proxies pass on for WebSockets.
cdef set END_TO_END = {b"x-label-selector"}


cdef bint is_request_id(Bytes value) noexcept:
    """Whether a client's request id can be forwarded: short, and visible ASCII."""
    cdef Py_ssize_t i
    if not 0 < value.size <= REQUEST_ID_MAX_BYTES:
        return False
    for i in range(value.size):
        if not c"!" <= value.at[i] <= c"~":
            return False
    return True


cdef bytes new_request_id(bytes prefix, uint64_t number):
    """A header line: the prefix, 16 hexadecimal digits, and 12 of the number."""
    cdef bytes line = PyBytes_FromStringAndSize(NULL, 14 + 16 + 12 + 2)
    cdef char *to = put(PyBytes_AS_STRING(line), b"X-Request-Id: ", 14)
    cdef int i
    to = put(to, PyBytes_AS_STRING(prefix), 16)
    for i in range(12):
        to[i] = b"0123456789abcdef"[(number >> (44 - 4 * i)) & 15]
    memcpy(to + 12, b"\r\n", 2)
    return line


cdef str id_in(bytes line):
    """The value of an X-Request-Id line; None for None."""
    return None if line is None else line[14:PyBytes_GET_SIZE(line) - 2].decode("ascii")


cdef bytes forwarded_lines(bytes forwarded_for, bytes peer, bytes host, bint has_proto):
    """The X-Forwarded-* lines. ``forwarded_for``: the client's header, or None. ``host``: None to
    leave X-Forwarded-Host out."""
    cdef bytes lines = b"X-Forwarded-For: "
    if forwarded_for is not None:
        lines += forwarded_for + b", "
    lines += peer + b"\r\n"
    if host is not None:
        lines += b"X-Forwarded-Host: " + host + b"\r\n"
    if not has_proto:
        lines += b"X-Forwarded-Proto: http\r\n"
    return lines


cdef class RequestHead(Head):
    """The head of a connection's current request."""

    cdef bint parse(self, bytes data, Py_ssize_t at, Py_ssize_t end) except -1:
        """Read the head that ``find_head_end`` has found at ``data[at:end]``.

        False: it is malformed or not supported; ``fault`` says why.
        """
        cdef const char *text = PyBytes_AS_STRING(data)
        self._clear()
        self.target = self.host = self.forwarded_for = self.request_id = None
        self.has_proto = self.has_host = self.expects = self.asks_websocket = False
        if self.feed_data is None:
            self.feed_data = HttpRequestParser(None).feed_data
        self._feed(cut(data, at, end - at))
        if self.fault is not None:
            self.fault = f"The request head is malformed: {self.fault}."
            return False
        self._take_lines(text + self.scan.first_end + 2, text + end - 2)
        self._judge_line(text + at, text + self.scan.first_end)
        return self.fault is None

    cdef int complete(self, bytes peer, bytes id_prefix, uint64_t number) except -1:
        """Prepare a valid head for forwarding: drop and add what a proxy must.

        ``id_prefix``, ``number``: of the request id, if the client has sent none.
        """
        if self.named is not None:
            self.drop(set(self.named.split(b",")) - END_TO_END)  # hop-by-hop
        self.forwarded = self._forwarded(peer)
        if self.request_id is None:
            self.request_id = new_request_id(id_prefix, number)
        return 0

    cdef int abandon(self, bytes data, Py_ssize_t at) except -1:
        """Give up on a head that is incomplete or malformed; ``data``: None if there is no input.

        ``target`` is then what its first line says, and empty if that has not ended.
        """
        cdef list parts = []
        if data is not None and self.scan.lines:
            parts = data[at:self.scan.first_end].strip(b"\r\n").split(b" ")
        self.method = b""
        self.target = parts[1] if len(parts) == 3 else b""
        self.request_id = None
        return 0

    cdef bytes for_upstream(self, bytes path, bytes host_line, int64_t length, bytes body):
        """The head as an upstream gets it, and ``body`` after it unless that is None.

        ``length``: the Content-Length; -1: none, the body is chunked if the client's is.
        """
        cdef char framing[64]
        cdef char *end = framing
        cdef char *to
        cdef bytes out
        cdef Py_ssize_t framing_size
        cdef Py_ssize_t body_size = 0 if body is None else PyBytes_GET_SIZE(body)
        if length >= 0:
            end = put_length(end, length)
        elif self.chunked:
            end = put(end, b"Transfer-Encoding: chunked\r\n", 28)
        framing_size = put(end, b"\r\n", 2) - framing
        out = PyBytes_FromStringAndSize(
            NULL,
            PyBytes_GET_SIZE(self.method)
            + PyBytes_GET_SIZE(path)
            + 12
            + PyBytes_GET_SIZE(host_line)
            + self.text.size
            + PyBytes_GET_SIZE(self.forwarded)
            + PyBytes_GET_SIZE(self.request_id)
            + framing_size
            + body_size,
        )
        to = put_bytes(PyBytes_AS_STRING(out), self.method)
        to = put(to, b" ", 1)
        to = put_bytes(to, path)
        to = put(to, b" HTTP/1.1\r\n", 11)
        to = put_bytes(to, host_line)
        to = put(to, self.text.at, self.text.size)
        to = put_bytes(to, self.forwarded)
        to = put_bytes(to, self.request_id)
        to = put(to, framing, framing_size)
        if body_size:
            put_bytes(to, body)
        return out

    cdef int _header(self, HeaderKind kind, Bytes name, Bytes value) except -1:
        cdef bytes copied
        cdef bint usual
        if kind == PLAIN:
            text_add_header(&self.text, name, value)
        elif kind == HOST:
            if self.host is not None:
                self.fault = "There is more than one Host header."
            usual = is_same(self.usual_host, value)
            self.host = self.usual_host if usual else value.at[:value.size]
        elif kind == EXPECT:
            self.expects = True
            if not is_value(value, b"100-continue", 12):
                self.fault = "Expect: only 100-continue is supported."
        elif kind == FORWARDED_FOR:
            copied = value.at[:value.size]
            self.forwarded_for = (
                copied if self.forwarded_for is None else self.forwarded_for + b", " + copied
            )
        elif kind == REQUEST_ID:
            if self.request_id is None and is_request_id(value):
                self.request_id = b"X-Request-Id: %b\r\n" % value.at[:value.size]
        elif kind == FORWARDED_PROTO or kind == FORWARDED_HOST:
            self.has_proto = self.has_proto or kind == FORWARDED_PROTO
            self.has_host = self.has_host or kind == FORWARDED_HOST
            text_add_header(&self.text, name, value)
        elif kind != DROPPED:
            self._framing(kind, value)
        elif is_value(name, b"upgrade", 7):
            if b"websocket" in value.at[:value.size].lower().replace(b",", b" ").split():
                self.asks_websocket = True
        return 0

    cdef int _judge_line(self, const char *begin, const char *end) except -1:
        """Parse the request line and reject what llhttp tolerates; ``end``: of that line."""
        cdef const char *space
        while begin[0] == c"\r" or begin[0] == c"\n":
            begin += 1
        space = <const char *> memchr(begin, c" ", end - begin)
        if space is NULL or end - space < 10 or memcmp(end - 9, b" HTTP/1.", 8) != 0:
            self.fault = "Only HTTP/1.1 and HTTP/1.0 are supported."
            return 0
        if space - begin == 4 and memcmp(begin, b"POST", 4) == 0:
            self.method = b"POST"
        else:
            self.method = begin[:space - begin]
        self.target = space[1:end - 9 - space]
        self.http10 = (end - 1)[0] == c"0"
        if self.method == b"CONNECT":
            self.fault = "CONNECT is not supported."
        elif memchr(space + 1, c" ", end - 10 - space) is not NULL:
            self.fault = "There is more than one space between the parts of the request line."
        elif self.chunked and self.http10:
            self.fault = "Transfer-Encoding is not allowed in an HTTP/1.0 request."
        elif self.host is None and not self.http10:
            self.fault = "The Host header is missing."
        self.keep_alive = not self.says_close and (self.says_keep or not self.http10)
        return 0

    cdef bytes _forwarded(self, bytes peer):
        """The X-Forwarded-* lines; cached, as they rarely change within a connection."""
        cdef bint usual = self.forwarded_for is None and not self.has_host and not self.has_proto
        cdef bytes lines
        if usual and self.usual_forwarded is not None and self.host == self.usual_host:
            return self.usual_forwarded
        lines = forwarded_lines(
            self.forwarded_for, peer, None if self.has_host else self.host, self.has_proto
        )
        if usual:
            self.usual_host = self.host
            self.usual_forwarded = lines
        return lines
