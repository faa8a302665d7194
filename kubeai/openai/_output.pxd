"""How many tokens a request's body allows its response to have: functions that ``_body_scan``
inlines. There is no ``_output.pyx``.

The values have been validated as JSON. A number that is not positive and whole counts as missing:
the engine rejects it, or takes it for "no limit".
"""

from libc.stdint cimport int64_t

from kubeai.openai._json cimport Word, is_word, next_member, read_key, skip_space, skip_value

cdef enum:
    ASKED_MAX = 1 << 30


cdef struct Asked:  # 0: the body does not say
    int64_t tokens  # of each choice
    int64_t choices


cdef inline int64_t whole_number(const char *at) noexcept nogil:
    """A positive whole number, at most ``ASKED_MAX``; 0 for any other value."""
    cdef int64_t number = 0
    while c"0" <= at[0] <= c"9":
        number = min(10 * number + (at[0] - c"0"), <int64_t> ASKED_MAX)
        at += 1
    if at[0] == c"." or at[0] == c"e" or at[0] == c"E":
        return 0
    return number


cdef inline void note_options(Asked *asked, const char *at, const char *end) noexcept nogil:
    """Note the limit in the ``options`` of Ollama's API."""
    cdef const char *value
    cdef Word key
    if at[0] != c"{":
        return
    at = skip_space(at + 1)
    while at is not NULL and at[0] != c"}":
        value = read_key(at, end, &key)
        if value is NULL:
            return
        if is_word(&key, b"num_predict", 11):
            asked.tokens = max(asked.tokens, whole_number(value))
        at = skip_value(value, end)
        if at is not NULL:
            at = next_member(at, c"}")


cdef inline void note_asked(
    Asked *asked, const Word *key, const char *value, const char *end
) noexcept nogil:
    """Note a member of the body, if it is one that limits the response."""
    if key.size == 10:
        if is_word(key, b"max_tokens", 10):
            asked.tokens = max(asked.tokens, whole_number(value))
    elif key.size == 1:
        if key.at[0] == c"n":
            asked.choices = whole_number(value)
    elif key.size == 17:
        if is_word(key, b"max_output_tokens", 17):
            asked.tokens = max(asked.tokens, whole_number(value))
    elif key.size == 21:
        if is_word(key, b"max_completion_tokens", 21):
            asked.tokens = max(asked.tokens, whole_number(value))
    elif key.size == 7:
        if is_word(key, b"options", 7):
            note_options(asked, value, end)


cdef inline int64_t asked_tokens(const Asked *asked) noexcept nogil:
    """The limit for all choices together; -1: there is none."""
    if asked.tokens <= 0:
        return -1
    return min(asked.tokens * max(<int64_t> 1, asked.choices), <int64_t> ASKED_MAX)
