# cython: language_level=3
"""Reads the streams of thousands of connections, most of it without an object or a call for each.

In most streams every event looks like the one before: a chunk of its own, its text at the same
place, the same end. A :class:`Stream` knows what its events look like; a :class:`Poller` reads the
sockets of those that are under way into one buffer and counts what is as usual where it lies there.
Whatever is not (roles, the usage, errors, the end, a chunk that is cut) goes to the HTTP parser,
which knows nothing of chunks that it was not given: only whole ones are left out, and only where it
stands between two.

What a chunk costs is then the kernel's part and cold memory; so nothing of a usual event is kept
but its time.
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
    READS_MAX = 256  # a turn of the loop, which has requests to send as well
    SIZE_MAX_DIGITS = 6  # of a chunk; none that is longer has one event
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
    # Of the last event with text: where that is in it (0: there was none), and how it ends. One
    # that tells the usage as well ends otherwise.
    cdef Py_ssize_t _text_at
    cdef char[END_BYTES] _end
    cdef public bint between_chunks  # the HTTP parser is
    cdef public bytes rest  # of a line, whose end has not come
    cdef public list kept  # the pieces of the text, or None
    cdef object _other  # while a Poller reads it: takes what is not as usual

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
        """Count the usual events at the front, a chunk each; how many bytes those were."""
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
    """The length of the chunk whose line is there, or -1; moves to behind that line."""
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
        # More comes while this reads; a turn of the loop for it would cost as much as its read.
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
        if stream is None:  # removed since it was ready
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
