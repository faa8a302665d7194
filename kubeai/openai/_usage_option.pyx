# cython: language_level=3, nonecheck=True
"""Has an engine report the tokens of a stream: adds ``stream_options.include_usage`` to a body.

Chat completions and completions report no usage at the end of a stream unless the client asks for
it. The gateway asks where it needs to know, and the relay removes the report again
(``gateway/relay/_usage_filter.pyx``).

- With ``"include_usage": true`` the client asks for it itself: nothing is added.
- ``false`` and ``null`` are replaced by ``true``. Any other member of ``stream_options`` is kept,
  except that ``continuous_usage_stats``, which has no effect without ``include_usage``, becomes
  ``false``.
- ``stream_options`` that are no object are replaced, because some engines ignore them.
- Engines reject the field in a request that does not stream, so nothing is added there.

vLLM and SGLang read numbers and strings as booleans, as pydantic does: 1, "true", "t", "yes", "y",
"on" and "1" are true. So they are here; other strings are false or invalid.

No I/O. All other bytes of the body are unchanged.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.string cimport memcmp, memcpy

from kubeai.openai._body_scan cimport LARGE_BYTES, InferenceRequest
from kubeai.openai._json cimport Word, is_word, next_member, read_key, skip_space, skip_value

cdef const char *MEMBER = b'"stream_options":{"include_usage":true},'
cdef enum:
    MEMBER_BYTES = 40
    OPTION_AT = 17  # of the object in it
    OPTION_BYTES = 22  # of the object
    CONTINUOUS_BYTES = 24  # of the key, with its quotes


cdef struct Edit:
    Py_ssize_t at  # in the payload
    Py_ssize_t size  # of what is replaced
    const char *text
    Py_ssize_t text_size


cdef bint is_true(const char *at) noexcept nogil:
    """Whether an engine may read a value as true. NULL: the member is missing."""
    cdef char letter
    if at is NULL or at[0] == c"f" or at[0] == c"n":
        return False
    if at[0] == c"t":
        return True
    if at[0] == c'"':  # as pydantic reads strings: "true", "yes", "1" and "on" are true
        letter = at[1] | 32
        return letter == c"t" or letter == c"y" or at[1] == c"1" or (
            letter == c"o" and (at[2] | 32) == c"n"
        )
    # A number is true unless it is 0: skip the sign, zeros and the point.
    while at[0] == c"-" or at[0] == c"." or at[0] == c"0":
        at += 1
    return c"1" <= at[0] <= c"9"


cdef bint asks_to_stream(InferenceRequest request) noexcept:
    return request.stream or is_true(request.stream_value)


cdef void replace(
    Edit *edit, const char *begin, const char *at, const char *after, const char *text, int size
) noexcept nogil:
    """Make an edit that replaces a value."""
    edit.at = at - begin
    edit.size = after - at
    edit.text = text
    edit.text_size = size


cdef int options_edits(InferenceRequest request, Edit *edits) noexcept nogil:
    """How ``stream_options`` change: the number of edits, in no order; 0: the client has asked."""
    cdef const char *begin = request.begin
    cdef const char *end = request.end
    cdef const char *at = request.stream_options.at
    cdef const char *key_at
    cdef const char *value
    cdef bint has_usage = False
    cdef int n = 0
    cdef Word key
    if at[0] != c"{":
        replace(
            edits, begin, at, request.stream_options.after, MEMBER + OPTION_AT, OPTION_BYTES
        )
        return 1
    # The first member, unless there is one that is changed. Of several equal ones the last counts,
    # as in most JSON readers.
    replace(edits, begin, at + 1, at + 1, b'"include_usage":true,', 21)
    at = skip_space(at + 1)
    if at[0] == c"}":
        edits[0].text_size = 20
        return 1
    while at[0] != c"}":
        key_at = at
        value = read_key(at, end, &key)
        at = skip_value(value, end)
        if is_word(&key, b"include_usage", 13):
            has_usage = is_true(value)
            replace(edits, begin, value, at, b"true", 4)
        elif value - key_at > CONTINUOUS_BYTES and memcmp(
            key_at, b'"continuous_usage_stats"', CONTINUOUS_BYTES
        ) == 0:
            n = 1
            replace(edits + 1, begin, value, at, b"false", 5)
        at = next_member(at, c"}")
    return 0 if has_usage else n + 1


cdef bytes with_usage(InferenceRequest request, bytes payload):
    """See ``asking_for_usage`` in the stub."""
    cdef Edit edits[2]
    cdef Edit first
    cdef const char *first_member
    cdef int n = 1
    cdef int i
    # Where the payload differs from the body: after the end of the value of ``model``.
    cdef Py_ssize_t shift = PyBytes_GET_SIZE(payload) - PyBytes_GET_SIZE(request.body)
    if not request.has_usage_option or not is_true(request.stream_value):
        return None
    if request.stream_options.at is NULL:
        first_member = skip_space(request.begin) + 1
        replace(edits, request.begin, first_member, first_member, MEMBER, MEMBER_BYTES)
    else:
        n = options_edits(request, edits)
        if request.stream_options.at > request.model_value.at:
            for i in range(n):
                edits[i].at += shift
    if n == 0:
        return None
    if n == 2 and edits[1].at < edits[0].at:
        first = edits[1]
        edits[1] = edits[0]
        edits[0] = first
    return edited(payload, edits, n)


cdef bytes edited(bytes payload, const Edit *edits, int n):
    """The payload with edits that are in order and do not overlap."""
    cdef Py_ssize_t size = PyBytes_GET_SIZE(payload)
    cdef int i
    for i in range(n):
        size += edits[i].text_size - edits[i].size
    cdef bytes out = PyBytes_FromStringAndSize(NULL, size)
    cdef char *to = PyBytes_AS_STRING(out)
    cdef const char *begin = PyBytes_AS_STRING(payload)
    cdef Py_ssize_t payload_size = PyBytes_GET_SIZE(payload)
    if payload_size > LARGE_BYTES:
        with nogil:  # no other reference exists yet
            copy_edited(to, begin, payload_size, edits, n)
    else:
        copy_edited(to, begin, payload_size, edits, n)
    return out


cdef void copy_edited(
    char *to, const char *begin, Py_ssize_t size, const Edit *edits, int n
) noexcept nogil:
    cdef Py_ssize_t done = 0
    cdef int i
    for i in range(n):
        memcpy(to, begin + done, edits[i].at - done)
        to += edits[i].at - done
        memcpy(to, edits[i].text, edits[i].text_size)
        to += edits[i].text_size
        done = edits[i].at + edits[i].size
    memcpy(to, begin + done, size - done)


def asking_for_usage(InferenceRequest request not None, bytes payload not None):
    """See the stub."""
    return with_usage(request, payload)
