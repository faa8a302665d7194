"""What a worker counts in the load table: its requests (:class:`Admission`) and their picks of
endpoints (:class:`Reservation`). Each is counted once and released once."""

cimport cython
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t

from kubeai._load cimport (
    OUTCOMES,
    PENDING_MAX,
    PICKS,
    REPORTED_CACHED_TOKENS,
    REPORTED_OUTPUT_TOKENS,
    REPORTED_PROMPT_TOKENS,
    LoadTable,
    add_load,
    count,
    down,
    get_i64,
    get_u64,
    kind_index,
    load_of,
    pending_of,
    put_i64,
    subtract_load,
    up,
)

# How a request may end, in the order of the cells; the last, retried, is not an outcome.
from kubeai._load import OUTCOME_NAMES as _OUTCOME_NAMES

cdef int64_t live_admissions = 0
cdef int64_t live_reservations = 0


def live():
    """Number of open (Admissions, Reservations) in this process: a leak check for tests."""
    return live_admissions, live_reservations


cpdef Admission admit(
    LoadTable table, Py_ssize_t row, uint32_t generation, str kind="http"
):
    """Count one request as active for the model in ``row`` until the Admission is closed."""
    if table is None:
        raise TypeError("an Admission needs a load table")
    global live_admissions
    table._check_row(row)
    table._check_writer()
    cdef size_t cell = <size_t> table._column * table.rows + row
    cdef int index = kind_index(kind)
    cdef Admission admission = Admission.__new__(Admission)
    admission.table = table
    admission.row = <int> row
    admission.generation = generation
    admission.active_cell = (
        &table.active_cells[index * <size_t> table.columns * table.rows + cell]
    )
    admission.held_cell = &table.held_cells[cell]
    admission.column_active = &table.column_headers[table._column].active
    admission.outcome_cells = &table.outcome_cells[OUTCOMES * cell]
    admission._open = True
    live_admissions += 1
    put_i64(admission.column_active, get_i64(admission.column_active) + 1)
    if table.lives(row, generation):
        up(admission.active_cell)
    return admission


@cython.final
@cython.freelist(256)
@cython.no_gc
cdef class Admission:
    """One request, counted as active for a model until closed."""

    def __init__(self):
        raise TypeError("use admit()")

    cdef bint _counts(self) noexcept:
        return self.table.header != NULL and self.table.lives(self.row, self.generation)

    def hold(self):
        """Count the request as held too (idempotent; no effect once closed)."""
        if self._open and not self._held:
            self._held = True
            if self._counts():
                up(self.held_cell)

    def unhold(self):
        if self._held:
            self._held = False
            if self._counts():
                down(self.held_cell)

    def close(self):
        """Stop counting it (idempotent; also done when garbage-collected)."""
        if self._open:
            self._close()

    def count(self, outcome):
        """Count the request's outcome, or a retry: one of ``OUTCOME_NAMES``."""
        self._count(_OUTCOME_NAMES.index(outcome))

    cdef void _close(self) noexcept:
        global live_admissions
        if self._held:
            self.unhold()
        self._open = False
        live_admissions -= 1
        if self.table.header == NULL:
            return
        cdef int64_t total = get_i64(self.column_active)
        if total > 0:
            put_i64(self.column_active, total - 1)
        if self._counts():
            down(self.active_cell)

    cdef void _count(self, int outcome) noexcept:
        if self._counts():
            count(&self.outcome_cells[outcome], 1)

    def __dealloc__(self):
        if self._open:
            self._close()


@cython.final
@cython.freelist(1024)
@cython.no_gc_clear  # __dealloc__ releases it and still needs the table
cdef class Reservation:
    """One pick of an endpoint, counted in its row and its model's row until released."""

    def __init__(self):
        raise TypeError("use Ring.pick_hashed or Ring.pick_least")

    @property
    def released(self):
        return self._released

    cdef void _subtract(self, uint64_t load) noexcept:
        cdef LoadTable table = self.table
        if table.header == NULL:
            return
        if table.lives(self.row, self.generation):
            subtract_load(self.cell, load)
        if table.lives(self.model_row, self.model_generation):
            subtract_load(self.model_cell, load)

    cdef void _computed(self) noexcept:
        """The prompt's tokens are no longer pending (idempotent)."""
        if self.pending:
            self._subtract(load_of(0, self.pending))
            self.pending = 0

    cdef void _prefilled(self, double now_s) noexcept:
        """The first byte of the response's body has come."""
        self._computed()
        if self.ahead_tokens > 0:
            self.table.learn(
                self.row, self.model_row, max(0.0, now_s - self.picked_s), self.ahead_tokens
            )
            self.ahead_tokens = 0

    cdef void _count_reported(self, uint64_t prompt, uint64_t cached, uint64_t output) noexcept:
        """Count the tokens that the engine has reported, for the model."""
        cdef LoadTable table = self.table
        if table.header == NULL or not table.lives(self.model_row, self.model_generation):
            return
        cdef uint64_t *cells = &table.pick_cells[
            PICKS * (<size_t> table._column * table.rows + self.model_row)
        ]
        count(&cells[REPORTED_PROMPT_TOKENS], prompt)
        count(&cells[REPORTED_CACHED_TOKENS], cached)
        count(&cells[REPORTED_OUTPUT_TOKENS], output)

    def prefilled(self, double now_s):
        """See the stub."""
        if not self._released and self.table.header != NULL:
            self._prefilled(now_s)

    cdef void _release(self) noexcept:
        global live_reservations
        self._released = True
        live_reservations -= 1
        self._subtract(load_of(1, self.pending))
        self.pending = 0
        if self.queues is not None:
            self.queues.freed(self.model_row)

    def release(self):
        """Stop counting it (idempotent; also done when garbage-collected)."""
        if not self._released:
            self._release()

    def __dealloc__(self):
        if self.table is not None and not self._released:
            self._release()


cdef Reservation reserve(
    LoadTable table,
    int row,
    uint32_t generation,
    int model_row,
    uint32_t model_generation,
    uint32_t pending,
):
    """Count one pick of ``row`` for ``model_row``, with the tokens that it has to compute.

    The caller has checked rows and column.
    """
    global live_reservations
    cdef Reservation reservation = Reservation.__new__(Reservation)
    reservation.table = table
    reservation.row = row
    reservation.generation = generation
    reservation.model_row = model_row
    reservation.model_generation = model_generation
    reservation.cell = &table.load_cells[<size_t> row * table.stride + table._column]
    reservation.model_cell = (
        &table.load_cells[<size_t> model_row * table.stride + table._column]
    )
    # The model's cell has the sum of its endpoints' tokens: if it has room, so have theirs.
    cdef uint32_t counted = min(<uint32_t> PENDING_MAX, pending_of(get_u64(reservation.model_cell)))
    reservation.pending = min(pending, <uint32_t> PENDING_MAX - counted)
    live_reservations += 1
    cdef uint64_t load = load_of(1, reservation.pending)
    if table.lives(row, generation):
        add_load(reservation.cell, load)
    if table.lives(model_row, model_generation):
        add_load(reservation.model_cell, load)
    return reservation
