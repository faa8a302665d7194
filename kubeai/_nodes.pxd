"""Declarations of ``_nodes.pyx``."""

from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t
from libc.stdlib cimport realloc

# A virtual node: the upper 44 bits are its position on the ring, the lower 20 its endpoint's slot.
# Eight per cache line; 256,000 of them take 2 MB, where a pick mostly waits for memory. If nodes
# ever share a position, they are ordered by endpoint name.
ctypedef uint64_t Node

cdef enum:
    SLOT_BITS = 20
    SLOTS_MAX = 1 << SLOT_BITS


cdef inline int32_t slot_of(Node node) noexcept nogil:
    return <int32_t> (node & (SLOTS_MAX - 1))


cdef inline void *grown(void *array, size_t size) except NULL:
    array = realloc(array, size)
    if array == NULL:
        raise MemoryError(f"cannot allocate {size} bytes for a ring")
    return array


cdef inline uint64_t mix(uint64_t value) noexcept nogil:
    """The finaliser of SplitMix64 (Stafford's variant 13): an input bit flips half the output."""
    value = (value ^ (value >> 30)) * <uint64_t> 0xBF58476D1CE4E5B9
    value = (value ^ (value >> 27)) * <uint64_t> 0x94D049BB133111EB
    return value ^ (value >> 31)


cdef class VirtualNodes:
    cdef list names  # slot → endpoint name
    cdef Node *nodes  # sorted by position, then by endpoint name
    cdef size_t n
    cdef size_t capacity
    cdef uint32_t *buckets  # first node of each range of positions, and an end marker
    cdef int bucket_shift
    cdef int add(self, list slots, list name_hashes, int64_t replication) except -1
    cdef int index(self) except -1
    cdef list shares(self)
    cdef inline size_t first_at(self, uint64_t key) noexcept:
        """The first node at or after the key's position, wrapping around."""
        cdef Node place = mix(key) >> SLOT_BITS << SLOT_BITS
        cdef size_t at = self.buckets[place >> self.bucket_shift]
        while at < self.n and self.nodes[at] < place:
            at += 1
        return at if at < self.n else 0

    cdef bint _before(self, Node one, Node other) noexcept
    cdef Node *_sorted(self, Node *nodes, size_t n) except NULL
    cdef int _insert(self, const Node *added, size_t added_n) except -1
