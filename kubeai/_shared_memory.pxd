"""Declarations of ``_shared_memory.pyx``."""

from libc.stdint cimport uint64_t

cdef extern from *:
    """
    /* An entry of a log is written before the count that announces it, and after the count that
       announces the entry before it: from that a reader sees that the place is being reused. */
    #define kb_acquire(cell) __atomic_load_n((cell), __ATOMIC_ACQUIRE)
    #define kb_release(cell, value) __atomic_store_n((cell), (value), __ATOMIC_RELEASE)
    #define kb_read_fence() __atomic_thread_fence(__ATOMIC_ACQUIRE)
    #define kb_write_fence() __atomic_thread_fence(__ATOMIC_RELEASE)
    """
    uint64_t acquire "kb_acquire"(const uint64_t *cell) nogil
    void release "kb_release"(uint64_t *cell, uint64_t value) nogil
    void read_fence "kb_read_fence"() nogil
    void write_fence "kb_write_fence"() nogil


cdef class SharedMemory:
    cdef readonly int fd
    cdef char *base  # NULL once closed
    cdef size_t _size
    cdef bint _owns_fd
    cdef int _create(self, str name, size_t size) except -1
    cdef int _attach(self, int fd, str what, size_t size) except -1
    cdef int _map(self, size_t size) except -1
    cdef void _unmap(self) noexcept


cdef size_t lines(size_t size) noexcept


cdef bytes read_header(int fd, str what, size_t size, uint64_t magic, uint64_t version)
