"""The tokens that an engine reports at the end of a response: the last member ``usage``.

Responses are not parsed. :func:`find_usage` is given the last bytes of a body that the relay has in
hand and searches them backwards for ``"usage"``: in OpenAI's chat, completions, embeddings and
responses, and in Anthropic's messages, streamed or not. What is not found there is unknown.

Generated text cannot be mistaken for it. In a JSON string, quotes are escaped, so ``"usage"`` with
a colon is a key. A key inside of a tool's input or of another value is not taken: after its object,
one object must end before the end of the body, or two (the event in a stream of responses), and no
list. The same holds for the last members ``prompt_eval_count`` and ``eval_count`` of Ollama's API,
which are looked for if there is no ``usage``.
"""

from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcmp

from kubeai.openai._json cimport skip_number, skip_space, skip_string, skip_value

cdef extern from "<string.h>" nogil:
    const void *memrchr(const void *text, int c, size_t size)

cdef extern from *:
    """
    /* What a key consists of that is looked for; what matters after a value. */
    enum { KB_WORD = 1, KB_MARK = 2 };
    static const unsigned char kb_classes[256] = {
        ['a' ... 'z'] = KB_WORD, ['_'] = KB_WORD,
        ['"'] = KB_MARK, ['{'] = KB_MARK, ['}'] = KB_MARK, ['['] = KB_MARK, [']'] = KB_MARK,
    };
    static inline int kb_class(const char *at) { return kb_classes[(unsigned char) *at]; }
    """
    int class_of "kb_class"(const char *at) nogil
    enum: WORD "KB_WORD"
    enum: MARK "KB_MARK"

cdef enum:
    TAIL_MAX_BYTES = 2048
    TOKENS_MAX = 1 << 30
    OPEN_MAX = 2
    DETAILS_BYTES = 24  # of the key that has the details
    COUNT_BYTES = 12  # of ``eval_count":``
    QUICK_BYTES = 32  # more than the longest member that ``_quick`` knows, with a number


cdef struct Reported:
    Usage usage
    uint32_t read  # Anthropic's: tokens that were read from the cache …
    uint32_t written  # … and written to it; ``input_tokens`` has neither
    uint32_t other  # not used


cdef inline const char *_to_text(const char *at) noexcept nogil:
    return at if <unsigned char> at[0] > 32 else skip_space(at)


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
            at = _to_text(last + 3)
            if at < end and at[0] == c":":
                return _to_text(at + 1)
    return NULL


cdef inline const char *_number(const char *at, uint32_t *tokens) noexcept nogil:
    """Read a number of tokens; any other number is left unknown. NULL: malformed."""
    cdef const char *begin = at
    cdef uint64_t value = 0
    while c"0" <= at[0] <= c"9" and value < TOKENS_MAX:
        value = 10 * value + <uint64_t> (at[0] - c"0")
        at += 1
    if value < TOKENS_MAX and (
        at[0] == c"," or at[0] == c"}" or <unsigned char> at[0] <= 32
    ):
        tokens[0] = <uint32_t> value
        return at
    return skip_number(begin)


cdef inline bint _is(const char *key, const char *name, size_t size) noexcept nogil:
    return memcmp(key, name, size) == 0


cdef inline uint32_t *_place(const char *key, Py_ssize_t size, Reported *found) noexcept nogil:
    """Where the value of a member of ``usage`` belongs; NULL: nowhere."""
    if size == 13:
        if _is(key, b"prompt_tokens", 13):
            return &found.usage.prompt_tokens
        if _is(key, b"output_tokens", 13):
            return &found.usage.output_tokens
    elif size == 17:
        if _is(key, b"completion_tokens", 17):
            return &found.usage.output_tokens
    elif size == 12:
        if _is(key, b"input_tokens", 12):
            return &found.usage.prompt_tokens
    elif size == 23:
        if _is(key, b"cache_read_input_tokens", 23):
            return &found.read
    elif size == 27:
        if _is(key, b"cache_creation_input_tokens", 27):
            return &found.written
    return NULL


cdef inline bint _has_details(const char *key, Py_ssize_t size) noexcept nogil:
    return (size == 21 and _is(key, b"prompt_tokens_details", 21)) or (
        size == 20 and _is(key, b"input_tokens_details", 20)
    )


cdef inline uint32_t *_quick(
    const char *at, bint details, Reported *found, Py_ssize_t *size
) noexcept nogil:
    """Like ``_place``, for the members of nearly every response, compared as a whole.

    At least ``QUICK_BYTES`` follow. ``size``: of the key with its quotes and colon; without a place
    it is ``DETAILS_BYTES`` if the value is an object with details.
    """
    size[0] = 16
    if details:
        return &found.usage.cached_tokens if _is(at, b'"cached_tokens":', 16) else NULL
    if _is(at, b'"prompt_tokens":', 16):
        return &found.usage.prompt_tokens
    if _is(at, b'"output_tokens":', 16):
        return &found.usage.output_tokens
    size[0] = 15
    if _is(at, b'"total_tokens":', 15):
        return &found.other
    if _is(at, b'"input_tokens":', 15):
        return &found.usage.prompt_tokens
    size[0] = 20
    if _is(at, b'"completion_tokens":', 20):
        return &found.usage.output_tokens
    size[0] = DETAILS_BYTES if _is(at, b'"prompt_tokens_details":', 24) else 0
    return NULL


cdef inline const char *_any(
    const char *at, const char *end, bint details, Reported *found
) noexcept nogil:
    """Read any member, from its quote on; returns the place after its value, or NULL."""
    cdef const char *key = at + 1
    cdef Py_ssize_t size
    cdef uint32_t *tokens = NULL
    cdef bint escaped
    at = skip_string(key, end, &escaped)
    if at is NULL:
        return NULL
    size = at - 1 - key
    at = _to_text(at)
    if at[0] != c":":
        return NULL
    at = _to_text(at + 1)
    if not details:
        tokens = _place(key, size, found)
    elif size == 13 and _is(key, b"cached_tokens", 13):
        tokens = &found.usage.cached_tokens
    if tokens is not NULL and c"0" <= at[0] <= c"9":
        return _number(at, tokens)
    if at[0] == c"{" and not details and _has_details(key, size):
        return _members(at, end, found, True)
    return skip_value(at, end)


cdef const char *_members(
    const char *at, const char *end, Reported *found, bint details
) noexcept nogil:
    """Read the members of ``usage``, or of its details, from the brace on.

    Returns the place after the object, or NULL if it is malformed or not complete.
    """
    cdef Py_ssize_t size
    cdef uint32_t *tokens
    at = _to_text(at + 1)
    if at[0] == c"}":
        return at + 1
    while at < end and at[0] == c'"':
        size = 0
        tokens = _quick(at, details, found, &size) if end - at >= QUICK_BYTES else NULL
        if tokens is not NULL and c"0" <= at[size] <= c"9":
            at = _number(at + size, tokens)
        elif size == DETAILS_BYTES and at[size] == c"{":
            at = _members(at + size, end, found, True)
        else:
            at = _any(at, end, details, found)
        if at is NULL:
            return NULL
        at = _to_text(at)
        if at[0] == c"}":
            return at + 1
        if at[0] != c",":
            return NULL
        at = _to_text(at + 1)
    return NULL


cdef bint _is_outer(const char *at, const char *end) noexcept nogil:
    """Whether one or two objects, and no list, are open before this place."""
    cdef int depth = 0, closed = 0
    cdef bint escaped = False
    while at < end:
        if class_of(at) != MARK:
            at += 1
            continue
        if at[0] == c'"':
            at += 1
            while class_of(at) == WORD:
                at += 1
            if at[0] != c'"':
                at = skip_string(at, end, &escaped)
                if at is NULL:
                    return False
                continue
        elif at[0] == c"{" or at[0] == c"[":
            depth += 1
        elif depth:
            depth -= 1
        elif at[0] == c"]":
            return False
        else:
            closed += 1
        at += 1
    return 1 <= closed <= OPEN_MAX


cdef bint _find_counts(const char *begin, const char *end, Usage *usage) noexcept nogil:
    """Find what Ollama reports. False if there is nothing."""
    cdef const char *last = end
    cdef const char *at
    cdef uint32_t tokens
    cdef bint found = False
    while last - begin > 2:
        last = <const char *> memrchr(begin, c"v", last - begin)
        if last is NULL or last - begin < 2:
            break
        if end - last < COUNT_BYTES or memcmp(last - 1, b'eval_count":', COUNT_BYTES) != 0:
            continue
        tokens = <uint32_t> UNKNOWN_TOKENS
        at = _to_text(last - 1 + COUNT_BYTES)
        if c"0" <= at[0] <= c"9":
            at = _number(at, &tokens)
        if at is NULL or at >= end or not _is_outer(at, end):
            break
        if (last - 2)[0] == c'"' and usage.output_tokens == <uint32_t> UNKNOWN_TOKENS:
            usage.output_tokens = tokens
            found = True
        elif last - begin >= 9 and memcmp(last - 9, b'"prompt_', 8) == 0:
            usage.prompt_tokens = tokens
            found = True
            break
    return found


cdef void forget_usage(Usage *usage) noexcept nogil:
    usage.prompt_tokens = usage.cached_tokens = usage.output_tokens = <uint32_t> UNKNOWN_TOKENS


cdef bint find_usage(const char *begin, Py_ssize_t size, Usage *usage) noexcept nogil:
    """Find what was reported in the last bytes of a body that has been received whole.

    NUL must follow the text. False, and all unknown, if nothing was.
    """
    cdef const char *end = begin + size
    cdef const char *at
    cdef Reported found
    forget_usage(usage)
    if size > TAIL_MAX_BYTES:
        begin = end - TAIL_MAX_BYTES
    at = _key(begin, end)
    if at is NULL:
        return _find_counts(begin, end, usage)
    if at >= end or at[0] != c"{":
        return False
    forget_usage(&found.usage)
    found.read = found.written = <uint32_t> UNKNOWN_TOKENS
    at = _members(at, end, &found, False)
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


# -- for tests -------------------------------------------------------------------------------------


def usage_in(bytes body not None):
    """See the stub. For tests only."""
    cdef Usage usage
    if not find_usage(body, len(body), &usage):
        return None
    return tuple(
        [
            None if tokens == <uint32_t> UNKNOWN_TOKENS else tokens
            for tokens in (usage.prompt_tokens, usage.cached_tokens, usage.output_tokens)
        ]
    )
