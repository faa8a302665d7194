"""The pick of an endpoint for a request, by the strategy of its Model.

``LeastLoad`` and ``PrefixHash`` are in ``_ring``. ``PrefixCache`` picks the endpoint where a
request costs all requests the least time. In tokens of prefill, that cost is

    pending + new + in flight × (min(new, DELAY_TOKENS) + STEP_TOKENS) / 8

``pending``: tokens of prompts that were sent there and have not led to the first byte of a body.
``new``: tokens of this prompt that the prefix index does not know there. The first two are what the
request waits for. Those in flight wait for its prefill, but not longer than they run, and with each
of them a step takes longer. The cost is multiplied by the endpoint's slowness, its time per token
relative to that of the model's endpoints together. It is learned from the times to the first byte
of streamed responses, and bounded by ``SLOWNESS_MAX``, because an engine may lie.

A prompt of which the index knows nothing may have been sent by a peer that has not reported
it yet. Its beginning is therefore assumed at the ring's endpoint for it, so that peers agree.

A response that is not streamed has its first byte when it is complete. The end of its prefill is
estimated with the learned time per token, and applied at the next pick or ``expire``; that of a
short prompt is not, because its tokens hardly count beside its request.
"""

cimport cython
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t

from collections import deque

from kubeai._counts cimport Reservation
from kubeai._load cimport (
    CACHED_TOKENS,
    PICKED_AWAY,
    PICKED_CACHED,
    PICKED_NEW,
    PICKS,
    PROMPT_TOKENS,
    REQUEST_TOKENS,
    LoadTable,
    Speed,
    count,
    get_time,
    get_u64,
    in_flight_of,
    work_of,
)
from kubeai._members cimport Members
from kubeai._queue_table cimport QueueTable
from kubeai._prefix cimport PrefixIndex
from kubeai._nodes cimport slot_of
from kubeai._prompt cimport Known, Prompt, add_known, known_tokens
from kubeai._ring cimport Ring, Survey, _Endpoint

cdef enum:
    # A decode step takes about as long as this many tokens of a prompt: 110 to 250 for the engines
    # in simulation/presets.py.
    STEP_TOKENS = 200
    # With more, the long prompts of a trace wait in queues elsewhere to spare the requests in
    # flight, which makes its 99th percentile half as long again. With less, it has fewer hits in
    # overload.
    DELAY_TOKENS = 16384
    # An endpoint's slowness has half its weight when this many samples per endpoint came after its
    # last one: an endpoint that seemed slow is tried again.
    FADE_SAMPLES = 8
    # Of a shorter prompt, the tokens that the chat template adds would count.
    LEARNED_MIN_BYTES = 1024

cdef double SLOWNESS_MAX = 4.0
# Times to the first byte vary about as much as their mean. An endpoint whose mean of n differs from
# the model's by less than this many standard errors is not slower, but had other requests.
cdef double NOISE_ERRORS = 2.5
cdef double UNKNOWN_S_PER_TOKEN = 2e-4
cdef double BELIEF = 0.9  # how much of a beginning the ring's endpoint is believed to have
cdef int *BELIEF_DEPTHS = [4, 16, 28]  # samples that end after 1, 4 and 16 KiB of conversation
cdef double ESTIMATE_MAX_S = 60.0
cdef double TOKENS_PER_BYTE = 0.25  # English
cdef double TOKENS_PER_BYTE_MIN = 1 / 16.0  # what is learned is bounded, because an engine may lie
cdef double TOKENS_PER_BYTE_MAX = 1.0
cdef double LEARNED_SHARE = 1 / 32.0  # of one report, in what is learned

STRATEGIES = ("LeastLoad", "PrefixHash", "PrefixCache")


cdef inline int64_t per_request(int64_t new_tokens) noexcept:
    """What a request in flight adds to the cost: an eighth of a prefill, and of a decode step."""
    return 1 + ((min(new_tokens, DELAY_TOKENS) + STEP_TOKENS) >> 3)


cdef inline double slowness_of(Picker picker, int32_t row) noexcept:
    """An endpoint's time per token, relative to that of the model's endpoints together."""
    return 1.0 if get_u64(&picker.ring.table.speeds[row].samples) == 0 else picker._learned(row)


cdef inline double cost_of(Picker picker, int32_t row, uint32_t new_tokens) noexcept:
    """The cost of a request with new tokens at an endpoint. Inlined: called for each endpoint."""
    cdef uint64_t load = picker.ring.table._load(row)
    return slowness_of(picker, row) * <double> (
        new_tokens + work_of(load, per_request(new_tokens))
    )


@cython.final
cdef class Picker:
    """See the stub."""

    def __init__(self, Ring ring not None, PrefixIndex index=None):
        self.ring = ring
        self.index = index
        self.estimated = deque()
        self.tokens_per_byte = TOKENS_PER_BYTE
        self.configure("LeastLoad")

    def configure(self, str strategy, prefix_char_length=0, load_factor=0):
        """See the stub."""
        self.strategy = STRATEGIES.index(strategy)
        self.prefix_char_length = prefix_char_length
        self.load_factor = load_factor

    def limit(self, int64_t capacity, QueueTable queues):
        """See the stub."""
        if queues is None and capacity:
            raise ValueError("a capacity needs a queue table")
        self.queues = queues if capacity else None
        self.capacity = self.ring.capacity = capacity

    cpdef Reservation pick(self, Prompt prompt, str adapter=None, object exclude=()):
        """See the stub."""
        cdef Reservation reservation
        if prompt is None:
            raise TypeError("a pick needs a prompt")
        self.expire()
        if self.strategy == PREFIX_CACHE:
            reservation = self._pick_cached(prompt, adapter, exclude)
        else:
            reservation = self._pick_by_ring(prompt, adapter, exclude)
        if self.queues is not None and reservation is not None:
            reservation.queues = self.queues
        return reservation

    cpdef Reservation pick_new(self, Prompt prompt, str adapter=None, str tenant=""):
        """See the stub."""
        cdef Reservation reservation
        if self.queues is None:
            return self.pick(prompt, adapter)
        if self.queues.is_any_waiting(self.ring.row, adapter is not None):
            return None
        if self.queues.is_peer_waiting(self.ring.row) and not self.has_room(adapter, 2):
            return None
        reservation = self.pick(prompt, adapter)
        if reservation is not None:
            self.queues.charge_now(
                self.ring.row, self.ring.generation, tenant, prompt.tokens + REQUEST_TOKENS
            )
        return reservation

    cpdef int settle(self, str tenant, uint32_t output_tokens) except -1:
        """See the stub."""
        if self.queues is not None and output_tokens > REQUEST_TOKENS:
            self.queues.charge_more(
                self.ring.row, self.ring.generation, tenant, output_tokens - REQUEST_TOKENS
            )
        return 0

    def pick_beyond_capacity(self, Prompt prompt, str adapter=None, object exclude=()):
        """See the stub."""
        self.ring.capacity = 0
        try:
            return self.pick(prompt, adapter, exclude)
        finally:
            self.ring.capacity = self.capacity

    cpdef bint has_room(self, str adapter=None, int64_t requests=1):
        """See the stub."""
        cdef Members members = self.ring._members(adapter)
        cdef int32_t at
        if members is None:
            return False
        if not self.capacity:
            return members.n > 0
        for at in range(members.n):
            requests -= max(
                0, self.capacity - in_flight_of(self.ring.table._load(members.rows[at]))
            )
            if requests <= 0:
                return True
        return False

    cdef Reservation _pick_by_ring(self, Prompt prompt, str adapter, object exclude):
        cdef Reservation reservation
        if self.strategy == PREFIX_HASH and prompt.has_key:
            reservation = self.ring.pick_hashed(prompt.key, adapter, exclude, prompt, self.index)
            if reservation is not None:
                self._count(prompt, reservation, reservation.cached)
        else:
            reservation = self.ring.pick_least(adapter, exclude, prompt.tokens)
        if reservation is not None and (reservation.pending > REQUEST_TOKENS or prompt.streams):
            self._expect(reservation, reservation.pending, prompt.streams)
        return reservation

    cdef Reservation _pick_cached(self, Prompt prompt, str adapter, object exclude):
        cdef Ring ring = self.ring
        cdef Members members
        cdef Survey survey
        cdef Known known, believed
        cdef const Known *held = &known
        cdef Choice choice
        cdef Reservation reservation
        cdef int32_t row, first
        cdef uint32_t new_tokens
        cdef int64_t ahead
        ring._begin()
        members = ring._members(adapter)
        survey.per_request = REQUEST_TOKENS
        if members is None or not ring._survey(&survey, members, exclude, self.load_factor != 0):
            return None
        ring._turn(members)
        prompt.look_up(self.index, &known)
        if prompt.n and self._may_be_unreported(&known):
            believed = known
            held = &believed
            self._believe(prompt, &believed)
        choice.at = -1
        self._cheapest(members, &survey, prompt, held, members.cursor, members.n, &choice)
        self._cheapest(members, &survey, prompt, held, 0, members.cursor, &choice)
        if choice.at < 0:
            choice.at = ring._any(members)
        row = members.rows[choice.at]
        # What is only believed does not count as cached: it would hide work from the next picks.
        new_tokens = prompt.tokens - known_tokens(&known, row)
        choice.cost = cost_of(self, row, new_tokens)
        members.cursor = choice.at + 1 if choice.at + 1 < members.n else 0
        ahead = new_tokens + ring._work(row, 0)
        first = self._most_cached(members, &survey, &known, choice.at)
        reservation = ring._reserve(
            members.slots[choice.at], members.slots[first], new_tokens, &survey
        )
        reservation.cached = prompt.tokens - new_tokens
        reservation.cost = choice.cost
        if first != choice.at:
            reservation.first_cached = known_tokens(&known, members.rows[first])
            reservation.first_cost = cost_of(
                self, members.rows[first], prompt.tokens - reservation.first_cached
            )
        self._count(prompt, reservation, known.n)
        if self.index is not None:
            self.index.send(row, prompt.blocks, prompt.n, new_tokens)
        if reservation.pending > REQUEST_TOKENS or prompt.streams:
            self._expect(reservation, ahead, prompt.streams)
        return reservation

    cdef bint _may_be_unreported(self, const Known *known) noexcept:
        """Whether peers may have sent this prompt's beginning and not reported it yet."""
        if self.index is None:
            return False
        if get_u64(&self.index.header.silent):
            return True
        return known.n == 0 and get_u64(&self.ring.table.header.peers) != 0

    cdef void _believe(self, Prompt prompt, Known *known) noexcept:
        """Add what peers may have sent, to the ring's endpoints for the prompt.

        All KubeAI replicas prefer those for a prompt that is new to them.
        """
        cdef Ring ring = self.ring
        cdef size_t at
        cdef int32_t slot
        cdef int depth, which
        for which in range(3):
            depth = BELIEF_DEPTHS[which]
            if depth > prompt.n:
                break
            at = ring.nodes.first_at(prompt.blocks[depth - 1])
            slot = slot_of(ring.nodes.nodes[at])
            add_known(
                known, ring.slots[slot].row, <uint32_t> (prompt.depths[depth - 1] * BELIEF)
            )

    cdef void _cheapest(
        self,
        Members members,
        const Survey *survey,
        Prompt prompt,
        const Known *known,
        int32_t start,
        int32_t end,
        Choice *choice,
    ) noexcept:
        """Update the choice with members in [start, end)."""
        cdef bint all_open = survey.open == members.n
        cdef int32_t at, row
        cdef uint32_t new_tokens
        cdef double cost
        for at in range(start, end):
            row = members.rows[at]
            if not all_open and not self.ring._is_open(members.slots[at], survey.now_s):
                continue
            new_tokens = prompt.tokens - known_tokens(known, row)
            if self.load_factor and self._exceeds(survey, row, REQUEST_TOKENS + new_tokens):
                continue
            cost = cost_of(self, row, new_tokens)
            if choice.at < 0 or cost < choice.cost:
                choice.at = at
                choice.cost = cost

    cdef int32_t _most_cached(
        self, Members members, const Survey *survey, const Known *known, int32_t chosen
    ) noexcept:
        """The member that could serve and has the most of the prompt; the chosen one on a tie."""
        cdef uint32_t most_tokens = known_tokens(known, members.rows[chosen])
        cdef int32_t at, row = -1
        for at in range(known.n):
            if known.tokens[at] > most_tokens:
                most_tokens = known.tokens[at]
                row = known.found[at].row
        if row >= 0:
            for at in range(members.n):
                if members.rows[at] == row and self.ring._is_open(members.slots[at], survey.now_s):
                    return at
        return chosen

    cdef void _count(self, Prompt prompt, Reservation reservation, int known_n) noexcept:
        cdef LoadTable table = self.ring.table
        cdef uint64_t *cells = &table.pick_cells[
            PICKS * (<size_t> table._column * table.rows + self.ring.row)
        ]
        if known_n == 0:
            reservation.reason = PICKED_NEW
        elif reservation.first_cached > reservation.cached:
            reservation.reason = PICKED_AWAY
        else:
            reservation.reason = PICKED_CACHED
        if not table.lives(self.ring.row, self.ring.generation):
            return
        count(&cells[PROMPT_TOKENS], prompt.tokens)
        count(&cells[CACHED_TOKENS], reservation.cached)
        count(&cells[reservation.reason], 1)

    def explain(self, Prompt prompt not None, str adapter=None, object exclude=()):
        """See the stub."""
        cdef Ring ring = self.ring
        cdef Members members
        cdef Survey survey
        cdef Known known
        cdef int32_t at, row
        cdef uint32_t cached
        cdef list candidates = []
        ring._begin()
        members = ring._members(adapter)
        survey.per_request = REQUEST_TOKENS
        if members is None or not ring._survey(&survey, members, exclude, True):
            return candidates
        prompt.look_up(self.index, &known)
        for at in range(members.n):
            if not ring._is_open(members.slots[at], survey.now_s):
                continue
            row = members.rows[at]
            cached = known_tokens(&known, row)
            candidates.append(
                {
                    "endpoint": (<_Endpoint> ring.by_slot[members.slots[at]]).name,
                    "cached": cached,
                    "pending": ring._work(row, 0),
                    "in_flight": ring._work(row, 1) - ring._work(row, 0),
                    "slowness": slowness_of(self, row),
                    "cost": cost_of(self, row, prompt.tokens - cached),
                }
            )
        return candidates

    cdef bint _exceeds(self, const Survey *survey, int32_t row, int64_t own) noexcept:
        """Whether an endpoint's load, with ``own`` of this request, would be over the bound."""
        cdef int64_t bound = self.ring._bound(survey, self.load_factor, own)
        return self.ring._work(row, REQUEST_TOKENS) + own > bound

    # -- learned times ---------------------------------------------------------------------------

    cdef double _learned(self, int32_t row) noexcept:
        """What ``slowness_of`` returns for an endpoint with samples."""
        cdef Speed *own = &self.ring.table.speeds[row]
        cdef uint64_t samples = get_u64(&self.ring.table.speeds[self.ring.row].samples)
        cdef double age = <double> (samples - get_u64(&own.samples))
        cdef double slowness = get_time(&own.slowness)
        slowness = min(max(slowness, 1 / SLOWNESS_MAX), SLOWNESS_MAX)
        age /= FADE_SAMPLES * self.ring.everyone.n
        slowness = 1 + (slowness - 1) / (1 + age * age)
        cdef double errors_squared = (slowness - 1) * (slowness - 1) * get_time(&own.n)
        return slowness if errors_squared > NOISE_ERRORS * NOISE_ERRORS else 1.0

    cdef void learn_tokens(self, Prompt prompt, uint32_t reported) noexcept:
        """Update the estimate of tokens per byte (a moving average).

        ``reported``: the tokens that an engine has reported for the prompt.
        """
        cdef double per_byte
        if prompt.text_bytes < LEARNED_MIN_BYTES:
            return
        per_byte = <double> reported / <double> prompt.text_bytes
        per_byte = min(max(per_byte, TOKENS_PER_BYTE_MIN), TOKENS_PER_BYTE_MAX)
        self.tokens_per_byte += (per_byte - self.tokens_per_byte) * LEARNED_SHARE

    cdef int _expect(self, Reservation reservation, int64_t ahead, bint streams) except -1:
        """Note what a reservation waits for: to learn from it, or to estimate when it ends."""
        cdef double now_s = self.ring._now_s()
        cdef double s_per_token
        if streams:
            reservation.ahead_tokens = <double> (ahead + STEP_TOKENS)
            reservation.picked_s = now_s
        else:
            s_per_token = get_time(&self.ring.table.speeds[self.ring.row].slowness)
            s_per_token = s_per_token if s_per_token > 0 else UNKNOWN_S_PER_TOKEN
            ends_s = now_s + min(ESTIMATE_MAX_S, s_per_token * (ahead + STEP_TOKENS))
            self.estimated.append((ends_s, reservation))
        return 0

    cpdef int expire(self) except -1:
        """See the stub."""
        cdef double now_s
        cdef Reservation reservation
        if not self.estimated:
            return 0
        now_s = self.ring._now_s()
        while self.estimated and self.estimated[0][0] <= now_s:
            _, reservation = self.estimated.popleft()
            if not reservation._released:
                reservation._computed()
        return 0


cdef class RoutedFields:
    """See the stub."""
