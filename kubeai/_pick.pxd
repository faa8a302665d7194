"""Declarations of ``_pick.pyx``."""

from kubeai._counts cimport Reservation
from kubeai._load cimport Speed
from kubeai._prefix cimport PrefixIndex
from kubeai._prompt cimport Known, Prompt
from kubeai._members cimport Members
from kubeai._queue_table cimport QueueTable
from kubeai._ring cimport Ring, Survey

from libc.stdint cimport int32_t, int64_t, uint32_t


cdef enum Strategy:
    LEAST_LOAD
    PREFIX_HASH
    PREFIX_CACHE


cdef struct Choice:
    int32_t at  # of the members; -1: none yet
    double cost


cdef class Picker:
    cdef readonly Ring ring
    cdef PrefixIndex index
    cdef Strategy strategy
    cdef readonly int64_t prefix_char_length
    cdef int64_t load_factor  # of PrefixCache, in percent; 0: no bound
    cdef readonly double tokens_per_byte  # of prompts' text
    cdef readonly int64_t capacity  # requests in flight per endpoint; 0: not limited
    cdef QueueTable queues  # None: the capacity is not limited
    cdef object estimated  # deque of (when its prefill is believed to end, Reservation)

    cpdef Reservation pick(self, Prompt prompt, str adapter=*, object exclude=*)
    cpdef Reservation pick_new(self, Prompt prompt, str adapter=*, str tenant=*)
    cpdef int settle(self, str tenant, uint32_t output_tokens) except -1
    cpdef bint has_room(self, str adapter=*, int64_t requests=*)
    cdef Reservation _pick_by_ring(self, Prompt prompt, str adapter, object exclude)
    cdef Reservation _pick_cached(self, Prompt prompt, str adapter, object exclude)
    cdef bint _may_be_unreported(self, const Known *known) noexcept
    cdef void _believe(self, Prompt prompt, Known *known) noexcept
    cdef void _cheapest(
        self,
        Members members,
        const Survey *survey,
        Prompt prompt,
        const Known *known,
        int32_t start,
        int32_t end,
        Choice *choice,
    ) noexcept
    cdef int32_t _most_cached(
        self, Members members, const Survey *survey, const Known *known, int32_t chosen
    ) noexcept
    cdef void _count(self, Prompt prompt, Reservation reservation, int known_n) noexcept
    cdef bint _exceeds(self, const Survey *survey, int32_t row, int64_t own) noexcept
    cdef double _learned(self, int32_t row) noexcept
    cdef void learn_tokens(self, Prompt prompt, uint32_t reported) noexcept
    cdef int _expect(self, Reservation reservation, int64_t ahead, bint streams) except -1
    cpdef int expire(self) except -1


cdef class RoutedFields:
    cdef public str model
    cdef public object route  # Route
    cdef public Picker picker
