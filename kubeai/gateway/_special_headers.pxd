"""The headers that the fast path does not handle. There is no ``_special_headers.pyx``."""

from libc.string cimport memchr

from kubeai.gateway.relay._text cimport Text, is_name


cdef inline bint is_special(const Text *text) noexcept:
    """Whether header lines have one that the fast path does not handle."""
    cdef const char *at = text.at
    cdef const char *end = text.at + text.size
    cdef const char *line_end
    cdef Py_ssize_t size
    while at < end:
        line_end = <const char *> memchr(at, c"\r", end - at)
        size = line_end - at
        if size > 16 and at[16] == c":":
            if is_name(at, b"content-encoding", 16) or is_name(at, b"x-label-selector", 16):
                return True
        elif size > 17 and at[17] == c":" and is_name(at, b"x-kubeai-max-wait", 17):
            return True
        elif size > 29 and is_name(at, b"x-gateway-inference-", 20):  # llm-d's headers
            return True
        at = line_end + 2
    return False
