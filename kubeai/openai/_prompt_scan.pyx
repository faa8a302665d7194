"""What a pick needs to know of a request's prompt: its length, and hashes of its beginnings.

The engine sees a text that it makes of the tools, the system text and the messages. Here they are
hashed as they stand in the body, in this order: clients send the earlier turns of a conversation
again byte for byte. A body that says the same in other bytes (another order of members, other
escapes) has other hashes, and is routed as if its prompt were new.

The first samples end with the tools and with the system text outside the conversation; those that
follow lie in the conversation, as ``_prompt`` says. Each hash covers all before it, beginning with
the model's name and that of its adapter, because adapters share no cached blocks.

Tokens are estimated from bytes, with the picker's ``tokens_per_byte``. An image or another file in
a message counts as ``FILE_TOKENS``, whatever its size.
"""

from cpython.bytes cimport PyBytes_GET_SIZE
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memcpy

from kubeai._pick cimport LEAST_LOAD, PREFIX_HASH, Picker
from kubeai._prefix cimport SAMPLES_MAX, PrefixIndex, prefetch_bucket
from kubeai._prompt cimport Prompt, next_end, new_prompt
from kubeai.openai._body_scan cimport InferenceRequest, Place
from kubeai.openai._json cimport Word, is_word, read_key, skip_space, skip_string, skip_value

cdef extern from "Python.h":
    const char *PyUnicode_AsUTF8AndSize(object text, Py_ssize_t *size) except NULL

cdef extern from *:
    """
    #include <stdint.h>
    #include <string.h>
    /* Folds the 128-bit product of two words. */
    static inline uint64_t kb_fold(uint64_t one, uint64_t other) {
        __uint128_t product = (__uint128_t) one * other;
        return (uint64_t) product ^ (uint64_t) (product >> 64);
    }
    static inline uint64_t kb_word(const char *at) {
        uint64_t word;
        memcpy(&word, at, sizeof word);
        return word;
    }
    /* Hashes a text after what ``hash`` covers, 64 bytes at a time in four chains that the CPU
       computes side by side. Not cryptographic: see docs/explain/routing.md for what a collision
       does. */
    static inline uint64_t kb_hash(uint64_t hash, const char *at, size_t size) {
        const uint64_t k0 = 0x9E3779B97F4A7C15u, k1 = 0xBF58476D1CE4E5B9u;
        const uint64_t k2 = 0x94D049BB133111EBu, k3 = 0xD6E8FEB86659FD93u;
        uint64_t a = hash ^ k0, b = hash ^ k1, c = hash ^ k2, d = hash ^ k3;
        char rest[64] = {0};
        uint64_t left = size;
        for (; left >= 64; left -= 64, at += 64) {
            a = kb_fold(kb_word(at) ^ k0, kb_word(at + 8) ^ a);
            b = kb_fold(kb_word(at + 16) ^ k1, kb_word(at + 24) ^ b);
            c = kb_fold(kb_word(at + 32) ^ k2, kb_word(at + 40) ^ c);
            d = kb_fold(kb_word(at + 48) ^ k3, kb_word(at + 56) ^ d);
        }
        if (left) {
            memcpy(rest, at, left);
            a = kb_fold(kb_word(rest) ^ k0, kb_word(rest + 8) ^ a);
            b = kb_fold(kb_word(rest + 16) ^ k1, kb_word(rest + 24) ^ b);
            c = kb_fold(kb_word(rest + 32) ^ k2, kb_word(rest + 40) ^ c);
            d = kb_fold(kb_word(rest + 48) ^ k3, kb_word(rest + 56) ^ d);
        }
        return kb_fold(kb_fold(a ^ k2, b ^ k3), kb_fold(c ^ k0, d ^ k1) ^ size);
    }
    """
    uint64_t hash_text "kb_hash"(uint64_t before, const char *at, size_t size) nogil

cdef enum:
    FILE_TOKENS = 1000
    FILE_MIN_BYTES = 1024  # a shorter one is counted as text
    FILES_MAX = 16  # further ones are counted as text
    TOKENS_MAX = 1 << 24


cdef struct Files:  # of a conversation, in order
    Place places[FILES_MAX]
    int n


cdef bint is_file(const Word *key) noexcept nogil:
    """Whether a member of a message has an image, a recording or a document as its value."""
    return (
        is_word(key, b"image_url", 9)
        or is_word(key, b"source", 6)
        or is_word(key, b"input_audio", 11)
        or is_word(key, b"file", 4)
        or is_word(key, b"file_data", 9)
        or is_word(key, b"audio_url", 9)
        or is_word(key, b"video_url", 9)
        or is_word(key, b"images", 6)  # Ollama's
    )


cdef void find_files(
    Files *files, const char *at, const char *after, const char *end
) noexcept nogil:
    """Find the files in a value that has been validated."""
    cdef const char *next
    cdef bint escaped
    cdef Word key
    while at < after and files.n < FILES_MAX:
        if at[0] != c'"':
            at += 1
            continue
        escaped = False
        next = skip_string(at + 1, end, &escaped)
        if skip_space(next)[0] == c":":
            next = read_key(at, end, &key)
            if is_file(&key):
                at = next
                next = skip_value(at, end)
                if next - at >= FILE_MIN_BYTES:
                    files.places[files.n].at = at
                    files.places[files.n].after = next
                    files.n += 1
        at = next


cdef inline int64_t size_of(const Place *place) noexcept nogil:
    return 0 if place.at is NULL else place.after - place.at


cdef struct Length:  # of a beginning of a conversation, as files are passed
    double tokens_per_byte
    int64_t file_bytes
    int files_n


cdef inline uint32_t text_tokens(double tokens_per_byte, int64_t text_bytes) noexcept:
    return <uint32_t> min(<int64_t> (tokens_per_byte * <double> text_bytes), <int64_t> TOKENS_MAX)


cdef uint32_t tokens_of(
    Length *length, const Files *files, const char *begin, int64_t size
) noexcept:
    """The tokens in the first ``size`` bytes. Sizes must not fall from call to call."""
    while length.files_n < files.n and files.places[length.files_n].after <= begin + size:
        length.file_bytes += size_of(&files.places[length.files_n])
        length.files_n += 1
    cdef int64_t text_bytes = size - length.file_bytes
    if length.files_n < files.n and files.places[length.files_n].at < begin + size:
        text_bytes -= begin + size - files.places[length.files_n].at
    return text_tokens(length.tokens_per_byte, text_bytes) + <uint32_t> length.files_n * FILE_TOKENS


cdef Prompt prompt_for(Picker picker, InferenceRequest request, bint complete):
    """See the stub of ``prompt_of``."""
    cdef Place *conversation = &request.conversation
    cdef int64_t size = size_of(conversation)
    cdef int64_t head_bytes = size_of(&request.tools) + size_of(&request.system_field)
    cdef Files files
    cdef Length length
    cdef Prompt prompt
    if not request.has_prompt:
        return new_prompt(request.stream)
    files.n = length.files_n = 0
    length.file_bytes = 0
    length.tokens_per_byte = picker.tokens_per_byte
    if request.has_parts:
        if request._is_large():
            with nogil:
                find_files(&files, conversation.at, conversation.after, request.end)
        else:
            find_files(&files, conversation.at, conversation.after, request.end)
    prompt = new_prompt(request.stream)
    if not request.uses_prefix_cache:  # embeddings, reranking: all of the body is computed
        size = request.end - request.begin
        conversation = NULL
    if complete or picker.strategy != LEAST_LOAD:
        # Without the text, all requests would have the same key and go to the same endpoint.
        if (complete or picker.strategy == PREFIX_HASH) and (
            request.uses_prefix_cache or request.first.at is not NULL
        ):
            prompt.key = request.hash_key(picker.prefix_char_length)
            prompt.has_key = True
        if request.uses_prefix_cache:
            _add_blocks(prompt, request, picker.index, &files, &length)
    if conversation is NULL:
        prompt.tokens = text_tokens(picker.tokens_per_byte, size)
    else:
        prompt.tokens = text_tokens(picker.tokens_per_byte, head_bytes)
        prompt.tokens += tokens_of(&length, &files, conversation.at, size)
    if not files.n:
        prompt.text_bytes = head_bytes + size
    return prompt


cdef int _add_blocks(
    Prompt prompt, InferenceRequest request, PrefixIndex index, Files *files, Length *length
) except -1:
    cdef const char *at = request.conversation.at
    cdef int64_t size = size_of(&request.conversation)
    cdef int64_t end = 0, next
    cdef Py_ssize_t name_size
    cdef const char *name = PyUnicode_AsUTF8AndSize(request.target, &name_size)
    cdef uint64_t hashed = hash_text(0, name, name_size)
    cdef uint64_t blocks[SAMPLES_MAX]
    cdef uint32_t depths[SAMPLES_MAX]
    cdef uint32_t head_tokens = 0
    cdef Place *heads[2]
    cdef int n = 0, head, block
    heads[0] = &request.tools
    heads[1] = &request.system_field
    for head in range(2):
        if heads[head].at is not NULL:
            hashed = hash_text(hashed, heads[head].at, size_of(heads[head]))
            head_tokens += text_tokens(length.tokens_per_byte, size_of(heads[head]))
            blocks[n] = hashed
            depths[n] = head_tokens
            n += 1
    next = next_end(end)
    while n < SAMPLES_MAX and next <= size:
        hashed = hash_text(hashed, at + end, next - end)
        end = next
        blocks[n] = hashed
        depths[n] = head_tokens + tokens_of(length, files, at, end)
        n += 1
        next = next_end(end)
    if index is not None:
        for block in range(n):
            prefetch_bucket(index, blocks[block])
    prompt.reserve(n)
    memcpy(prompt.blocks, blocks, n * sizeof(uint64_t))
    memcpy(prompt.depths, depths, n * sizeof(uint32_t))
    return 0


def prompt_of(Picker picker not None, InferenceRequest request not None, bint complete=False):
    """See the stub."""
    return prompt_for(picker, request, complete)
