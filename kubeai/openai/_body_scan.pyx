# cython: language_level=3, nonecheck=True
"""Extract routing data from a JSON request body in one pass, without creating other objects.

:func:`scan` and :func:`read` validate every byte of a body: strict JSON, valid UTF-8, no lone
surrogates, exactly one ``model``. Of its other members, only those that a :class:`Shape` lists are
interpreted, and only for the hash key; an unusual structure there makes the key less specific.
The tests compare them with an oracle in Python.

No I/O. Strings are scanned 64 bytes at a time (0.05 ns per byte for ASCII without escapes); the
worst case is 2 ns per byte. A body above ``LARGE_BYTES`` is read without the GIL, so in its own
thread it blocks nothing.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.pyport cimport PY_SSIZE_T_MAX
from cpython.unicode cimport PyUnicode_DecodeUTF8
from libc.stdint cimport uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memchr, memcmp, memcpy, memset

from kubeai.openai._json cimport (
    TOKEN_MAX_BYTES, Text, Word, is_word, kb_members, next_member, put_bytes, put_content,
    put_input, put_string, put_utf8, read_key, read_word, skip_space, skip_value,
)
from kubeai.openai._murmur3 cimport murmur3
from kubeai.openai._output cimport asked_tokens, note_asked

from msgspec.json import decode, encode
from kubeai.openai.errors import ErrorResponse

cdef enum:
    KEYS_MAX_COUNT = 1000  # at the top level
    NAME_MAX_BYTES = 4096  # of model and adapter in a large body; no Model's name is that long
    # Limit of a conversation's messages and parts, estimated by counting { and ". Counting costs
    # time, so values of up to SURE_BYTES are not counted.
    SURE_BYTES = 1 << 20
    MEMBERS_MAX_COUNT = 200_000
    # Hashed instead of a longer one: later turns of a conversation begin with the same bytes.
    CROWDED_BYTES = 4096
    LATEST_BYTES = 7  # of ":latest", the tag of Ollama's that a Model answers to

cdef dict FAULTS = {
    <int> MALFORMED: (
        "The body is not valid JSON, or is nested too deeply: the error is in the text that begins "
        "at byte {at}.", None,
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
    """The top-level members that a kind of request is routed by: at most one of the first two."""

    def __init__(
        self,
        kind,
        bytes conversation=None,
        bytes text=None,
        bytes system=None,
        bytes previous=None,
        bint uses_prefix_cache=True,
        bint has_prompt=True,
        bint streams_by_default=False,
        bint generates=False,
        bint has_usage_option=False,
    ):
        self.kind = kind
        self.conversation = conversation
        self.text = text
        self.system = system
        self.previous = previous
        self.names[0] = name_of(conversation)
        self.names[1] = name_of(text)
        self.names[2] = name_of(system)
        self.names[3] = name_of(previous)
        self.uses_prefix_cache = uses_prefix_cache and has_prompt
        self.has_prompt = has_prompt
        self.streams_by_default = streams_by_default
        self.generates = generates
        self.has_usage_option = has_usage_option
        self.is_ollama = kind.is_ollama


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


@cython.final
cdef class InferenceRequest:
    """The routing data of one request; see the stub."""

    def __init__(self):
        raise TypeError("use read or named")

    def __dealloc__(self):
        if self.systems is not self.systems_few:
            free(self.systems)

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
            # An error in the syntax is reported rather than one in ``model`` before it.
            if self.fault != MANY_KEYS and self.fault != NO_MEMORY:
                self.fault = MALFORMED
            return False
        if not self.fault:
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
                at = self._read_system(value)
            else:
                at = skip_value(value, self.end)
                if is_word(&key, b"stream", 6):
                    self.stream = value[0] == c"t" or (self.streams_by_default and value[0] != c"f")
                    self.stream_value = value
                elif key.size == 14 and is_word(&key, b"stream_options", 14):
                    self.stream_options.at = value
                    self.stream_options.after = at
                elif key.size == 5 and is_word(&key, b"tools", 5):
                    self.tools.at = value
                    self.tools.after = at
                elif key.size == 5 and is_model(key.at):
                    if self.model_value.at is NULL and memcmp(key.at, b"model", 5) == 0:
                        self.model_value.at = value
                        self.model_value.after = at
                    elif not self.fault:
                        self.fault = MODEL_CASE if self.model_value.at is NULL else MODEL_TWICE
                        memcpy(self.fault_key, key.at, 5)
                elif is_key(&key, &names[3]):
                    self.previous.at = value
                    self.previous.after = at
                elif self.generates and at is not NULL:
                    note_asked(&self.asked, &key, value, self.end)
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
        if self.model_value.after - at > NAME_MAX_BYTES and self._is_large():
            return MODEL_LONG
        return NO_FAULT

    cdef inline bint _is_large(self) noexcept nogil:
        return self.end - self.begin > LARGE_BYTES

    cdef int _take_model(self) except -1:
        """Set ``model``, ``name`` and ``adapter``."""
        cdef const char *at = self.model_value.at + 1
        cdef Py_ssize_t size = self.model_value.after - 1 - at
        cdef const char *split
        cdef char few[NAME_MAX_BYTES]
        cdef bytes many
        cdef Text text
        if memchr(at, c"\\", size) is not NULL:
            text.at = few
            if size > NAME_MAX_BYTES:
                many = PyBytes_FromStringAndSize(NULL, size)
                text.at = PyBytes_AS_STRING(many)
            text.size = 0
            text.left = size
            put_string(&text, at, self.end)
            at = text.at
            size = text.size
        if self.is_ollama and size > LATEST_BYTES:
            if memcmp(at + size - LATEST_BYTES, b":latest", LATEST_BYTES) == 0:
                size -= LATEST_BYTES
        self.model = PyUnicode_DecodeUTF8(at, size, NULL)
        split = <const char *> memchr(at, c"_", size)
        if split is NULL:
            self.name = self.model
        else:
            self.name = PyUnicode_DecodeUTF8(at, split - at, NULL)
            self.adapter = PyUnicode_DecodeUTF8(split + 1, at + size - split - 1, NULL)
            self.is_renamed = True
        self.target = self.model
        return 0

    cdef object _refusal(self):
        """The exception for the fault."""
        if self.fault == NO_MEMORY:
            return MemoryError()
        if not self._is_large():
            try:
                self.body.decode()
            except UnicodeDecodeError as error:
                return ErrorResponse(f"The body is not valid UTF-8 (byte {error.start}).")
        message, param = FAULTS[<int> self.fault]
        return ErrorResponse(
            message.format(
                at=self.fault_at - self.begin,
                key=self.fault_key[:5].decode() if self.fault == MODEL_CASE else None,
            ),
            param,
        )

    # The values that are hashed. Each function returns the position after the value, or NULL. If a
    # member occurs twice, the last one counts, as in most JSON readers.

    cdef const char *_read_conversation(self, const char *begin) noexcept nogil:
        cdef const char *after
        self.first.at = self.first.after = NULL
        self.systems_n = 0
        self.has_parts = False
        self.is_malformed = self.is_crowded = False
        if begin[0] == c"[":
            after = self._read_messages(begin)
        else:
            after = skip_value(begin, self.end)
            self.first.at = begin
            self.first.after = after
        self.conversation.at = begin
        self.conversation.after = after
        if after is not NULL and is_crowded(begin, after):
            self.is_crowded = True
            self.is_malformed = False
            self.first.at = begin
            self.first.after = begin + CROWDED_BYTES
            self.systems_n = 0
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
                elif role == SYSTEM and not self._add_system(&content):
                    return NULL
            else:
                self.is_malformed = True
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
                    self.is_malformed = True
                    at = skip_value(value, self.end)
            else:
                at = skip_value(value, self.end)
                if is_word(&key, b"content", 7):
                    content.at = value
                    content.after = at
                    if value[0] == c"[":
                        self.has_parts = True
                elif is_word(&key, b"output", 6) and value[0] != c'"':  # a tool's, may have images
                    self.has_parts = True
                elif is_word(&key, b"images", 6):  # Ollama's
                    self.has_parts = True
            if at is NULL:
                return NULL
            at = next_member(at, c"}")
            if at is NULL:
                return NULL
        return at + 1

    cdef bint _add_system(self, const Place *content) noexcept nogil:
        """Add a system text; False if out of memory."""
        cdef Place *grown
        if self.systems_n == self.systems_room:
            if self.systems_n > MEMBERS_MAX_COUNT:
                return True  # too many: the conversation is crowded, and ``systems`` is not used
            grown = <Place *> malloc(2 * self.systems_room * sizeof(Place))
            if grown is NULL:
                self.fault = NO_MEMORY
                return False
            memcpy(grown, self.systems, self.systems_n * sizeof(Place))
            if self.systems is not self.systems_few:
                free(self.systems)
            self.systems = grown
            self.systems_room = 2 * self.systems_room
        self.systems[self.systems_n] = content[0]
        self.systems_n = self.systems_n + 1
        return True

    cdef const char *_read_text(self, const char *begin) noexcept nogil:
        self.first.at = begin
        self.first.after = skip_value(begin, self.end)
        self.is_input = begin[0] == c"["
        self.conversation = self.first
        return self.first.after

    cdef const char *_read_system(self, const char *begin) noexcept nogil:
        cdef const char *after = skip_value(begin, self.end)
        self.system_field.after = after
        self.system_field.at = begin
        if after is NULL or is_crowded(begin, after):
            self.system_field.at = NULL
        return after

    # the hash key

    cdef Py_ssize_t _room(self, Py_ssize_t limit, Py_ssize_t name_size) noexcept nogil:
        """An upper bound in bytes for each of the hashed texts."""
        cdef Py_ssize_t systems = 1
        cdef Py_ssize_t prefix = self.first.after - self.first.at
        cdef int i
        if self.system_field.at is not NULL:
            systems = self.system_field.after - self.system_field.at
        for i in range(self.systems_n):
            systems += self.systems[i].after - self.systems[i].at + 1
        if self.is_crowded:
            prefix *= 2
        elif self.is_input:
            prefix = min(2 * prefix, 2 * TOKEN_MAX_BYTES * (limit + 3))
        else:
            prefix = min(prefix, 4 * limit)
        return max(systems, prefix + name_size + 16)

    cdef bint _put_system(self, Text *text) noexcept nogil:
        cdef int i
        text.size = 0
        text.left = PY_SSIZE_T_MAX
        if self.is_malformed:
            return False
        if self.system_field.at is not NULL:
            if not put_content(text, self.system_field.at, self.end):
                return False
        for i in range(self.systems_n):
            if i or self.system_field.at is not NULL:
                put_utf8(text, 0)
            if not put_content(text, self.systems[i].at, self.end):
                return False
        return True

    cdef bint _put_prefix(self, Text *text, Py_ssize_t limit) noexcept nogil:
        text.left = limit
        if self.first.at is NULL:
            return True
        if self.is_crowded:
            put_bytes(text, self.first.at, self.first.after)
        elif self.is_input:
            put_input(text, self.first.at, self.first.after, self.end)
        else:
            return put_content(text, self.first.at, self.end)
        return True

    cdef uint64_t _put_and_hash(
        self, Text *text, const char *name, Py_ssize_t name_size, Py_ssize_t limit
    ) noexcept nogil:
        cdef Py_ssize_t head_size = 8 + name_size + 1
        cdef uint64_t system_hash = 0
        cdef bint well = self._put_system(text)
        cdef int i
        if well and text.size:  # without system text the hash is 0
            system_hash = murmur3(text.at, text.size)
        for i in range(8):  # little-endian
            text.at[i] = <char> (system_hash >> 8 * i & 0xFF)
        memcpy(text.at + 8, name, name_size)
        text.at[head_size - 1] = 0
        text.size = head_size
        if well:
            well = self._put_prefix(text, limit)
        if not well:  # hash as if empty
            memset(text.at, 0, 8)
            text.size = head_size
        return murmur3(text.at, text.size)

    cdef uint64_t hash_key(self, Py_ssize_t prefix_char_length) except? 0:
        """See ``key`` in the stub."""
        cdef bytes name = b"" if self.adapter is None else self.adapter.encode()
        cdef const char *name_at = PyBytes_AS_STRING(name)
        cdef Py_ssize_t limit = min(max(prefix_char_length, 0), <Py_ssize_t> 1 << 40)
        cdef Py_ssize_t name_size = PyBytes_GET_SIZE(name)
        cdef Py_ssize_t room = self._room(limit, name_size)
        cdef char few[2048]
        cdef uint64_t hashed
        cdef Text text
        text.at = few
        if room <= <Py_ssize_t> sizeof(few):
            return self._put_and_hash(&text, name_at, name_size, limit)
        text.at = <char *> malloc(room)
        if text.at is NULL:
            raise MemoryError()
        if not self._is_large():
            hashed = self._put_and_hash(&text, name_at, name_size, limit)
            free(text.at)
            return hashed
        with nogil:  # freeing tens of MiB takes some milliseconds too
            hashed = self._put_and_hash(&text, name_at, name_size, limit)
            free(text.at)
        return hashed

    def key(self, Py_ssize_t prefix_char_length):
        """See the stub."""
        return self.hash_key(prefix_char_length)

    def serve_as(self, str name not None, str adapter=None):
        """See the stub."""
        self.name = name
        self.adapter = adapter
        self.target = name if adapter is None else f"{name}_{adapter}"
        self.is_renamed = adapter is not None or name != self.model

    @property
    def engines_name(self):
        """See the stub."""
        return self.name if self.adapter is None else self.adapter

    @property
    def model_json(self):
        """See the stub."""
        cdef const char *at = self.model_value.at
        return encode(self.model) if at is NULL else at[:self.model_value.after - at]

    @property
    def previous_response_id(self):
        """See the stub."""
        cdef const char *at = self.previous.at
        if at is NULL or at[0] != c'"':
            return None
        return decode(at[:self.previous.after - at]) or None

    @property
    def output_tokens(self):
        """See the stub."""
        return asked_tokens(&self.asked)

    def with_model(self, bytes value not None):
        """The body with the value of ``model`` replaced; all other bytes are unchanged."""
        cdef const char *begin = self.begin
        cdef Py_ssize_t size = PyBytes_GET_SIZE(value)
        cdef const char *new = PyBytes_AS_STRING(value)
        cdef const char *at = self.model_value.at
        cdef const char *after = self.model_value.after
        if at is NULL:
            raise ValueError("the request has no JSON body")
        cdef bytes out = PyBytes_FromStringAndSize(NULL, at - begin + size + (self.end - after))
        cdef char *to = PyBytes_AS_STRING(out)
        with nogil:  # no other reference exists yet
            memcpy(to, begin, at - begin)
            memcpy(to + (at - begin), new, size)
            memcpy(to + (at - begin) + size, after, self.end - after)
        return out


cdef InferenceRequest new_request(object kind, bytes body):
    cdef InferenceRequest request = InferenceRequest.__new__(InferenceRequest)
    request.kind = kind
    request.body = body
    request.begin = PyBytes_AS_STRING(body)
    request.end = request.begin + PyBytes_GET_SIZE(body)
    request.systems = request.systems_few
    request.systems_room = SYSTEMS_FEW_COUNT
    return request


cdef inline InferenceRequest request_of(Shape shape, bytes body):
    """A request with its shape's properties, before the body is scanned."""
    cdef InferenceRequest request = new_request(shape.kind, body)
    request.uses_prefix_cache = shape.uses_prefix_cache
    request.has_prompt = shape.has_prompt
    request.streams_by_default = request.stream = shape.streams_by_default
    request.generates = shape.generates
    request.is_ollama = shape.is_ollama
    request.has_usage_option = shape.has_usage_option
    return request


cdef InferenceRequest scan(Shape shape, bytes body):
    """Parse a body of this shape; None if it is rejected: ``read`` then reports why."""
    cdef InferenceRequest request = request_of(shape, body)
    if not request._read(shape.names, request.begin):
        return None
    request._take_model()
    return request


def read(Shape shape not None, bytes body not None):
    """Like ``scan``, but raises ErrorResponse if the body is rejected."""
    cdef InferenceRequest request = request_of(shape, body)
    cdef bint accepted
    if request._is_large():
        with nogil:
            accepted = request._read(shape.names, request.begin)
    else:
        accepted = request._read(shape.names, request.begin)
    if not accepted:
        raise request._refusal()
    request._take_model()
    return request


def named(kind, str model not None):
    """See the stub."""
    if not model:
        raise ErrorResponse(*FAULTS[<int> MODEL_MISSING])
    cdef InferenceRequest request = new_request(kind, b"")
    name, separator, adapter = model.partition("_")
    request.model = request.target = model
    request.name = name
    request.adapter = adapter if separator else None
    request.is_renamed = request.adapter is not None
    return request
