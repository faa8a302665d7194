# cython: language_level=3, nonecheck=True
"""Extract routing data from a JSON request body in one pass, without creating other objects.

:func:`read` interprets a body as ``openai.parse`` and ``openai.hash_key`` do, or rejects it. It
rejects what they reject and, in addition, nesting beyond ``DEPTH_MAX_COUNT`` and model names beyond
``NAME_MAX_BYTES``. It validates every byte of the bodies that it accepts: strict JSON, valid UTF-8,
no lone surrogates, exactly one ``model``.

It knows JSON and, from a :class:`Shape`, which members a request is hashed by. It does no I/O.
Strings are scanned 64 bytes at a time (0.05 ns per byte for ASCII without escapes); the worst case
is 2 ns per byte. A body above ``LARGE_BYTES`` is read without the GIL, so in its own thread it
blocks nothing. All code here relies on the NUL that ends every bytes object, and reads no byte
after it.
"""

cimport cython
from cpython.buffer cimport PyBUF_READ
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.memoryview cimport PyMemoryView_FromMemory
from cpython.pyport cimport PY_SSIZE_T_MAX
from cpython.unicode cimport PyUnicode_DecodeUTF8
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memchr, memcmp, memcpy, memset

from mmh3 import mmh3_x64_128_digest

cdef enum:
    DEPTH_MAX_COUNT = 512
    KEYS_MAX_COUNT = 1000  # at the top level; same as openai.TOP_LEVEL_KEYS_MAX_COUNT
    NAME_MAX_BYTES = 4096  # of model and adapter together; no Model's name is that long
    SURE_BYTES = 1 << 20  # same as openai.HASH_SURE_BYTES: above it, members are counted
    MEMBERS_MAX_COUNT = 200_000  # same as openai.HASH_MAX_COUNT
    CROWDED_BYTES = 4096  # same as openai.CROWDED_BYTES
    TOKEN_MAX_BYTES = 24  # same as openai's
    WORD_MAX_CHARS = 16  # longer than any name that is looked for

cdef extern from *:
    """
    static const signed char kb_hex[256] = {  /* -1: not a hex digit */
        [0 ... 47] = -1, ['0'] = 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, [58 ... 64] = -1,
        ['A'] = 10, 11, 12, 13, 14, 15, [71 ... 96] = -1,
        ['a'] = 10, 11, 12, 13, 14, 15, [103 ... 255] = -1,
    };
    /* Whether 64 bytes of a string are all ASCII without quotes, backslashes or control characters.
       As signed bytes, non-ASCII bytes also compare below the space. The compiler vectorises it. */
    static inline int kb_is_plain(const char *text) {
        const signed char *at = (const signed char *) text;
        unsigned char special = 0;
        for (int i = 0; i < 64; i++)
            special |= (at[i] < 0x20) | (at[i] == '"') | (at[i] == '\\\\');
        return !special;
    }
    /* Skip three-byte code points that need no further checks: Chinese, Japanese, Thai. */
    static inline const char *kb_skip_threes(const char *text) {
        const unsigned char *at = (const unsigned char *) text;
        while ((unsigned char) (at[0] - 0xE1) < 12 && (at[1] & 0xC0) == 0x80
               && (at[2] & 0xC0) == 0x80)
            at += 3;
        return (const char *) at;
    }
    /* Counts possible members as openai does: braces and quotes, less escaped quotes. */
    static inline int kb_member(const char *at) {
        return (at[0] == '{') + (at[0] == '"') - ((at[0] == '\\\\') & (at[1] == '"'));
    }
    static long kb_members(const char *at, const char *end) {
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
    bint kb_is_plain(const char *text) noexcept nogil
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


cdef const char *skip_string(const char *at, const char *end, bint *escaped) noexcept nogil:
    """Skip a string, from after its opening quote to after its closing one."""
    cdef const char *block
    cdef uint32_t code = 0
    cdef char c
    while True:
        while end - at >= 64 and kb_is_plain(at):
            at += 64
        block = at + 64
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


cdef const char *skip_digits(const char *at) noexcept nogil:
    if not c"0" <= at[0] <= c"9":
        return NULL
    while c"0" <= at[0] <= c"9":
        at += 1
    return at


cdef const char *skip_number(const char *at) noexcept nogil:
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


cdef const char *skip_scalar(const char *at, const char *end) noexcept nogil:
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


cdef const char *skip_value(const char *at, const char *end) noexcept nogil:
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


cdef const char *next_member(const char *at, char closing) noexcept nogil:
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


cdef void put_string(Text *text, const char *at, const char *end) noexcept nogil:
    """Decode a validated string from after its opening quote, up to ``text.left`` code points.

    The UTF-8 is never longer than its JSON form.
    """
    cdef const char *after
    cdef uint32_t code = 0
    while text.left >= 64 and end - at >= 64 and kb_is_plain(at):
        memcpy(text.at + text.size, at, 64)
        text.size += 64
        text.left -= 64
        at += 64
    while text.left and at[0] != c'"':
        if at[0] == c"\\":
            at = skip_escape(at, &code)
            put_utf8(text, code)
        else:
            after = at + 1 if <unsigned char> at[0] < 0x80 else skip_utf8(at)
            while at < after:
                text.at[text.size] = at[0]
                text.size += 1
                at += 1
        text.left -= 1


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


cdef bint put_content(Text *text, const char *at, const char *end) noexcept nogil:
    """Append the text of a message's content, like openai's _text; False if it is invalid."""
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


cdef void put_bytes(Text *text, const char *at, const char *after) noexcept nogil:
    """Append bytes as code points (Latin-1)."""
    while at < after:
        put_utf8(text, <unsigned char> at[0])
        at += 1


cdef inline bint is_space(char c) noexcept nogil:
    return c == c" " or c == c"\n" or c == c"\r" or c == c"\t"


cdef void put_input(Text *text, const char *at, const char *after, const char *end) noexcept nogil:
    """Append the first input of a list, like openai's _first_input."""
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


# -- requests --------------------------------------------------------------------------------------

class Refused(Exception):
    """A body was rejected. Arguments: a message, and the parameter at fault or None."""


cdef dict FAULTS = {
    <int> MALFORMED: (
        "The body is not valid UTF-8 JSON, or is nested too deeply: "
        "the error is in the text that begins at byte {at}.",
        None,
    ),
    <int> NO_OBJECT: ("The body is not a JSON object.", None),
    <int> MANY_KEYS: (f"The body has more than {KEYS_MAX_COUNT} keys.", None),
    <int> MODEL_TWICE: ("The body has several keys that may be read as 'model'.", "model"),
    <int> MODEL_CASE: ("Unknown parameter {key!r}: did you mean 'model'?", "model"),
    <int> MODEL_MISSING: ("You must provide a model parameter.", "model"),
    <int> MODEL_TYPE: ("'model' must be a string.", "model"),
    <int> MODEL_LONG: (f"'model' is longer than {NAME_MAX_BYTES} bytes.", "model"),
}


@cython.final
cdef class Shape:
    """The top-level members that a kind of request is hashed by: one of the first two is set."""

    def __init__(self, bytes conversation=None, bytes text=None, bytes system=None):
        self.conversation = conversation
        self.text = text
        self.system = system
        self.names[0] = name_of(conversation)
        self.names[1] = name_of(text)
        self.names[2] = name_of(system)


cdef Name name_of(bytes text) noexcept:
    """A view of a member's name; NULL if there is none."""
    cdef Name name
    name.at = NULL if text is None else PyBytes_AS_STRING(text)
    name.size = 0 if text is None else PyBytes_GET_SIZE(text)
    return name


cdef inline bint is_key(const Word *key, const Name *name) noexcept nogil:
    return name.at is not NULL and is_word(key, name.at, name.size)


cdef bint is_model(const char *key) noexcept nogil:
    """Whether five bytes are "model", ignoring case, as some JSON readers do."""
    cdef const char *model = b"model"
    cdef int i
    for i in range(5):
        if (key[i] | 0x20) != model[i]:
            return False
    return True


cdef Role role_of(const Word *word) noexcept nogil:
    if is_word(word, b"user", 4):
        return USER
    if is_word(word, b"system", 6) or is_word(word, b"developer", 9):
        return SYSTEM
    return ANY_ROLE


cdef bint is_crowded(const char *begin, const char *after) noexcept nogil:
    return after - begin > SURE_BYTES and kb_members(begin, after) > MEMBERS_MAX_COUNT


cdef const char *NOTHING = b"null"


cdef uint64_t hash_of(const Text *text) except? 0:
    cdef bytes digest
    cdef uint64_t hashed
    if text.size > LARGE_BYTES:  # without a copy
        digest = mmh3_x64_128_digest(PyMemoryView_FromMemory(text.at, text.size, PyBUF_READ))
    else:
        digest = mmh3_x64_128_digest(PyBytes_FromStringAndSize(text.at, text.size))
    memcpy(&hashed, PyBytes_AS_STRING(digest), sizeof(hashed))
    return hashed


@cython.final
cdef class Ask:
    """The routing data of one request; see ``openai.Ask``."""

    def __init__(self):
        raise TypeError("use read")

    def __dealloc__(self):
        if self.said is not self.said_few:
            free(self.said)

    cdef bint _read(self, const Name *names, const char *at) noexcept nogil:
        """Parse the body; False if it is rejected."""
        at = skip_space(at)
        self.fault_at = at
        if at[0] != c"{":
            self.fault = NO_OBJECT
            return False
        at = self._read_members(names, at)
        if at is not NULL:
            at = skip_space(at)
            self.fault_at = at
        if at != self.end:
            if not self.fault:
                self.fault = MALFORMED
            return False
        self.fault = self._judge_model()
        return not self.fault

    cdef const char *_read_members(self, const Name *names, const char *at) noexcept nogil:
        """Parse the top-level object; the position after it, or NULL if it is rejected."""
        cdef const char *value
        cdef int keys = 0
        cdef Word key
        at = skip_space(at + 1)
        while at[0] != c"}":
            self.fault_at = at
            value = read_key(at, self.end, &key)
            if value is NULL:
                return NULL
            keys += 1
            if keys > KEYS_MAX_COUNT:
                self.fault = MANY_KEYS
                return NULL
            if is_key(&key, &names[0]):
                at = self._read_conversation(value)
            elif is_key(&key, &names[1]):
                at = self._read_text(value)
            elif is_key(&key, &names[2]):
                at = self._read_beside(value)
            else:
                at = skip_value(value, self.end)
                if is_word(&key, b"stream", 6):
                    self.stream = value[0] == c"t"
                elif key.size == 5 and is_model(key.at):
                    if self.model_value.at is not NULL or memcmp(key.at, b"model", 5) != 0:
                        self.fault = MODEL_TWICE if self.model_value.at is not NULL else MODEL_CASE
                        memcpy(self.fault_key, key.at, 5)
                        return NULL
                    self.model_value.at = value
                    self.model_value.after = at
            if at is NULL:
                return NULL
            at = next_member(at, c"}")
            if at is NULL:
                return NULL
        return at + 1

    cdef Fault _judge_model(self) noexcept nogil:
        cdef const char *at = self.model_value.at
        if at is NULL:
            return MODEL_MISSING
        if at[0] != c'"':
            return MODEL_TYPE
        if self.model_value.after - at == 2:
            return MODEL_MISSING
        return MODEL_LONG if self.model_value.after - at > NAME_MAX_BYTES else NO_FAULT

    cdef int _take_model(self) except -1:
        """Set ``model``, ``name`` and ``adapter``."""
        cdef const char *at = self.model_value.at + 1
        cdef Py_ssize_t size = self.model_value.after - 1 - at
        cdef const char *split
        cdef char plain[NAME_MAX_BYTES]
        cdef Text text
        if memchr(at, c"\\", size) is not NULL:
            text.at = plain
            text.size = 0
            text.left = NAME_MAX_BYTES
            put_string(&text, at, self.end)
            at = plain
            size = text.size
        self.model = PyUnicode_DecodeUTF8(at, size, NULL)
        split = <const char *> memchr(at, c"_", size)
        if split is NULL:
            self.name = self.model
        else:
            self.name = PyUnicode_DecodeUTF8(at, split - at, NULL)
            self.adapter = PyUnicode_DecodeUTF8(split + 1, at + size - split - 1, NULL)
        return 0

    cdef object _refusal(self):
        """The exception for the fault."""
        if self.fault == NO_MEMORY:
            return MemoryError()
        message, param = FAULTS[<int> self.fault]
        return Refused(
            message.format(
                at=self.fault_at - PyBytes_AS_STRING(self.body),
                key=self.fault_key[:5].decode() if self.fault == MODEL_CASE else None,
            ),
            param,
        )

    # The values that are hashed. Each function returns the position after the value, or NULL. If a
    # member occurs twice, the last one counts, as in most JSON readers.

    cdef const char *_read_conversation(self, const char *begin) noexcept nogil:
        cdef const char *after
        self.first.at = self.first.after = NULL
        self.said_n = 0
        self.odd = self.crowded = False
        if begin[0] == c"[":
            after = self._read_messages(begin)
        else:
            after = skip_value(begin, self.end)
            self.first.at = begin
            self.first.after = after
        if after is not NULL and is_crowded(begin, after):
            self.crowded = True
            self.odd = False
            self.first.at = begin
            self.first.after = begin + CROWDED_BYTES
            self.said_n = 0
        return after

    cdef const char *_read_messages(self, const char *at) noexcept nogil:
        """Find the system texts and the first user text."""
        cdef Role role
        cdef Place content
        at = skip_space(at + 1)
        while at[0] != c"]":
            if at[0] == c"{":
                role = ANY_ROLE
                content.at = NOTHING
                content.after = NOTHING + 1
                at = self._read_message(skip_space(at + 1), &role, &content)
                if role == USER and self.first.at is NULL:
                    self.first = content
                elif role == SYSTEM and not self._add_said(&content):
                    return NULL
            else:
                self.odd = True
                at = skip_value(at, self.end)
            if at is NULL:
                return NULL
            at = next_member(at, c"]")
            if at is NULL:
                return NULL
        return at + 1

    cdef const char *_read_message(
        self, const char *at, Role *role, Place *content
    ) noexcept nogil:
        """Parse one message's members, starting after its opening brace."""
        cdef const char *value
        cdef Word key, word
        while at[0] != c"}":
            value = read_key(at, self.end, &key)
            if value is NULL:
                return NULL
            if is_word(&key, b"role", 4):
                if value[0] == c'"':
                    at = read_word(value, self.end, &word)
                    if at is not NULL:
                        role[0] = role_of(&word)
                else:
                    self.odd = True
                    at = skip_value(value, self.end)
            else:
                at = skip_value(value, self.end)
                if is_word(&key, b"content", 7):
                    content.at = value
                    content.after = at
            if at is NULL:
                return NULL
            at = next_member(at, c"}")
            if at is NULL:
                return NULL
        return at + 1

    cdef bint _add_said(self, const Place *content) noexcept nogil:
        """Add a system text; False if out of memory."""
        cdef Place *grown
        if self.said_n == self.said_room:
            if self.said_n > MEMBERS_MAX_COUNT:
                return True  # too many: the conversation is crowded, and ``said`` is not used
            grown = <Place *> malloc(2 * self.said_room * sizeof(Place))
            if grown is NULL:
                self.fault = NO_MEMORY
                return False
            memcpy(grown, self.said, self.said_n * sizeof(Place))
            if self.said is not self.said_few:
                free(self.said)
            self.said = grown
            self.said_room = 2 * self.said_room
        self.said[self.said_n] = content[0]
        self.said_n = self.said_n + 1
        return True

    cdef const char *_read_text(self, const char *begin) noexcept nogil:
        self.first.at = begin
        self.first.after = skip_value(begin, self.end)
        self.is_input = begin[0] == c"["
        return self.first.after

    cdef const char *_read_beside(self, const char *begin) noexcept nogil:
        cdef const char *after = skip_value(begin, self.end)
        self.beside.after = after
        self.beside.at = begin
        if after is NULL or is_crowded(begin, after):
            self.beside.at = NULL
        return after

    # the hash key

    cdef Py_ssize_t _room(self, Py_ssize_t limit, Py_ssize_t name_size) noexcept nogil:
        """An upper bound in bytes for each of the hashed texts."""
        cdef Py_ssize_t said = 1 if self.beside.at is NULL else self.beside.after - self.beside.at
        cdef Py_ssize_t prefix = self.first.after - self.first.at
        cdef int i
        for i in range(self.said_n):
            said += self.said[i].after - self.said[i].at + 1
        if self.crowded:
            prefix *= 2
        elif self.is_input:
            prefix = min(2 * prefix, 2 * TOKEN_MAX_BYTES * (limit + 3))
        else:
            prefix = min(prefix, 4 * limit)
        return max(said, prefix + name_size + 16)

    cdef bint _put_system(self, Text *text) noexcept nogil:
        cdef int i
        text.size = 0
        text.left = PY_SSIZE_T_MAX
        if self.odd:
            return False
        if self.beside.at is not NULL and not put_content(text, self.beside.at, self.end):
            return False
        for i in range(self.said_n):
            if i or self.beside.at is not NULL:
                put_utf8(text, 0)
            if not put_content(text, self.said[i].at, self.end):
                return False
        return True

    cdef bint _put_prefix(self, Text *text, Py_ssize_t limit) noexcept nogil:
        text.left = limit
        if self.first.at is NULL:
            return True
        if self.crowded:
            put_bytes(text, self.first.at, self.first.after)
        elif self.is_input:
            put_input(text, self.first.at, self.first.after, self.end)
        else:
            return put_content(text, self.first.at, self.end)
        return True

    cdef uint64_t _key(self, Text *text, bytes name, Py_ssize_t limit) except? 0:
        cdef bint large = self.end - PyBytes_AS_STRING(self.body) > LARGE_BYTES
        cdef Py_ssize_t head_size = 9 + PyBytes_GET_SIZE(name)
        cdef uint64_t system_hash = 0
        cdef bint well
        cdef int i
        if large:
            with nogil:
                well = self._put_system(text)
        else:
            well = self._put_system(text)
        if well and text.size:  # without system text the hash is 0
            system_hash = hash_of(text)
        for i in range(8):  # little-endian
            text.at[i] = <char> (system_hash >> 8 * i & 0xFF)
        memcpy(text.at + 8, PyBytes_AS_STRING(name), PyBytes_GET_SIZE(name) + 1)
        text.size = head_size
        if well:
            if large:
                with nogil:
                    well = self._put_prefix(text, limit)
            else:
                well = self._put_prefix(text, limit)
        if not well:  # hash as if empty
            memset(text.at, 0, 8)
            text.size = head_size
        return hash_of(text)

    cpdef key(self, Py_ssize_t prefix_char_length):
        """The same key as ``openai.hash_key``."""
        cdef bytes name = b"" if self.adapter is None else self.adapter.encode()
        cdef Py_ssize_t limit = min(max(prefix_char_length, 0), <Py_ssize_t> 1 << 40)
        cdef Py_ssize_t room = self._room(limit, PyBytes_GET_SIZE(name))
        cdef char few[2048]
        cdef Text text
        text.at = few
        if room > <Py_ssize_t> sizeof(few):
            text.at = <char *> malloc(room)
            if text.at is NULL:
                raise MemoryError()
        try:
            return self._key(&text, name, limit)
        finally:
            if text.at is not few:
                with nogil:  # freeing tens of MiB takes some milliseconds
                    free(text.at)

    def with_model(self, bytes value not None):
        """The body with the value of ``model`` replaced; all other bytes are unchanged."""
        cdef const char *begin = PyBytes_AS_STRING(self.body)
        cdef Py_ssize_t size = PyBytes_GET_SIZE(value)
        cdef const char *new = PyBytes_AS_STRING(value)
        cdef const char *at = self.model_value.at
        cdef const char *after = self.model_value.after
        cdef bytes out = PyBytes_FromStringAndSize(NULL, at - begin + size + (self.end - after))
        cdef char *to = PyBytes_AS_STRING(out)
        with nogil:  # no other reference exists yet
            memcpy(to, begin, at - begin)
            memcpy(to + (at - begin), new, size)
            memcpy(to + (at - begin) + size, after, self.end - after)
        return out


cdef Ask new_ask(bytes body):
    cdef Ask ask = Ask.__new__(Ask)
    ask.body = body
    ask.end = PyBytes_AS_STRING(body) + PyBytes_GET_SIZE(body)
    ask.said = ask.said_few
    ask.said_room = SAID_FEW_COUNT
    return ask


cpdef Ask read(Shape shape, bytes body):
    """Parse a body of this shape; None if it is rejected: ``openai.parse`` then finds out why."""
    cdef Ask ask = new_ask(body)
    if not ask._read(shape.names, PyBytes_AS_STRING(body)):
        return None
    ask._take_model()
    return ask


def judge(Shape shape not None, bytes body not None):
    """Like ``read``, without the GIL. Raises Refused with the reason."""
    cdef Ask ask = new_ask(body)
    cdef const char *at = PyBytes_AS_STRING(body)
    cdef bint taken
    with nogil:
        taken = ask._read(shape.names, at)
    if not taken:
        raise ask._refusal()
    ask._take_model()
    return ask
