"""Consistent hashing with bounded loads, and least load, over one model's endpoints.

Mirrokni, Thorup and Zadimoghaddam, "Consistent Hashing with Bounded Loads" (2016). An endpoint
has ``replication`` virtual nodes on the ring. Their positions derive from a 64-bit hash of its
name, advanced by a mixer, and from nothing else: neither the order in which endpoints were added
nor the process. A key maps to the first endpoint clockwise of it. A pick moves on clockwise while
an endpoint's load would exceed

    max(LOAD_FLOOR, ceil(mean_load_factor × (total + 1) / n))

where total and n are the load and the number of the endpoints that can serve the request (they
have the adapter and are not ejected). The floor keeps a conversation on its endpoint when it sends
a second request concurrently. If all n loads had reached the bound, their sum would exceed the
total, so at least one endpoint is below it. If all such endpoints are excluded, the first that can
serve is taken.

Loads of other KubeAI replicas arrive with a delay (see ``_load``). In the meantime hashed picks are
spread by their keys, and least-load picks use the expected load.

``set`` and ``remove`` only record changes; the next lookup merges them into the sorted array in
place, so a snapshot of a thousand endpoints costs one merge.

A worker's routing table owns one Ring per model and calls it from one thread. Loads come from the
load table, which other processes write too: workers that pick at the same instant do not see each
other's picks, and may exceed the bound by at most their number − 1.
"""

cimport cython
from libc.math cimport ceil
from libc.stdint cimport INT64_MAX, int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memset

from kubeai._clock cimport now
from kubeai._counts cimport Reservation, reserve
from kubeai._load cimport (
    REQUEST_TOKENS,
    Health,
    LoadTable,
    get_time,
    get_u32,
    get_u64,
    least_row,
    put_time,
    work_of,
)
from kubeai._members cimport Members
from kubeai._nodes cimport SLOTS_MAX, Node, VirtualNodes, grown, slot_of
from kubeai._prefix cimport PrefixIndex
from kubeai._prompt cimport Known, Prompt, known_tokens, new_prompt

from mmh3 import hash64

from kubeai._load import HALF_OPEN_PROBE_S as _HALF_OPEN_PROBE_S

cdef Prompt NOTHING = new_prompt(False)
cdef double FAR_S = 1e300  # later than the end of any ejection: no endpoint is skipped
cdef double HALF_OPEN_PROBE_S = _HALF_OPEN_PROBE_S
cdef uint64_t NEVER = <uint64_t> -1

cdef enum:
    _LOAD_FLOOR = 2
    _REPLICATION_MAX = 4096

LOAD_FLOOR = _LOAD_FLOOR
REPLICATION_MAX = _REPLICATION_MAX


@cython.final
cdef class _Endpoint:
    """One endpoint as last set. Immutable, so that a Reservation can outlive it."""



@cython.final
cdef class Ring:
    """One model's endpoints. Single-threaded; reads loads that other processes write."""

    def __init__(
        self,
        LoadTable table not None,
        int32_t row,
        uint32_t generation,
        *,
        replication=20,
        mean_load_factor=125,
        clock=None,
    ):
        """``row``, ``generation``: the model's. ``mean_load_factor`` in percent, ≥ 100.

        ``clock``: the clock, in seconds, for ejections; default CLOCK_MONOTONIC.
        """
        table._check_row(row)
        self.table = table
        self.clock = clock
        self.row = row
        self.generation = generation
        self.endpoints = {}
        self.by_slot = []
        self.free_slots = []
        self.gone_slots = []
        self.new_slots = []
        self.adapters = {}
        self.everyone = Members()
        self.nodes = VirtualNodes()
        self.configure(replication=replication, mean_load_factor=mean_load_factor)

    def __dealloc__(self):
        free(self.slots)
        free(self.departed)

    # -- membership ----------------------------------------------------------------------------

    def configure(self, *, replication, mean_load_factor):
        """Change the parameters. A new replication rebuilds the ring at the next pick.

        ``replication`` is clamped to 1 … ``REPLICATION_MAX``.
        """
        if mean_load_factor < 100:
            raise ValueError(f"mean_load_factor must be at least 100, not {mean_load_factor}")
        # Capped so that no product below can overflow; no load reaches a bound that high.
        self.factor = min(mean_load_factor, 100 << 20)
        replication = min(max(replication, 1), _REPLICATION_MAX)
        if replication == self.replication:
            return
        self.replication = replication
        self.nodes.n = 0
        self.free_slots += self.gone_slots
        self.gone_slots = []
        self.new_slots = [(<_Endpoint> e).slot for e in self.endpoints.values()]

    def set(self, str name not None, Py_ssize_t row, uint32_t generation, adapters=(), target=None):
        """Add or update an endpoint. Merges it into the ring; does not rebuild."""
        self.table._check_row(row)
        cdef _Endpoint old = self.endpoints.get(name)
        cdef _Endpoint endpoint = _Endpoint()
        cdef Slot *slot
        endpoint.name = name
        endpoint.target = target
        endpoint.adapters = frozenset(adapters)
        if old is None:
            endpoint.name_hash = hash64(name.encode(), signed=False)[0]
            endpoint.slot = self._take_slot()
            self.slots[endpoint.slot].gone = False
            self.nodes.names[endpoint.slot] = name
            self.everyone.add(endpoint.slot, <int32_t> row)
            self.new_slots.append(endpoint.slot)
        else:
            endpoint.name_hash = old.name_hash
            endpoint.slot = old.slot
            slot = &self.slots[old.slot]
            if slot.row != row or slot.generation != generation:
                self._depart(slot.row, slot.generation)
            self.everyone.rows[self.everyone.position(old.slot)] = <int32_t> row
            self._leave_adapters(old)
        slot = &self.slots[endpoint.slot]
        self.health_events_seen = NEVER  # it may be ejected already
        slot.row = <int32_t> row
        slot.generation = generation
        self._return(slot.row, generation)
        self.endpoints[name] = endpoint
        self.by_slot[endpoint.slot] = endpoint
        self._join_adapters(endpoint)

    def remove(self, str name not None):
        """Remove an endpoint; unknown names are ignored. Open Reservations stay valid."""
        cdef _Endpoint endpoint = self.endpoints.pop(name, None)
        if endpoint is None:
            return
        cdef Slot *slot = &self.slots[endpoint.slot]
        self._depart(slot.row, slot.generation)
        self._leave_adapters(endpoint)
        self.everyone.drop(endpoint.slot)
        self.by_slot[endpoint.slot] = None
        if endpoint.slot in self.new_slots:
            self.new_slots.remove(endpoint.slot)
            self.free_slots.append(endpoint.slot)
        else:
            slot.gone = True
            self.gone_slots.append(endpoint.slot)

    def __len__(self):
        return len(self.endpoints)

    def __contains__(self, name):
        return name in self.endpoints

    def names(self):
        return list(self.endpoints)

    def can_serve(self, str adapter=None):
        """Whether any endpoint has the adapter (None: whether there are any endpoints)."""
        return self._members(adapter) is not None

    def shares(self):
        """See the stub."""
        if self.new_slots or self.gone_slots:
            self._merge()
        cdef list shares = self.nodes.shares()
        return {name: shares[(<_Endpoint> e).slot] for name, e in self.endpoints.items()}

    cdef Members _members(self, str adapter):
        if adapter is not None:
            return <Members> self.adapters.get(adapter)
        return self.everyone if self.everyone.n else None

    cdef int32_t _take_slot(self) except -1:
        cdef int32_t capacity
        if self.free_slots:
            return self.free_slots.pop()
        cdef int32_t slot = <int32_t> len(self.by_slot)
        if slot == SLOTS_MAX:
            raise MemoryError(f"a ring holds at most {SLOTS_MAX} endpoints")
        if slot == self.slots_capacity:
            capacity = 2 * self.slots_capacity + 16
            self.slots = <Slot *> grown(self.slots, capacity * sizeof(Slot))
            memset(self.slots + slot, 0, (capacity - slot) * sizeof(Slot))
            self.slots_capacity = capacity
        self.by_slot.append(None)
        self.nodes.names.append(None)
        return slot

    cdef int _join_adapters(self, _Endpoint endpoint) except -1:
        cdef Members members
        for adapter in endpoint.adapters:
            members = self.adapters.get(adapter)
            if members is None:
                members = self.adapters[adapter] = Members()
            members.add(endpoint.slot, self.slots[endpoint.slot].row)
        return 0

    cdef int _leave_adapters(self, _Endpoint endpoint) except -1:
        cdef Members members
        for adapter in endpoint.adapters:
            members = self.adapters[adapter]
            members.drop(endpoint.slot)
            if members.n == 0:
                del self.adapters[adapter]
        return 0

    cdef int _depart(self, int32_t row, uint32_t generation) except -1:
        cdef int32_t capacity
        if self.departed_n == self.departed_capacity:
            capacity = 2 * self.departed_capacity + 4
            self.departed = <Departed *> grown(self.departed, capacity * sizeof(Departed))
            self.departed_capacity = capacity
        self.departed[self.departed_n].row = row
        self.departed[self.departed_n].generation = generation
        self.departed_n += 1
        return 0

    cdef void _return(self, int32_t row, uint32_t generation) noexcept:
        cdef int32_t at
        for at in range(self.departed_n - 1, -1, -1):
            if self.departed[at].row == row and self.departed[at].generation == generation:
                self.departed_n -= 1
                self.departed[at] = self.departed[self.departed_n]

    # -- the sorted array ----------------------------------------------------------------------

    cdef int _merge(self) except -1:
        """Apply recorded additions and removals to the sorted nodes."""
        cdef int32_t slot
        if self.gone_slots:
            self._compact()
        if self.new_slots:
            hashes = [(<_Endpoint> self.by_slot[slot]).name_hash for slot in self.new_slots]
            self.nodes.add(self.new_slots, hashes, self.replication)
            self.new_slots = []
        return self.nodes.index()

    cdef void _compact(self) noexcept:
        cdef size_t source, target = 0
        cdef Node *nodes = self.nodes.nodes
        for source in range(self.nodes.n):
            nodes[target] = nodes[source]
            target += not self.slots[slot_of(nodes[source])].gone
        self.nodes.n = target
        self.free_slots += self.gone_slots
        self.gone_slots = []

    # -- picks ---------------------------------------------------------------------------------

    cpdef Reservation pick_hashed(
        self,
        uint64_t key,
        str adapter=None,
        object exclude=(),
        Prompt prompt=NOTHING,
        PrefixIndex index=None,
    ):
        """See the stub."""
        cdef Known known
        if prompt is None:
            raise TypeError("a pick needs a prompt")
        prompt.look_up(index, &known)
        self._begin()
        if self.everyone.n == 0:
            return None
        cdef Members members = self._members(adapter)
        cdef size_t at = self.nodes.first_at(key)
        cdef int32_t initial = self.slots[slot_of(self.nodes.nodes[at])].row
        cdef Survey survey
        survey.per_request = REQUEST_TOKENS
        if members is None or not self._survey(&survey, members, exclude, True):
            self.table.count_lookup(initial, -1, False, 0)
            return None
        cdef int64_t own, bound = 0
        cdef uint32_t new_tokens
        cdef int32_t slot, chosen = -1, first = -1
        cdef int64_t work, first_work = 0, first_own = 0
        cdef int iterations = 0
        while iterations < self.everyone.n and survey.open:
            slot = slot_of(self.nodes.nodes[at])
            at += 1
            if at == self.nodes.n:
                at = 0
            if self.slots[slot].seen == self.walk:
                continue
            self.slots[slot].seen = self.walk
            iterations += 1
            if not members.contains(slot) or not self._is_open(slot, survey.now_s):
                continue
            survey.open -= 1
            work = self._work(self.slots[slot].row, survey.per_request)
            own = survey.per_request + prompt.tokens - known_tokens(&known, self.slots[slot].row)
            if first < 0:
                first_own = own
                bound = self._bound(&survey, self.factor, own)
                first = slot
                first_work = work
            if work + own <= bound:
                chosen = slot
                break
        if first < 0:
            first = members.slots[self._any(members)]
            first_work = self._work(self.slots[first].row, survey.per_request)
            first_own = survey.per_request + prompt.tokens
            bound = self._bound(&survey, self.factor, first_own)
        if chosen < 0:
            self.table.count_lookup(initial, self.slots[first].row, True, iterations)
            chosen = first
        else:
            self.table.count_lookup(initial, self.slots[chosen].row, False, iterations)
        new_tokens = prompt.tokens - known_tokens(&known, self.slots[chosen].row)
        if index is not None:
            index.send(self.slots[chosen].row, prompt.blocks, prompt.n, new_tokens)
        cdef Reservation reservation = self._reserve(chosen, first, new_tokens, &survey)
        reservation.cached = prompt.tokens - new_tokens
        reservation.first_load = <double> first_work / survey.per_request
        reservation.own_load = <double> first_own / survey.per_request
        reservation.bound = bound // survey.per_request
        reservation.iterations = iterations
        return reservation

    cdef int64_t _bound(self, const Survey *survey, int64_t factor, int64_t own) noexcept:
        """The most work that an endpoint may have, this request's included: whole requests."""
        cdef double share = <double> factor * (survey.total + own) / (100.0 * survey.n)
        return survey.per_request * max(
            <int64_t> ceil(share / survey.per_request),
            _LOAD_FLOOR - 1 + (own + survey.per_request - 1) // survey.per_request,
        )

    cpdef Reservation pick_least(self, str adapter=None, object exclude=(), uint32_t tokens=0):
        """See the stub."""
        self._begin()
        cdef Members members = self._members(adapter)
        cdef Survey survey
        survey.per_request = REQUEST_TOKENS
        if members is None or not self._survey(&survey, members, exclude, False):
            return None
        self._turn(members)
        cdef int64_t work = INT64_MAX
        cdef int32_t best = self._least(members, &survey, members.cursor, members.n, &work)
        cdef int32_t round_the_end = self._least(members, &survey, 0, members.cursor, &work)
        if round_the_end >= 0:
            best = round_the_end
        if best < 0:
            best = self._any(members)
            work = self._work(members.rows[best], survey.per_request)
        members.cursor = best + 1 if best + 1 < members.n else 0
        cdef int32_t slot = members.slots[best]
        cdef Reservation reservation = self._reserve(slot, slot, tokens, &survey)
        reservation.first_load = <double> work / survey.per_request
        return reservation

    cdef void _turn(self, Members members) noexcept:
        """Set the cursor of the first pick; it differs between KubeAI replicas."""
        if members.cursor < 0:
            members.cursor = <int32_t> (get_u64(&self.table.header.phase) % members.n)

    cdef int32_t _least(
        self, Members members, const Survey *survey, int32_t start, int32_t end, int64_t *least
    ) noexcept:
        """The first member in [start, end) with the least work below ``least`` (updated); or -1."""
        cdef LoadTable table = self.table
        cdef int32_t at, best = -1
        cdef int64_t here
        cdef bint all_open = survey.open == members.n
        cdef bint alone = get_u64(&table.header.peers) == 0
        if all_open and alone:
            return least_row(
                table.load_cells,
                table.stride,
                table.columns,
                members.rows,
                start,
                end,
                least,
            )
        for at in range(start, end):
            if all_open or self._is_open(members.slots[at], survey.now_s):
                here = self._expected_work(members.rows[at], survey.per_request)
                if here < least[0]:
                    least[0] = here
                    best = at
        return best

    def lookup(self, uint64_t key, str adapter=None):
        """The endpoint that a key maps to when there is no load. Pure: counts nothing."""
        cdef Members members = self._members(adapter)
        if members is None:
            return None
        if self.new_slots or self.gone_slots:
            self._merge()
        cdef size_t at = self.nodes.first_at(key)
        while not members.contains(slot_of(self.nodes.nodes[at])):
            at += 1
            if at == self.nodes.n:
                at = 0
        return (<_Endpoint> self.by_slot[slot_of(self.nodes.nodes[at])]).name

    cdef int _begin(self) except -1:
        self.table._check_row(0)
        self.table._check_writer()
        if self.new_slots or self.gone_slots:
            self._merge()
        self.walk += 1
        return 0

    cdef int64_t _work(self, int32_t row, int64_t per_request) noexcept:
        return work_of(self.table._load(row), per_request)

    cdef int64_t _expected_work(self, int32_t row, int64_t per_request) noexcept:
        """An endpoint's work in tokens, with an estimate of what peers have not reported yet."""
        if get_u64(&self.table.header.peers) == 0:
            return self._work(row, per_request)
        return self.table._expected_work(row, per_request)

    cdef bint _is_open(self, int32_t slot, double now_s) noexcept:
        if self.slots[slot].excluded == self.walk:
            return False
        cdef Health *health = &self.table.health[self.slots[slot].row]
        return now_s == 0 or get_time(&health.ejected_until_s) <= now_s

    cdef bint _survey(
        self, Survey *survey, Members members, object exclude, bint loads
    ) except -1:
        """Find who can serve; False if none can. ``loads``: compute n and total too."""
        cdef int32_t excluded = self._exclude(members, exclude) if exclude else 0
        cdef uint64_t health_events = self.table._health_events()
        survey.now_s = 0
        survey.busy = 0
        survey.unwell = health_events != self.health_events_seen and not self._all_well()
        if not survey.unwell:
            self.health_events_seen = health_events
        elif self.ejected_count():
            survey.now_s = self._now_s()
        if self.capacity:
            excluded += exclude_full(
                self.slots, members, self.table, self.walk, self.capacity, survey
            )
        if survey.now_s != 0:
            if self._survey_ejected(survey, members):
                return True
            if survey.busy:  # not panic mode: those that are not ejected will have room again
                return False
            survey.now_s = FAR_S
        survey.n = members.n
        survey.open = members.n - excluded
        if loads:
            if members is self.everyone:
                survey.total = max(
                    0,
                    self._work(self.row, survey.per_request)
                    - self._departed_work(survey.per_request),
                )
            else:
                survey.total = self._total(members, survey.per_request)
        return survey.open > 0

    cdef bint _survey_ejected(self, Survey *survey, Members members) noexcept:
        """Skip ejected endpoints; False if no other can serve (panic mode: none is skipped)."""
        cdef int32_t at
        survey.n = 0
        survey.total = 0
        survey.open = 0
        for at in range(members.n):
            if get_time(&self.table.health[members.rows[at]].ejected_until_s) > survey.now_s:
                continue
            survey.n += 1
            survey.total += self._work(members.rows[at], survey.per_request)
            survey.open += self.slots[members.slots[at]].excluded != self.walk
        return survey.open > 0

    cdef int32_t _exclude(self, Members members, object exclude) except -1:
        cdef _Endpoint endpoint
        cdef int32_t excluded = 0
        for name in exclude:
            endpoint = self.endpoints.get(name)
            if endpoint is None or self.slots[endpoint.slot].excluded == self.walk:
                continue
            self.slots[endpoint.slot].excluded = self.walk
            excluded += members.contains(endpoint.slot)
        return excluded

    cdef int64_t _total(self, Members members, int64_t per_request) noexcept:
        cdef int64_t total = 0
        cdef int32_t at
        for at in range(members.n):
            total += self._work(members.rows[at], per_request)
        return total

    cdef int64_t _departed_work(self, int64_t per_request) noexcept:
        """The work that the model's row still includes for removed endpoints."""
        cdef int64_t total = 0, work
        cdef int32_t at
        for at in range(self.departed_n - 1, -1, -1):
            work = 0
            if self.table.lives(self.departed[at].row, self.departed[at].generation):
                work = self._work(self.departed[at].row, per_request)
            if work == 0:
                self.departed_n -= 1
                self.departed[at] = self.departed[self.departed_n]
            total += work
        return total

    cdef int32_t _any(self, Members members) noexcept:
        """One that is not excluded: the last open ones have been ejected since the survey."""
        cdef int32_t at
        for at in range(members.n):
            if self.slots[members.slots[at]].excluded != self.walk:
                return at
        return 0

    cdef Reservation _reserve(
        self, int32_t chosen, int32_t first, uint32_t tokens, const Survey *survey
    ):
        cdef _Endpoint endpoint = <_Endpoint> self.by_slot[chosen]
        cdef Reservation reservation = reserve(
            self.table,
            self.slots[chosen].row,
            self.slots[chosen].generation,
            self.row,
            self.generation,
            tokens,
        )
        reservation.name = endpoint.name
        reservation.target = endpoint.target
        reservation.first = (<_Endpoint> self.by_slot[first]).name
        if survey.unwell:
            reservation.failing = get_u32(&self.table.health[self.slots[chosen].row].failures) != 0
            reservation.is_probe = survey.now_s != 0 and self._try(
                self.slots[chosen].row, survey.now_s
            )
        return reservation

    cdef bint _try(self, int32_t row, double now_s) noexcept:
        """Whether this pick probes an ejected endpoint.

        If so, other picks avoid it for ``HALF_OPEN_PROBE_S``.
        """
        cdef double until_s = get_time(&self.table.health[row].ejected_until_s)
        if until_s == 0:
            return False
        if until_s <= now_s < FAR_S:
            put_time(&self.table.health[row].ejected_until_s, now_s + HALF_OPEN_PROBE_S)
        return True

    cpdef int32_t ejected_count(self) noexcept:
        """Number of endpoints that are ejected or half-open."""
        cdef int32_t at, n = 0
        for at in range(self.everyone.n):
            n += get_time(&self.table.health[self.everyone.rows[at]].ejected_until_s) != 0
        return n

    cdef bint _all_well(self) noexcept:
        """Whether no endpoint has failed since its last complete response or is ejected."""
        cdef int32_t at
        cdef Health *health
        for at in range(self.everyone.n):
            health = &self.table.health[self.everyone.rows[at]]
            if get_u32(&health.failures) or get_time(&health.ejected_until_s) != 0:
                return False
        return True

    cdef double _now_s(self) except -1:
        return now() if self.clock is None else self.clock()
