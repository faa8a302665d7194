# cython: language_level=3, nonecheck=True
"""The body of an engine's response, from its framing to the client's; sans I/O.

It is passed on as it came, unless the client cannot take its framing or a name in it is replaced:
then it is decoded, and framed again.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport int64_t

from kubeai.gateway.relay._chunked cimport (
    CHUNKS_BAD,
    CHUNKS_END,
    chunks_reset,
    chunks_scan,
    one_chunk,
)
from kubeai.gateway.relay._renaming cimport Renaming
from kubeai.gateway.relay._text cimport text_free

cdef enum:
    # The end of a stream ("data: [DONE]", an empty chunk) often comes in buffers of its own.
    SHORT_BYTES = 96


cdef class ResponseBody:
    """The body of the current response on a connection to an engine."""

    def __dealloc__(self):
        text_free(&self.grown)

    cdef void begin(self, bint has_body, bint chunked, int64_t length) noexcept:
        """The next body, as its head announces it; ``length``: -1 if that is not known."""
        self.ended = self.malformed = self.recoded = self.rechunks = self.decodes = False
        self.tail = None
        self.renaming = None
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

    cdef int send_as(self, bint chunked, Renaming renaming) except -1:
        """Decide how the client gets it: with chunked framing, or else the data alone.

        ``renaming``: of a name in it that is to be replaced, or None.
        """
        cdef bint renames = renaming is not None
        self.renaming = renaming
        self.decodes = self.framing == CHUNKED and (renames or not chunked)
        self.rechunks = chunked and (renames or self.framing != CHUNKED)
        self.recoded = renames or self.decodes or self.rechunks
        return 0

    cdef Py_ssize_t take(self, bytes data, Py_ssize_t at) except -1:
        """Take what has been received; returns how many bytes from ``at`` on belong to the body.

        Sets ``ended`` or ``malformed``.
        """
        cdef Py_ssize_t size = PyBytes_GET_SIZE(data) - at
        if self.framing == CHUNKED:
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
        if size >= SHORT_BYTES or (size and self.tail is None):
            self.tail = data
            self.tail_at = at
            self.tail_size = size
        return size

    cdef bytes recode(self, bytes piece):
        """What the client gets for the part just taken, ``piece``; None: nothing yet."""
        if self.decodes:
            piece = PyBytes_FromStringAndSize(self.grown.at, self.grown.size)
            self.grown.size = 0
        if self.renaming is not None:
            piece = self.renaming.feed(piece or b"", self.ended)
        if not piece:
            return None
        return one_chunk(piece) if self.rechunks else piece
