"""Text as C memory: borrowed (Bytes), growing (Text), and what is read from and added to both.

All functions are inline, because calls across compiled modules are not inlined.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport uint64_t
from libc.stdlib cimport free, realloc
from libc.string cimport memchr, memcmp, memcpy

cdef extern from *:
    """
    #define KB_PAIRS \\
        "00010203040506070809101112131415161718192021222324252627282930313233343536373839" \\
        "40414243444546474849505152535455565758596061626364656667686970717273747576777879" \\
        "8081828384858687888990919293949596979899"
    """
    const char *PAIRS "KB_PAIRS"  # "00" to "99"


cdef struct Text:
    char *at
    Py_ssize_t size
    Py_ssize_t room


cdef struct Bytes:  # borrowed: the memory belongs to someone else
    const char *at
    Py_ssize_t size


cdef inline char *put(char *at, const char *data, Py_ssize_t size) noexcept:
    memcpy(at, data, size)
    return at + size


cdef inline char *put_bytes(char *at, bytes data) noexcept:
    return put(at, PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data))


cdef inline char *put_number(char *to, uint64_t number) noexcept:
    """Write a number, two digits at a time, at less than a fifth of the cost of ``snprintf``."""
    cdef uint64_t left = number
    cdef int size = 1
    cdef int at
    while left >= 10:
        left //= 10
        size += 1
    at = size
    while number >= 100:
        at -= 2
        memcpy(&to[at], &PAIRS[2 * (number % 100)], 2)
        number //= 100
    if number >= 10:
        memcpy(to, &PAIRS[2 * number], 2)
    else:
        to[0] = c"0" + <char> number
    return to + size


cdef inline Bytes view(bytes data) noexcept:
    cdef Bytes seen
    seen.at = PyBytes_AS_STRING(data)
    seen.size = PyBytes_GET_SIZE(data)
    return seen


cdef inline bytes cut(bytes data, Py_ssize_t at, Py_ssize_t size):
    """``data[at:at + size]``, without a copy if that is all of it."""
    if at == 0 and size == PyBytes_GET_SIZE(data):
        return data
    return PyBytes_FromStringAndSize(PyBytes_AS_STRING(data) + at, size)


# -- comparisons -----------------------------------------------------------------------------------

cdef inline bint is_same(bytes known, Bytes value) noexcept:
    return (
        known is not None
        and PyBytes_GET_SIZE(known) == value.size
        and memcmp(PyBytes_AS_STRING(known), value.at, value.size) == 0
    )


cdef inline bint is_name(const char *name, const char *lower, Py_ssize_t size) noexcept:
    """Whether a header name (a token: no control characters) equals ``lower``, ignoring case.

    ``lower`` has only letters, digits and hyphens. Setting the case bit turns no other character
    that a token may contain into one of these.
    """
    cdef Py_ssize_t i
    for i in range(size):
        if (name[i] | 0x20) != lower[i]:
            return False
    return True


cdef inline bint is_value(Bytes value, const char *lower, Py_ssize_t size) noexcept:
    """Like ``is_name``, for header values. llhttp already rejects control characters."""
    return value.size == size and is_name(value.at, lower, size)


cdef inline void strip(Bytes *value) noexcept:
    """Strip spaces and tabs from both ends."""
    while value.size and (value.at[0] == c" " or value.at[0] == c"\t"):
        value.at += 1
        value.size -= 1
    while value.size and (value.at[value.size - 1] == c" " or value.at[value.size - 1] == c"\t"):
        value.size -= 1


# -- growing text ----------------------------------------------------------------------------------

cdef inline int text_grow(Text *text, Py_ssize_t size) except -1:
    """Make room for ``size`` more bytes."""
    cdef Py_ssize_t room
    cdef char *grown
    if text.size + size > text.room:
        room = max(text.size + size, 2 * text.room, 512)
        grown = <char *> realloc(text.at, room)
        if grown is NULL:
            raise MemoryError()
        text.at = grown
        text.room = room
    return 0


cdef inline int text_add(Text *text, const char *data, Py_ssize_t size) except -1:
    text_grow(text, size)
    memcpy(text.at + text.size, data, size)
    text.size += size
    return 0


cdef inline int text_add_header(Text *text, Bytes name, Bytes value) except -1:
    cdef char *to
    text_grow(text, name.size + value.size + 4)
    to = put(text.at + text.size, name.at, name.size)
    to = put(to, b": ", 2)
    to = put(to, value.at, value.size)
    to = put(to, b"\r\n", 2)
    text.size = to - text.at
    return 0


cdef inline list text_values(const Text *text, bytes name):
    """The values of a header in header lines, in order; ``name`` in lower case."""
    cdef const char *at = text.at
    cdef const char *end = text.at + text.size
    cdef const char *line_end
    cdef Py_ssize_t size = PyBytes_GET_SIZE(name)
    cdef list values = []
    while at < end:
        line_end = <const char *> memchr(at, c"\r", end - at)
        if line_end - at > size and at[size] == c":" and is_name(
            at, PyBytes_AS_STRING(name), size
        ):
            values.append(at[size + 1:line_end - at].strip(b" \t"))
        at = line_end + 2
    return values


cdef inline void text_free(Text *text) noexcept:
    free(text.at)
    text.at = NULL
    text.size = text.room = 0
