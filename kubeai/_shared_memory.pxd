"""Declarations of ``_shared_memory.pyx``."""

from libc.stdint cimport uint64_t


cdef class SharedMemory:
    cdef readonly int fd
    cdef char *base  # NULL once closed
    cdef size_t _size
    cdef bint _owns_fd
    cdef int _create(self, str name, size_t size) except -1
    cdef int _attach(self, int fd, size_t size) except -1
    cdef int _map(self, size_t size) except -1
    cdef void _unmap(self) noexcept


cdef size_t lines(size_t size) noexcept


cdef bytes read_header(int fd, str what, size_t size, uint64_t magic, uint64_t version)
