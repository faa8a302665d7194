# cython: language_level=3, nonecheck=True
"""The body of an engine's response, from its framing to the client's; sans I/O.

It is passed on as it came, unless the client cannot take its framing, or what is sent differs from
what is received: then it is decoded, and framed again.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport int64_t

from kubeai.gateway.relay._chunked cimport (
    CHUNKS_BAD,
    CHUNK_SIZE_FIRST,
    CHUNKS_END,
    chunks_reset,
    chunks_scan,
    one_chunk,
)
from kubeai.gateway.relay._renaming cimport Renaming
from kubeai.gateway.relay._text cimport text_free
from kubeai.gateway.relay._usage_filter cimport UsageFilter

cdef enum:
    # The end of a stream ("data: [DONE]", an empty chunk) often comes in buffers of its own.
    SHORT_BYTES = 96
    TAIL_BYTES = 2048  # what an engine reports at the end of a body is in the last bytes


cdef class ResponseBody:
    """The body of the current response on a connection to an engine."""

    def __dealloc__(self):
        text_free(&self.grown)

    cdef void begin(self, bint has_body, bint chunked, int64_t length) noexcept:
        """The next body, as its head announces it; ``length``: -1 if that is not known."""
        self.ended = self.malformed = self.recoded = self.rechunks = self.decodes = False
        self.tail = self.before_tail = self.after_tail = None
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
        if self.framing == CHUNKED:
            self.is_aligned = self.chunks.state == CHUNK_SIZE_FIRST
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
            self._note_tail(data, at, size)
        return size

    cdef int _note_tail(self, bytes data, Py_ssize_t at, Py_ssize_t size) except -1:
        if size < SHORT_BYTES and self.tail is not None:
            data = data[at:at + size]
            self.after_tail = data if self.after_tail is None else (self.after_tail + data)
            if PyBytes_GET_SIZE(self.after_tail) > TAIL_BYTES:
                self.after_tail = self.after_tail[PyBytes_GET_SIZE(self.after_tail) - TAIL_BYTES:]
            return 0
        if self.after_tail is not None:
            self.join_tail()
        self.before_tail = self.tail
        self.before_tail_at = self.tail_at
        self.before_tail_size = self.tail_size
        self.tail = data
        self.tail_at = at
        self.tail_size = size
        return 0

    cdef bytes recode(self, bytes piece):
        """What the client gets for the part just taken, ``piece``; None: nothing yet."""
        if self._is_unchanged():
            self.grown.size = 0
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

    cdef bint _is_unchanged(self) noexcept:
        """Whether the part just taken is sent as it came, with its own framing: whole chunks."""
        return (
            self.usage_filter is not None
            and self.renaming is None
            and self.decodes
            and self.rechunks
            and self.is_aligned
            and self.chunks.state == CHUNK_SIZE_FIRST
            and self.usage_filter.passes(self.grown.at, self.grown.size)
        )

    cdef int join_tail(self) except -1:
        """Make ``tail`` have the last bytes of the body, also if its last buffer has too few."""
        cdef Py_ssize_t end = self.tail_at + self.tail_size
        cdef Py_ssize_t size = min(self.tail_size, TAIL_BYTES)
        cdef bytes joined = b""
        if self.after_tail is None and (self.before_tail is None or size == TAIL_BYTES):
            return 0
        if self.before_tail is not None:
            joined = self.before_tail[
                self.before_tail_at + self.before_tail_size
                - min(self.before_tail_size, TAIL_BYTES - size):
                self.before_tail_at + self.before_tail_size
            ]
        joined = joined + self.tail[end - size:end]
        if self.after_tail is not None:
            joined = joined + self.after_tail
        self.tail = joined
        self.tail_at = 0
        self.tail_size = PyBytes_GET_SIZE(joined)
        self.before_tail = self.after_tail = None
        return 0
