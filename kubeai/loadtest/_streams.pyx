# cython: language_level=3
"""Reads thousands of event streams, most events without a Python object or call.

In most streams every event has the same shape as the one before: its own chunk, the text at the
same offset, the same end. A :class:`Stream` learns the shape of its events; a :class:`Poller` reads
the sockets of open streams into one buffer and counts matching events in place. Everything else
(roles, usage, errors, the end, a partial chunk) goes to the HTTP parser. The parser never sees the
counted chunks: only whole chunks are skipped, and only while it is between two chunks.

The remaining cost per chunk is the kernel's and cold memory, so only the arrival time of a matching
event is kept.
"""

from cpython.bytes cimport PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport uint32_t
from libc.stdlib cimport free, realloc
from libc.string cimport memchr, memcmp, memcpy
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec
from posix.unistd cimport close

cdef extern from "<sys/epoll.h>" nogil:
    enum:
        EPOLLIN
        EPOLL_CLOEXEC
        EPOLL_CTL_ADD
        EPOLL_CTL_DEL
    ctypedef union epoll_data_t:
        int fd
    struct epoll_event:
        uint32_t events
        epoll_data_t data
    int epoll_create1(int flags)
    int epoll_ctl(int epoll, int what, int fd, epoll_event *event)
    int epoll_wait(int epoll, epoll_event *events, int most, int timeout_ms)

cdef extern from "<sys/socket.h>" nogil:
    enum:
        MSG_DONTWAIT
    ssize_t recv(int fd, void *buffer, size_t size, int flags)

cdef enum:
    READ_MAX_BYTES = 65536
    READY_MAX = 64
    READS_MAX = 256  # per turn of the event loop, which also sends requests
    SIZE_MAX_DIGITS = 6  # of a chunk size; larger chunks are not single events
    CONTENT_BYTES = 11
    END_BYTES = 4

cdef const char *CONTENT = b'"content":"'


cdef double monotonic() noexcept nogil:
    cdef timespec t
    clock_gettime(CLOCK_MONOTONIC, &t)
    return t.tv_sec + t.tv_nsec * 1e-9


cdef class Stream:

    cdef double *_times_s
    cdef Py_ssize_t _room
    cdef readonly Py_ssize_t tokens
    # The shape of the last event with text: the text's offset (0: none yet) and the event's end.
    # An event that also carries usage ends differently.
    cdef Py_ssize_t _text_at
    cdef char[END_BYTES] _end
    cdef public bint between_chunks  # whether the HTTP parser is between two chunks
    cdef public bytes rest  # an incomplete line
    cdef public list kept  # the received data, or None
    cdef object _other  # while a Poller reads the stream: takes data that does not match

    def __cinit__(self):
        self.rest = b""

    def __dealloc__(self):
        free(self._times_s)

    @property
    def times_s(self):
        return [self._times_s[at] for at in range(self.tokens)]

    def note(self, double at_s):
        self._note(at_s)

    def learn(self, bytes line, Py_ssize_t text_at):
        cdef Py_ssize_t size = PyBytes_GET_SIZE(line)
        if not 0 < text_at < size - CONTENT_BYTES:
            raise ValueError("no text there")
        memcpy(self._end, <const char *> line + size - 2, 2)
        memcpy(self._end + 2, b"\n\n", 2)
        self._text_at = text_at

    def forget(self):
        self._text_at = 0

    def take(self, bytes piece, double at_s):
        if not self._is_usual(piece, PyBytes_GET_SIZE(piece)):
            return False
        self._count(piece, PyBytes_GET_SIZE(piece), at_s)
        return True

    cdef bint _is_usual(self, const char *piece, Py_ssize_t size) noexcept:
        cdef Py_ssize_t text = self._text_at + CONTENT_BYTES
        return (
            self._text_at > 0
            and size > text + END_BYTES
            and memcmp(piece + self._text_at, CONTENT, CONTENT_BYTES) == 0
            and piece[text] != c'"'
            and memcmp(piece, b"data:", 5) == 0
            and memcmp(piece + size - END_BYTES, self._end, END_BYTES) == 0
            and memchr(piece, c"\n", size) == piece + size - 2
            and PyBytes_GET_SIZE(self.rest) == 0
        )

    cdef int _note(self, double at_s) except -1:
        cdef void *grown
        cdef Py_ssize_t room
        if self.tokens == self._room:
            room = max(2 * self._room, 64)
            grown = realloc(self._times_s, room * sizeof(double))
            if grown is NULL:
                raise MemoryError()
            self._times_s, self._room = <double *> grown, room
        self._times_s[self.tokens] = at_s
        self.tokens += 1
        return 0

    cdef int _count(self, const char *piece, Py_ssize_t size, double at_s) except -1:
        self._note(at_s)
        if self.kept is not None:
            self.kept.append(PyBytes_FromStringAndSize(piece, size))
        return 0

    cdef Py_ssize_t _take_chunks(self, const char *at, Py_ssize_t size) except -1:
        """Count the matching events at the front, one per chunk; returns the bytes consumed."""
        cdef double at_s = monotonic()
        cdef Py_ssize_t used = 0, data, length
        if not self.between_chunks:
            return 0
        while used < size:
            data = used
            length = _size_line(at, size, &data)
            if length < 0 or data + length + 2 > size:
                break
            if at[data + length] != c"\r" or at[data + length + 1] != c"\n":
                break
            if not self._is_usual(at + data, length):
                break
            self._count(at + data, length, at_s)
            used = data + length + 2
        return used


cdef Py_ssize_t _size_line(const char *text, Py_ssize_t size, Py_ssize_t *at) noexcept:
    """Parse a chunk size line and advance past it; returns the chunk's length, or -1."""
    cdef Py_ssize_t length = 0
    cdef Py_ssize_t most = at[0] + SIZE_MAX_DIGITS
    cdef char c
    while at[0] < min(most, size):
        c = text[at[0]]
        if c"0" <= c <= c"9":
            length = length * 16 + c - c"0"
        elif c"a" <= c | 32 <= c"f":
            length = length * 16 + (c | 32) - c"a" + 10
        else:
            break
        at[0] += 1
    if size - at[0] < 2 or text[at[0]] != c"\r" or text[at[0] + 1] != c"\n":
        return -1
    at[0] += 2
    return length


cdef class Poller:
    cdef readonly int fd
    cdef list _streams  # by descriptor
    cdef epoll_event[READY_MAX] _ready
    cdef char[READ_MAX_BYTES] _buffer

    def __cinit__(self):
        self._streams = []
        self.fd = epoll_create1(EPOLL_CLOEXEC)
        if self.fd < 0:
            raise OSError(errno, "epoll_create1")

    def __dealloc__(self):
        self.close()

    def close(self):
        if self.fd >= 0:
            close(self.fd)
        self.fd = -1

    def add(self, int fd, Stream stream, other):
        cdef epoll_event event
        event.events = EPOLLIN
        event.data.fd = fd
        if epoll_ctl(self.fd, EPOLL_CTL_ADD, fd, &event) < 0:
            raise OSError(errno, "epoll_ctl")
        while len(self._streams) <= fd:
            self._streams.append(None)
        stream._other = other
        self._streams[fd] = stream

    def remove(self, int fd, Stream stream):
        if fd >= len(self._streams) or self._streams[fd] is not stream:
            return
        self._streams[fd] = None
        stream._other = None
        epoll_ctl(self.fd, EPOLL_CTL_DEL, fd, NULL)

    def run(self):
        cdef int left = READS_MAX
        cdef int ready, number
        # More data arrives while this reads; another turn of the event loop costs as much.
        while left > 0:
            ready = epoll_wait(self.fd, self._ready, min(left, READY_MAX), 0)
            if ready <= 0:
                break
            for number in range(ready):
                self._read(self._ready[number].data.fd)
            left -= ready

    cdef int _read(self, int fd) except -1:
        cdef Stream stream = self._streams[fd]
        cdef Py_ssize_t size, used
        if stream is None:  # removed since epoll reported it
            return 0
        size = recv(fd, self._buffer, READ_MAX_BYTES, MSG_DONTWAIT)
        if size < 0 and (errno == EAGAIN or errno == EINTR):
            return 0
        if size <= 0:
            stream._other(b"")
            return 0
        used = stream._take_chunks(self._buffer, size)
        if used < size:
            stream._other(PyBytes_FromStringAndSize(self._buffer + used, size - used))
        return 0
