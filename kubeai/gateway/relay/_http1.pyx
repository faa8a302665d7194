# cython: language_level=3, nonecheck=True
"""HTTP/1.1 message heads and chunked framing; sans I/O.

llhttp (through httptools) validates a head on exactly the bytes up to its empty line, after a check
that every line ends in CRLF and none is folded, so no two parsers can disagree on where it ends.
:class:`Head` then reads the header lines in place: each is a name, a colon and a value, or llhttp
would have rejected it. (httptools would create two objects and make one call per header: a fifth of
the cost of a request.)

``chunks_scan`` checks chunked framing, which httptools does not report. It is stricter than llhttp:
no bare LF, limited extensions and trailers.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport int64_t, uint64_t
from libc.stdio cimport snprintf
from libc.stdlib cimport free, realloc
from libc.string cimport memchr, memcpy

from email.utils import formatdate
from http import HTTPStatus

cdef enum:
    CHUNK_LINE_MAX_BYTES = 256
    TRAILERS_MAX_BYTES = 8192
    REQUEST_ID_MAX_BYTES = 128


cdef set CORS_NAMES = {
    b"access-control-allow-origin",
    b"access-control-allow-methods",
    b"access-control-allow-headers",
    b"access-control-allow-credentials",
    b"access-control-expose-headers",
    b"access-control-max-age",
}


# -- growing text ----------------------------------------------------------------------------------

cdef int text_grow(Text *text, Py_ssize_t size) except -1:
    """Make room for ``size`` more bytes."""
    cdef Py_ssize_t room
    cdef char *grown
    if text.size + size > text.room:
        room = max(text.size + size, 2 * text.room, 1024)
        grown = <char *> realloc(text.at, room)
        if grown is NULL:
            raise MemoryError()
        text.at = grown
        text.room = room
    return 0


cdef int text_add(Text *text, const char *data, Py_ssize_t size) except -1:
    text_grow(text, size)
    memcpy(text.at + text.size, data, size)
    text.size += size
    return 0


cdef int text_add_header(Text *text, Bytes name, Bytes value) except -1:
    cdef char *to
    text_grow(text, name.size + value.size + 4)
    to = put(text.at + text.size, name.at, name.size)
    to = put(to, b": ", 2)
    to = put(to, value.at, value.size)
    to = put(to, b"\r\n", 2)
    text.size = to - text.at
    return 0


cdef list text_values(const Text *text, bytes name):
    """The values of a header in header lines, in order; ``name`` in lower case."""
    cdef const char *at = text.at
    cdef const char *end = text.at + text.size
    cdef const char *line_end
    cdef Py_ssize_t size = PyBytes_GET_SIZE(name)
    cdef list values = []
    while at < end:
        line_end = <const char *> memchr(at, c"\r", end - at)
        if line_end - at > size and at[size] == c":" and is_name(
            at, PyBytes_AS_STRING(name), size
        ):
            values.append(at[size + 1:line_end - at].strip(b" \t"))
        at = line_end + 2
    return values


cdef void text_free(Text *text) noexcept:
    free(text.at)
    text.at = NULL
    text.size = text.room = 0


# -- heads -----------------------------------------------------------------------------------------

cdef bint is_name(const char *name, const char *lower, Py_ssize_t size) noexcept:
    """Whether a header name (a token: no control characters) equals ``lower``, ignoring case.

    ``lower`` has only letters, digits and hyphens. Setting the case bit turns no other character
    that a token may contain into one of these.
    """
    cdef Py_ssize_t i
    for i in range(size):
        if (name[i] | 0x20) != lower[i]:
            return False
    return True


cdef inline void strip(Bytes *value) noexcept:
    """Strip spaces and tabs from both ends."""
    while value.size and (value.at[0] == c" " or value.at[0] == c"\t"):
        value.at += 1
        value.size -= 1
    while value.size and (value.at[value.size - 1] == c" " or value.at[value.size - 1] == c"\t"):
        value.size -= 1


cdef HeaderKind header_kind(Bytes header) noexcept:
    cdef const char *name = header.at
    cdef Py_ssize_t size = header.size
    if size == 2:
        return DROPPED if is_name(name, b"te", 2) else PLAIN
    if size == 4:
        return HOST if is_name(name, b"host", 4) else PLAIN
    if size == 6:
        return EXPECT if is_name(name, b"expect", 6) else PLAIN
    if size == 7:
        return DROPPED if is_name(name, b"upgrade", 7) else PLAIN
    if size == 10:
        if is_name(name, b"connection", 10):
            return CONNECTION
        return DROPPED if is_name(name, b"keep-alive", 10) else PLAIN
    if size == 12:
        return REQUEST_ID if is_name(name, b"x-request-id", 12) else PLAIN
    if size == 14:
        return CONTENT_LENGTH if is_name(name, b"content-length", 14) else PLAIN
    if size == 15:
        return FORWARDED_FOR if is_name(name, b"x-forwarded-for", 15) else PLAIN
    if size == 16:
        if is_name(name, b"x-forwarded-host", 16):
            return FORWARDED_HOST
        return DROPPED if is_name(name, b"proxy-connection", 16) else PLAIN
    if size == 17:
        if is_name(name, b"transfer-encoding", 17):
            return TRANSFER_ENCODING
        return FORWARDED_PROTO if is_name(name, b"x-forwarded-proto", 17) else PLAIN
    if size == 18:
        return DROPPED if is_name(name, b"proxy-authenticate", 18) else PLAIN
    if size == 19:
        return DROPPED if is_name(name, b"proxy-authorization", 19) else PLAIN
    return PLAIN


cdef bint is_request_id(Bytes value) noexcept:
    """Whether a client's request id can be forwarded: short, and visible ASCII."""
    cdef Py_ssize_t i
    if not 0 < value.size <= REQUEST_ID_MAX_BYTES:
        return False
    for i in range(value.size):
        if not c"!" <= value.at[i] <= c"~":
            return False
    return True


cdef int64_t number(Bytes digits) noexcept:
    """Parse 1 to 18 decimal digits; -1 if malformed."""
    cdef int64_t value = 0
    cdef Py_ssize_t i
    if not 0 < digits.size <= 18:
        return -1
    for i in range(digits.size):
        if not c"0" <= digits.at[i] <= c"9":
            return -1
        value = value * 10 + (digits.at[i] - c"0")
    return value


cdef char *put_length(char *to, int64_t length) noexcept:
    """Write a Content-Length line: at most 37 bytes."""
    cdef char digits[20]
    cdef int at = 20
    while True:
        at -= 1
        digits[at] = <char> (c"0" + length % 10)
        length //= 10
        if length == 0:
            break
    to = put(to, b"Content-Length: ", 16)
    to = put(to, digits + at, 20 - at)
    return put(to, b"\r\n", 2)


cdef bytes new_request_id(uint64_t high, uint64_t low):
    """A header line: 16 hexadecimal digits of this relay, 12 of the request number."""
    cdef bytes line = PyBytes_FromStringAndSize(NULL, 14 + 16 + 12 + 2)
    cdef char *to = put(PyBytes_AS_STRING(line), b"X-Request-Id: ", 14)
    cdef int i
    for i in range(16):
        to[i] = b"0123456789abcdef"[(high >> (60 - 4 * i)) & 15]
    for i in range(12):
        to[16 + i] = b"0123456789abcdef"[(low >> (44 - 4 * i)) & 15]
    memcpy(to + 28, b"\r\n", 2)
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


cdef bytes target_in(bytes line):
    """The target in a request line that may be malformed; empty if there is none."""
    cdef list parts = line.strip(b"\r\n").split(b" ")
    return parts[1] if len(parts) == 3 else b""


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


cdef Py_ssize_t find_head_end(Scan *scan, const char *data, Py_ssize_t size) noexcept:
    """The offset after a head's empty line; 0 if it has not been received; -1 if malformed.

    Every line must end in CRLF and none may be folded. Empty lines before the first are skipped.
    """
    cdef const char *found
    cdef Py_ssize_t end
    while True:
        found = <const char *> memchr(data + scan.at, c"\n", size - scan.at)
        if found is NULL:
            scan.at = size
            return 0
        end = found - data
        if end == scan.line or data[end - 1] != c"\r":
            return -1
        scan.at = end + 1
        if end - 1 == scan.line:
            if scan.lines:
                return end + 1
        else:
            if scan.lines == 0:
                scan.first_end = end - 1
            elif data[scan.line] == c" " or data[scan.line] == c"\t":
                return -1
            scan.lines += 1
        scan.line = end + 1


cdef bint is_line(const char *at) noexcept:
    """Whether a line up to its CR has no control characters. llhttp allows any in a reason."""
    while at[0] != c"\r":
        if <unsigned char> at[0] < 32 and at[0] != c"\t" or at[0] == 127:
            return False
        at += 1
    return True


cdef void scan_reset(Scan *scan, Py_ssize_t at) noexcept:
    scan.at = scan.line = at
    scan.lines = 0


cdef class Head:
    """What request and response heads have in common."""

    def __dealloc__(self):
        text_free(&self.text)

    cdef void _clear(self) noexcept:
        self.text.size = 0
        self.length = -1
        self.chunked = self.says_close = self.says_keep = False
        self.named = None
        self.fault = None

    cdef int _take_lines(self, const char *at, const char *end) except -1:
        """Parse the header lines of a head that llhttp accepted; ``end``: after the last one."""
        cdef const char *stop
        cdef Bytes name
        cdef Bytes value
        while at < end:
            stop = <const char *> memchr(at, c"\r", end - at)
            name.at = at
            value.at = NULL
            if stop is not NULL and stop[1] == c"\n":
                value.at = <const char *> memchr(at, c":", stop - at)
            if value.at is NULL:
                self.fault = "A header line is not of the form 'name: value'."
                return 0
            name.size = value.at - at
            value.at += 1
            value.size = stop - value.at
            strip(&value)
            self._header(header_kind(name), name, value)
            at = stop + 2
        return 0

    cdef int _header(self, HeaderKind kind, Bytes name, Bytes value) except -1:
        raise NotImplementedError

    cdef int _framing(self, HeaderKind kind, Bytes value) except -1:
        """Process a header on message framing or connection persistence."""
        cdef int64_t length
        if kind == CONTENT_LENGTH:
            length = number(value)
            if length < 0 or self.length >= 0 or self.chunked:
                self.fault = (
                    "Content-Length is malformed, is repeated, or is combined with "
                    "Transfer-Encoding."
                )
                return 0
            self.length = length
        elif kind == TRANSFER_ENCODING:
            if self.length >= 0 or self.chunked or not is_value(value, b"chunked", 7):
                self.fault = (
                    "Transfer-Encoding is not chunked, is repeated, or is combined with "
                    "Content-Length."
                )
                return 0
            self.chunked = True
        elif is_value(value, b"keep-alive", 10):
            self.says_keep = True
        elif is_value(value, b"close", 5):
            self.says_close = True
        else:
            self._take_tokens(value.at[:value.size])
        return 0

    cdef int _take_tokens(self, bytes value) except -1:
        """Process a Connection header with several tokens, or one that names a header."""
        cdef bytes token
        for token in value.lower().split(b","):
            token = token.strip(b" \t")
            if token == b"close":
                self.says_close = True
            elif token == b"keep-alive":
                self.says_keep = True
            elif token:
                self.named = token if self.named is None else self.named + b"," + token
        return 0

    cdef int _drop(self, set names) except -1:
        """Remove headers; ``names`` in lower case."""
        cdef bytes line
        cdef list lines = self.text.at[:self.text.size].split(b"\r\n") if self.text.size else []
        self.text.size = 0
        for line in lines:
            if line and line.partition(b":")[0].lower() not in names:
                text_add(&self.text, PyBytes_AS_STRING(line), PyBytes_GET_SIZE(line))
                text_add(&self.text, b"\r\n", 2)
        return 0

    cdef int _drop_cors(self) except -1:
        """Remove the headers of an engine's own CORS policy."""
        return self._drop(CORS_NAMES)

    cdef str _content_type(self):
        """The Content-Type; empty if there is none."""
        cdef list values = text_values(&self.text, b"content-type")
        return values[0].decode("latin-1") if values else ""

    cdef bint _is_compressed(self):
        """Whether the body has a content coding."""
        return text_values(&self.text, b"content-encoding") not in ([], [b"identity"])


# -- chunked framing -------------------------------------------------------------------------------

cdef inline int hex_digit(char c) noexcept:
    if c"0" <= c <= c"9":
        return c - c"0"
    c |= 0x20
    if c"a" <= c <= c"f":
        return c - c"a" + 10
    return -1


cdef inline bint is_token(char c) noexcept:
    return (
        c"a" <= c <= c"z"
        or c"A" <= c <= c"Z"
        or c"0" <= c <= c"9"
        or (c > 32 and c != 127 and memchr(b"!#$%&'*+-.^_`|~", c, 15) is not NULL)
    )


cdef Py_ssize_t chunks_scan(
    Chunks *chunks, const char *data, Py_ssize_t size, Text *into
) except -1:
    """Parse chunked framing. Returns the bytes consumed: all, unless it ended or is malformed.

    ``into``: collects the chunks' data, or NULL to discard it.
    """
    cdef Py_ssize_t at = 0
    cdef Py_ssize_t take
    cdef int digit
    cdef char c
    while at < size and chunks.state < CHUNKS_END:
        if chunks.state == CHUNK_DATA:
            take = size - at
            if <uint64_t> take > chunks.left:
                take = <Py_ssize_t> chunks.left
            if into is not NULL:
                text_add(into, data + at, take)
            at += take
            chunks.left -= <uint64_t> take
            if chunks.left == 0:
                chunks.state = CHUNK_DATA_CR
            continue
        c = data[at]
        at += 1
        if chunks.state < CHUNK_SIZE_LF or TRAILER_START <= chunks.state <= TRAILER:
            chunks.line += 1
        if chunks.state <= CHUNK_SIZE:
            digit = hex_digit(c)
            if digit >= 0:
                if chunks.left >> 56:
                    chunks.state = CHUNKS_BAD
                else:
                    chunks.left = (chunks.left << 4) | <uint64_t> digit
                    chunks.state = CHUNK_SIZE
            elif chunks.state == CHUNK_SIZE_FIRST:
                chunks.state = CHUNKS_BAD
            elif c == c"\r":
                chunks.state = CHUNK_SIZE_LF
            elif c == c";":
                chunks.state = EXTENSION_NAME_FIRST
            else:
                chunks.state = CHUNKS_BAD
        elif chunks.state < CHUNK_SIZE_LF:
            if is_token(c):
                if chunks.state == EXTENSION_NAME_FIRST or chunks.state == EXTENSION_VALUE_FIRST:
                    chunks.state = <ChunkState> (chunks.state + 1)
            elif chunks.state == EXTENSION_NAME_FIRST or chunks.state == EXTENSION_VALUE_FIRST:
                chunks.state = CHUNKS_BAD
            elif c == c"\r":
                chunks.state = CHUNK_SIZE_LF
            elif c == c";":
                chunks.state = EXTENSION_NAME_FIRST
            elif c == c"=" and chunks.state == EXTENSION_NAME:
                chunks.state = EXTENSION_VALUE_FIRST
            else:  # including quoted values, which are not used in practice
                chunks.state = CHUNKS_BAD
        elif chunks.state == CHUNK_SIZE_LF:
            if c != c"\n":
                chunks.state = CHUNKS_BAD
            else:
                chunks.line = 0
                chunks.state = CHUNK_DATA if chunks.left else TRAILER_START
        elif chunks.state == CHUNK_DATA_CR:
            chunks.state = CHUNK_DATA_LF if c == c"\r" else CHUNKS_BAD
        elif chunks.state == CHUNK_DATA_LF:
            chunks.state = CHUNK_SIZE_FIRST if c == c"\n" else CHUNKS_BAD
        elif chunks.state == TRAILER_START:
            if c == c"\r":
                chunks.state = LAST_LF
            else:
                chunks.state = TRAILER_NAME if is_token(c) else CHUNKS_BAD
        elif chunks.state == TRAILER_NAME:
            if c == c":":
                chunks.state = TRAILER
            elif not is_token(c):
                chunks.state = CHUNKS_BAD
        elif chunks.state == TRAILER:
            if c == c"\r":
                chunks.state = TRAILER_LF
            elif <unsigned char> c < 32 and c != c"\t" or c == 127:
                chunks.state = CHUNKS_BAD
        elif chunks.state == TRAILER_LF:
            chunks.state = TRAILER_START if c == c"\n" else CHUNKS_BAD
        else:
            chunks.state = CHUNKS_END if c == c"\n" else CHUNKS_BAD
        if chunks.line > CHUNK_LINE_MAX_BYTES and (
            chunks.state < CHUNK_SIZE_LF or chunks.line > TRAILERS_MAX_BYTES
        ):
            chunks.state = CHUNKS_BAD
    return at


cdef void chunks_reset(Chunks *chunks) noexcept:
    chunks.state = CHUNK_SIZE_FIRST
    chunks.left = 0
    chunks.line = 0


cdef bytes one_chunk(bytes prefix, bytes data, Py_ssize_t at, Py_ssize_t size):
    """``prefix``, then ``data[at:at + size]`` as one chunk of at least one byte."""
    cdef char line[24]
    cdef int line_size = snprintf(line, sizeof(line), b"%zx\r\n", size)
    cdef Py_ssize_t prefix_size = 0 if prefix is None else PyBytes_GET_SIZE(prefix)
    cdef bytes out = PyBytes_FromStringAndSize(NULL, prefix_size + line_size + size + 2)
    cdef char *to = PyBytes_AS_STRING(out)
    if prefix_size:
        to = put_bytes(to, prefix)
    to = put(to, line, line_size)
    to = put(to, PyBytes_AS_STRING(data) + at, size)
    put(to, b"\r\n", 2)
    return out


def unchunk(*pieces):
    """Parse chunked framing given in pieces: (data, bytes used, ended). ValueError if malformed.

    For tests and fuzzers only: the relay itself never joins pieces.
    """
    cdef Chunks chunks
    cdef Text into
    cdef bytes piece
    cdef Py_ssize_t used = 0
    cdef bytes data
    into.at = NULL
    into.size = into.room = 0
    chunks_reset(&chunks)
    try:
        for piece in pieces:
            used += chunks_scan(&chunks, PyBytes_AS_STRING(piece), PyBytes_GET_SIZE(piece), &into)
            if chunks.state == CHUNKS_BAD:
                raise ValueError(f"bad chunked framing before byte {used}")
            if chunks.state == CHUNKS_END:
                break
        data = into.at[:into.size] if into.size else b""
        return data, used, chunks.state == CHUNKS_END
    finally:
        text_free(&into)
