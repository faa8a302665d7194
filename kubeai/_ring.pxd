"""Declarations of the ring for other compiled modules; see ``_ring.pyx`` for its guarantees."""

from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t

from kubeai._counts cimport Reservation
from kubeai._load cimport LoadTable, get_time, in_flight_of
from kubeai._members cimport Members
from kubeai._nodes cimport VirtualNodes
from kubeai._prefix cimport PrefixIndex
from kubeai._prompt cimport Prompt


cdef struct Slot:  # what a walk needs to know of an endpoint
    int32_t row
    uint32_t generation
    uint64_t seen  # the last walk that examined it
    uint64_t excluded  # the last walk that excluded it
    bint gone  # removed, but still on the ring until the next merge


cdef struct Departed:  # a removed endpoint; the model's row still counts its open requests
    int32_t row
    uint32_t generation


cdef struct Survey:  # which endpoints can serve one request
    double now_s  # endpoints ejected until later are skipped; 0: none is ejected
    bint unwell  # some endpoint has failed since its last complete response, or is ejected
    int64_t per_request  # tokens of work that a request in flight counts as
    int64_t n
    int64_t total  # work of the n
    int64_t open  # of the n, those that are not excluded
    int32_t busy  # those that are not ejected, but full


cdef inline int32_t exclude_full(
    Slot *slots, Members members, LoadTable table, uint64_t walk, int64_t capacity, Survey *survey
) noexcept:
    """Exclude the endpoints with ``capacity`` requests in flight; returns how many."""
    cdef int32_t at, row, full = 0
    cdef Slot *slot
    for at in range(members.n):
        row = members.rows[at]
        slot = &slots[members.slots[at]]
        if in_flight_of(table._load(row)) < capacity or slot.excluded == walk:
            continue
        slot.excluded = walk
        full += 1
        survey.busy += get_time(&table.health[row].ejected_until_s) <= survey.now_s
    return full


cdef class _Endpoint:
    cdef str name
    cdef object target
    cdef frozenset adapters
    cdef uint64_t name_hash
    cdef int32_t slot


cdef class Ring:
    cdef LoadTable table
    cdef int32_t row
    cdef uint32_t generation
    cdef int64_t replication
    cdef int64_t factor
    cdef int64_t capacity  # requests in flight per endpoint; 0: not limited
    cdef dict endpoints  # name → _Endpoint
    cdef list by_slot  # slot → _Endpoint, or None
    cdef list free_slots
    cdef list gone_slots  # on the ring until the next merge
    cdef list new_slots  # not on the ring until the next merge
    cdef dict adapters  # name → Members
    cdef Members everyone
    cdef Slot *slots
    cdef int32_t slots_capacity
    cdef VirtualNodes nodes
    cdef uint64_t walk
    cdef uint64_t health_events_seen  # the table's, when every endpoint here was last healthy
    cdef object clock  # in seconds; None: CLOCK_MONOTONIC
    cdef Departed *departed
    cdef int32_t departed_n
    cdef int32_t departed_capacity
    cdef Members _members(self, str adapter)
    cdef int32_t _take_slot(self) except -1
    cdef int _join_adapters(self, _Endpoint endpoint) except -1
    cdef int _leave_adapters(self, _Endpoint endpoint) except -1
    cdef int _depart(self, int32_t row, uint32_t generation) except -1
    cdef void _return(self, int32_t row, uint32_t generation) noexcept
    cdef int _merge(self) except -1
    cdef void _compact(self) noexcept
    cpdef Reservation pick_hashed(
        self,
        uint64_t key,
        str adapter=*,
        object exclude=*,
        Prompt prompt=*,
        PrefixIndex index=*,
    )
    cdef int64_t _bound(self, const Survey *survey, int64_t factor, int64_t own) noexcept
    cpdef Reservation pick_least(self, str adapter=*, object exclude=*, uint32_t tokens=*)
    cdef void _turn(self, Members members) noexcept
    cdef int32_t _least(
        self, Members members, const Survey *survey, int32_t start, int32_t end, int64_t *least
    ) noexcept
    cdef int _begin(self) except -1
    cdef int64_t _work(self, int32_t row, int64_t per_request) noexcept
    cdef int64_t _expected_work(self, int32_t row, int64_t per_request) noexcept
    cdef bint _is_open(self, int32_t slot, double now_s) noexcept
    cdef bint _survey(self, Survey *survey, Members members, object exclude, bint loads) except -1
    cdef bint _survey_ejected(self, Survey *survey, Members members) noexcept
    cdef int32_t _exclude(self, Members members, object exclude) except -1
    cdef int64_t _total(self, Members members, int64_t per_request) noexcept
    cdef int64_t _departed_work(self, int64_t per_request) noexcept
    cdef int32_t _any(self, Members members) noexcept
    cdef Reservation _reserve(
        self, int32_t chosen, int32_t first, uint32_t tokens, const Survey *survey
    )
    cdef bint _try(self, int32_t row, double now_s) noexcept
    cpdef int32_t ejected_count(self) noexcept
    cdef bint _all_well(self) noexcept
    cdef double _now_s(self) except -1
