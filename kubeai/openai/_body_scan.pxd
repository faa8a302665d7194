"""Declarations of the body scanner for compiled modules; see ``_body_scan.pyx``."""

from libc.stdint cimport uint64_t

from kubeai.openai._json cimport Text
from kubeai.openai._output cimport Asked

cpdef enum:
    LARGE_BYTES = 1 << 20  # larger bodies are parsed in a thread; smaller ones take 2 ms at most

cdef enum:
    SYSTEMS_FEW_COUNT = 8


cdef enum Fault:  # why a body is rejected; FAULTS has the messages
    NO_FAULT
    MALFORMED
    NO_OBJECT
    MANY_KEYS
    MODEL_TWICE
    MODEL_CASE
    MODEL_MISSING
    MODEL_TYPE
    MODEL_LONG
    NO_MEMORY


cdef enum Role:
    ANY_ROLE
    USER
    SYSTEM


cdef struct Name:
    const char *at  # NULL: none
    Py_ssize_t size


cdef struct Place:
    const char *at  # the value's first byte
    const char *after  # its end


cdef class Shape:
    cdef readonly object kind
    cdef readonly bytes conversation  # holds a list of messages, or a string
    cdef readonly bytes text  # holds a string, or a list that begins with one
    cdef readonly bytes system  # holds system text outside the conversation
    cdef readonly bytes previous  # holds the ID of a stored response
    cdef Name names[4]  # of the above
    cdef bint uses_prefix_cache
    cdef bint has_prompt
    cdef bint streams_by_default
    cdef bint generates
    cdef bint is_ollama
    cdef bint has_usage_option


cdef class InferenceRequest:
    cdef readonly object kind
    cdef readonly str model  # as the client wrote it
    cdef readonly str name  # of the Model that serves it
    cdef readonly str adapter  # None: the model itself
    cdef readonly str target  # both: "<name>" or "<name>_<adapter>"
    cdef readonly bint is_renamed  # the engine knows the model by another name than the client
    cdef readonly bint stream
    cdef bytes body  # which the places point into
    cdef const char *begin
    cdef const char *end
    cdef Place model_value
    cdef Place conversation  # all of it, or the text
    cdef Place tools
    cdef Place previous  # the ID of the stored response that the request continues
    cdef const char *stream_value  # of "stream"; NULL: there is none
    cdef Place stream_options  # at: NULL if there are none
    cdef Place first  # the conversation's first user text, or the text
    cdef Place system_field  # the system text outside the conversation
    cdef Place *systems  # the system texts in the conversation
    cdef Place systems_few[SYSTEMS_FEW_COUNT]  # storage for ``systems`` while they are few
    cdef int systems_n
    cdef int systems_room
    cdef bint has_parts  # some message's content or output is not just text
    cdef bint uses_prefix_cache  # the engine keeps the keys and values of prompts of this kind
    cdef bint has_prompt  # the engine computes a prompt
    cdef bint streams_by_default  # unless the body says otherwise
    cdef bint generates  # the response is text that the engine generates
    cdef Asked asked  # how much of it at most
    cdef bint is_ollama  # ``model`` may have the tag "latest"
    cdef bint has_usage_option  # streams report their usage only if the client asks for it
    cdef bint is_input  # the first text is a list of strings or token ids
    cdef bint is_crowded  # too many messages: only their first bytes are hashed
    cdef bint is_malformed  # there are messages that an engine would reject
    cdef Fault fault
    cdef const char *fault_at
    cdef char fault_key[5]

    cdef bint _read(self, const Name *names, const char *at) noexcept nogil
    cdef const char *_read_members(self, const Name *names, const char *at) noexcept nogil
    cdef const char *_read_conversation(self, const char *begin) noexcept nogil
    cdef const char *_read_messages(self, const char *at) noexcept nogil
    cdef const char *_read_message(self, const char *at, Role *role, Place *content) noexcept nogil
    cdef bint _add_system(self, const Place *content) noexcept nogil
    cdef const char *_read_text(self, const char *begin) noexcept nogil
    cdef const char *_read_system(self, const char *begin) noexcept nogil
    cdef Fault _judge_model(self) noexcept nogil
    cdef bint _is_large(self) noexcept nogil
    cdef int _take_model(self) except -1
    cdef object _refusal(self)
    cdef Py_ssize_t _room(self, Py_ssize_t limit, Py_ssize_t name_size) noexcept nogil
    cdef bint _put_system(self, Text *text) noexcept nogil
    cdef bint _put_prefix(self, Text *text, Py_ssize_t limit) noexcept nogil
    cdef uint64_t _put_and_hash(
        self, Text *text, const char *name, Py_ssize_t name_size, Py_ssize_t limit
    ) noexcept nogil
    cdef uint64_t hash_key(self, Py_ssize_t prefix_char_length) except? 0


cdef InferenceRequest scan(Shape shape, bytes body)
