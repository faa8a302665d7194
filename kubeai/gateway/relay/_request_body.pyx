# cython: language_level=3, nonecheck=True
"""A request's body: its framing, its size limit and its buffer.

A body is either collected (:meth:`RequestBody.collect`) or taken in pieces
(:meth:`RequestBody.next_piece`). A body of known length is counted. A chunked one is checked, and
decoded unless it is streamed as it came. Only :meth:`RequestBody.receive` does I/O.
"""

from cpython.bytes cimport (
    PyBytes_AS_STRING,
    PyBytes_FromStringAndSize,
    PyBytes_GET_SIZE,
    _PyBytes_Resize,
)
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.stdint cimport int64_t
from libc.string cimport memcpy

from kubeai.gateway.relay._chunked cimport CHUNKS_BAD, CHUNKS_END, chunks_reset, chunks_scan
from kubeai.gateway.relay._socket cimport kb_receive
from kubeai.gateway.relay._text cimport cut, text_free


cdef class RequestBody:
    """The body of a connection's current request."""

    def __dealloc__(self):
        text_free(&self.grown)

    cdef void begin(self, int64_t length, bint chunked) noexcept:
        """Start a body. ``length``: its Content-Length, or -1."""
        self.length = self.left = length
        self.chunked = chunked
        self.received_bytes = 0
        self.state = INCOMPLETE if chunked or length > 0 else COMPLETE
        chunks_reset(&self.chunks)

    cdef void clear(self) noexcept:
        """Free the buffer."""
        self.collected = None
        text_free(&self.grown)

    cdef Py_ssize_t collect(self, bytes data, Py_ssize_t at) except -1:
        """Buffer the body's next bytes from ``data[at:]``; returns how many belong to it.

        Sets ``state``. Once it is COMPLETE, :meth:`take` returns the body.
        """
        cdef const char *begin = PyBytes_AS_STRING(data) + at
        cdef Py_ssize_t size = PyBytes_GET_SIZE(data) - at
        if self.chunked:
            return self._collect_chunks(begin, size)
        if size > self.left:
            size = <Py_ssize_t> self.left
        if size == self.length:
            self.collected = cut(data, at, size)
        else:
            self._fill(begin, size)
        self.left -= size
        if self.left == 0:
            self.state = COMPLETE
        return size

    cdef int receive(self, int fd) except -1:
        """Read more of an INCOMPLETE body of known length directly into its buffer.

        The event loop copies what it reads twice. It still reports the connection's end and errors:
        here, they look like a socket without data.
        """
        cdef Py_ssize_t filled, size
        cdef Py_ssize_t most = RECEIVE_MAX_BYTES
        while self.left >= RECEIVE_MIN_BYTES and most > 0:
            self._make_room(1)
            filled = <Py_ssize_t> (self.length - self.left)
            size = kb_receive(
                fd,
                PyBytes_AS_STRING(self.collected) + filled,
                PyBytes_GET_SIZE(self.collected) - filled,
            )
            if size == 0:
                return 0
            self.left -= size
            most -= size
        if self.left == 0:
            self.state = COMPLETE
        return 0

    cdef bytes take(self):
        """The collected body. It is buffered no longer."""
        cdef bytes body = self.collected
        self.collected = None
        return body

    cdef int64_t buffered_bytes(self) noexcept:
        """The memory that the collected part takes."""
        return self.grown.room + (
            0 if self.collected is None else PyBytes_GET_SIZE(self.collected)
        )

    cdef bytes next_piece(self, bytes data, Py_ssize_t at, Py_ssize_t *size, bint decode):
        """The body's next bytes from ``data[at:]``; ``decode``: without their chunked encoding.

        Sets ``state``, and ``size`` to how many bytes of ``data`` belong to the body.
        """
        cdef Text *into = &self.grown if decode else NULL
        cdef bytes piece
        size[0] = PyBytes_GET_SIZE(data) - at
        if self.chunked:
            size[0] = chunks_scan(&self.chunks, PyBytes_AS_STRING(data) + at, size[0], into)
            if self.chunks.state == CHUNKS_BAD:
                self.state = MALFORMED
                return None
            if self.chunks.state == CHUNKS_END:
                self.state = COMPLETE
        else:
            if size[0] > self.left:
                size[0] = <Py_ssize_t> self.left
            self.left -= size[0]
            if self.left == 0:
                self.state = COMPLETE
        if self.chunked and decode:
            piece = PyBytes_FromStringAndSize(self.grown.at, self.grown.size)
            self.grown.size = 0
        else:
            piece = cut(data, at, size[0])
        self.received_bytes += PyBytes_GET_SIZE(piece)
        if self.received_bytes > self.max_bytes:
            self.state = TOO_LONG
        return piece

    # internal

    cdef Py_ssize_t _collect_chunks(self, const char *data, Py_ssize_t size) except -1:
        size = chunks_scan(&self.chunks, data, size, &self.grown)
        if self.chunks.state == CHUNKS_BAD:
            self.state = MALFORMED
        elif self.received_bytes + self.grown.size > self.max_bytes:
            self.state = TOO_LONG
        elif self.chunks.state == CHUNKS_END:
            self.state = COMPLETE
            self._finish_chunks()
        elif self.grown.size > EXACT_BODY_MAX_BYTES:
            self._gather()
        return size

    cdef int _fill(self, const char *data, Py_ssize_t size) except -1:
        """Add to a body of known length."""
        self._make_room(size)
        memcpy(PyBytes_AS_STRING(self.collected) + self.length - self.left, data, size)
        return 0

    cdef int _make_room(self, Py_ssize_t size) except -1:
        """Make ``collected`` large enough for the next ``size`` bytes of a body of known length."""
        cdef Py_ssize_t needed = <Py_ssize_t> (self.length - self.left) + size
        cdef Py_ssize_t room = <Py_ssize_t> self.length
        if self.collected is None:
            room = min(room, max(needed, <Py_ssize_t> EXACT_BODY_MAX_BYTES))
            self.collected = PyBytes_FromStringAndSize(NULL, room)
        elif needed > PyBytes_GET_SIZE(self.collected):
            self._resize(min(room, max(needed, 2 * PyBytes_GET_SIZE(self.collected))))
        return 0

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
        cdef Py_ssize_t size = <Py_ssize_t> self.received_bytes + self.grown.size
        cdef Py_ssize_t room = <Py_ssize_t> min(2 * size, self.max_bytes)
        if self.collected is None:
            self.collected = PyBytes_FromStringAndSize(NULL, room)
        elif size > PyBytes_GET_SIZE(self.collected):
            self._resize(room)
        memcpy(
            PyBytes_AS_STRING(self.collected) + self.received_bytes,
            self.grown.at,
            self.grown.size,
        )
        self.received_bytes = size
        self.grown.size = 0
        return 0

    cdef int _finish_chunks(self) except -1:
        """Make ``collected`` the whole body."""
        if self.collected is None:
            self.collected = PyBytes_FromStringAndSize(self.grown.at, self.grown.size)
        else:
            self._gather()
            self._resize(<Py_ssize_t> self.received_bytes)
        text_free(&self.grown)
        return 0
