"""The clocks of the compiled core."""

from posix.time cimport CLOCK_MONOTONIC, CLOCK_REALTIME, clock_gettime, clockid_t, timespec

cdef extern from "time.h":
    clockid_t CLOCK_MONOTONIC_COARSE


cdef inline double now() noexcept nogil:
    """CLOCK_MONOTONIC, in seconds."""
    cdef timespec time
    clock_gettime(CLOCK_MONOTONIC, &time)
    return time.tv_sec + time.tv_nsec * 1e-9


cdef inline double coarse_now() noexcept nogil:
    """What ``now`` was at the kernel's last timer tick, 1 to 10 ms ago.

    It takes a quarter of the time, because it does not read a counter. For timeouts, which are set
    with every message and rarely expire.
    """
    cdef timespec time
    clock_gettime(CLOCK_MONOTONIC_COARSE, &time)
    return time.tv_sec + time.tv_nsec * 1e-9


cdef inline double wall_s() noexcept nogil:
    """Unix time, in seconds. It can jump: for times that people set, and for nothing else."""
    cdef timespec time
    clock_gettime(CLOCK_REALTIME, &time)
    return time.tv_sec + time.tv_nsec * 1e-9
