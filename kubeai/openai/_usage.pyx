"""The tokens that an engine reports at the end of a response: the last member ``usage``.

Responses are not parsed. :func:`find_usage` is given the last bytes of a body that the relay has in
hand and searches them backwards for ``"usage"``: OpenAI's chat, completions, embeddings and responses,
and Anthropic's messages, streamed or not. What is not found there is unknown.

Contents cannot pass for it. In a JSON string, quotes are escaped, so ``"usage"`` with a colon is a key.
A key inside of a tool's input or of another value is not taken: after its object, one object must end
before the end of the body, or two (the event in a stream of responses), and no list.
"""

from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcmp

from kubeai.openai._json cimport skip_number, skip_space, skip_string, skip_value

cdef extern from "<string.h>" nogil:
    const void *memrchr(const void *text, int c, size_t size)

cdef enum:
    TAIL_MAX_BYTES = 2048
    TOKENS_MAX = 1 << 30
    OPEN_MAX = 2


cdef inline bint _is(const char *key, Py_ssize_t size, const char *name, Py_ssize_t length) noexcept nogil:
    return size == length and memcmp(key, name, length) == 0


cdef const char *_key(const char *begin, const char *end) noexcept nogil:
    """After the last ``"usage"`` in the text and the colon that follows it; NULL: there is none."""
    cdef const char *last = end
    cdef const char *at
    while last - begin >= 8:
        # Few letters are rarer in the last members of a response.
        last = <const char *> memrchr(begin, c"g", last - begin)
        if last is NULL:
            return NULL
        if last - begin >= 4 and end - last >= 4 and memcmp(last - 4, b'"usage"', 7) == 0:
            at = skip_space(last + 3)
            if at < end and at[0] == c":":
                return skip_space(at + 1)
    return NULL


cdef const char *_number(const char *at, uint32_t *tokens) noexcept nogil:
    """Read a number of tokens; anything else is left unknown. NULL: not a number."""
    cdef const char *after = skip_number(at)
    cdef uint64_t value = 0
    if after is NULL:
        return NULL
    while at < after and c"0" <= at[0] <= c"9" and value < TOKENS_MAX:
        value = 10 * value + <uint64_t> (at[0] - c"0")
        at += 1
    if at == after and value < TOKENS_MAX:
        tokens[0] = <uint32_t> value
    return after


cdef struct Reported:
    Usage usage
    uint32_t read  # Anthropic's: tokens that were read from the cache …
    uint32_t written  # … and written to it; ``input_tokens`` has neither


cdef const char *_members(const char *at, const char *end, Reported *found, int depth) noexcept nogil:
    """Read an object's members, starting at its brace; returns the place after it, or NULL."""
    cdef const char *key
    cdef Py_ssize_t size
    cdef bint escaped = False
    at = skip_space(at + 1)
    if at[0] == c"}":
        return at + 1
    while at < end and at[0] == c'"':
        key = at + 1
        at = skip_string(key, end, &escaped)
        if at is NULL:
            return NULL
        size = at - 1 - key
        at = skip_space(at)
        if at[0] != c":":
            return NULL
        at = _member(key, size, skip_space(at + 1), end, found, depth)
        if at is NULL:
            return NULL
        at = skip_space(at)
        if at[0] == c"}":
            return at + 1
        if at[0] != c",":
            return NULL
        at = skip_space(at + 1)
    return NULL


cdef const char *_member(
    const char *key, Py_ssize_t size, const char *at, const char *end, Reported *found, int depth
) noexcept nogil:
    cdef uint32_t *tokens = NULL
    if depth == 1:
        if _is(key, size, b"cached_tokens", 13):
            tokens = &found.usage.cached_tokens
    elif _is(key, size, b"prompt_tokens", 13) or _is(key, size, b"input_tokens", 12):
        tokens = &found.usage.prompt_tokens
    elif _is(key, size, b"completion_tokens", 17) or _is(key, size, b"output_tokens", 13):
        tokens = &found.usage.output_tokens
    elif _is(key, size, b"cache_read_input_tokens", 23):
        tokens = &found.read
    elif _is(key, size, b"cache_creation_input_tokens", 27):
        tokens = &found.written
    elif at[0] == c"{" and (
        _is(key, size, b"prompt_tokens_details", 21) or _is(key, size, b"input_tokens_details", 20)
    ):
        return _members(at, end, found, 1)
    if tokens is not NULL and c"0" <= at[0] <= c"9":
        return _number(at, tokens)
    return skip_value(at, end)


cdef bint _is_outer(const char *at, const char *end) noexcept nogil:
    """Whether one or two objects, and no list, are open before this place."""
    cdef int depth = 0, closed = 0
    cdef bint escaped = False
    while at < end:
        if at[0] == c'"':
            at = skip_string(at + 1, end, &escaped)
            if at is NULL:
                return False
            continue
        if at[0] == c"{" or at[0] == c"[":
            depth += 1
        elif at[0] == c"}" or at[0] == c"]":
            if depth:
                depth -= 1
            elif at[0] == c"]":
                return False
            else:
                closed += 1
        at += 1
    return 1 <= closed <= OPEN_MAX


cdef void forget_usage(Usage *usage) noexcept nogil:
    usage.prompt_tokens = usage.cached_tokens = usage.output_tokens = <uint32_t> UNKNOWN_TOKENS


cdef bint find_usage(const char *begin, Py_ssize_t size, Usage *usage) noexcept nogil:
    """Find what was reported in the last bytes of a body that has been received whole.

    The text must be part of a bytes object. False, and all unknown, if nothing was.
    """
    cdef const char *end = begin + size
    cdef const char *at
    cdef Reported found
    forget_usage(usage)
    if size > TAIL_MAX_BYTES:
        begin = end - TAIL_MAX_BYTES
    at = _key(begin, end)
    if at is NULL or at >= end or at[0] != c"{":
        return False
    forget_usage(&found.usage)
    found.read = found.written = <uint32_t> UNKNOWN_TOKENS
    at = _members(at, end, &found, 0)
    if at is NULL or at > end or not _is_outer(at, end):
        return False
    usage[0] = found.usage
    if found.read != <uint32_t> UNKNOWN_TOKENS:
        usage.cached_tokens = found.read
        if usage.prompt_tokens != <uint32_t> UNKNOWN_TOKENS:
            usage.prompt_tokens += found.read
            if found.written != <uint32_t> UNKNOWN_TOKENS:
                usage.prompt_tokens += found.written
    return (
        usage.prompt_tokens != <uint32_t> UNKNOWN_TOKENS
        or usage.output_tokens != <uint32_t> UNKNOWN_TOKENS
    )


def usage_in(bytes body not None):
    """See the stub."""
    cdef Usage usage
    if not find_usage(body, len(body), &usage):
        return None
    return tuple(
        [
            None if tokens == <uint32_t> UNKNOWN_TOKENS else tokens
            for tokens in (usage.prompt_tokens, usage.cached_tokens, usage.output_tokens)
        ]
    )
