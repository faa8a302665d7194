# cython: language_level=3, nonecheck=True
"""What the heads of requests and responses have in common; sans I/O.

llhttp (through httptools) validates a head on exactly the bytes up to its empty line, after a check
that every line ends in CRLF and none is folded, so no two parsers can disagree on where it ends.
:class:`Head` then reads the header lines in place: each is a name, a colon and a value, or llhttp
would have rejected it. (httptools would create two objects and make one call per header: a fifth of
the cost of a request.)
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.stdint cimport int64_t
from libc.string cimport memchr, memmove

from kubeai.gateway.relay._text cimport (
    Bytes,
    is_name,
    is_value,
    put,
    put_number,
    strip,
    text_add,
    text_add_header,
    text_free,
    text_values,
    view,
)

from httptools import HttpParserUpgrade


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
    to = put(to, b"Content-Length: ", 16)
    return put(put_number(to, length), b"\r\n", 2)


cdef class Head:
    """The head of one message at a time; its owner reuses it for the next one."""

    def __dealloc__(self):
        text_free(&self.text)

    # where it ends in the input

    cdef void begin_scan(self, Py_ssize_t at) noexcept:
        """Look for a head from this offset of the input on."""
        self.scan.at = self.scan.line = at
        self.scan.lines = 0

    cdef void shift_scan(self, Py_ssize_t by) noexcept:
        """The input has lost its first ``by`` bytes."""
        self.scan.at -= by
        self.scan.line -= by
        self.scan.first_end -= by

    # what it says

    cdef list values(self, bytes name):
        """The values of a forwarded header, in order; ``name`` in lower case."""
        return text_values(&self.text, name)

    cdef int drop(self, set names) except -1:
        """Remove headers; ``names`` in lower case."""
        cdef bytes line
        cdef list lines = self.text.at[:self.text.size].split(b"\r\n") if self.text.size else []
        self.text.size = 0
        for line in lines:
            if line and line.partition(b":")[0].lower() not in names:
                text_add(&self.text, PyBytes_AS_STRING(line), PyBytes_GET_SIZE(line))
                text_add(&self.text, b"\r\n", 2)
        return 0

    cdef int replace(self, bytes name, bytes value) except -1:
        """Set a header, instead of those of this name; ``name`` in lower case."""
        cdef const char *at = self.text.at
        cdef const char *end = at + self.text.size
        cdef const char *next_line
        cdef char *to = self.text.at  # what is kept moves here
        cdef Py_ssize_t size = PyBytes_GET_SIZE(name)
        while at < end:
            next_line = <const char *> memchr(at, c"\r", end - at) + 2
            if not (
                next_line - at > size + 2
                and at[size] == c":"
                and is_name(at, PyBytes_AS_STRING(name), size)
            ):
                if to != at:
                    memmove(to, at, next_line - at)
                to += next_line - at
            at = next_line
        self.text.size = to - self.text.at
        return text_add_header(&self.text, view(name), view(value))

    cdef int skip_body(self, bytes data) except -1:
        """Have llhttp consume the message's body, which it must before the next head.

        It does not inspect a body of known length. Of a chunked one it is given only the end.
        """
        if self.feed_data is not None:
            self.feed_data(data)
        return 0

    # parsing

    cdef void _clear(self) noexcept:
        self.text.size = 0
        self.length = -1
        self.chunked = self.says_close = self.says_keep = False
        self.named = None
        self.fault = None

    cdef int _feed(self, bytes head) except -1:
        """Have llhttp validate a head."""
        try:
            self.feed_data(head)
        except HttpParserUpgrade:
            self.feed_data = None  # it would take what follows for another protocol
        except Exception as error:
            self.fault = str(error)
        return 0

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
        cdef list named = [] if self.named is None else [self.named]
        for token in value.lower().split(b","):
            token = token.strip(b" \t")
            if token == b"close":
                self.says_close = True
            elif token == b"keep-alive":
                self.says_keep = True
            elif token:
                named.append(token)
        if named:
            self.named = b",".join(named)
        return 0
