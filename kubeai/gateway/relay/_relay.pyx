# cython: language_level=3, nonecheck=True
"""The relay: HTTP/1.1 between clients' connections and engines.

Owns all downstream connections (:class:`Downstream`), all upstream connections (:class:`Upstream`)
and the data that passes between them. It knows nothing of models: the :class:`Exchange` of a
request, created by the factory passed to :class:`Relay`, decides where the request goes; the relay
sends it there.

llhttp (through httptools) validates a head on exactly the bytes up to its empty line, after a check
that every line ends in CRLF and none is folded, so no two parsers can disagree on where it ends.
The relay then reads the header lines in place: each is a name, a colon and a value, or llhttp would
have rejected it. (httptools would create two objects and make one call per header: a fifth of the
cost of a request.) The forwarded head is written from scratch, with one framing header and without
hop-by-hop headers. Bodies are passed through without decoding. A body of known length is counted;
the framing of a chunked one is checked (``chunks_scan``, stricter than llhttp: no bare LF, limited
extensions and trailers) and passed through unchanged, since httptools reports neither where a
message ends nor its chunks.

Guarantees:
- a request that is malformed, too large or too slow gets an error response (400, 408, 413, 417,
  431), its connection is closed, and no byte of it reaches an upstream;
- one request at a time per connection; data that a client sends meanwhile waits, with reading
  paused;
- one write per direction and wake-up, and flow control both ways: a slow reader pauses its own
  upstream and no other;
- before the first byte of a response, the Exchange may recover from a failure (``wants_retry``);
  after it, the client's connection is cut, so a broken response never looks complete;
- when a client disconnects, its upstream connection is closed at once;
- ``on_end`` is called exactly once per Exchange, whatever happens;
- every wait has a deadline, checked every ``tick_s``.

One thread, one event loop (uvloop).

        client ── Downstream ── Exchange ── Upstream ── engine
                      │             │           │
          one per connection  one per request  one per connection, pooled when idle
"""

from cpython.bytes cimport (
    PyBytes_AS_STRING,
    PyBytes_FromStringAndSize,
    PyBytes_GET_SIZE,
    _PyBytes_Resize,
)
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.stdint cimport int64_t, uint64_t
from libc.stdio cimport snprintf
from libc.stdlib cimport free, realloc
from libc.string cimport memchr, memcmp, memcpy
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from email.utils import formatdate
from http import HTTPStatus
from os import urandom

from httptools import HttpParserUpgrade, HttpRequestParser, HttpResponseParser

cdef extern from *:
    """
    #include <sys/socket.h>
    /* Closing the socket then sends RST: for responses delimited by the end of the connection, the
       only way to signal that the response is incomplete. */
    static void kb_reset_on_close(int fd) {
        struct linger linger = {1, 0};
        (void)setsockopt(fd, SOL_SOCKET, SO_LINGER, &linger, sizeof linger);
    }
    """
    void kb_reset_on_close(int fd) nogil

# Why an attempt failed: passed to Exchange.wants_retry and give_up.
CONNECT = 1  # the connection failed or timed out
LOST = 2  # the connection ended before the response head was complete
INVALID = 3  # the response is not valid HTTP
TIMEOUT = 4  # no first byte in time
STATUS = 5  # a response that the Exchange may not want to pass on

RETRY_AFTER_S = 5  # Retry-After of the relay's own 503 responses

cdef enum:
    BODY_IN_HEAD_WRITE_MAX_BYTES = 65536  # above it, a second buffer is cheaper than a copy
    EXACT_BODY_MAX_BYTES = 1 << 20  # larger buffers grow with the data: a length is only a claim
    CHUNK_LINE_MAX_BYTES = 256
    TRAILERS_MAX_BYTES = 8192
    REQUEST_ID_MAX_BYTES = 128
    LINGER_MAX_S = 2  # after responding to a request that was not read completely
    CLOSING_IDLE_MAX_S = 1  # clients often send the next request right after a response


cdef double now() noexcept:
    cdef timespec t
    clock_gettime(CLOCK_MONOTONIC, &t)
    return t.tv_sec + t.tv_nsec * 1e-9


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


cdef void text_free(Text *text) noexcept:
    free(text.at)
    text.at = NULL
    text.size = text.room = 0


cdef inline char *put(char *at, const char *data, Py_ssize_t size) noexcept:
    memcpy(at, data, size)
    return at + size


cdef inline char *put_bytes(char *at, bytes data) noexcept:
    return put(at, PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data))


# -- heads -----------------------------------------------------------------------------------------

cdef int write_at_once(object transport) except -1:
    """Pass each write to the kernel immediately.

    By default uvloop holds writes until it has handled everything that is ready: after a stall, it
    would process a whole backlog before sending the first of it. Writing is paused when the kernel
    does not accept all the data.
    """
    transport.set_write_buffer_limits(0)
    return 0


cdef inline bint is_failure(int status) noexcept:
    """Whether a response status counts as a failure of the upstream."""
    return status in (500, 502, 503, 504)


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


cdef inline bint is_same(bytes known, Bytes value) noexcept:
    return (
        known is not None
        and PyBytes_GET_SIZE(known) == value.size
        and memcmp(PyBytes_AS_STRING(known), value.at, value.size) == 0
    )


cdef inline bint is_value(Bytes value, const char *lower, Py_ssize_t size) noexcept:
    """Like ``is_name``, for header values. llhttp already rejects control characters."""
    return value.size == size and is_name(value.at, lower, size)


cdef inline void strip(Bytes *value) noexcept:
    """Strip spaces and tabs from both ends."""
    while value.size and (value.at[0] == c" " or value.at[0] == c"\t"):
        value.at += 1
        value.size -= 1
    while value.size and (value.at[value.size - 1] == c" " or value.at[value.size - 1] == c"\t"):
        value.size -= 1


cdef inline Bytes view(bytes data) noexcept:
    cdef Bytes seen
    seen.at = PyBytes_AS_STRING(data)
    seen.size = PyBytes_GET_SIZE(data)
    return seen


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


cdef bytes cut(bytes data, Py_ssize_t at, Py_ssize_t size):
    """``data[at:at + size]``, without a copy if that is all of it."""
    if at == 0 and size == PyBytes_GET_SIZE(data):
        return data
    return PyBytes_FromStringAndSize(PyBytes_AS_STRING(data) + at, size)


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


# -- the relay -------------------------------------------------------------------------------------

cdef class Relay:
    """All connections of one worker, their limits and timers."""


    def __init__(
        self,
        owner,
        exchange,
        refusal,
        *,
        Py_ssize_t head_max_bytes,
        int head_max_count,
        double head_timeout_s,
        double body_timeout_s,
        double keep_alive_timeout_s,
        double stall_timeout_s,
        Py_ssize_t connections_max,
        int64_t buffer_max_bytes,
        double tick_s=0.25,
    ):
        self.owner = owner
        self.exchange = exchange
        self.refusal = refusal
        self.head_max_bytes = head_max_bytes
        self.head_max_count = head_max_count
        self.head_timeout_s = head_timeout_s
        self.body_timeout_s = body_timeout_s
        self.keep_alive_timeout_s = keep_alive_timeout_s
        self.stall_timeout_s = stall_timeout_s
        self.connections_max = connections_max
        self.buffer_max_bytes = buffer_max_bytes
        self.id_high = int.from_bytes(urandom(8), "little")
        self.tick_s = tick_s
        self.downstreams = set()
        self.upstreams = set()

    def start(self, loop):
        self.loop = loop
        self.timer = loop.call_later(self.tick_s, self._tick)

    def stop(self):
        """Abort all open connections and stop the timers."""
        cdef Downstream downstream
        cdef Upstream upstream
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        for downstream in list(self.downstreams):
            downstream._abort()
        for upstream in list(self.upstreams):
            upstream._abort()

    def downstream(self):
        """Create the protocol for an accepted connection (for ``loop.create_server``)."""
        return Downstream(self)

    def close_idle(self):
        """Start draining: close connections once they have been idle for a second.

        Not at once: after a response without ``Connection: close`` the client may be about to send
        its next request, and the response to that one carries the header.
        """
        cdef Downstream downstream
        cdef double sooner_s = max(0.0, self.keep_alive_timeout_s - CLOSING_IDLE_MAX_S)
        self.draining = True
        self.keep_alive_timeout_s -= sooner_s
        for downstream in list(self.downstreams):
            if downstream.state == IDLE and downstream.input is None and not downstream.write_paused:
                downstream.deadline -= sooner_s
                if downstream.deadline <= now():
                    downstream._close()

    @property
    def connections(self):
        """Number of open downstream connections."""
        return len(self.downstreams)

    def _tick(self):
        cdef Downstream downstream
        cdef Upstream upstream
        cdef double time = now()
        for downstream in list(self.downstreams):
            if 0 < downstream.deadline < time:
                downstream._expired()
        for upstream in list(self.upstreams):
            if 0 < upstream.deadline < time:
                upstream._expired()
        self.timer = self.loop.call_later(self.tick_s, self._tick)

    cdef void _report(self, str what, object error) noexcept:
        try:
            self.loop.call_exception_handler({"message": what, "exception": error})
        except BaseException:  # a failing handler must not break the relay
            pass


# -- downstream ------------------------------------------------------------------------------------

cdef class Downstream(Head):
    """One client connection."""


    def __cinit__(self, Relay relay):
        self.relay = relay
        self.state = IDLE
        self.reading = True

    def __dealloc__(self):
        text_free(&self.grown)

    # called by the event loop

    def connection_made(self, transport):
        self.transport = transport
        write_at_once(transport)
        address = transport.get_extra_info("peername")
        self.peer = address[0].encode() if isinstance(address, tuple) else b"unknown"
        self.relay.downstreams.add(self)
        self.deadline = now() + self.relay.keep_alive_timeout_s
        if len(self.relay.downstreams) > self.relay.connections_max:
            self._refuse(503, "Too many connections are open.")

    def data_received(self, bytes data):
        if self.state >= LEAVING:
            return
        if self.input is None:
            self.input = data
            self.used = 0
        else:
            self._append(data)
        if self.state == BODY:
            self._take_body()
        if self.state == IDLE:
            self._pump()
        self._set_reading()

    def eof_received(self):
        """A client that half-closes counts as disconnected, as in nginx and Go."""
        if self.exchange is not None:
            self._abort()
        return False

    def connection_lost(self, error):
        self.relay.downstreams.discard(self)
        self.state = CLOSED
        self.transport = None
        self.input = self.collected = None
        if self.exchange is not None:
            self._finish()

    def pause_writing(self):
        self.write_paused = True
        self.deadline = now() + self.relay.stall_timeout_s
        if self.exchange is not None and self.exchange.upstream is not None:
            self.exchange.upstream._pause()

    def resume_writing(self):
        self.write_paused = False
        if self.state == IDLE:
            self.deadline = now() + self.relay.keep_alive_timeout_s
        elif self.state < LEAVING:
            self.deadline = 0
        if self.exchange is not None and self.exchange.upstream is not None:
            self.exchange.upstream._resume()
        if self.state == IDLE:
            self._pump()
        self._set_reading()

    cdef int _header(self, HeaderKind kind, Bytes name, Bytes value) except -1:
        cdef bytes copied
        if kind == PLAIN:
            text_add_header(&self.text, name, value)
        elif kind == HOST:
            if self.host is not None:
                self.fault = "There is more than one Host header."
            if is_same(self.usual_host, value):
                self.host = self.usual_host
            else:
                self.host = value.at[:value.size]
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
            if kind == FORWARDED_PROTO:
                self.has_proto = True
            else:
                self.has_host = True
            text_add_header(&self.text, name, value)
        elif kind != DROPPED:
            self._framing(kind, value)
        elif is_value(name, b"upgrade", 7):
            if b"websocket" in value.at[:value.size].lower().replace(b",", b" ").split():
                self.asks_websocket = True
        return 0

    # the input

    cdef int _append(self, bytes data) except -1:
        if self.used:
            self.input = self.input[self.used:]
            self.scan.at -= self.used
            self.scan.line -= self.used
            self.scan.first_end -= self.used
            self.used = 0
        self.input += data
        return 0

    cdef void _use(self, Py_ssize_t until) noexcept:
        """Mark the input as consumed up to an offset."""
        if until == PyBytes_GET_SIZE(self.input):
            self.input = None
            self.used = 0
        else:
            self.used = until

    cdef int _set_reading(self) except -1:
        """Read only while data can be used, or to notice that the client disconnects."""
        cdef bint reading
        cdef bint streaming
        if self.state >= LEAVING:
            return 0
        streaming = self.state == BODY and not self.exchange.collecting
        if streaming:
            reading = (
                self.exchange.upstream is not None and not self.exchange.upstream.write_paused
            )
        elif self.state == IDLE:
            reading = self.input is None or not self.write_paused
        else:
            reading = self.state == BODY or self.input is None
        if reading != self.reading:
            self.reading = reading
            if reading:
                self.transport.resume_reading()
            else:
                self.transport.pause_reading()
        if streaming and not self.write_paused:
            self.deadline = now() + self.relay.body_timeout_s if reading else 0
        return 0

    # heads

    cdef int _pump(self) except -1:
        """Take pipelined requests from the input for as long as each is answered immediately."""
        if self.pumping:
            return 0
        self.pumping = True
        try:
            while (
                self.state == IDLE
                and self.input is not None
                and not self.write_paused
                and self._take_head()
            ):
                pass
        finally:
            self.pumping = False
        return 0

    cdef bint _take_head(self) except -1:
        """Take a request head and begin the request; False if it is incomplete or bad."""
        cdef const char *data = PyBytes_AS_STRING(self.input)
        cdef Py_ssize_t size = PyBytes_GET_SIZE(self.input)
        cdef Py_ssize_t end
        if not self.head_started:
            scan_reset(&self.scan, self.used)
            if not (c"A" <= data[self.used] <= c"Z" or data[self.used] == c"\r"):
                return self._refuse(400, "This is not an HTTP request.")
        end = find_head_end(&self.scan, data, size)
        if end < 0:
            return self._refuse(
                400, "A line of the request head does not end in CRLF, or is folded."
            )
        if (end if end else size) - self.used > self.relay.head_max_bytes:
            return self._refuse(
                431, f"The request head is longer than {self.relay.head_max_bytes} bytes."
            )
        if self.scan.lines - 1 > self.relay.head_max_count:
            return self._refuse(
                431, f"The request has more than {self.relay.head_max_count} headers."
            )
        if end == 0:
            if self.scan.lines == 0 and self.scan.line == size:
                self._use(size)  # only empty lines, which some old clients send after a body
            elif not self.head_started:
                self.head_started = True
                self.deadline = now() + self.relay.head_timeout_s
            return False
        self.head_started = False
        return self._parse_head(end) and self._begin(end)

    cdef bint _parse_head(self, Py_ssize_t end) except -1:
        cdef bytes head = cut(self.input, self.used, end - self.used)
        cdef const char *data = PyBytes_AS_STRING(self.input)
        self._clear()
        self.target = self.host = self.forwarded_for = self.request_id = None
        self.has_proto = self.has_host = self.expects = self.asks_websocket = False
        if self.parser is None:
            self.parser = HttpRequestParser(None)
        try:
            self.parser.feed_data(head)
        except HttpParserUpgrade:
            self.parser = None  # upgrades are not supported: treat it as an ordinary request
        except Exception as error:
            return self._refuse(400, f"The request head is malformed: {error}.")
        self._take_lines(data + self.scan.first_end + 2, data + end - 2)
        self._judge_line(data + self.scan.first_end)
        if self.fault is not None:
            return self._refuse(417 if self.fault.startswith("Expect") else 400, self.fault)
        return True

    cdef int _judge_line(self, const char *end) except -1:
        """Parse the request line and reject what llhttp tolerates; ``end``: of that line."""
        cdef const char *begin = PyBytes_AS_STRING(self.input) + self.used
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
        self.old = (end - 1)[0] == c"0"
        if self.method == b"CONNECT":
            self.fault = "CONNECT is not supported."
        elif memchr(space + 1, c" ", end - 10 - space) is not NULL:
            self.fault = "There is more than one space between the parts of the request line."
        elif self.chunked and self.old:
            self.fault = "Transfer-Encoding is not allowed in an HTTP/1.0 request."
        elif self.host is None and not self.old:
            self.fault = "The Host header is missing."
        self.keep_alive = not self.says_close and (self.says_keep or not self.old)
        return 0

    cdef bint _begin(self, Py_ssize_t end) except -1:
        """The head is complete and valid: create the Exchange, which decides what to do next."""
        cdef Exchange exchange
        if self.named is not None:
            self._drop(set(self.named.split(b",")))  # hop-by-hop
        self.forwarded = self._forwarded()
        self.relay.requests += 1
        if self.request_id is None:
            self.request_id = new_request_id(self.relay.id_high, self.relay.requests)
        self._use(end)
        self.deadline = 0
        self.left = self.length
        self.body_bytes = 0
        chunks_reset(&self.chunks)
        self.state = BODY if self.chunked or self.length > 0 else BUSY
        exchange = self.relay.exchange(self)
        self.exchange = exchange
        self.relay.exchanges += 1
        try:
            exchange._begun()
            if self.exchange is exchange and not exchange.decided:
                raise RuntimeError("on_head called no action")
        except Exception as error:
            self._crashed(exchange, error)
        if self.exchange is exchange and exchange.collecting:
            if self.state == BODY:
                self._take_body()
            elif exchange.body is None:
                self._body_whole(b"")
        return True

    cdef bytes _forwarded(self):
        """The X-Forwarded-* lines; cached, as they rarely change within a connection."""
        cdef bint usual = self.forwarded_for is None and not self.has_host and not self.has_proto
        cdef bytes lines
        if usual and self.usual_forwarded is not None and self.host == self.usual_host:
            return self.usual_forwarded
        lines = b"X-Forwarded-For: "
        if self.forwarded_for is not None:
            lines += self.forwarded_for + b", "
        lines += self.peer + b"\r\n"
        if not self.has_host and self.host is not None:
            lines += b"X-Forwarded-Host: " + self.host + b"\r\n"
        if not self.has_proto:
            lines += b"X-Forwarded-Proto: http\r\n"
        if usual:
            self.usual_host = self.host
            self.usual_forwarded = lines
        return lines

    # bodies

    cdef bint _buffer(self, int64_t size) except -1:
        """Account for ``size`` buffered bytes; False: over the limit, the request is rejected."""
        self.relay.buffered_bytes += size - self.buffered_bytes
        self.buffered_bytes = size
        if self.relay.buffered_bytes <= self.relay.buffer_max_bytes:
            return True
        return self._refuse(503, "The buffer for request bodies is full.")

    cdef int _take_body(self) except -1:
        """Consume the available part of the current request's body."""
        cdef Upstream upstream
        cdef bytes piece
        if self.exchange.collecting:
            if self.input is not None:
                self._collect()
            if self.state == BODY and self.deadline == 0:
                self.deadline = now() + self.relay.body_timeout_s
        elif self.input is not None:
            upstream = self.exchange.upstream
            if upstream is not None and not upstream.write_paused:
                piece = self._piece()
                if piece is not None:
                    upstream._write(piece)
        return 0

    cdef int _expect_body(self) except -1:
        """Send 100 Continue if the client expects it."""
        if self.expects and self.state == BODY and self.input is None and not self.old:
            self._write(b"HTTP/1.1 100 Continue\r\n\r\n")
        return 0

    cdef int _collect(self) except -1:
        cdef const char *data = PyBytes_AS_STRING(self.input) + self.used
        cdef Py_ssize_t size = PyBytes_GET_SIZE(self.input) - self.used
        cdef bytes body
        if self.chunked:
            size = chunks_scan(&self.chunks, data, size, &self.grown)
            if self.chunks.state == CHUNKS_BAD:
                self._refuse(400, "The chunked encoding of the request body is malformed.")
                return 0
            if self.body_bytes + self.grown.size > self.body_max_bytes:
                self._refuse(413, f"The body is longer than {self.body_max_bytes} bytes.")
                return 0
            self._use(self.used + size)
            if self.chunks.state != CHUNKS_END and self.grown.size > EXACT_BODY_MAX_BYTES:
                self._gather()
            size = 0 if self.collected is None else PyBytes_GET_SIZE(self.collected)
            if not self._buffer(self.grown.room + size) or self.chunks.state != CHUNKS_END:
                return 0
            body = self._take_grown()
        else:
            if size > self.left:
                size = <Py_ssize_t> self.left
            if size == self.length:
                body = cut(self.input, self.used, size)
            else:
                body = self._fill(data, size)
            self.left -= size
            self._use(self.used + size)
            if self.left:
                self._buffer(PyBytes_GET_SIZE(self.collected))
                return 0
        if self._buffer(PyBytes_GET_SIZE(body)):
            self._body_whole(body)
        return 0

    cdef bytes _fill(self, const char *data, Py_ssize_t size):
        """Add to a body of known length. Returns the body once it is complete."""
        cdef Py_ssize_t filled = <Py_ssize_t> (self.length - self.left)
        cdef Py_ssize_t room = <Py_ssize_t> self.length
        cdef bytes body
        if self.collected is None:
            self.collected = PyBytes_FromStringAndSize(NULL, min(room, EXACT_BODY_MAX_BYTES))
        elif filled + size > PyBytes_GET_SIZE(self.collected):
            room = min(room, max(filled + size, 2 * PyBytes_GET_SIZE(self.collected)))
            self._resize(room)
        memcpy(PyBytes_AS_STRING(self.collected) + filled, data, size)
        if size < self.left:
            return None
        body = self.collected
        self.collected = None
        return body

    cdef int _resize(self, Py_ssize_t room) except -1:
        """Grow ``collected`` by realloc: a large block is remapped, not copied."""
        cdef PyObject *block = <PyObject *> self.collected
        Py_INCREF(self.collected)
        self.collected = None
        _PyBytes_Resize(&block, room)  # block holds the only reference now; freed on failure
        self.collected = <bytes> block
        Py_DECREF(self.collected)
        return 0

    cdef int _gather(self) except -1:
        """Append ``grown`` to ``collected``: a single copy at the end would take too long."""
        cdef Py_ssize_t size = <Py_ssize_t> self.body_bytes + self.grown.size
        cdef Py_ssize_t room = <Py_ssize_t> min(2 * size, self.body_max_bytes)
        if self.collected is None:
            self.collected = PyBytes_FromStringAndSize(NULL, room)
        elif size > PyBytes_GET_SIZE(self.collected):
            self._resize(room)
        memcpy(
            PyBytes_AS_STRING(self.collected) + self.body_bytes, self.grown.at, self.grown.size
        )
        self.body_bytes = size
        self.grown.size = 0
        return 0

    cdef bytes _take_grown(self):
        cdef bytes body
        if self.collected is None:
            body = PyBytes_FromStringAndSize(self.grown.at, self.grown.size)
        else:
            self._gather()
            self._resize(<Py_ssize_t> self.body_bytes)
            body = self.collected
            self.collected = None
        text_free(&self.grown)
        return body

    cdef int _body_whole(self, bytes body) except -1:
        cdef Exchange exchange = self.exchange
        self.state = BUSY
        self.deadline = 0
        # llhttp must consume a body before the next head. It does not inspect one of known length,
        # and of a chunked one it is given only the end.
        if self.parser is not None and (body or self.chunked):
            self.parser.feed_data(b"0\r\n\r\n" if self.chunked else body)
        exchange.body = body
        try:
            exchange._collected()
        except Exception as error:
            self._crashed(exchange, error)
        return 0

    cdef bytes _piece(self):
        """Take the next piece of a streamed body; None if there is none or it is invalid."""
        cdef const char *data
        cdef Py_ssize_t size
        cdef bytes piece
        if self.state != BODY or self.input is None:
            return None
        data = PyBytes_AS_STRING(self.input) + self.used
        size = PyBytes_GET_SIZE(self.input) - self.used
        if self.chunked:
            size = chunks_scan(&self.chunks, data, size, NULL)
            if self.chunks.state == CHUNKS_BAD:
                self._refuse(400, "The chunked encoding of the request body is malformed.")
                return None
        elif size > self.left:
            size = <Py_ssize_t> self.left
        self.body_bytes += size
        if self.body_bytes > self.body_max_bytes:
            self._refuse(413, f"The body is longer than {self.body_max_bytes} bytes.")
            return None
        piece = cut(self.input, self.used, size)
        self._use(self.used + size)
        if self.chunked:
            if self.chunks.state == CHUNKS_END:
                self.state = BUSY
                if self.parser is not None:
                    self.parser.feed_data(b"0\r\n\r\n")
        else:
            self.left -= size
            if self.parser is not None:
                self.parser.feed_data(piece)
            if self.left == 0:
                self.state = BUSY
        if self.state == BUSY and not self.write_paused:
            self.deadline = 0
        return piece

    # responses

    cdef int _write(self, bytes data) except -1:
        if self.state < CLOSED and self.transport is not None:
            if self.exchange is not None:
                self.exchange.answer_bytes += PyBytes_GET_SIZE(data)
            self.transport.write(data)
        return 0

    cdef bint _settle(self) except -1:
        """Decide, before a response head is sent, whether to keep the connection alive."""
        if (
            self.state == BODY
            and self.input is not None
            and not self.chunked
            and self.parser is not None
            and PyBytes_GET_SIZE(self.input) - self.used >= self.left
        ):  # the body is not needed, but has been received
            self.parser.feed_data(cut(self.input, self.used, <Py_ssize_t> self.left))
            self._use(self.used + <Py_ssize_t> self.left)
            self.state = BUSY
        if self.relay.draining or self.state == BODY:
            self.keep_alive = False
        return self.keep_alive

    cdef bytes _own_answer(self, int status, bytes body, bytes headers, bint keep_alive):
        """A JSON response from the relay or the Exchange itself."""
        cdef bytes connection = b""
        if not keep_alive:
            connection = b"Connection: close\r\n"
        elif self.old:
            connection = b"Connection: keep-alive\r\n"
        return (
            b"HTTP/1.1 %d %s\r\nDate: %s\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n%s%s%s\r\n%s"
        ) % (
            status,
            HTTPStatus(status).phrase.encode(),
            formatdate(usegmt=True).encode(),
            len(body),
            headers,
            b"" if self.request_id is None else self.request_id,
            connection,
            b"" if self.method == b"HEAD" else body,
        )

    cdef bint _refuse(self, int status, str message) except -1:
        """Respond with an error and close the connection. Returns False."""
        cdef bint answered = self.exchange is not None and self.exchange.answered
        cdef bytes body
        cdef bytes headers
        if self.exchange is not None:
            if not answered:
                self.exchange.status = status
                self.exchange.whole = True
            self._finish()
        if self.state >= LEAVING:
            return False
        if answered:
            self._abort()
            return False
        if self.state == IDLE:
            self.method = b""
            self.target = self._target_so_far()
            self.request_id = None
        body, headers = self.relay.refusal(
            status, message, self.target, id_in(self.request_id)
        )
        if status == 503:
            headers += b"Retry-After: %d\r\n" % RETRY_AFTER_S
        self._write(self._own_answer(status, body, headers, False))
        self._linger()
        return False

    cdef bytes _target_so_far(self):
        """The target of an incomplete or malformed head; empty before its first line ends."""
        cdef list parts
        if self.input is None or not self.scan.lines:
            return b""
        parts = self.input[self.used:self.scan.first_end].strip(b"\r\n").split(b" ")
        return parts[1] if len(parts) == 3 else b""

    cdef int _crashed(self, Exchange exchange, object error) except -1:
        """A hook raised, which is a bug: end this request and no other."""
        self.relay._report("an exchange failed", error)
        if self.exchange is exchange:
            self._refuse(500, "Internal error in the gateway.")
        return 0

    cdef int _finish(self) except -1:
        """Finish the current Exchange."""
        cdef Exchange exchange = self.exchange
        self.exchange = None
        self.collected = None
        text_free(&self.grown)
        self.relay.buffered_bytes -= self.buffered_bytes
        self.buffered_bytes = 0
        self.relay.exchanges -= 1
        exchange._detach()
        exchange.finished = True
        try:
            exchange._ended()
        except Exception as error:
            self.relay._report("an exchange's cleanup failed", error)
        return 0

    cdef int _answer_ended(self) except -1:
        """The last byte of a response has been written."""
        self.exchange.whole = True
        self._finish()
        if self.state >= LEAVING:
            return 0
        if self.state == BODY:
            self._linger()
        elif not self.keep_alive:
            self._close()
        else:
            self.state = IDLE
            if not self.write_paused:
                self.deadline = now() + self.relay.keep_alive_timeout_s
            if self.input is not None:
                self._pump()
            self._set_reading()
        return 0

    # ends

    cdef int _close(self) except -1:
        """Flush pending writes, then close."""
        if self.input is not None:  # closing now would send RST and could discard the response
            return self._linger()
        self.state = LEAVING
        self.deadline = now() + self.relay.stall_timeout_s
        self.transport.close()
        return 0

    cdef int _linger(self) except -1:
        """Flush, shut down the write side, and wait briefly for the client to close."""
        self.state = LEAVING
        self.deadline = now() + LINGER_MAX_S
        self.input = None
        if not self.reading:
            self.reading = True
            self.transport.resume_reading()
        self.transport.write_eof()
        return 0

    cdef int _abort(self) except -1:
        """Close at once, discarding unsent data."""
        if self.state == CLOSED:
            return 0
        self.state = CLOSED
        if self.exchange is not None:
            self._finish()
        if self.transport is not None:
            self.transport.abort()
        return 0

    cdef int _cut(self, bint looks_complete) except -1:
        """Abort a broken response so that the client can tell that it is incomplete."""
        if looks_complete and self.transport is not None:
            kb_reset_on_close(self.transport.get_extra_info("socket").fileno())
        return self._abort()

    cdef int _expired(self) except -1:
        self.deadline = 0
        if self.state == LEAVING or self.write_paused or self.state == BUSY:
            self._abort()
        elif self.state == BODY:
            self._refuse(408, "The request body was not received in time.")
        elif self.input is not None:
            self._refuse(408, "The request head was not received in time.")
        else:
            self._close()
        return 0


# -- pools -----------------------------------------------------------------------------------------

cdef class Connections:
    """The connection pool of one upstream.

    Subclasses create the connections: ``connect(exchange)`` returns an object with ``cancel()`` and
    eventually calls the exchange's ``connected`` or ``connect_failed``.
    """

    def __init__(
        self,
        Relay relay not None,
        str host not None,
        *,
        double idle_timeout_s,
        Py_ssize_t max_idle,
        double first_byte_timeout_s=0,
        double between_bytes_timeout_s=0,
    ):
        self.relay = relay
        self.host = host
        self.idle_timeout_s = idle_timeout_s
        self.max_idle = max_idle
        self.first_byte_timeout_s = first_byte_timeout_s
        self.between_bytes_timeout_s = between_bytes_timeout_s
        self.resting = []

    @property
    def idle(self):
        """Number of idle connections."""
        return len(self.resting)

    cpdef Upstream take(self):
        """The most recently returned connection, or None.

        A connection past half its idle timeout goes first: connections opened for a burst then stay
        open while requests are frequent enough, and need not be reopened in the next burst.
        """
        cdef Upstream upstream
        while self.resting:
            upstream = self.resting[0]
            if upstream.deadline - now() < self.idle_timeout_s / 2:
                del self.resting[0]
            else:
                upstream = self.resting.pop()
            if upstream.usable():
                return upstream
            upstream.close()
        return None

    cpdef give(self, Upstream upstream):
        """Keep a connection for the next request if there is room; otherwise close it."""
        if self.closed or len(self.resting) >= self.max_idle:
            upstream.close()
        else:
            self.resting.append(upstream)

    cpdef note_failure(self, int failure):
        """Record that an attempt failed or its response broke off."""
        self.failing = True
        self.failed(failure)

    cpdef note_answer(self, int status):
        """Record a response head. Some statuses count as a failure of the upstream."""
        if is_failure(status):
            self.note_failure(STATUS)
            return
        self.answers += 1
        self.answered_s = now()
        if self.trial:
            self.restored()

    cpdef note_end(self, int status):
        """Record that a response is complete."""
        if (self.failing or self.trial) and not is_failure(status):
            self.failing = self.trial = False
            self.recovered()

    def failed(self, int failure):
        """Hook: an attempt failed, or a response broke off."""

    def restored(self):
        """Hook: a probe has received a good response head."""

    def recovered(self):
        """Hook: the first response since a failure or an ejection is complete."""

    def waiting(self, double sent_before_s):
        """Exchanges that sent their request before then and received no byte of a response."""
        cdef Upstream upstream
        cdef list found = []
        for upstream in self.relay.upstreams:
            if (
                upstream.pool is self
                and upstream.exchange is not None
                and not upstream.touched
                and upstream.sent_s < sent_before_s
            ):
                found.append(upstream.exchange)
        return found

    def forget(self, upstream):
        """Remove an idle connection that has ended."""
        if upstream in self.resting:
            self.resting.remove(upstream)

    def close(self):
        """Close idle connections and keep none in future: the upstream was removed or has moved."""
        self.closed = True
        while self.resting:
            self.resting.pop().close()


# -- exchange --------------------------------------------------------------------------------------

cdef class Exchange:
    """One request and its response. Subclasses decide how it is handled.

    The relay calls the hooks (``on_…``, ``wants_retry``, ``retry``, ``give_up``). Hooks call the
    actions (``collect``, ``stream``, ``send``, ``answer``), at once or later until the exchange is
    ``finished``. An action after the client has disconnected does nothing.
    """


    def __cinit__(self, Downstream downstream, *args):
        self.downstream = downstream

    @property
    def method(self):
        return self.downstream.method.decode("ascii")

    @property
    def target(self):
        return self.downstream.target.decode("latin-1")

    @property
    def owner(self):
        return self.downstream.relay.owner

    @property
    def peer(self):
        """The client's address, without the port."""
        return self.downstream.peer.decode("ascii")

    @property
    def request_bytes(self):
        """Size of the request body."""
        if self.body is not None:
            return PyBytes_GET_SIZE(self.body)
        return self.downstream.body_bytes

    @property
    def request_id(self):
        """The client's X-Request-Id, or a generated one."""
        return id_in(self.downstream.request_id)

    @property
    def asks_websocket(self):
        """Whether the client requests a WebSocket upgrade. HTTP/1.0 has no upgrades."""
        return self.downstream.asks_websocket and not self.downstream.old

    def set_header(self, bytes name, bytes value):
        """Replace a header in the upstream request; ``name`` in lower case."""
        self.downstream._drop({name})
        text_add_header(&self.downstream.text, view(name), view(value))

    def drop_header(self, bytes name):
        """Remove a header from the upstream request; ``name`` in lower case."""
        self.downstream._drop({name})

    def headers(self, bytes name):
        """The values of a header, in order; ``name`` in lower case. Excludes hop-by-hop ones."""
        cdef Text *text = &self.downstream.text
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

    cdef bint _has(self, bytes name) except -1:
        """Whether ``headers(name)`` is not empty."""
        cdef Text *text = &self.downstream.text
        cdef const char *at = text.at
        cdef const char *end = text.at + text.size
        cdef const char *line_end
        cdef Py_ssize_t size = PyBytes_GET_SIZE(name)
        while at < end:
            line_end = <const char *> memchr(at, c"\r", end - at)
            if line_end - at > size and at[size] == c":" and is_name(
                at, PyBytes_AS_STRING(name), size
            ):
                return True
            at = line_end + 2
        return False

    # actions

    cpdef collect(self, int64_t max_bytes):
        """Read the whole body, then call ``on_body``."""
        self.decided = self.collecting = True
        self.downstream.body_max_bytes = max_bytes
        if self.downstream.length > max_bytes:
            self.downstream._refuse(413, f"The body is longer than {max_bytes} bytes.")
        else:
            self.downstream._expect_body()

    def stream(self, Connections pool not None, bytes path not None, int64_t max_bytes):
        """Stream the request to an upstream and its response back. No retries."""
        cdef Upstream upstream = None
        self.decided = self.streaming = True
        self.downstream.body_max_bytes = max_bytes
        if self.downstream.length > max_bytes:
            self.downstream._refuse(413, f"The body is longer than {max_bytes} bytes.")
            return
        self.pool = pool
        self.path = path
        self.sending = None
        self.downstream._expect_body()
        if self.downstream.state == BUSY:  # a body that is still arriving cannot be replayed
            upstream = pool.take()
        if upstream is None:
            self.connecting = pool.connect(self)
        else:
            upstream._start(self)

    cpdef send(self, Connections pool, bytes path, bytes body):
        """Start an attempt: send the request with this body and relay the response."""
        cdef Upstream upstream
        if self.finished:
            return
        self.decided = True
        self.pool = pool
        self.path = path
        self.sending = body
        self.replayed = False
        upstream = pool.take()
        if upstream is None:
            self.connecting = pool.connect(self)
        else:
            upstream._start(self)

    def answer(self, int status, bytes body, bytes headers=b""):
        """Respond with JSON, without an upstream. ``headers``: extra lines, each ending in CRLF."""
        cdef Downstream downstream = self.downstream
        if self.finished or self.answered:
            return
        self.decided = self.answered = True
        self.status = status
        self.answered_s = now()
        self._detach()
        downstream._write(
            downstream._own_answer(status, body, headers, downstream._settle())
        )
        downstream._answer_ended()

    # called by pools

    def connected(self, Upstream upstream):
        """The connection requested with ``pool.connect`` is established."""
        if self.connecting is None:
            upstream._abort()
            return
        self.connecting = None
        if not upstream.usable():  # already closed again
            self._failed(LOST)
            return
        upstream._start(self)
        if not self.finished:
            self.downstream._set_reading()

    def connect_failed(self):
        if self.connecting is not None:
            self.connecting = None
            self._failed(CONNECT)

    # hooks

    def on_head(self):
        """The head is complete: call ``collect``, ``stream`` or ``answer``."""

    def on_body(self):
        """``body`` is complete: call ``send`` or ``answer``, now or later."""

    def wants_retry(self, int failure, int status):
        """Whether to make another attempt: True calls ``retry``, False ``give_up``.

        Nothing has reached the client. ``status``: of the response, if ``failure`` is STATUS;
        False then passes that response on.
        """
        return False

    def retry(self):
        """Call ``send`` again or ``answer``, now or later."""

    def give_up(self, int failure):
        """Respond with an error."""

    def attempt_elsewhere(self):
        """The upstream is not expected to respond: make another attempt if possible."""

    def on_end(self):
        """The exchange is over, answered or not: release its resources. Called once."""

    # entry points from the relay, which a compiled subclass may override

    cdef int _begun(self) except -1:
        self.on_head()
        return 0

    cdef int _collected(self) except -1:
        self.on_body()
        return 0

    cdef int _ended(self) except -1:
        self.on_end()
        return 0

    # internal

    cdef int _failed(self, int failure) except -1:
        """An attempt failed and its upstream connection is gone; nothing has reached the client."""
        try:
            if self.replayed and failure == LOST:
                # So the first connection was not just idle. It is not LOST: that counts requests
                # which an engine takes along when it dies, and this is one.
                self.pool.note_failure(INVALID)
            self.pool.note_failure(failure)
            if not self.streaming and self.wants_retry(failure, 0):
                self.retry()
            else:
                self.give_up(failure)
        except Exception as error:
            self.downstream._crashed(self, error)
        return 0

    cdef int _retry(self) except -1:
        try:
            self.retry()
        except Exception as error:
            self.downstream._crashed(self, error)
        return 0

    cpdef detach(self):
        """Abandon the current attempt, if any, and close its upstream connection.

        ``send`` or ``answer`` must follow.
        """
        self._detach()

    cdef int _detach(self) except -1:
        """Drop the upstream, if any, which stops a response that is no longer wanted."""
        cdef Upstream upstream = self.upstream
        cdef object connecting = self.connecting
        self.upstream = None
        self.connecting = None
        if connecting is not None:
            connecting.cancel()
        if upstream is not None:
            upstream.exchange = None
            upstream._abort()
        return 0


# -- upstream --------------------------------------------------------------------------------------

cdef class Upstream(Head):
    """One connection to an engine; idle in its pool, or serving one Exchange."""



    def __init__(self, Connections pool not None):
        self.pool = pool
        self.relay = pool.relay
        self.host_line = b"Host: " + pool.host.encode("ascii") + b"\r\n"
        self.first_byte_timeout_s = pool.first_byte_timeout_s
        self.between_bytes_timeout_s = pool.between_bytes_timeout_s

    def __dealloc__(self):
        text_free(&self.grown)

    # called by the pool

    cpdef bint usable(self):
        return not self.ended and self.transport is not None

    def close(self):
        """Close at once, even if it was never established and connection_lost will not come."""
        self.idle = False
        self.relay.upstreams.discard(self)
        self._abort()

    # called by the event loop

    def connection_made(self, transport):
        self.transport = transport
        write_at_once(transport)
        self.relay.upstreams.add(self)

    def data_received(self, bytes data):
        if self.exchange is None:
            self._lose()  # data without a request
            return
        try:
            self._take(data)
        except Exception as error:
            self.relay._report("relaying a response failed", error)
            self._broken(INVALID)

    def eof_received(self):
        self.ended = True
        if self.exchange is not None and self.head_done and self.framing == UNTIL_CLOSE:
            self._complete()
        else:
            self._abort()  # pending writes have no reader
        return False

    def connection_lost(self, error):
        self.relay.upstreams.discard(self)
        self.ended = True
        self.transport = None
        self._lose()
        if self.exchange is None:
            return
        if self.served and not self.touched and not self.head_done and self._replay():
            return
        self._broken(LOST)

    def pause_writing(self):
        self.write_paused = True
        if self.exchange is not None:
            self.exchange.downstream._set_reading()

    def resume_writing(self):
        self.write_paused = False
        if self.exchange is not None and self.exchange.streaming:
            if self.exchange.downstream.state == BODY:
                self.exchange.downstream._take_body()
            if self.exchange is not None:
                self.exchange.downstream._set_reading()

    cdef int _header(self, HeaderKind kind, Bytes name, Bytes value) except -1:
        if kind == CONTENT_LENGTH or kind == TRANSFER_ENCODING or kind == CONNECTION:
            self._framing(kind, value)
        elif kind != DROPPED and kind != REQUEST_ID:  # the client gets the id that was forwarded
            text_add_header(&self.text, name, value)
        return 0

    # the request

    cdef int _start(self, Exchange exchange) except -1:
        cdef Downstream downstream = exchange.downstream
        cdef bytes body = exchange.sending
        self.exchange = exchange
        exchange.upstream = self
        self.idle = False
        self.touched = self.head_done = False
        if exchange.streaming:
            body = downstream._piece()
            if exchange.finished:  # the piece was invalid
                return 0
        self._write_request(exchange, downstream, body)
        self.sent_s = now()
        self.deadline = self.sent_s + self.first_byte_timeout_s if self.first_byte_timeout_s else 0
        return 0

    cdef int _write_request(self, Exchange exchange, Downstream downstream, bytes body) except -1:
        cdef char framing[64]
        cdef char *end = framing
        cdef Py_ssize_t framing_size
        cdef Py_ssize_t body_size = 0 if body is None else PyBytes_GET_SIZE(body)
        cdef bint together = body_size <= BODY_IN_HEAD_WRITE_MAX_BYTES
        cdef bytes out
        cdef char *to
        if not exchange.streaming:
            end = put_length(end, body_size)
        elif downstream.chunked:
            end = put(end, b"Transfer-Encoding: chunked\r\n", 28)
        elif downstream.length >= 0:
            end = put_length(end, downstream.length)
        framing_size = put(end, b"\r\n", 2) - framing
        out = PyBytes_FromStringAndSize(
            NULL,
            PyBytes_GET_SIZE(downstream.method)
            + PyBytes_GET_SIZE(exchange.path)
            + 12
            + PyBytes_GET_SIZE(self.host_line)
            + downstream.text.size
            + PyBytes_GET_SIZE(downstream.forwarded)
            + PyBytes_GET_SIZE(downstream.request_id)
            + framing_size
            + (body_size if together else 0),
        )
        to = put_bytes(PyBytes_AS_STRING(out), downstream.method)
        to = put(to, b" ", 1)
        to = put_bytes(to, exchange.path)
        to = put(to, b" HTTP/1.1\r\n", 11)
        to = put_bytes(to, self.host_line)
        to = put(to, downstream.text.at, downstream.text.size)
        to = put_bytes(to, downstream.forwarded)
        to = put_bytes(to, downstream.request_id)
        to = put(to, framing, framing_size)
        if body_size and together:
            put_bytes(to, body)
        if together:
            self.transport.write(out)
        else:
            self.transport.writelines((out, body))
        return 0

    cdef int _write(self, bytes data) except -1:
        if self.transport is not None and not self.ended:
            self.transport.write(data)
        return 0

    cdef bint _replay(self) except -1:
        """Send the request again on a new connection to the same upstream.

        Not if the upstream has just failed: then it is resetting all connections, not just closing
        an idle one.
        """
        cdef Exchange exchange = self.exchange
        if self.pool.failing or exchange.replayed or (exchange.streaming and exchange.downstream.body_bytes):
            return False
        exchange.replayed = True
        exchange.upstream = None
        self.exchange = None
        exchange.connecting = exchange.pool.connect(exchange)
        return True

    # the response

    cdef int _take(self, bytes data) except -1:
        cdef Py_ssize_t at = 0
        cdef double came_s = 0
        cdef bytes prefix = None
        if not self.head_done:
            self.touched = True
            if self.input is not None:
                data = self.input + data
            else:
                scan_reset(&self.scan, 0)
            at = self._take_head(data)
            if at <= 0:
                return 0
            prefix = self._answer_head(data)
            came_s = self.exchange.answered_s = now()
        if self.between_bytes_timeout_s and not self.paused:
            self.deadline = (came_s or now()) + self.between_bytes_timeout_s
        self._pass(prefix, data, at)
        return 0

    cdef Py_ssize_t _take_head(self, bytes data) except -2:
        """The offset of the response body; 0: the head is incomplete; -1: stop here."""
        cdef const char *text = PyBytes_AS_STRING(data)
        cdef Py_ssize_t size = PyBytes_GET_SIZE(data)
        cdef Py_ssize_t begin = 0
        cdef Py_ssize_t end
        while True:
            end = find_head_end(&self.scan, text, size)
            if end < 0 or (end if end else size) - begin > self.relay.head_max_bytes or (
                size > begin and text[begin] != c"H"
            ):
                self._broken(INVALID)
                return -1
            if end == 0:
                self.input = data[begin:]
                self.scan.at -= begin
                self.scan.line -= begin
                self.scan.first_end -= begin
                if self.between_bytes_timeout_s:
                    self.deadline = now() + self.between_bytes_timeout_s
                return 0
            if not self._parse_head(
                cut(data, begin, end - begin), text + begin, text + self.scan.first_end
            ):
                self._broken(INVALID)
                return -1
            if self.status >= 200:
                break
            begin = end  # an interim (1xx) response: skipped
            scan_reset(&self.scan, begin)
        self.input = None
        self.pool.note_answer(self.status)
        if self.status >= 500 and not self.exchange.streaming and self._diverted(data, end):
            return -1
        self.head_done = True
        self.scan.line = begin  # offset of the status line, for _answer_head
        return end

    cdef bint _parse_head(self, bytes head, const char *line, const char *line_end) except -1:
        self._clear()
        if self.parser is None:
            self.parser = HttpResponseParser(None)
        try:
            self.parser.feed_data(head)
        except Exception:
            return False
        if memcmp(line, b"HTTP/1.", 7) != 0 or not is_line(line):
            return False
        self._take_lines(line_end + 2, line + PyBytes_GET_SIZE(head) - 2)
        if self.fault is not None:
            return False
        self.status = (line[9] - c"0") * 100 + (line[10] - c"0") * 10 + line[11] - c"0"
        self.reusable = not self.says_close and (self.says_keep or line[7] == c"1")
        if self.named is not None:
            self._drop(set(self.named.split(b",")))  # hop-by-hop
        if self.exchange.downstream.method == b"HEAD" or self.status == 204 or self.status == 304:
            self.framing = NOTHING
            if self.length > 0 or self.chunked:
                self.parser = None  # llhttp would wait for a body
        elif self.chunked:
            self.framing = CHUNKED
            chunks_reset(&self.chunks)
        elif self.length >= 0:
            self.framing = LENGTH
            self.left = self.length
        else:
            self.framing = UNTIL_CLOSE
            self.reusable = False
        return 100 <= self.status != 101

    cdef bint _diverted(self, bytes data, Py_ssize_t at) except -1:
        """Ask the Exchange about a 5xx; True if it is not passed on but retried."""
        cdef Exchange exchange = self.exchange
        cdef Py_ssize_t rest = PyBytes_GET_SIZE(data) - at
        try:
            if not exchange.wants_retry(STATUS, self.status):
                return False
        except Exception as error:
            exchange.downstream._crashed(exchange, error)
            return True
        exchange.upstream = None
        self.exchange = None
        if self.framing == LENGTH and rest == self.left and self.reusable:
            if rest:
                self.parser.feed_data(cut(data, at, rest))
            self._rest()
        else:
            self._abort()
        exchange._retry()
        return True

    cdef bytes _answer_head(self, bytes data):
        """Build the head for the client and decide how the body is framed."""
        cdef Downstream downstream = self.exchange.downstream
        cdef const char *line = PyBytes_AS_STRING(data) + self.scan.line + 8
        cdef Py_ssize_t line_size = PyBytes_AS_STRING(data) + self.scan.first_end - line
        cdef char framing[96]
        cdef char *end = framing
        cdef Py_ssize_t size
        cdef bint keep_alive
        cdef bytes out
        cdef char *to
        self.rechunk = self.framing == UNTIL_CLOSE and not downstream.old
        self.unchunk = self.framing == CHUNKED and downstream.old
        keep_alive = downstream._settle()
        if downstream.old and (self.framing == UNTIL_CLOSE or self.unchunk):
            keep_alive = downstream.keep_alive = False
        if self.length >= 0 and self.status != 204:
            end = put_length(end, self.length)
        elif (self.chunked or self.rechunk) and not downstream.old and self.status != 204:
            end = put(end, b"Transfer-Encoding: chunked\r\n", 28)
        if not keep_alive:
            end = put(end, b"Connection: close\r\n", 19)
        elif downstream.old:
            end = put(end, b"Connection: keep-alive\r\n", 24)
        size = put(end, b"\r\n", 2) - framing
        out = PyBytes_FromStringAndSize(
            NULL,
            8 + line_size + 2
            + self.text.size
            + PyBytes_GET_SIZE(downstream.request_id)
            + size,
        )
        to = put(PyBytes_AS_STRING(out), b"HTTP/1.1", 8)
        to = put(to, line, line_size)
        to = put(to, b"\r\n", 2)
        to = put(to, self.text.at, self.text.size)
        to = put_bytes(to, downstream.request_id)
        put(to, framing, size)
        self.exchange.answered = True
        self.exchange.status = self.status
        return out

    cdef int _pass(self, bytes prefix, bytes data, Py_ssize_t at) except -1:
        """Pass on the received part of the response body, after ``prefix``."""
        cdef Downstream downstream = self.exchange.downstream
        cdef Py_ssize_t came = PyBytes_GET_SIZE(data) - at
        cdef Py_ssize_t size = came
        cdef bint complete = False
        cdef bytes piece = None
        if self.framing == LENGTH:
            if size > self.left:
                size = <Py_ssize_t> self.left
            self.left -= size
            complete = self.left == 0
        elif self.framing == CHUNKED:
            size = chunks_scan(
                &self.chunks,
                PyBytes_AS_STRING(data) + at,
                came,
                &self.grown if self.unchunk else NULL,
            )
            complete = self.chunks.state == CHUNKS_END
        elif self.framing == NOTHING:
            size = 0
            complete = True
        if size < came:  # unexpected bytes after the end of the response
            self.reusable = False
        if size:
            piece = cut(data, at, size)
            if self.framing == LENGTH and self.parser is not None:
                self.parser.feed_data(piece)
        if self.unchunk:
            piece = PyBytes_FromStringAndSize(self.grown.at, self.grown.size)
            self.grown.size = 0
        elif self.rechunk and size:
            piece = one_chunk(prefix, piece, 0, size)
            prefix = None
        self._pass_on(downstream, prefix, piece)
        if self.framing == CHUNKED and self.chunks.state == CHUNKS_BAD:
            self._broken(INVALID)
        elif complete:
            if self.framing == CHUNKED and self.parser is not None:
                self.parser.feed_data(b"0\r\n\r\n")
            self._complete()
        return 0

    cdef int _pass_on(self, Downstream downstream, bytes prefix, bytes piece) except -1:
        cdef bytes out
        if prefix is not None:
            if piece is None or PyBytes_GET_SIZE(piece) > BODY_IN_HEAD_WRITE_MAX_BYTES:
                downstream._write(prefix)
            else:
                out = PyBytes_FromStringAndSize(
                    NULL, PyBytes_GET_SIZE(prefix) + PyBytes_GET_SIZE(piece)
                )
                put_bytes(put_bytes(PyBytes_AS_STRING(out), prefix), piece)
                piece = out
        if piece is not None:
            downstream._write(piece)
        return 0

    cdef int _complete(self) except -1:
        """The response is complete."""
        cdef Downstream downstream = self.exchange.downstream
        self.pool.note_end(self.status)
        if self.rechunk:
            downstream._write(b"0\r\n\r\n")
        self.exchange.upstream = None
        self.exchange = None
        if (
            self.reusable
            and not self.ended
            and downstream.state != BODY
            and self.transport.get_write_buffer_size() == 0
        ):
            self._rest()
        else:
            self._abort()
        downstream._answer_ended()
        return 0

    cdef int _rest(self) except -1:
        """Return the connection to the pool."""
        self.served += 1
        self.idle = True
        self.deadline = now() + self.pool.idle_timeout_s
        self._resume()
        self.pool.give(self)
        return 0

    # ends

    cdef int _broken(self, int failure) except -1:
        """The response cannot be continued: fail the attempt, or cut the client's connection."""
        cdef Exchange exchange = self.exchange
        cdef Downstream downstream
        self._abort()
        if exchange is None:
            return 0
        self.exchange = None
        exchange.upstream = None
        downstream = exchange.downstream
        if exchange.answered:
            exchange.broken = True
            self.pool.note_failure(failure)
            downstream._cut(downstream.old and self.framing != LENGTH)
        else:
            exchange._failed(failure)
        return 0

    cdef int _lose(self) except -1:
        """Remove the connection from the pool; close it if it serves no Exchange."""
        if self.idle:
            self.idle = False
            self.pool.forget(self)
        if self.exchange is None:
            self._abort()
        return 0

    cdef int _abort(self) except -1:
        self.ended = True
        self.deadline = 0
        if self.transport is not None:
            self.transport.abort()
        return 0

    cdef int _pause(self) except -1:
        if not self.paused and self.transport is not None:
            self.paused = True
            self.deadline = 0  # the client is slow, not the upstream
            self.transport.pause_reading()
        return 0

    cdef int _resume(self) except -1:
        if self.paused:
            self.paused = False
            if self.exchange is not None and self.between_bytes_timeout_s:
                self.deadline = now() + self.between_bytes_timeout_s
            if self.transport is not None:
                self.transport.resume_reading()
        return 0

    cdef int _expired(self) except -1:
        self.deadline = 0
        if self.exchange is None:
            self._lose()
        else:
            self._broken(TIMEOUT)
        return 0
