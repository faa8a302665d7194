"""Declarations of ``_prompt.pyx``."""

from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t

from kubeai._prefix cimport FOUND_MAX, Found, PrefixIndex


cdef struct Known:  # what the index knows of a prompt
    Found found[FOUND_MAX]
    uint32_t tokens[FOUND_MAX]  # parallel to found
    int n
    uint64_t rows  # a bit for each row, by its last six bits: most endpoints are not among them


cdef inline uint32_t known_tokens(const Known *known, int32_t row) noexcept:
    """How many of the prompt's tokens an endpoint is believed to have in its cache."""
    cdef int at
    if known.rows >> (row & 63) & 1:
        for at in range(known.n):
            if known.found[at].row == row:
                return known.tokens[at]
    return 0


cdef inline void add_known(Known *known, int32_t row, uint32_t tokens) noexcept:
    """Believe at least this number of the prompt's tokens to be in an endpoint's cache."""
    cdef int at
    for at in range(known.n):
        if known.found[at].row == row:
            known.tokens[at] = max(known.tokens[at], tokens)
            return
    if known.n < FOUND_MAX:
        known.rows |= <uint64_t> 1 << (row & 63)
        known.found[known.n].row = row
        known.tokens[known.n] = tokens
        known.n += 1


cdef class Prompt:
    cdef readonly uint32_t tokens
    cdef readonly uint64_t key  # of PrefixHash
    cdef readonly bint has_key
    cdef readonly bint streams  # the response is streamed
    cdef int64_t text_bytes  # of the text that ``tokens`` was estimated from; 0: it has files too
    cdef int n
    cdef uint64_t *blocks  # hashes of the sampled blocks
    cdef uint32_t *depths  # tokens up to each block's end

    cdef int reserve(self, int n) except -1
    cdef void look_up(self, PrefixIndex index, Known *known) noexcept


cdef enum:
    BLOCK_BYTES = 256


cdef inline int64_t next_end(int64_t end) noexcept nogil:
    """Where the next sample after one that ends at ``end`` (0: the first) ends, in bytes."""
    cdef int64_t step = BLOCK_BYTES
    while end >= 16 * step:
        step *= 4
    return end + step


cdef Prompt new_prompt(bint streams)
