"""The ring's classes as other compiled modules see them; ``_ring.pyx`` says what they promise."""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t

from kubeai._load cimport LoadTable, Reservation

# A virtual node: its place on the ring in the upper 44 bits, the slot of its endpoint in the lower
# 20. Eight to a cache line; 256,000 of them are 2 MB, where a pick mostly waits for memory. Nodes
# on one place, if it ever happens, stand in the order of their names.
ctypedef uint64_t Node

cdef struct Slot:  # an endpoint, as the walk needs it
    int32_t row
    uint32_t generation
    uint64_t seen  # the walk that last looked at it
    uint64_t excluded  # the walk that was told to leave it out
    bint gone  # removed, but still on the ring until the next merge


cdef struct Departed:  # removed with requests still open, which its model's row counts on
    int32_t row
    uint32_t generation


cdef struct Survey:  # who can serve one request
    double now_s  # endpoints ejected beyond it are passed over; 0: none is ejected
    bint unwell  # some endpoint has failed since its last complete answer, or is ejected
    int64_t n
    int64_t total
    int64_t open  # of the n, those that are not excluded


cdef class _Endpoint:
    cdef str name
    cdef object target
    cdef frozenset adapters
    cdef uint64_t name_hash
    cdef int32_t slot


cdef class _Members:
    cdef int32_t *slots
    cdef int32_t *rows  # beside slots, so that a scan of loads reads one array
    cdef uint8_t *has  # by slot
    cdef int32_t n
    cdef int32_t capacity
    cdef int32_t has_capacity
    cdef int32_t cursor  # where the next least-load scan begins
    cdef bint contains(self, int32_t slot) noexcept
    cdef int add(self, int32_t slot, int32_t row) except -1
    cdef int32_t position(self, int32_t slot) noexcept
    cdef void drop(self, int32_t slot) noexcept


cdef class Ring:
    cdef LoadTable table
    cdef int32_t row
    cdef uint32_t generation
    cdef int64_t replication
    cdef int64_t factor
    cdef dict endpoints  # name → _Endpoint
    cdef list by_slot  # slot → _Endpoint, or None
    cdef list free_slots
    cdef list gone_slots  # on the ring until the next merge
    cdef list new_slots  # not on the ring until the next merge
    cdef dict adapters  # name → _Members
    cdef _Members everyone
    cdef Slot *slots
    cdef int32_t slots_capacity
    cdef Node *nodes  # sorted by place, then by the endpoint's name
    cdef size_t nodes_n
    cdef size_t nodes_capacity
    cdef uint32_t *buckets  # first node of each range of places; one more than there are ranges
    cdef int bucket_shift
    cdef uint64_t walk
    cdef uint64_t health_events_seen  # the table's, when every endpoint here was well
    cdef object clock  # seconds, as CLOCK_MONOTONIC; None: that clock
    cdef Departed *departed
    cdef int32_t departed_n
    cdef int32_t departed_capacity
    cdef _Members _members(self, str adapter)
    cdef int32_t _take_slot(self) except -1
    cdef int _join_adapters(self, _Endpoint endpoint) except -1
    cdef int _leave_adapters(self, _Endpoint endpoint) except -1
    cdef int _depart(self, int32_t row, uint32_t generation) except -1
    cdef void _return(self, int32_t row, uint32_t generation) noexcept
    cdef int _merge(self) except -1
    cdef void _compact(self) noexcept
    cdef bint _before(self, Node one, Node other) noexcept
    cdef Node *_sorted(self, Node *nodes, size_t n) except NULL
    cdef int _insert(self, const Node *added, size_t added_n) except -1
    cdef int _index(self) except -1
    cdef size_t _first_node(self, uint64_t key) noexcept
    cpdef Reservation pick_hashed(self, uint64_t key, str adapter=*, object exclude=*)
    cpdef Reservation pick_least(self, str adapter=*, object exclude=*)
    cdef int32_t _least(
        self, _Members members, const Survey *survey, int32_t start, int32_t end, int64_t *load
    ) noexcept
    cdef int _begin(self) except -1
    cdef int64_t _load(self, int32_t row) noexcept
    cdef bint _is_open(self, int32_t slot, double now_s) noexcept
    cdef bint _survey(self, Survey *survey, _Members members, object exclude, bint loads) except -1
    cdef bint _survey_ejected(self, Survey *survey, _Members members) noexcept
    cdef int32_t _exclude(self, _Members members, object exclude) except -1
    cdef int64_t _total(self, _Members members) noexcept
    cdef int64_t _departed_load(self) noexcept
    cdef int32_t _any(self, _Members members) noexcept
    cdef Reservation _reserve(
        self,
        int32_t chosen,
        int32_t first,
        int64_t first_load,
        int64_t bound,
        int iterations,
        const Survey *survey,
    )
    cdef bint _try(self, int32_t row, double now_s) noexcept
    cpdef int32_t ejected_count(self) noexcept
    cdef bint _all_well(self) noexcept
    cdef double _now_s(self) except -1
