"""A validating scanner of JSON: functions that the modules that cimport them inline.

Each one relies on the NUL that ends every bytes object, and reads no byte after it. A text is
strict JSON: valid UTF-8, no lone surrogates, no raw control characters. Strings are scanned 64
bytes at a time. There is no ``_json.pyx``: a function of another module would not be inlined.
"""

from libc.stdint cimport uint32_t
from libc.string cimport memcmp, memcpy

cdef enum:
    DEPTH_MAX_COUNT = 980  # of a value's lists and objects
    TOKEN_MAX_BYTES = 24  # of a token id with the spaces around it
    # Longer than any name that is looked for: only the start of a longer text with escapes is read.
    WORD_MAX_CHARS = 24

cdef extern from *:
    """
    #include <stdint.h>
    #include <string.h>
    __attribute__((unused)) static const signed char kb_hex[256] = {  /* -1: not a hex digit */
        [0 ... 47] = -1, ['0'] = 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, [58 ... 64] = -1,
        ['A'] = 10, 11, 12, 13, 14, 15, [71 ... 96] = -1,
        ['a'] = 10, 11, 12, 13, 14, 15, [103 ... 255] = -1,
    };
    /* Whether 64 bytes of a string are all ASCII without quotes, backslashes or control characters.
       As signed bytes, non-ASCII bytes also compare below the space. With vectors of GCC and clang:
       a plain loop was vectorised to twice as many instructions. */
    typedef signed char kb_bytes __attribute__((vector_size(16)));
    static inline int kb_is_plain(const char *text) {
        kb_bytes bytes, special = {0};
        uint64_t words[2];
        for (int i = 0; i < 64; i += 16) {
            memcpy(&bytes, text + i, 16);
            special |= (bytes < 0x20) | (bytes == '"') | (bytes == '\\\\');
        }
        memcpy(words, &special, 16);
        return !(words[0] | words[1]);
    }
    /* The same for 8 bytes: 0, or a word whose lowest set bit is in the first byte that is not. */
    static inline uint64_t kb_special(const char *at) {
        const uint64_t ones = 0x0101010101010101u;
        uint64_t word, quote, backslash;
        memcpy(&word, at, 8);
        quote = word ^ ones * '"';
        backslash = word ^ ones * '\\\\';
        return (word | ((word - ones * 0x20) & ~word) | ((quote - ones) & ~quote)
                | ((backslash - ones) & ~backslash)) & ones * 0x80;
    }
    /* Skip plain bytes: up to the first that is not, or to less than 8 bytes before the end. */
    static inline const char *kb_skip_plain(const char *at, const char *end) {
        uint64_t special;
        if (end - at >= 72 && !kb_special(at)) {  /* most strings end within the first 8 bytes */
            at += 8;
            while (end - at >= 64 && kb_is_plain(at))
                at += 64;
        }
        for (; end - at >= 8; at += 8)
            if ((special = kb_special(at)))
                return at + (__builtin_ctzll(special) >> 3);
        return at;
    }
    /* Skip three-byte code points that need no further checks: Chinese, Japanese, Thai. */
    static inline const char *kb_skip_threes(const char *text) {
        const unsigned char *at = (const unsigned char *) text;
        while ((unsigned char) (at[0] - 0xE1) < 12 && (at[1] & 0xC0) == 0x80
               && (at[2] & 0xC0) == 0x80)
            at += 3;
        return (const char *) at;
    }
    /* Estimates the number of members: braces and quotes, less escaped quotes. */
    static inline int kb_member(const char *at) {
        return (at[0] == '{') + (at[0] == '"') - ((at[0] == '\\\\') & (at[1] == '"'));
    }
    static inline long kb_members(const char *at, const char *end) {
        long count = 0;
        while (end - at >= 64) {
            signed char some = 0;  /* narrow, so that the loop is vectorised */
            for (int i = 0; i < 64; i++) some += kb_member(at + i);
            count += some;
            at += 64;
        }
        while (at < end) count += kb_member(at++);
        return count;
    }
    """
    const signed char kb_hex[256]
    const char *kb_skip_threes(const char *text) noexcept nogil
    const char *kb_skip_plain(const char *at, const char *end) noexcept nogil
    long kb_members(const char *at, const char *end) noexcept nogil


# -- JSON ------------------------------------------------------------------------------------------
# Each function takes a position in the text and returns the position after what it read, or NULL if
# the text is rejected.

cdef inline const char *skip_space(const char *at) noexcept nogil:
    while at[0] == c" " or at[0] == c"\n" or at[0] == c"\r" or at[0] == c"\t":
        at += 1
    return at


cdef inline int hex4(const char *text) noexcept nogil:
    """The value of four hex digits, or -1."""
    cdef const unsigned char *at = <const unsigned char *> text
    cdef int value = kb_hex[at[0]]
    # Stop at the first non-digit: the bytes after it may be past the end.
    if value >= 0:
        value = value << 4 | kb_hex[at[1]]
    if value >= 0:
        value = value << 4 | kb_hex[at[2]]
    if value >= 0:
        value = value << 4 | kb_hex[at[3]]
    return value


cdef inline const char *skip_escape(const char *at, uint32_t *code) noexcept nogil:
    """Skip an escape, starting at its backslash; ``code``: its code point."""
    cdef int value, low
    cdef char c = at[1]
    if c == c"u":
        value = hex4(at + 2)
        if value < 0 or 0xDC00 <= value < 0xE000:
            return NULL
        if value < 0xD800 or value >= 0xE000:
            code[0] = <uint32_t> value
            return at + 6
        if at[6] != c"\\" or at[7] != c"u":
            return NULL
        low = hex4(at + 8)
        if not 0xDC00 <= low < 0xE000:
            return NULL
        code[0] = <uint32_t> (0x10000 + ((value - 0xD800) << 10) + (low - 0xDC00))
        return at + 12
    if c == c'"' or c == c"\\" or c == c"/":
        code[0] = <uint32_t> c
    elif c == c"n":
        code[0] = 10
    elif c == c"r":
        code[0] = 13
    elif c == c"t":
        code[0] = 9
    elif c == c"b":
        code[0] = 8
    elif c == c"f":
        code[0] = 12
    else:
        return NULL
    return at + 2


cdef inline const char *skip_utf8(const char *text) noexcept nogil:
    """Skip a non-ASCII code point (RFC 3629: shortest form, no surrogate, up to U+10FFFF)."""
    cdef const unsigned char *at = <const unsigned char *> text
    cdef unsigned char first = at[0]
    if first < 0xE0:
        return text + 2 if first >= 0xC2 and at[1] & 0xC0 == 0x80 else NULL
    if at[1] & 0xC0 != 0x80 or at[2] & 0xC0 != 0x80:
        return NULL
    if first < 0xF0:
        if first == 0xE0 and at[1] < 0xA0 or first == 0xED and at[1] >= 0xA0:
            return NULL
        return text + 3
    if at[3] & 0xC0 != 0x80 or first > 0xF4:
        return NULL
    if first == 0xF0 and at[1] < 0x90 or first == 0xF4 and at[1] >= 0x90:
        return NULL
    return text + 4


cdef inline const char *skip_string(const char *at, const char *end, bint *escaped) noexcept nogil:
    """Skip a string, from after its opening quote to after its closing one."""
    cdef const char *block
    cdef uint32_t code = 0
    cdef char c
    while True:
        at = kb_skip_plain(at, end)
        block = at + 32  # special bytes often come together
        while at < block:  # the NUL at the end of the body stops the loop
            c = at[0]
            if c == c'"':
                return at + 1
            if c == c"\\":
                escaped[0] = True
                # Nearly all escapes are one of these.
                if at[1] == c"n" or at[1] == c'"' or at[1] == c"\\":
                    at += 2
                else:
                    at = skip_escape(at, &code)
            elif <unsigned char> c >= 0x80:
                at = skip_utf8(at)
                if at is not NULL:
                    at = kb_skip_threes(at)
            elif c >= 0x20:
                at += 1
            else:
                return NULL
            if at is NULL:
                return NULL


cdef inline const char *skip_digits(const char *at) noexcept nogil:
    if not c"0" <= at[0] <= c"9":
        return NULL
    while c"0" <= at[0] <= c"9":
        at += 1
    return at


cdef inline const char *skip_number(const char *at) noexcept nogil:
    if at[0] == c"-":
        at += 1
    at = at + 1 if at[0] == c"0" else skip_digits(at)
    if at is not NULL and at[0] == c".":
        at = skip_digits(at + 1)
    if at is not NULL and (at[0] == c"e" or at[0] == c"E"):
        at += 1
        if at[0] == c"+" or at[0] == c"-":
            at += 1
        at = skip_digits(at)
    return at


cdef inline bint is_text(
    const char *at, const char *end, const char *text, Py_ssize_t size
) noexcept nogil:
    return end - at >= size and memcmp(at, text, size) == 0


cdef inline const char *skip_scalar(const char *at, const char *end) noexcept nogil:
    cdef bint escaped
    cdef char c = at[0]
    if c == c'"':
        return skip_string(at + 1, end, &escaped)
    if c == c"t":
        return at + 4 if is_text(at, end, b"true", 4) else NULL
    if c == c"f":
        return at + 5 if is_text(at, end, b"false", 5) else NULL
    if c == c"n":
        return at + 4 if is_text(at, end, b"null", 4) else NULL
    return skip_number(at)


cdef inline const char *skip_key(const char *at, const char *end) noexcept nogil:
    """Skip an object's key, its colon and the space after it."""
    cdef bint escaped
    if at[0] != c'"':
        return NULL
    at = skip_string(at + 1, end, &escaped)
    if at is NULL:
        return NULL
    at = skip_space(at)
    return skip_space(at + 1) if at[0] == c":" else NULL


cdef inline const char *skip_value(const char *at, const char *end) noexcept nogil:
    """Skip any value, starting at its first byte."""
    cdef char closing[DEPTH_MAX_COUNT]  # the closing bracket of each level
    cdef char close
    cdef int depth = 0
    while True:
        if at[0] == c"{" or at[0] == c"[":
            if depth == DEPTH_MAX_COUNT:
                return NULL
            close = c"}" if at[0] == c"{" else c"]"
            closing[depth] = close
            depth += 1
            at = skip_space(at + 1)
            if at[0] != close:
                if close == c"}":
                    at = skip_key(at, end)
                    if at is NULL:
                        return NULL
                continue
            at += 1
            depth -= 1
        else:
            at = skip_scalar(at, end)
            if at is NULL:
                return NULL
        while depth:  # after a value
            close = closing[depth - 1]
            at = skip_space(at)
            if at[0] == c",":
                at = skip_space(at + 1)
                if close == c"}":
                    at = skip_key(at, end)
                    if at is NULL:
                        return NULL
                break
            if at[0] != close:
                return NULL
            at += 1
            depth -= 1
        if depth == 0:
            return at


cdef inline const char *next_member(const char *at, char closing) noexcept nogil:
    """After a member: the position of the next one or of the closing bracket."""
    at = skip_space(at)
    if at[0] == c",":
        at = skip_space(at + 1)
        if at[0] != closing:
            return at
    elif at[0] == closing:
        return at
    return NULL


# -- text ------------------------------------------------------------------------------------------

cdef struct Text:
    char *at
    Py_ssize_t size
    Py_ssize_t left  # number of code points that may still be added


cdef inline void put_utf8(Text *text, uint32_t code) noexcept nogil:
    cdef char *to = text.at + text.size
    if code < 0x80:
        to[0] = <char> code
        text.size += 1
    elif code < 0x800:
        to[0] = <char> (0xC0 | code >> 6)
        to[1] = <char> (0x80 | code & 0x3F)
        text.size += 2
    elif code < 0x10000:
        to[0] = <char> (0xE0 | code >> 12)
        to[1] = <char> (0x80 | code >> 6 & 0x3F)
        to[2] = <char> (0x80 | code & 0x3F)
        text.size += 3
    else:
        to[0] = <char> (0xF0 | code >> 18)
        to[1] = <char> (0x80 | code >> 12 & 0x3F)
        to[2] = <char> (0x80 | code >> 6 & 0x3F)
        to[3] = <char> (0x80 | code & 0x3F)
        text.size += 4


cdef inline void put_string(Text *text, const char *at, const char *end) noexcept nogil:
    """Decode a validated string from after its opening quote, up to ``text.left`` code points.

    The UTF-8 is never longer than its JSON form.
    """
    cdef const char *after
    cdef uint32_t code = 0
    while text.left and at[0] != c'"':
        if at[0] == c"\\":
            at = skip_escape(at, &code)
            put_utf8(text, code)
            text.left -= 1
            continue
        if <unsigned char> at[0] < 0x80:
            after = kb_skip_plain(at + 1, at + min(end - at, text.left))
            text.left -= after - at
        else:
            after = skip_utf8(at)
            text.left -= 1
        memcpy(text.at + text.size, at, after - at)
        text.size += after - at
        at = after


cdef struct Word:
    const char *at
    Py_ssize_t size
    char plain[4 * WORD_MAX_CHARS]


cdef inline const char *read_word(const char *at, const char *end, Word *word) noexcept nogil:
    """Read a string with escapes decoded. Only the start of a long one that has escapes."""
    cdef bint escaped = False
    cdef Text text
    if at[0] != c'"':
        return NULL
    word.at = at + 1
    at = skip_string(at + 1, end, &escaped)
    word.size = at - 1 - word.at
    if escaped and at is not NULL:
        text.at = word.plain
        text.size = 0
        text.left = WORD_MAX_CHARS
        put_string(&text, word.at, end)
        word.at = text.at
        word.size = text.size
    return at


cdef inline const char *read_key(const char *at, const char *end, Word *key) noexcept nogil:
    """Like ``skip_key``, and read the key."""
    at = read_word(at, end, key)
    if at is NULL:
        return NULL
    at = skip_space(at)
    return skip_space(at + 1) if at[0] == c":" else NULL


cdef inline bint is_word(const Word *word, const char *text, Py_ssize_t size) noexcept nogil:
    return word.size == size and memcmp(word.at, text, size) == 0


cdef inline bint put_content(Text *text, const char *at, const char *end) noexcept nogil:
    """Append the text of a message's content, False if it is invalid."""
    cdef const char *found
    cdef bint first = True
    cdef Word key
    if at[0] == c'"':
        put_string(text, at + 1, end)
        return True
    if at[0] != c"[":
        return True
    at = skip_space(at + 1)
    while at[0] != c"]":
        found = NULL
        if at[0] == c'"':
            found = at
            at = skip_value(at, end)
        elif at[0] == c"{":
            at = skip_space(at + 1)
            while at[0] != c"}":
                at = read_key(at, end, &key)
                if is_word(&key, b"text", 4):
                    found = at
                at = next_member(skip_value(at, end), c"}")
            at += 1
        else:
            return False
        if found is not NULL and found[0] == c'"':
            if not first and text.left:
                put_utf8(text, c"\n")
                text.left -= 1
            first = False
            put_string(text, found + 1, end)
        at = next_member(at, c"]")
    return True


cdef inline void put_bytes(Text *text, const char *at, const char *after) noexcept nogil:
    """Append bytes as code points (Latin-1)."""
    while at < after:
        put_utf8(text, <unsigned char> at[0])
        at += 1


cdef inline bint is_space(char c) noexcept nogil:
    return c == c" " or c == c"\n" or c == c"\r" or c == c"\t"


cdef inline void put_input(
    Text *text, const char *at, const char *after, const char *end
) noexcept nogil:
    """Append the first input of a list: a string, or token ids joined by commas."""
    cdef const char *next
    cdef const char *last
    while at < after and (at[0] == c"[" or is_space(at[0])):
        at += 1
    if at[0] == c'"':
        put_string(text, at + 1, end)
        return
    after = at + min(after - at, TOKEN_MAX_BYTES * (text.left + 3))
    while text.left:
        while at < after and is_space(at[0]):
            at += 1
        next = at
        while next < after and next[0] != c"," and next[0] != c"]":
            next += 1
        last = next
        while last > at and is_space((last - 1)[0]):
            last -= 1
        put_bytes(text, at, last)
        text.left -= 1
        if next == after or next[0] == c"]":
            return
        if text.left:
            put_utf8(text, c",")
        at = next + 1
