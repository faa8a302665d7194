"""Rate limits of log events.

Compiled because under load many requests are an event (they move off their first endpoint), and
nearly all of these events are suppressed.
"""

cimport cython
from libc.stdint cimport int64_t


@cython.final
cdef class RateLimit:
    """See the stub."""

    def __init__(self, double burst_max, double per_s):
        self._burst_max = self._left = burst_max
        self._per_s = per_s

    cdef int64_t _take(self, double now_s) noexcept:
        """What ``take`` returns; -1 instead of None."""
        cdef int64_t suppressed
        if self._left < 1 or now_s > self._at_s + 1:
            self._left = min(self._burst_max, self._left + (now_s - self._at_s) * self._per_s)
            self._at_s = now_s
            if self._left < 1:
                self._suppressed += 1
                return -1
        suppressed = self._suppressed
        self._left -= 1
        self._suppressed = 0
        return suppressed

    def take(self, double now_s):
        """See the stub."""
        cdef int64_t suppressed = self._take(now_s)
        return None if suppressed < 0 else suppressed
