# cython: language_level=3, nonecheck=True
"""The body of an engine's response, from its framing to the client's; sans I/O.

It is passed on as it came, unless the client cannot take its framing, or what is sent differs from
what is received: then it is decoded, and framed again.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport int64_t
from libc.string cimport memcpy, memmove

from kubeai.gateway.relay._chunked cimport (
    CHUNKS_BAD,
    CHUNK_SIZE_FIRST,
    CHUNKS_END,
    chunks_reset,
    chunks_scan,
    one_chunk,
    whole_chunk,
)
from kubeai.gateway.relay._renaming cimport Renaming
from kubeai.gateway.relay._text cimport Text, text_free, text_grow
from kubeai.gateway.relay._usage_filter cimport UsageFilter

cdef enum:
    # What an engine reports at the end of a body is in the last bytes. With NUL, they are 2 KiB.
    TAIL_BYTES = 2047


cdef inline int note_tail(ResponseBody body, const char *data, Py_ssize_t size) except -1:
    """Keep the last bytes of a body, however many buffers they come in."""
    if size > TAIL_BYTES - body.tail.size:
        return body._replace_oldest(data, size)
    if body.tail.size + size >= body.tail.room:
        body._make_room(size)
    memcpy(body.tail.at + body.tail.size, data, size)
    body.tail.size += size
    return 0


@cython.final
cdef class ResponseBody:
    """The body of the current response on a connection to an engine."""

    def __dealloc__(self):
        text_free(&self.grown)
        text_free(&self.tail)

    cdef void begin(self, bint has_body, bint chunked, int64_t length) noexcept:
        """The next body, as its head announces it; ``length``: -1 if that is not known."""
        self.ended = self.malformed = self.recoded = self.rechunks = self.decodes = False
        self.is_unchanged = False
        self.tail.size = self.oldest = 0
        self.renaming = None
        self.usage_filter = None
        if not has_body:
            self.framing = NOTHING
        elif chunked:
            self.framing = CHUNKED
            chunks_reset(&self.chunks)
        elif length >= 0:
            self.framing = LENGTH
            self.left = length
        else:
            self.framing = UNTIL_CLOSE

    cdef int send_as(
        self, bint chunked, Renaming renaming, UsageFilter usage_filter=None
    ) except -1:
        """Decide how the client gets it: with chunked framing, or else the data alone.

        ``renaming``: of a name in it that is to be replaced, or None. ``usage_filter``: removes the
        report of usage, or None.
        """
        cdef bint edits = renaming is not None or usage_filter is not None
        self.renaming = renaming
        self.usage_filter = usage_filter
        self.decodes = self.framing == CHUNKED and (edits or not chunked)
        self.rechunks = chunked and (edits or self.framing != CHUNKED)
        self.recoded = edits or self.decodes or self.rechunks
        return 0

    cdef Py_ssize_t take(self, bytes data, Py_ssize_t at) except -1:
        """Take what has been received; returns how many bytes from ``at`` on belong to the body.

        Sets ``ended`` or ``malformed``.
        """
        cdef Py_ssize_t size = PyBytes_GET_SIZE(data) - at
        if self.usage_filter is not None:
            self.is_unchanged = self._passes_filter(PyBytes_AS_STRING(data) + at, size)
        if self.is_unchanged:
            pass  # a whole chunk: the next one begins after it
        elif self.framing == CHUNKED:
            size = chunks_scan(
                &self.chunks,
                PyBytes_AS_STRING(data) + at,
                size,
                &self.grown if self.decodes else NULL,
            )
            self.ended = self.chunks.state == CHUNKS_END
            self.malformed = self.chunks.state == CHUNKS_BAD
        elif self.framing == LENGTH:
            if size > self.left:
                size = <Py_ssize_t> self.left
            self.left -= size
            self.ended = self.left == 0
        elif self.framing == NOTHING:
            size = 0
            self.ended = True
        if size:
            note_tail(self, PyBytes_AS_STRING(data) + at, size)
        return size

    cdef int _replace_oldest(self, const char *data, Py_ssize_t size) except -1:
        """The tail does not grow any further: a stream may be open for an hour."""
        cdef Py_ssize_t part
        if size >= TAIL_BYTES:
            self.tail.size = self.oldest = 0
            return note_tail(self, data + size - TAIL_BYTES, TAIL_BYTES)
        part = TAIL_BYTES - self.tail.size
        if part:
            note_tail(self, data, part)
            data += part
            size -= part
        part = min(size, TAIL_BYTES - self.oldest)
        memcpy(self.tail.at + self.oldest, data, part)
        self.oldest += part
        if self.oldest == TAIL_BYTES:
            self.oldest = size - part
            memcpy(self.tail.at, data + part, self.oldest)
        return 0

    cdef int _make_room(self, Py_ssize_t size) except -1:
        """For ``size`` more bytes of the tail and NUL: 512 bytes, 1 or 2 KiB in all."""
        cdef Py_ssize_t room = 512
        while room <= self.tail.size + size:
            room *= 2
        return text_grow(&self.tail, room - self.tail.size)

    cdef const char *end_tail(self) noexcept:
        """The last ``tail.size`` bytes of the body, at least one, with NUL, once it has ended."""
        if self.oldest:
            self._unroll()
        self.tail.at[self.tail.size] = 0
        return self.tail.at

    cdef void _unroll(self) noexcept:
        """Move the oldest byte of the tail to the front."""
        cdef char newer[TAIL_BYTES]
        cdef Py_ssize_t older = self.tail.size - self.oldest
        memcpy(newer, self.tail.at, self.oldest)
        memmove(self.tail.at, self.tail.at + self.oldest, older)
        memcpy(self.tail.at + older, newer, self.oldest)
        self.oldest = 0

    cdef bytes recode(self, bytes piece):
        """What the client gets for the part just taken, ``piece``; None: nothing yet."""
        if self.is_unchanged:
            return piece
        if self.decodes:
            piece = PyBytes_FromStringAndSize(self.grown.at, self.grown.size)
            self.grown.size = 0
        if self.usage_filter is not None:
            piece = self.usage_filter.feed(piece or b"", self.ended)
        if self.renaming is not None:
            piece = self.renaming.feed(piece or b"", self.ended)
        if not piece:
            return None
        return one_chunk(piece) if self.rechunks else piece

    cdef bint _passes_filter(self, const char *data, Py_ssize_t size) noexcept:
        """Whether the input is one chunk, with whole events that are passed on as they are.

        So is nearly every input of an event stream. It needs no decoding.
        """
        cdef Py_ssize_t line
        if (
            self.framing != CHUNKED
            or not self.rechunks
            or self.renaming is not None
            or self.chunks.state != CHUNK_SIZE_FIRST
        ):
            return False
        line = whole_chunk(data, size)
        return line > 0 and self.usage_filter.passes(data + line, size - line - 2)
