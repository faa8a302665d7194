"""Declarations of the journal for other compiled modules; see ``_journal.pyx``."""

from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t

from kubeai._shared_memory cimport SharedMemory


cdef enum:
    ID_MAX_BYTES = 56
    COLUMNS_MAX = 64


cdef enum:
    UNKNOWN_TOKENS = 0xFFFFFFFF


cdef enum Pick:  # why an endpoint was picked; same order as PICKS
    NOT_PICKED
    PICK_CACHED
    PICK_AWAY
    PICK_NEW
    PICK_LEAST
    PICK_HASHED
    PICK_BOUNDED


cdef struct Header:
    uint64_t magic
    uint64_t version
    uint64_t columns  # workers
    uint64_t entries  # of each worker
    uint64_t spare[4]


cdef struct Column:  # of a worker, its only writer
    uint64_t written  # entries since the start
    uint64_t spare[7]


cdef struct Slot:  # one entry: two cache lines
    uint64_t number  # of the entry, from 1; 0: it is being written
    double began_s  # when the request's head was complete (CLOCK_MONOTONIC)
    float waited_s  # for an endpoint
    float first_s  # from began_s to the first byte of the response's body; negative: none came
    float duration_s
    int32_t model_row  # in the load table
    uint32_t model_generation
    int32_t row  # of the last attempt's endpoint; -1: none
    uint32_t generation
    uint16_t status
    uint8_t end  # of ENDS
    uint8_t pick
    uint8_t retries
    uint8_t id_size
    uint8_t streamed
    uint8_t spare
    uint32_t estimated_tokens  # of the prompt
    uint32_t expected_tokens  # of these, believed to be in the endpoint's cache
    uint32_t prompt_tokens  # these three as the engine reported, or UNKNOWN_TOKENS
    uint32_t cached_tokens
    uint32_t output_tokens
    char id[ID_MAX_BYTES]


cdef class Journal(SharedMemory):
    cdef readonly int columns
    cdef readonly Py_ssize_t entries
    cdef int _column  # that this process writes; -1: none
    cdef Header *header
    cdef Column *column_headers
    cdef Slot *slots  # [columns][entries]
    cdef void _lay_out(self) noexcept
    cdef int _check_open(self) except -1
    cdef Slot *begin(self) noexcept
    cdef void commit(self, Slot *slot) noexcept
