"""The clocks of the compiled core."""

from posix.time cimport CLOCK_MONOTONIC, CLOCK_REALTIME, clock_gettime, timespec


cdef inline double now() noexcept nogil:
    """CLOCK_MONOTONIC, in seconds."""
    cdef timespec time
    clock_gettime(CLOCK_MONOTONIC, &time)
    return time.tv_sec + time.tv_nsec * 1e-9


cdef inline double wall_s() noexcept nogil:
    """Unix time, in seconds. It can jump: for times that people set, and for nothing else."""
    cdef timespec time
    clock_gettime(CLOCK_REALTIME, &time)
    return time.tv_sec + time.tv_nsec * 1e-9
