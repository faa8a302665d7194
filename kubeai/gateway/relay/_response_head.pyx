# cython: language_level=3, nonecheck=True
"""The head of a response; sans I/O.

An engine's is read, and written again for the client. The gateway's own are written here, too.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.string cimport memcmp

from kubeai.gateway.relay._head cimport (
    CONNECTION,
    CONTENT_LENGTH,
    DROPPED,
    REQUEST_ID,
    TRANSFER_ENCODING,
    Head,
    HeaderKind,
    find_head_end,
    put_length,
)
from kubeai.gateway.relay._text cimport Bytes, Text, cut, put, put_bytes, text_add_header

from email.utils import formatdate
from http import HTTPStatus

from httptools import HttpResponseParser

cdef set CORS_NAMES = {
    b"access-control-allow-origin",
    b"access-control-allow-methods",
    b"access-control-allow-headers",
    b"access-control-allow-credentials",
    b"access-control-expose-headers",
    b"access-control-max-age",
}


cdef bytes json_response(int status, bytes headers, bytes body, bint is_head):
    """A response of the gateway's own. ``headers``: extra lines, each ending in CRLF."""
    return (
        b"HTTP/1.1 %d %s\r\nDate: %s\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n%s\r\n%s"
    ) % (
        status,
        HTTPStatus(status).phrase.encode(),
        formatdate(usegmt=True).encode(),
        len(body),
        headers,
        b"" if is_head else body,
    )


cdef bytes response_head(
    Bytes line,
    const Text *text,
    bytes request_id,
    bytes extra,
    const char *framing,
    Py_ssize_t framing_size,
):
    """The head of an engine's response. ``line``: the first one, after the version.

    ``extra``: further lines, or None. ``framing``: the last lines, with the empty one.
    """
    cdef Py_ssize_t extra_size = 0 if extra is None else PyBytes_GET_SIZE(extra)
    cdef bytes head = PyBytes_FromStringAndSize(
        NULL,
        8 + line.size + 2 + text.size + PyBytes_GET_SIZE(request_id) + extra_size + framing_size,
    )
    cdef char *to = put(PyBytes_AS_STRING(head), b"HTTP/1.1", 8)
    to = put(to, line.at, line.size)
    to = put(to, b"\r\n", 2)
    to = put(to, text.at, text.size)
    to = put_bytes(to, request_id)
    if extra is not None:
        to = put_bytes(to, extra)
    put(to, framing, framing_size)
    return head


cdef bytes event_stream_head(bytes headers, bint is_chunked, bint keep_alive):
    """The head of an event stream of the gateway's own. ``headers``: as of ``json_response``."""
    return (
        b"HTTP/1.1 200 OK\r\nDate: %s\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
        b"Cache-Control: no-cache\r\nX-Accel-Buffering: no\r\n%s%s%s\r\n"
    ) % (
        formatdate(usegmt=True).encode(),
        headers,
        b"Transfer-Encoding: chunked\r\n" if is_chunked else b"",
        b"" if keep_alive else b"Connection: close\r\n",
    )


cdef bint is_line(const char *at) noexcept:
    """Whether a line up to its CR has no control characters. llhttp allows any in a reason."""
    while at[0] != c"\r":
        if <unsigned char> at[0] < 32 and at[0] != c"\t" or at[0] == 127:
            return False
        at += 1
    return True


cdef class ResponseHead(Head):
    """The head of the current response on a connection to an engine."""

    cdef Py_ssize_t take(self, bytes data, Py_ssize_t max_bytes) except -2:
        """Read a head at the beginning of the input, and skip interim (1xx) responses before it.

        Returns the offset of the response's body; 0: the head is incomplete, and the input before
        ``begin`` is no longer needed; -1: it is invalid or too long.
        """
        cdef const char *text = PyBytes_AS_STRING(data)
        cdef Py_ssize_t size = PyBytes_GET_SIZE(data)
        cdef Py_ssize_t end
        self.begin = 0
        while True:
            end = find_head_end(&self.scan, text, size)
            if end < 0 or (end if end else size) - self.begin > max_bytes or (
                size > self.begin and text[self.begin] != c"H"
            ):
                return -1
            if end == 0:
                return 0
            if not self._parse(
                cut(data, self.begin, end - self.begin),
                text + self.begin,
                text + self.scan.first_end,
            ):
                return -1
            if self.status >= 200 or self.status == 101:
                return end
            self.begin = end
            self.begin_scan(end)

    cdef bint _parse(self, bytes head, const char *line, const char *line_end) except -1:
        self._clear()
        if self.feed_data is None:
            self.feed_data = HttpResponseParser(None).feed_data
        self._feed(head)
        if self.fault is not None or memcmp(line, b"HTTP/1.", 7) != 0 or not is_line(line):
            return False
        self._take_lines(line_end + 2, line + PyBytes_GET_SIZE(head) - 2)
        if self.fault is not None:
            return False
        self.status = (line[9] - c"0") * 100 + (line[10] - c"0") * 10 + line[11] - c"0"
        self.keep_alive = not self.says_close and (self.says_keep or line[7] == c"1")
        if self.named is not None:
            self.drop(set(self.named.split(b",")))  # hop-by-hop
        return self.status >= 100

    cdef int _header(self, HeaderKind kind, Bytes name, Bytes value) except -1:
        if kind == CONTENT_LENGTH or kind == TRANSFER_ENCODING or kind == CONNECTION:
            self._framing(kind, value)
        elif kind != DROPPED and kind != REQUEST_ID:  # the client gets the id that was forwarded
            text_add_header(&self.text, name, value)
        return 0

    cdef bytes for_client(
        self,
        bytes data,
        bytes request_id,
        bytes extra,
        bint is_rechunked,
        bint http10,
        bint keep_alive,
    ):
        """The head as the client gets it. ``data``: the input; ``extra``: further lines, or None.

        ``is_rechunked``: the body gets chunked framing that it does not have. ``http10``: the
        client's version.
        """
        cdef Bytes line  # after the version
        cdef char framing[96]
        cdef char *end = framing
        line.at = PyBytes_AS_STRING(data) + self.begin + 8
        line.size = PyBytes_AS_STRING(data) + self.scan.first_end - line.at
        if self.length >= 0 and self.status != 204:
            end = put_length(end, self.length)
        elif (self.chunked or is_rechunked) and not http10 and self.status != 204:
            end = put(end, b"Transfer-Encoding: chunked\r\n", 28)
        if not keep_alive:
            end = put(end, b"Connection: close\r\n", 19)
        elif http10:
            end = put(end, b"Connection: keep-alive\r\n", 24)
        end = put(end, b"\r\n", 2)
        return response_head(line, &self.text, request_id, extra, framing, end - framing)

    cdef int drop_cors(self) except -1:
        """Remove the headers of an engine's own CORS policy."""
        return self.drop(CORS_NAMES)

    cdef str content_type(self):
        """The Content-Type; empty if there is none."""
        cdef list values = self.values(b"content-type")
        return values[0].decode("latin-1") if values else ""

    cdef bint is_compressed(self):
        """Whether the body has a content coding other than "identity"."""
        cdef list values = self.values(b"content-encoding")
        cdef bytes coding
        if values:
            for coding in b",".join(values).lower().split(b","):
                if coding.strip(b" \t") not in (b"", b"identity"):
                    return True
        return False
