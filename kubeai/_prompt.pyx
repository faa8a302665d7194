"""What a pick needs to know of a prompt: its length, and hashes of its beginnings.

A prompt is cut into blocks of ``BLOCK_BYTES``. The hash of a block covers everything before it. Of
a long prompt only some blocks are sampled: all in its first 4 KiB, then 12 in each further fourfold
of its length, so that what is found of a prefix is at most a quarter too short, and no prompt has
more than ``BLOCKS_MAX``. Where the samples lie depends on nothing but their offset.
"""

cimport cython
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc

from kubeai._prefix cimport FOUND_MAX, SAMPLES_MAX, Found, PrefixIndex

BLOCKS_MAX = SAMPLES_MAX


def sample_ends(int64_t size_bytes):
    """See the stub."""
    cdef int64_t end = next_end(0)
    cdef list ends = []
    while len(ends) < SAMPLES_MAX and end <= size_bytes:
        ends.append(end)
        end = next_end(end)
    return ends


@cython.final
@cython.freelist(64)
@cython.no_gc
cdef class Prompt:
    """See the module."""

    def __init__(self, uint32_t tokens=0, blocks=(), depths=(), key=None, bint streams=False):
        """See the stub."""
        cdef int at
        if len(blocks) != len(depths):
            raise ValueError(f"{len(blocks)} blocks, but {len(depths)} depths")
        if len(blocks) > SAMPLES_MAX:
            raise ValueError(f"a prompt has at most {SAMPLES_MAX} sampled blocks")
        self.tokens = tokens
        self.streams = streams
        if key is not None:
            self.key = key
            self.has_key = True
        self.reserve(<int> len(blocks))
        for at in range(self.n):
            self.blocks[at] = blocks[at]
            self.depths[at] = depths[at]

    def __dealloc__(self):
        free(self.blocks)

    @property
    def samples(self):
        """See the stub."""
        cdef int at
        return tuple([(self.blocks[at], self.depths[at]) for at in range(self.n)])

    cdef int reserve(self, int n) except -1:
        """Make room for ``n`` blocks. Called once."""
        if n == 0:
            return 0
        self.blocks = <uint64_t *> malloc(n * (sizeof(uint64_t) + sizeof(uint32_t)))
        if self.blocks == NULL:
            raise MemoryError()
        self.depths = <uint32_t *> (self.blocks + n)
        self.n = n
        return 0

    cdef void look_up(self, PrefixIndex index, Known *known) noexcept:
        """Find which endpoints are believed to have a beginning of the prompt, and how much."""
        cdef int at
        known.rows = 0
        known.n = 0
        if self.n == 0 or index is None:
            return
        known.n = index.lookup(self.blocks, self.n, known.found)
        for at in range(known.n):
            known.rows |= <uint64_t> 1 << (known.found[at].row & 63)
            known.tokens[at] = min(self.tokens, self.depths[known.found[at].depth - 1])


cdef Prompt new_prompt(bint streams):
    cdef Prompt prompt = Prompt.__new__(Prompt)
    prompt.streams = streams
    return prompt
