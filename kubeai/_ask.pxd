"""What a request asks for, as the compiled exchange sees it; ``_ask.pyx`` says what it promises."""

cdef enum:
    SYSTEM_MAX_COUNT = 8


cdef struct Place:
    const char *at  # the value's first byte
    const char *after


cdef class Shape:
    cdef readonly bytes conversation  # a list of messages, or a string
    cdef readonly bytes text  # a string, or a list that begins with one
    cdef readonly bytes system  # text beside the conversation


cdef class Ask:
    cdef readonly str model  # as the client wrote it
    cdef readonly str name  # the Model's
    cdef readonly str adapter  # None: the model itself
    cdef readonly bint stream
    cdef bytes body  # what the places point into
    cdef const char *end
    cdef Place first  # the conversation's first text by the user, or the text
    cdef Place beside  # the system's text beside the conversation
    cdef Place said[SYSTEM_MAX_COUNT]  # the system's texts in the conversation
    cdef int said_n
    cdef Place model_value
    cdef bint placed
    cdef bint streamed  # a member named so was there
    cdef bint sure  # that the places are those which openai.hash_key would find

    cdef const char *_read_members(self, Shape shape, const char *at) noexcept
    cdef const char *_read_conversation(self, const char *begin) noexcept
    cdef const char *_read_messages(self, const char *at) noexcept
    cdef const char *_read_message(self, const char *at, const char **role, Place *content) noexcept
    cdef const char *_read_text(self, const char *begin) noexcept
    cdef const char *_read_beside(self, const char *begin) noexcept
    cdef void _check_crowd(self, const char *begin, const char *after) noexcept
    cdef bint _take_model(self) except -1
    cpdef key(self, Py_ssize_t prefix_char_length)


cpdef Ask read(Shape shape, bytes body)
