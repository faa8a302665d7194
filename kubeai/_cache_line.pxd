"""Loading memory into the cache before it is needed, inlined by its users.

With thousands of API keys, what belongs to a request's key is in the main memory, and each access
to it would wait 0.1 µs or more. There is no ``_cache_line.pyx``.
"""

cdef extern from *:
    """
    #define KB_LINE_BYTES 64
    static inline void kb_prefetch(const void *at) {
        __builtin_prefetch(at);
    }
    """
    enum: LINE_BYTES "KB_LINE_BYTES"
    void prefetch "kb_prefetch"(const void *at) nogil  # any address, even one that is not mapped
