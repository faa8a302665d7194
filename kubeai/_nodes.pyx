"""The virtual nodes of a ring: one sorted array, and an index of its ranges of positions."""

cimport cython
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memmove, memset

cdef enum:
    NODES_A_BUCKET = 4


cdef inline Node _node(uint64_t name_hash, uint64_t index, int32_t slot) noexcept nogil:
    cdef uint64_t place = mix(name_hash + (index + 1) * <uint64_t> 0x9E3779B97F4A7C15)
    return place >> SLOT_BITS << SLOT_BITS | <uint64_t> slot


@cython.final
@cython.no_gc_clear
cdef class VirtualNodes:
    """See the module. ``add``, then ``index`` before the next ``first_at``."""

    def __cinit__(self):
        self.names = []

    def __dealloc__(self):
        free(self.nodes)
        free(self.buckets)

    cdef int add(self, list slots, list name_hashes, int64_t replication) except -1:
        """Merge the nodes of new endpoints into the array."""
        cdef Node *added = <Node *> grown(NULL, <size_t> len(slots) * replication * sizeof(Node))
        cdef size_t added_n = 0
        cdef int32_t slot
        cdef int64_t index
        cdef uint64_t name_hash
        try:
            for slot, name_hash in zip(slots, name_hashes):
                for index in range(replication):
                    added[added_n] = _node(name_hash, index, slot)
                    added_n += 1
            added = self._sorted(added, added_n)
            self._insert(added, added_n)
        finally:
            free(added)
        return 0

    cdef bint _before(self, Node one, Node other) noexcept:
        if one >> SLOT_BITS != other >> SLOT_BITS:
            return one < other
        return <str> self.names[slot_of(one)] < <str> self.names[slot_of(other)]

    cdef Node *_sorted(self, Node *nodes, size_t n) except NULL:
        """Sort, and free ``nodes``. Positions are uniform: one scatter nearly sorts them."""
        cdef int shift = 63
        while (<size_t> 1 << (64 - shift)) < n and shift > 1:
            shift -= 1
        cdef size_t ranges = <size_t> 1 << (64 - shift)
        cdef Node *result = <Node *> malloc(n * sizeof(Node))
        cdef uint32_t *ends = <uint32_t *> malloc((ranges + 1) * sizeof(uint32_t))
        cdef size_t at, back
        cdef Node node
        if result == NULL or ends == NULL:
            free(result)
            free(ends)
            raise MemoryError(f"cannot allocate {n} virtual nodes")
        memset(ends, 0, (ranges + 1) * sizeof(uint32_t))
        for at in range(n):
            ends[(nodes[at] >> shift) + 1] += 1
        for at in range(ranges):
            ends[at + 1] += ends[at]
        for at in range(n):
            back = ends[nodes[at] >> shift]
            ends[nodes[at] >> shift] += 1
            result[back] = nodes[at]
        for at in range(1, n):
            node = result[at]
            back = at
            while back > 0 and self._before(node, result[back - 1]):
                result[back] = result[back - 1]
                back -= 1
            result[back] = node
        free(ends)
        free(nodes)
        return result

    cdef int _insert(self, const Node *added, size_t added_n) except -1:
        """Merge sorted nodes into the array from its end; each existing node moves once."""
        cdef size_t total = self.n + added_n
        cdef size_t old = self.n
        cdef size_t start, low, high, middle
        if total > <size_t> 0xFFFFFFFF:
            raise MemoryError(f"a ring cannot hold {total} virtual nodes")
        if total > self.capacity:
            self.nodes = <Node *> grown(self.nodes, total * sizeof(Node))
            self.capacity = total
        while added_n:
            low = 0
            high = old
            while low < high:
                middle = (low + high) // 2
                if self._before(added[added_n - 1], self.nodes[middle]):
                    high = middle
                else:
                    low = middle + 1
            memmove(&self.nodes[low + added_n], &self.nodes[low], (old - low) * sizeof(Node))
            old = low
            added_n -= 1
            self.nodes[old + added_n] = added[added_n]
        self.n = total
        return 0

    cdef list shares(self):
        """By slot, the share of the ring's positions whose next node is of that slot."""
        cdef list shares = [0.0] * len(self.names)
        cdef size_t at
        cdef uint64_t before = self.nodes[self.n - 1] if self.n else 0
        cdef double whole = 2.0**64
        for at in range(self.n):
            # Unsigned: the first node's distance from the last one wraps around.
            shares[slot_of(self.nodes[at])] += (self.nodes[at] - before) / whole
            before = self.nodes[at]
        if self.n == 1:
            shares[slot_of(self.nodes[0])] = 1.0
        return shares

    cdef int index(self) except -1:
        """Record where each range of positions begins in the array."""
        cdef int shift = 63
        cdef size_t ranges, at
        while (<size_t> NODES_A_BUCKET << (64 - shift)) < self.n:
            shift -= 1
        ranges = <size_t> 1 << (64 - shift)
        self.buckets = <uint32_t *> grown(self.buckets, (ranges + 1) * sizeof(uint32_t))
        self.bucket_shift = shift
        memset(self.buckets, 0, (ranges + 1) * sizeof(uint32_t))
        # The last node of a range overwrites those before it: branch-free, 0.1 ms for 256,000.
        for at in range(self.n):
            self.buckets[(self.nodes[at] >> shift) + 1] = <uint32_t> (at + 1)
        for at in range(ranges):
            self.buckets[at + 1] = max(self.buckets[at], self.buckets[at + 1])
        return 0
