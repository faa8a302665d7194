"""Memory that several processes map: a memfd of fixed size, passed on by descriptor."""

from posix.unistd cimport close as close_fd

from libc.stdint cimport uint64_t

import fcntl
import os

cdef extern from "<sys/mman.h>" nogil:
    void *mmap(void *address, size_t size, int protection, int flags, int fd, long offset)
    int munmap(void *address, size_t size)
    int PROT_READ
    int PROT_WRITE
    int MAP_SHARED
    void *MAP_FAILED

cdef enum:
    LINE_BYTES = 64


cdef size_t lines(size_t size) noexcept:
    """Round a size up to whole cache lines."""
    return (size + LINE_BYTES - 1) // LINE_BYTES * LINE_BYTES


cdef bytes read_header(int fd, str what, size_t size, uint64_t magic, uint64_t version):
    """The first ``size`` bytes, which begin with magic and version; ValueError if those differ."""
    cdef bytes start = os.pread(fd, size, 0)
    cdef const uint64_t *words = <const uint64_t *> <const char *> start
    if <size_t> len(start) < size:
        raise ValueError(f"not a {what}: too short")
    if words[0] != magic:
        raise ValueError(f"not a {what}: wrong magic")
    if words[1] != version:
        raise ValueError(f"{what} has layout {words[1]}, this program has {version}")
    return start


cdef class SharedMemory:
    """See the module. Subclasses say what is in it."""

    def __cinit__(self):
        self.fd = -1

    cdef int _create(self, str name, size_t size) except -1:
        """Create and map zeroed memory. ``name``: shown in /proc."""
        self.fd = os.memfd_create(name, os.MFD_ALLOW_SEALING)
        self._owns_fd = True
        os.ftruncate(self.fd, size)
        # Sealed, so that no holder of the descriptor can shrink the file under another's mapping.
        fcntl.fcntl(
            self.fd,
            fcntl.F_ADD_SEALS,
            fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL,
        )
        return self._map(size)

    cdef int _attach(self, int fd, str what, size_t size) except -1:
        """Map existing memory; ValueError if it does not have the ``size`` that its header implies.

        The caller keeps ownership of the descriptor: ``close`` only unmaps.
        """
        cdef size_t found = os.fstat(fd).st_size
        if found != size:
            raise ValueError(f"{what}'s size of {found} bytes does not match its header")
        self.fd = fd
        return self._map(size)

    cdef int _map(self, size_t size) except -1:
        cdef void *base = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, self.fd, 0)
        if base == MAP_FAILED:
            raise OSError(f"mapping {size} bytes of shared memory failed")
        self.base = <char *> base
        self._size = size
        return 0

    cdef void _unmap(self) noexcept:
        if self.base != NULL:
            munmap(self.base, self._size)
            self.base = NULL

    def close(self):
        """Unmap, and close the descriptor if this process created it."""
        self._unmap()
        if self._owns_fd:
            self._owns_fd = False
            close_fd(self.fd)
        self.fd = -1

    def __dealloc__(self):
        self._unmap()
        if self._owns_fd:
            close_fd(self.fd)  # at the end of the interpreter, os is None
