# cython: language_level=3, nonecheck=True
"""What a JSON request asks for, found in one pass over its body, without objects for the rest.

:func:`read` either understands a body wholly, and then as ``openai.parse`` and ``openai.hash_key``
do, or returns None and leaves the verdict to them: it refuses more than they do, and never takes
what they would not. Of a body that it takes it has seen every byte: strict JSON, valid UTF-8, no
lone surrogate, nesting of at most ``DEPTH_MAX_COUNT``, one ``model``.

It knows JSON, and from a :class:`Shape` which members place a request on the ring; it does no I/O.
Strings are looked at 64 bytes at a time (0.05 ns a byte for ASCII without escapes). All the code
here leans on the NUL that ends every bytes object: no byte after it is read.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.pyport cimport PY_SSIZE_T_MAX
from cpython.unicode cimport PyUnicode_DecodeUTF8
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memchr, memcmp, memcpy

from mmh3 import hash64

cdef enum:
    DEPTH_MAX_COUNT = 64  # bits of a stack
    KEYS_MAX_COUNT = 1000  # of the top level, as openai.TOP_LEVEL_KEYS_MAX_COUNT
    SURE_BYTES = 1 << 20  # as openai.HASH_SURE_BYTES: above it, members are counted
    MEMBERS_MAX_COUNT = 200_000  # as openai.HASH_MAX_COUNT
    FIRST_INPUT_WITHIN_BYTES = 24  # of a list: openai looks at no more than its beginning

cdef extern from *:
    """
    static const signed char kb_hex[256] = {  /* -1: not a hex digit */
        [0 ... 47] = -1, ['0'] = 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, [58 ... 64] = -1,
        ['A'] = 10, 11, 12, 13, 14, 15, [71 ... 96] = -1,
        ['a'] = 10, 11, 12, 13, 14, 15, [103 ... 255] = -1,
    };
    /* Whether 64 bytes of a string are all ASCII without quote, backslash or control character.
       As signed bytes, what is above ASCII is below the space too. Vectorised by the compiler. */
    static inline int kb_is_plain(const char *text) {
        const signed char *at = (const signed char *) text;
        unsigned char special = 0;
        for (int i = 0; i < 64; i++)
            special |= (at[i] < 0x20) | (at[i] == '"') | (at[i] == '\\\\');
        return !special;
    }
    /* Past code points of three bytes, as far as they need no closer look: Chinese, Japanese, Thai. */
    static inline const char *kb_skip_threes(const char *text) {
        const unsigned char *at = (const unsigned char *) text;
        while ((unsigned char) (at[0] - 0xE1) < 12 && (at[1] & 0xC0) == 0x80
               && (at[2] & 0xC0) == 0x80)
            at += 3;
        return (const char *) at;
    }
    /* As openai counts what may be members: braces and quotes, escaped quotes taken off. */
    static inline int kb_member(const char *at) {
        return (at[0] == '{') + (at[0] == '"') - ((at[0] == '\\\\') & (at[1] == '"'));
    }
    static long kb_members(const char *at, const char *end) {
        long count = 0;
        while (end - at >= 64) {
            signed char some = 0;  /* small, so that it is vectorised */
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
# Each function takes a place in the text and returns the place after what it read, NULL: refused.

cdef inline const char *skip_space(const char *at) noexcept nogil:
    while at[0] == c" " or at[0] == c"\n" or at[0] == c"\r" or at[0] == c"\t":
        at += 1
    return at


cdef inline int hex4(const char *text) noexcept nogil:
    """The value of four hex digits, or -1."""
    cdef const unsigned char *at = <const unsigned char *> text
    cdef int value = kb_hex[at[0]]
    # One that is no digit ends it there: what lies behind may be behind the end.
    if value >= 0:
        value = value << 4 | kb_hex[at[1]]
    if value >= 0:
        value = value << 4 | kb_hex[at[2]]
    if value >= 0:
        value = value << 4 | kb_hex[at[3]]
    return value


cdef inline const char *skip_escape(const char *at, uint32_t *code) noexcept nogil:
    """An escape, from its backslash; ``code``: what it stands for."""
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
    """One code point above ASCII (RFC 3629: shortest form, no surrogate, up to U+10FFFF)."""
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
    """A string, from behind its opening quote to behind its closing one."""
    cdef const char *block
    cdef uint32_t code = 0
    cdef char c
    while True:
        while end - at >= 64 and kb_is_plain(at):
            at += 64
        block = at + 64
        while at < block:  # the end, and whatever lies behind it, is met as a NUL
            c = at[0]
            if c == c'"':
                return at + 1
            if c == c"\\":
                escaped[0] = True
                # Nearly all there are.
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


cdef const char *skip_key(const char *at, const char *end, bint *escaped) noexcept nogil:
    """An object's key and its colon, and the space after that."""
    if at[0] != c'"':
        return NULL
    at = skip_string(at + 1, end, escaped)
    if at is NULL:
        return NULL
    at = skip_space(at)
    return skip_space(at + 1) if at[0] == c":" else NULL


cdef const char *skip_value(const char *at, const char *end) noexcept nogil:
    """Any value, from its first byte."""
    cdef uint64_t objects = 0  # a bit a level: 1 for an object
    cdef int depth = 0
    cdef bint escaped
    while True:
        if at[0] == c"{" or at[0] == c"[":
            if depth == DEPTH_MAX_COUNT:
                return NULL
            depth += 1
            objects = objects << 1 | (at[0] == c"{")
            at = skip_space(at + 1)
            if at[0] == (c"}" if objects & 1 else c"]"):
                at += 1
                depth -= 1
                objects >>= 1
            elif objects & 1:
                at = skip_key(at, end, &escaped)
                if at is NULL:
                    return NULL
                continue
            else:
                continue
        else:
            at = skip_scalar(at, end)
            if at is NULL:
                return NULL
        while depth:  # after a value
            at = skip_space(at)
            if at[0] == c",":
                at = skip_space(at + 1)
                if objects & 1:
                    at = skip_key(at, end, &escaped)
                    if at is NULL:
                        return NULL
                break
            if at[0] != (c"}" if objects & 1 else c"]"):
                return NULL
            at += 1
            depth -= 1
            objects >>= 1
        if depth == 0:
            return at


cdef const char *next_member(const char *at, char closing) noexcept nogil:
    """After a member: the next one's place, or, at the closing bracket, that."""
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
    Py_ssize_t left  # code points that may still be added


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
    """Decode a string that was read before, from behind its opening quote, as far as it may be.

    UTF-8 is never longer than what stands for it in JSON.
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


cdef bint put_content(Text *text, const char *at, const char *end) noexcept nogil:
    """The text of a message's content, as openai's _text; False: not to be sure of."""
    cdef const char *key
    cdef const char *found
    cdef bint escaped
    cdef bint first = True
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
                key = at + 1
                escaped = False
                at = skip_key(at, end, &escaped)
                if escaped:
                    return False
                if is_text(key, end, b'text"', 5):
                    if found is not NULL:
                        return False
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


# -- what is asked for -----------------------------------------------------------------------------

@cython.final
cdef class Shape:
    """Which top-level members place a request of one kind; one of the first two."""

    def __init__(self, bytes conversation=None, bytes text=None, bytes system=None):
        self.conversation = conversation
        self.text = text
        self.system = system


cdef inline bint is_key(const char *key, Py_ssize_t size, bytes name) noexcept:
    return (
        name is not None
        and PyBytes_GET_SIZE(name) == size
        and memcmp(key, PyBytes_AS_STRING(name), size) == 0
    )


cdef bint is_model(const char *key) noexcept:
    """Whether five bytes are "model", whatever their case: some readers do not mind it."""
    cdef const char *model = b"model"
    cdef int i
    for i in range(5):
        if (key[i] | 0x20) != model[i]:
            return False
    return True


cdef const char *NOTHING = b"null"


cdef uint64_t hash_of(const Text *text) except? 0:
    cdef int64_t signed = hash64(PyBytes_FromStringAndSize(text.at, text.size))[0]
    return <uint64_t> signed


cdef object make_key(Ask ask, Text *text, bytes name, Py_ssize_t limit):
    cdef uint64_t system_hash = 0
    cdef int i
    text.size = 0
    text.left = PY_SSIZE_T_MAX
    if ask.beside.at is not NULL and not put_content(text, ask.beside.at, ask.end):
        return None
    for i in range(ask.said_n):
        if i or ask.beside.at is not NULL:
            put_utf8(text, 0)
        if not put_content(text, ask.said[i].at, ask.end):
            return None
    if text.size:  # of nothing it is 0
        system_hash = hash_of(text)
    for i in range(8):  # little-endian
        text.at[i] = <char> (system_hash >> 8 * i & 0xFF)
    memcpy(text.at + 8, PyBytes_AS_STRING(name), PyBytes_GET_SIZE(name) + 1)
    text.size = 9 + PyBytes_GET_SIZE(name)
    text.left = limit
    if ask.first.at is not NULL and not put_content(text, ask.first.at, ask.end):
        return None
    return hash_of(text)


@cython.final
cdef class Ask:
    """What one request asks for; see ``openai.Ask``."""

    def __init__(self):
        raise TypeError("use read")

    cdef const char *_read_members(self, Shape shape, const char *at) noexcept:
        """The body's object; the place after it, NULL: refused."""
        cdef const char *key
        cdef const char *value
        cdef Py_ssize_t size
        cdef int keys = 0
        cdef bint escaped = False
        if at[0] != c"{":
            return NULL
        at = skip_space(at + 1)
        while at[0] != c"}":
            keys += 1
            key = at + 1
            value = skip_key(at, self.end, &escaped)
            if value is NULL or escaped or keys > KEYS_MAX_COUNT:
                return NULL
            size = <const char *> memchr(key, c'"', value - key) - key
            if is_key(key, size, shape.conversation):
                at = self._read_conversation(value)
            elif is_key(key, size, shape.text):
                at = self._read_text(value)
            elif is_key(key, size, shape.system):
                at = self._read_beside(value)
            else:
                at = skip_value(value, self.end)
                if size == 6 and memcmp(key, b"stream", 6) == 0:
                    if self.streamed:
                        return NULL
                    self.streamed = True
                    self.stream = value[0] == c"t"
                elif size == 5 and is_model(key):
                    if self.model_value.at is not NULL or memcmp(key, b"model", 5) != 0:
                        return NULL
                    self.model_value.at = value
                    self.model_value.after = at
            if at is NULL:
                return NULL
            at = next_member(at, c"}")
            if at is NULL:
                return NULL
        return at + 1

    cdef bint _take_model(self) except -1:
        """Make the names; False: the model's value is not to be taken as it stands."""
        cdef const char *at = self.model_value.at
        cdef Py_ssize_t size
        cdef const char *split
        if at is NULL or at[0] != c'"':
            return False
        at += 1
        size = self.model_value.after - 1 - at
        if size == 0 or memchr(at, c"\\", size) is not NULL:
            return False
        self.model = PyUnicode_DecodeUTF8(at, size, NULL)
        split = <const char *> memchr(at, c"_", size)
        if split is NULL:
            self.name = self.model
        else:
            self.name = PyUnicode_DecodeUTF8(at, split - at, NULL)
            self.adapter = PyUnicode_DecodeUTF8(split + 1, at + size - split - 1, NULL)
        return True

    # the places that hash_key reads; each function returns the place after the value, or NULL

    cdef void _check_crowd(self, const char *begin, const char *after) noexcept:
        if (
            after is not NULL
            and after - begin > SURE_BYTES
            and kb_members(begin, after) > MEMBERS_MAX_COUNT
        ):
            self.sure = False

    cdef const char *_read_conversation(self, const char *begin) noexcept:
        cdef const char *after
        if self.placed:
            return NULL
        self.placed = True
        after = self._read_messages(begin) if begin[0] == c"[" else NULL
        if after is NULL:
            self.sure = begin[0] != c"["
            after = skip_value(begin, self.end)
            self.first.at = begin
            self.first.after = after
        self._check_crowd(begin, after)
        return after

    cdef const char *_read_messages(self, const char *at) noexcept:
        """Find the system's texts and the user's first; NULL: not to be sure of, or not JSON."""
        cdef const char *role
        cdef Place content
        at = skip_space(at + 1)
        while at[0] != c"]":
            role = NULL
            content.at = content.after = NULL
            if at[0] != c"{":
                return NULL
            at = self._read_message(skip_space(at + 1), &role, &content)
            if at is NULL:
                return NULL
            if content.at is NULL:
                content.at = NOTHING
                content.after = NOTHING + 1
            if role is NULL:
                pass
            elif is_text(role, self.end, b'"user"', 6):
                if self.first.at is NULL:
                    self.first = content
            elif is_text(role, self.end, b'"system"', 8) or is_text(
                role, self.end, b'"developer"', 11
            ):
                if self.said_n == SYSTEM_MAX_COUNT:
                    return NULL
                self.said[self.said_n] = content
                self.said_n += 1
            at = next_member(at + 1, c"]")
            if at is NULL:
                return NULL
        return at + 1

    cdef const char *_read_message(
        self, const char *at, const char **role, Place *content
    ) noexcept:
        """One message's members, from behind its brace to its closing one."""
        cdef const char *key
        cdef const char *value
        cdef bint escaped = False
        while at[0] != c"}":
            key = at + 1
            value = skip_key(at, self.end, &escaped)
            if value is NULL or escaped:
                return NULL
            if is_text(key, self.end, b'role"', 5):
                if role[0] is not NULL or value[0] != c'"':
                    return NULL
                role[0] = value
                at = skip_string(value + 1, self.end, &escaped)
                if escaped:
                    return NULL
            else:
                at = skip_value(value, self.end)
                if is_text(key, self.end, b'content"', 8):
                    if content.at is not NULL:
                        return NULL
                    content.at = value
                    content.after = at
            if at is NULL:
                return NULL
            at = next_member(at, c"}")
            if at is NULL:
                return NULL
        return at

    cdef const char *_read_text(self, const char *begin) noexcept:
        cdef const char *after
        cdef const char *at = begin
        if self.placed:
            return NULL
        self.placed = True
        after = skip_value(begin, self.end)
        while after is not NULL and at[0] == c"[":
            at = skip_space(at + 1)
        if at > begin and (at[0] != c'"' or at - begin > FIRST_INPUT_WITHIN_BYTES):
            self.sure = False
        self.first.at = at
        self.first.after = after
        return after

    cdef const char *_read_beside(self, const char *begin) noexcept:
        if self.beside.at is not NULL:
            return NULL
        self.beside.at = begin
        self.beside.after = skip_value(begin, self.end)
        self._check_crowd(begin, self.beside.after)
        return self.beside.after

    cpdef key(self, Py_ssize_t prefix_char_length):
        """As ``openai.hash_key``; None when only that can tell."""
        cdef bytes name = b"" if self.adapter is None else self.adapter.encode()
        cdef Py_ssize_t name_size = PyBytes_GET_SIZE(name)
        cdef Py_ssize_t limit = max(prefix_char_length, 0)
        cdef Py_ssize_t room, system_room
        cdef char few[2048]
        cdef Text text
        cdef object result
        cdef int i
        if not self.sure:
            return None
        room = min(self.first.after - self.first.at, 4 * min(limit, 1 << 40)) + name_size + 16
        system_room = self.beside.after - self.beside.at + 1
        for i in range(self.said_n):
            system_room += self.said[i].after - self.said[i].at + 1
        room = max(room, system_room)
        text.at = few
        if room > <Py_ssize_t> sizeof(few):
            text.at = <char *> malloc(room)
            if text.at is NULL:
                raise MemoryError()
        result = make_key(self, &text, name, limit)
        if text.at is not few:
            free(text.at)
        return result

    def for_adapter(self):
        """The body with the adapter's name for its model; every other byte stays as it came."""
        cdef const char *begin = PyBytes_AS_STRING(self.body)
        cdef bytes name = self.adapter.encode()
        # It is a part of a string without escapes, and so needs none.
        return b'%b"%b"%b' % (
            memoryview(self.body)[:self.model_value.at - begin],
            name,
            memoryview(self.body)[self.model_value.after - begin:],
        )


cpdef Ask read(Shape shape, bytes body):
    """Read a body of this shape; None: let ``openai.parse`` judge."""
    cdef Ask ask = Ask.__new__(Ask)
    cdef const char *at = PyBytes_AS_STRING(body)
    ask.body = body
    ask.end = at + PyBytes_GET_SIZE(body)
    ask.sure = True
    at = ask._read_members(shape, skip_space(at))
    if at is NULL or skip_space(at) != ask.end or not ask._take_model():
        return None
    return ask
