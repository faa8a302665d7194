"""Declarations of the prefix index for other compiled modules; see ``_prefix.pyx``."""

from libc.stdint cimport int32_t, uint32_t, uint64_t

from kubeai._cache_line cimport prefetch
from kubeai._shared_memory cimport SharedMemory


cdef enum:
    BUCKET_ENTRIES = 8  # a cache line
    FOUND_MAX = 64  # endpoints per lookup
    SAMPLES_MAX = 64  # sampled blocks per prompt
    LOG_ENTRIES = 512  # per worker
    COLUMNS_MAX = 64


cdef struct Header:
    uint64_t magic
    uint64_t version
    uint64_t rows
    uint64_t buckets  # a power of two
    uint64_t columns  # workers
    uint64_t silent  # other replicas of KubeAI that do not report the prompts they send
    uint64_t spare[2]


cdef struct Row:  # of an endpoint
    uint64_t sent_tokens  # new prompt tokens sent to it; grows only
    uint32_t cache_tokens  # how many its cache holds
    uint32_t epoch  # incremented when its cache is lost
    uint32_t stamp  # of an entry that is written now
    uint32_t spare


cdef struct LogEntry:  # a prompt that a worker has sent
    int32_t row
    uint32_t new_tokens
    uint32_t n
    uint32_t spare
    uint64_t blocks[SAMPLES_MAX]


cdef struct Log:  # of a worker, its only writer
    uint64_t written  # entries since the start
    uint64_t spare[7]
    LogEntry entries[LOG_ENTRIES]


cdef struct Found:
    int32_t row
    int32_t depth  # number of leading blocks believed to be in the endpoint's cache


cdef class PrefixIndex(SharedMemory):
    cdef readonly int rows
    cdef readonly Py_ssize_t entries
    cdef uint64_t _mask  # of bucket numbers
    cdef int _column  # whose log this process writes; -1: none
    cdef int columns
    cdef Header *header
    cdef Row *row_states
    cdef Log *logs
    cdef uint64_t taken[COLUMNS_MAX]  # entries of each log: ``take_log`` returned or skipped them
    cdef uint64_t *cells  # [buckets][BUCKET_ENTRIES]
    cdef void _lay_out(self) noexcept
    cdef int _check_row(self, Py_ssize_t row) except -1
    cdef int _copy_hashes(self, blocks, uint64_t *hashes) except -1
    cdef uint64_t *_bucket(self, uint64_t block) noexcept
    cdef uint32_t _advance(self, Row *row, uint32_t new_tokens) noexcept
    cdef uint32_t _staleness(self, uint64_t entry) noexcept
    cdef void record(self, int32_t row, const uint64_t *blocks, int n, uint32_t new_tokens) noexcept
    cdef void send(self, int32_t row, const uint64_t *blocks, int n, uint32_t new_tokens) noexcept
    cdef int lookup(self, const uint64_t *blocks, int n, Found *found) noexcept


cdef inline void prefetch_bucket(PrefixIndex index, uint64_t block) noexcept:
    """Load a block's bucket, which a lookup will read."""
    prefetch(&index.cells[(block & index._mask) * BUCKET_ENTRIES])
