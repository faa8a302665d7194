# cython: language_level=3, nonecheck=True
"""Replaces the model's name in a response: the one that an engine knows by the one a client used.

An engine knows an adapter by its own name, and its clients as ``<model>_<adapter>``. The body of
the response is passed on as it comes, byte for byte, except for the values of

- ``model`` at the top level of JSON, of each line of newline-delimited JSON, and of the data of
  each server-sent event (OpenAI's APIs);
- ``model`` in the top-level member ``response`` (OpenAI's Responses API) or ``message``
  (Anthropic's) of an event's data,

where they are equal to the old name. Quotes in a JSON string are escaped, so no content can pass
for one of these. Keys and values that are written with escapes are not recognised; engines write
none.

Sans I/O. Text may be split anywhere; only the old name's first bytes are held back, so memory is
bounded by a piece's size. About 2 ns per byte, and none once a JSON body's model has been replaced.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE

from kubeai.gateway.relay._text cimport text_add, text_free

cdef enum:
    MODEL = 1
    RESPONSE = 2
    MESSAGE = 4

cdef const char *FIELD = b"data:"
cdef enum:
    FIELD_BYTES = 5


cdef inline bint is_line_end(char c) noexcept:
    return c == c"\n" or c == c"\r"


cdef class Renaming:
    """The replacement in one response at a time; ``begin`` starts each."""

    def __init__(self, bytes old not None, bytes new not None):
        """``old``, ``new``: JSON strings, with their quotes. ``old`` has no escapes."""
        self.old = old
        self.new = new

    def __dealloc__(self):
        text_free(&self.out)

    cdef void begin(self, bint is_events, bint is_single) noexcept:
        """``is_single``: the body is one JSON value, not one on each line."""
        self.is_events = is_events
        self.is_single = is_single
        self.matched = 0
        self.after_cr = False
        self.out.size = 0
        self._begin_value()
        self.mode = LINE_START if is_events else BETWEEN

    cdef bytes feed(self, bytes data, bint complete):
        """The text to send for the body's next bytes. ``complete``: they are the last."""
        cdef const char *at = PyBytes_AS_STRING(data)
        cdef const char *end = at + PyBytes_GET_SIZE(data)
        cdef const char *kept = at  # not yet in ``out``
        cdef char c
        cdef bytes text
        while at < end:
            c = at[0]
            if self.is_events and self.mode > LINE_REST and is_line_end(c):
                if self.mode == NAME:
                    text_add(&self.out, PyBytes_AS_STRING(self.old), self.matched)
                    kept = at
                self._line_end(c)
            elif self.mode == BETWEEN:
                if c == c'"':
                    self._string()
                    if self.mode == NAME:
                        text_add(&self.out, kept, at - kept)
                else:
                    self._punctuation(c)
            elif self.mode == STRING:
                while at < end and at[0] != c'"' and at[0] != c"\\" and not is_line_end(at[0]):
                    at += 1
                if at == end:
                    break
                if at[0] == c'"':
                    self.mode = BETWEEN
                elif at[0] == c"\\":
                    self.mode = STRING_ESCAPE
                elif self.is_events:
                    continue
            elif self.mode == STRING_ESCAPE:
                self.mode = STRING
            elif self.mode == KEY:
                self._key(c)
            elif self.mode == NAME:
                if c != PyBytes_AS_STRING(self.old)[self.matched]:
                    text_add(&self.out, PyBytes_AS_STRING(self.old), self.matched)
                    kept = at
                    self.mode = STRING
                    continue
                self.matched += 1
                if self.matched == PyBytes_GET_SIZE(self.old):
                    text_add(&self.out, PyBytes_AS_STRING(self.new), PyBytes_GET_SIZE(self.new))
                    kept = at + 1
                    self.mode = COPYING if self.is_single else BETWEEN
            elif self.mode == LINE_START:
                at = self._line_start(at, end)
                continue
            elif self.mode == LINE_REST:
                while at < end and not is_line_end(at[0]):
                    at += 1
                if at == end:
                    break
                self._line_end(at[0])
            else:
                break
            at += 1
        if self.mode != NAME:
            text_add(&self.out, kept, end - kept)
        elif complete:
            text_add(&self.out, PyBytes_AS_STRING(self.old), self.matched)
        text = PyBytes_FromStringAndSize(self.out.at, self.out.size)
        self.out.size = 0
        return text

    # lines of an event stream

    cdef const char *_line_start(self, const char *at, const char *end) noexcept:
        """Read a field's name, and the position after what was read."""
        if is_line_end(at[0]):
            if at[0] == c"\n" and self.after_cr and not self.matched:
                self.after_cr = False  # the end of the line before
            else:
                if not self.matched:  # an empty line ends the event
                    self._begin_value()
                self._line_end(at[0])
            return at + 1
        self.after_cr = False
        if at[0] != FIELD[self.matched]:
            self.mode = LINE_REST
            return at
        self.matched += 1
        if self.matched == FIELD_BYTES:
            self.mode = LINE_REST if self.skips else BETWEEN
        return at + 1

    cdef void _line_end(self, char c) noexcept:
        """A line ends. The event's data continues on the next one, outside of strings."""
        if self.mode > BETWEEN:
            self.skips = True
        self.mode = LINE_START
        self.matched = 0
        self.after_cr = c == c"\r"

    # JSON

    cdef void _begin_value(self) noexcept:
        self.depth = self.key = 0
        self.expects_key = self.expects_value = self.is_nested = self.skips = False

    cdef void _punctuation(self, char c) noexcept:
        if c == c"{":
            self._open(True)
        elif c == c"[":
            self._open(False)
        elif c == c"}" or c == c"]":
            self.depth = max(0, self.depth - 1)
            if self.depth < 2:
                self.is_nested = False
            self.expects_key = self.expects_value = False
            self.key = 0
        elif c == c",":
            self.expects_key = (
                self.depth == 1 and self.is_object or self.depth == 2 and self.is_nested
            )
            self.expects_value = False
            self.key = 0
        elif c == c":":
            self.expects_value = self.key != 0
        elif <unsigned char> c > 32:
            self.expects_value = False

    cdef void _open(self, bint is_object) noexcept:
        self.depth += 1
        if self.depth == 1:
            self.is_object = self.expects_key = is_object
        else:
            self.is_nested = self.depth > 2 and self.is_nested
            self.expects_key = False
            if self.depth == 2 and is_object and self.expects_value and self.key != MODEL:
                self.is_nested = self.expects_key = True
        self.expects_value = False
        self.key = 0

    cdef void _string(self) noexcept:
        """A string begins."""
        self.mode = STRING
        if self.expects_key:
            self.mode = KEY
            self.keys = MODEL
            if self.is_events and self.depth == 1:
                self.keys = MODEL | RESPONSE | MESSAGE
            self.matched = 0
        elif self.expects_value and self.key == MODEL:
            self.mode = NAME
            self.matched = 1
        self.expects_key = self.expects_value = False

    cdef void _key(self, char c) noexcept:
        """Compare the next character of a key."""
        if c == c'"':
            self.mode = BETWEEN
            if self.keys & MODEL and self.matched == 5:
                self.key = MODEL
            elif self.keys & RESPONSE and self.matched == 8:
                self.key = RESPONSE
            elif self.keys & MESSAGE and self.matched == 7:
                self.key = MESSAGE
            return
        if self.matched >= 5 or b"model"[self.matched] != c:
            self.keys &= ~MODEL
        if self.matched >= 8 or b"response"[self.matched] != c:
            self.keys &= ~RESPONSE
        if self.matched >= 7 or b"message"[self.matched] != c:
            self.keys &= ~MESSAGE
        self.matched += 1
        if self.keys == 0:
            self.mode = STRING_ESCAPE if c == c"\\" else STRING


# -- for tests -------------------------------------------------------------------------------------


def rename(bytes old not None, bytes new not None, bint is_events, bint is_single, *pieces):
    """The body that is sent for one that comes in pieces. For tests only."""
    cdef Renaming renaming = Renaming(old, new)
    cdef Py_ssize_t i
    cdef bytes piece
    cdef list out = []
    renaming.begin(is_events, is_single)
    for i, piece in enumerate(pieces):
        out.append(renaming.feed(piece, i == len(pieces) - 1))
    return b"".join(out)
