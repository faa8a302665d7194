"""The prefix index: which endpoint's cache holds which beginnings of prompts, in shared memory.

A prompt is a chain of blocks. The hash of a block covers everything before it, so an endpoint that
has been sent a block has been sent all blocks before it. The index maps a block's hash to the
endpoints that it was sent to. It is one memfd of a fixed size, which all workers map, read and
write without locks.

An entry is 8 bytes, written at once: a part of the hash, the endpoint's row in the load table, its
epoch, and a stamp. Eight entries are a bucket, one cache line. A block's entries are all in one
bucket, so that one read finds every endpoint that holds it. A new entry takes the place of the
stalest in its bucket.

An engine evicts the blocks that it has not used for longest. The stamp is the number of tokens that
had been sent to the endpoint, in units of 1/``CACHE_UNITS`` of what its cache holds. Once as many
tokens as that have been sent since an entry was written or used, the block counts as evicted.
Stamps wrap after 16 cache sizes; an entry that has not been overwritten by then may count as cached
again. An endpoint that loses its cache, because its engine restarts, gets a new epoch: entries of
another epoch do not count.

Each worker also has a log of what it has sent, which the supervisor reports to the
peers; they note it in their own indexes.

All of this is a belief about the engines. Two workers that write one bucket at the same instant may
lose an entry, and different blocks may have equal parts of their hashes (one lookup of a block in
two million is wrong for that). Either can make a pick worse; neither affects the correctness of a
response.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport int32_t, uint32_t, uint64_t
from libc.string cimport memcpy

from kubeai._cache_line cimport prefetch
from kubeai._shared_memory cimport (
    SharedMemory,
    acquire,
    lines,
    read_fence,
    read_header,
    release,
    write_fence,
)
from kubeai._load cimport get_u32, get_u64, put_u32, put_u64

cdef extern from *:
    """
    /* Of the cells of one endpoint several workers add tokens. */
    #define kb_add(cell, value) __atomic_fetch_add((cell), (value), __ATOMIC_RELAXED)
    """
    uint64_t fetch_add "kb_add"(uint64_t *cell, uint64_t value) nogil

cdef enum:
    LAYOUT_VERSION = 2
    ROW_BITS = 20
    EPOCH_BITS = 4
    STAMP_BITS = 16
    TAG_SHIFT = ROW_BITS + EPOCH_BITS + STAMP_BITS
    _CACHE_UNITS = 4096
    FORGOTTEN = 1 << 20  # staler than any stamp

cdef uint64_t MAGIC = 0x6B75626561695058  # "kubeaiPX"
cdef uint32_t KEEPS_NOTHING = 0xFFFFFFFF  # in place of a cache's size
cdef uint64_t STAMP_MASK = (1 << STAMP_BITS) - 1
cdef uint64_t EPOCH_MASK = (1 << EPOCH_BITS) - 1
cdef uint64_t ROW_MASK = (1 << ROW_BITS) - 1

CACHE_UNITS = _CACHE_UNITS
ENTRIES_MAX = 1 << 30
ROWS_MAX = 1 << ROW_BITS


cdef size_t _logs_at(uint64_t rows) noexcept:
    return lines(sizeof(Header)) + lines(rows * sizeof(Row))


cdef size_t _buckets_at(uint64_t rows, uint64_t columns) noexcept:
    return _logs_at(rows) + lines(columns * sizeof(Log))


cdef size_t _size_of(uint64_t rows, uint64_t columns, uint64_t buckets) noexcept:
    return _buckets_at(rows, columns) + buckets * BUCKET_ENTRIES * sizeof(uint64_t)


@cython.final
cdef class PrefixIndex(SharedMemory):
    """Hashes of blocks → endpoints, in one memfd; see the module docstring."""

    def __init__(self):
        raise TypeError("use PrefixIndex.create or PrefixIndex.attach")

    def __cinit__(self):
        self._column = -1

    @staticmethod
    def create(int rows, Py_ssize_t entries, int workers=1):
        """See the stub."""
        cdef uint64_t buckets = 1
        if not 1 <= rows <= ROWS_MAX:
            raise ValueError(f"rows must be 1 to {ROWS_MAX}, not {rows}")
        if not 1 <= entries <= ENTRIES_MAX:
            raise ValueError(f"entries must be 1 to {ENTRIES_MAX}, not {entries}")
        if not 1 <= workers <= COLUMNS_MAX:
            raise ValueError(f"workers must be 1 to {COLUMNS_MAX}, not {workers}")
        while buckets * BUCKET_ENTRIES < <uint64_t> entries:
            buckets *= 2
        cdef PrefixIndex index = PrefixIndex.__new__(PrefixIndex)
        index._create("kubeai-prefixes", _size_of(rows, workers, buckets))
        cdef Header *header = <Header *> index.base
        header.version = LAYOUT_VERSION
        header.rows = rows
        header.buckets = buckets
        header.columns = workers
        header.magic = MAGIC
        index._lay_out()
        return index

    @staticmethod
    def attach(int fd, int column=-1):
        """See the stub."""
        cdef PrefixIndex index = PrefixIndex.__new__(PrefixIndex)
        cdef Header header
        cdef bytes start = read_header(fd, "prefix index", sizeof(Header), MAGIC, LAYOUT_VERSION)
        header = (<Header *> <const char *> start)[0]
        if (
            not 1 <= header.rows <= <uint64_t> ROWS_MAX
            or not 1 <= header.buckets <= <uint64_t> ENTRIES_MAX // BUCKET_ENTRIES
            or header.buckets & (header.buckets - 1)
        ):
            raise ValueError(f"prefix index has {header.rows} rows, {header.buckets} buckets")
        if not 1 <= header.columns <= COLUMNS_MAX:
            raise ValueError(f"prefix index has {header.columns} columns")
        index._attach(
            fd, "prefix index", _size_of(header.rows, header.columns, header.buckets)
        )
        if not -1 <= column < <int> header.columns:
            raise ValueError(f"column must be -1 to {header.columns - 1}, not {column}")
        index._lay_out()
        index._column = column
        return index

    cdef void _lay_out(self) noexcept:
        cdef Header *header = <Header *> self.base
        self.rows = <int> header.rows
        self.entries = <Py_ssize_t> header.buckets * BUCKET_ENTRIES
        self._mask = header.buckets - 1
        self.row_states = <Row *> (self.base + lines(sizeof(Header)))
        self.header = header
        self.columns = <int> header.columns
        self.logs = <Log *> (self.base + _logs_at(header.rows))
        self.cells = <uint64_t *> (self.base + _buckets_at(header.rows, header.columns))

    cdef int _check_row(self, Py_ssize_t row) except -1:
        if self.base == NULL:
            raise ValueError("the prefix index is closed")
        if not 0 <= row < self.rows:
            raise IndexError(f"row must be 0 to {self.rows - 1}, not {row}")
        return 0

    @property
    def silent(self):
        """See the stub."""
        self._check_row(0)
        return get_u64(&self.header.silent)

    @silent.setter
    def silent(self, uint64_t count):
        self._check_row(0)
        put_u64(&self.header.silent, count)

    # -- endpoints -----------------------------------------------------------------------------

    def set_cache(self, Py_ssize_t row, uint32_t tokens):
        """See the stub."""
        self._check_row(row)
        if tokens == 0:
            tokens = KEEPS_NOTHING
        if get_u32(&self.row_states[row].cache_tokens) != tokens:  # stamps have another unit now
            put_u32(&self.row_states[row].cache_tokens, tokens)
            self.forget(row)

    def forget(self, Py_ssize_t row):
        """See the stub."""
        self._check_row(row)
        put_u32(&self.row_states[row].epoch, get_u32(&self.row_states[row].epoch) + 1)

    # -- blocks --------------------------------------------------------------------------------

    def note(self, Py_ssize_t row, blocks not None, uint32_t new_tokens):
        """See the stub."""
        cdef uint64_t hashes[SAMPLES_MAX]
        cdef int n = self._copy_hashes(blocks, hashes)
        self._check_row(row)
        self.record(<int32_t> row, hashes, n, new_tokens)

    def find(self, blocks not None):
        """See the stub."""
        cdef uint64_t hashes[SAMPLES_MAX]
        cdef Found found[FOUND_MAX]
        cdef int n = self._copy_hashes(blocks, hashes)
        cdef int at
        self._check_row(0)
        n = self.lookup(hashes, n, found)
        return {found[at].row: found[at].depth for at in range(n)}

    def take_log(self, int limit):
        """See the stub."""
        cdef LogEntry entry
        cdef Log *log
        cdef uint64_t written
        cdef int column
        cdef Py_ssize_t skipped = 0
        cdef list entries = []
        self._check_row(0)
        for column in range(self.columns):
            log = &self.logs[column]
            written = acquire(&log.written)
            if written - self.taken[column] > <uint64_t> limit:
                skipped += written - limit - self.taken[column]
                self.taken[column] = written - limit
            while self.taken[column] < written:
                entry = log.entries[self.taken[column] % LOG_ENTRIES]
                self.taken[column] += 1
                # Discard the entry if the worker may have overwritten it during the read.
                read_fence()
                if acquire(&log.written) - self.taken[column] >= LOG_ENTRIES - 1:
                    skipped += 1
                elif 0 <= entry.row < self.rows and entry.n <= SAMPLES_MAX:
                    blocks = PyBytes_FromStringAndSize(<char *> entry.blocks, 8 * entry.n)
                    entries.append((entry.row, entry.new_tokens, blocks))
        return entries, skipped

    cdef int _copy_hashes(self, blocks, uint64_t *hashes) except -1:
        """Copy a prompt's block hashes to ``hashes``; returns how many.

        Bytes are cut off at SAMPLES_MAX; a longer sequence is a ValueError.
        """
        cdef int n = 0
        if isinstance(blocks, bytes):
            n = <int> min(PyBytes_GET_SIZE(blocks) // 8, <Py_ssize_t> SAMPLES_MAX)
            memcpy(hashes, PyBytes_AS_STRING(blocks), 8 * n)
            return n
        if len(blocks) > SAMPLES_MAX:
            raise ValueError(f"a prompt has at most {SAMPLES_MAX} sampled blocks")
        for block in blocks:
            hashes[n] = block
            n += 1
        return n

    cdef uint64_t *_bucket(self, uint64_t block) noexcept:
        return &self.cells[(block & self._mask) * BUCKET_ENTRIES]

    cdef uint32_t _advance(self, Row *row, uint32_t new_tokens) noexcept:
        """Count the tokens as sent, and return the endpoint's stamp after that."""
        cdef uint64_t cache_tokens = get_u32(&row.cache_tokens)
        cdef uint64_t sent_tokens = fetch_add(&row.sent_tokens, new_tokens) + new_tokens
        if cache_tokens:
            put_u32(&row.stamp, <uint32_t> (sent_tokens * _CACHE_UNITS // cache_tokens))
        return get_u32(&row.stamp)

    cdef uint32_t _staleness(self, uint64_t entry) noexcept:
        """How much has been sent to an entry's endpoint since it was used, in cache units."""
        cdef uint64_t row = entry >> (EPOCH_BITS + STAMP_BITS) & ROW_MASK
        cdef const Row *state
        if entry == 0 or row >= <uint64_t> self.rows:
            return FORGOTTEN
        state = &self.row_states[row]
        if (entry >> STAMP_BITS & EPOCH_MASK) != (get_u32(&state.epoch) & EPOCH_MASK):
            return FORGOTTEN
        return <uint32_t> ((get_u32(&state.stamp) - entry) & STAMP_MASK)

    cdef void record(
        self, int32_t row, const uint64_t *blocks, int n, uint32_t new_tokens
    ) noexcept:
        """Note that a prompt with these blocks is sent to an endpoint; see ``note``."""
        cdef Row *state = &self.row_states[row]
        cdef uint64_t value
        cdef uint64_t *bucket
        cdef uint64_t entry
        cdef uint32_t staleness, stalest
        cdef int block, at, place
        if get_u32(&state.cache_tokens) == KEEPS_NOTHING:
            return
        value = (<uint64_t> row << EPOCH_BITS | (get_u32(&state.epoch) & EPOCH_MASK)) << STAMP_BITS
        value |= self._advance(state, new_tokens) & STAMP_MASK
        for block in range(n):
            prefetch(self._bucket(blocks[block]))
        for block in range(n):
            bucket = self._bucket(blocks[block])
            stalest = 0
            place = 0
            for at in range(BUCKET_ENTRIES):
                entry = get_u64(&bucket[at])
                if is_of(entry, blocks[block], row):
                    place = at
                    break
                staleness = self._staleness(entry)
                if staleness > stalest:
                    stalest = staleness
                    place = at
            put_u64(&bucket[place], tag_of(blocks[block]) | value)

    cdef void send(
        self, int32_t row, const uint64_t *blocks, int n, uint32_t new_tokens
    ) noexcept:
        """Record a prompt that this worker sends, in its log too."""
        cdef Log *log
        cdef LogEntry *entry
        cdef uint64_t written
        self.record(row, blocks, n, new_tokens)
        if self._column < 0 or n == 0:
            return
        log = &self.logs[self._column]
        written = get_u64(&log.written)
        entry = &log.entries[written % LOG_ENTRIES]
        write_fence()
        entry.row = row
        entry.new_tokens = new_tokens
        entry.n = n
        memcpy(entry.blocks, blocks, n * sizeof(uint64_t))
        release(&log.written, written + 1)

    cdef int lookup(self, const uint64_t *blocks, int n, Found *found) noexcept:
        """The endpoints that are believed to hold a beginning of the prompt, with its depth.

        Fills ``found``, which has FOUND_MAX places; returns how many. The buckets are usually in
        the cache, because _prompt_scan.pyx loads them when it has hashed the prompt.
        """
        cdef uint64_t *bucket
        cdef uint64_t entry, tag
        cdef int32_t row
        cdef int block, at, place, count = 0
        for block in range(n - 1, -1, -1):  # the deepest first: the first hit of a row counts
            bucket = self._bucket(blocks[block])
            tag = tag_of(blocks[block])
            for at in range(BUCKET_ENTRIES):
                entry = get_u64(&bucket[at])
                if (entry ^ tag) >> TAG_SHIFT != 0 or self._staleness(entry) >= _CACHE_UNITS:
                    continue
                row = <int32_t> (entry >> (EPOCH_BITS + STAMP_BITS) & ROW_MASK)
                for place in range(count):
                    if found[place].row == row:
                        break
                else:
                    if count == FOUND_MAX:
                        return count
                    found[count].row = row
                    found[count].depth = block + 1
                    count += 1
        return count


cdef inline uint64_t tag_of(uint64_t block) noexcept:
    """The part of a hash that an entry has, in its place; the bucket's number is another part."""
    return block >> TAG_SHIFT << TAG_SHIFT


cdef inline bint is_of(uint64_t entry, uint64_t block, int32_t row) noexcept:
    return (entry ^ block) >> TAG_SHIFT == 0 and (
        <int32_t> (entry >> (EPOCH_BITS + STAMP_BITS) & ROW_MASK) == row
    )
