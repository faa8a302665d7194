"""The journal: the last requests of each worker, shared by the processes of a KubeAI replica.

It is one memfd of a fixed size, which all processes map. Each worker has a column, of which it is
the only writer: a ring of entries, two cache lines each. A request is entered when it has ended.
The supervisor reads the entries when someone looks at its console; otherwise nobody does.

An entry has a number, from 1. Its writer sets the number to 0, writes the entry, then sets the
number. A reader that finds the expected number before and after its copy has a whole entry. A
worker that is killed while it writes leaves a 0, which the next process of that column overwrites.

An entry says which model and endpoint by their rows in the load table and the rows' generations, so
that a row that has been reused is not taken for its former owner. The contents of a request or a
response are never in it.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from collections import namedtuple

from kubeai._load cimport get_u64, put_u64
from kubeai._shared_memory cimport (
    SharedMemory,
    acquire,
    lines,
    read_fence,
    read_header,
    release,
    write_fence,
)

cdef enum:
    LAYOUT_VERSION = 1
    ENTRIES_MAX = 1 << 20

cdef uint64_t MAGIC = 0x6B7562656169524A  # "kubeaiRJ"

ID_BYTES = ID_MAX_BYTES
ENDS = ("left", "whole", "broken")
PICKS = (None, "cached", "away", "new", "least", "hashed", "bounded")

Entry = namedtuple(
    "Entry",
    "began_s waited_s first_s duration_s model_row model_generation row generation status end pick "
    "retries streamed estimated_tokens expected_tokens prompt_tokens cached_tokens output_tokens "
    "id",
)


cdef size_t _size_of(uint64_t columns, uint64_t entries) noexcept:
    return lines(sizeof(Header)) + columns * (sizeof(Column) + entries * sizeof(Slot))


cdef object _tokens(uint32_t tokens):
    return None if tokens == UNKNOWN_TOKENS else tokens


cdef uint32_t _stored(object tokens) except *:
    return UNKNOWN_TOKENS if tokens is None else <uint32_t> tokens


cdef object _entry(const Slot *slot):
    """A copy of a slot as a Python value."""
    cdef Py_ssize_t size = min(<int> slot.id_size, <int> ID_MAX_BYTES)
    return Entry(
        slot.began_s,
        slot.waited_s,
        None if slot.first_s < 0 else slot.first_s,
        slot.duration_s,
        slot.model_row,
        slot.model_generation,
        slot.row,
        slot.generation,
        slot.status,
        ENDS[min(<int> slot.end, 2)],
        PICKS[min(<int> slot.pick, <int> PICK_BOUNDED)],
        slot.retries,
        bool(slot.streamed),
        slot.estimated_tokens,
        slot.expected_tokens,
        _tokens(slot.prompt_tokens),
        _tokens(slot.cached_tokens),
        _tokens(slot.output_tokens),
        slot.id[:size].decode("ascii", "replace"),
    )


@cython.final
cdef class Journal(SharedMemory):
    """See the module."""

    def __init__(self):
        raise TypeError("use Journal.create or Journal.attach")

    def __cinit__(self):
        self._column = -1

    @staticmethod
    def create(int workers, Py_ssize_t entries=4096):
        """See the stub."""
        if not 1 <= workers <= COLUMNS_MAX:
            raise ValueError(f"workers must be 1 to {COLUMNS_MAX}, not {workers}")
        if not 1 <= entries <= ENTRIES_MAX:
            raise ValueError(f"entries must be 1 to {ENTRIES_MAX}, not {entries}")
        cdef Journal journal = Journal.__new__(Journal)
        journal._create("kubeai-journal", _size_of(workers, entries))
        cdef Header *header = <Header *> journal.base
        header.version = LAYOUT_VERSION
        header.columns = workers
        header.entries = entries
        header.magic = MAGIC
        journal._lay_out()
        return journal

    @staticmethod
    def attach(int fd, int column):
        """See the stub."""
        cdef Journal journal = Journal.__new__(Journal)
        cdef Header header
        cdef bytes start = read_header(fd, "journal", sizeof(Header), MAGIC, LAYOUT_VERSION)
        header = (<Header *> <const char *> start)[0]
        if not (1 <= header.columns <= COLUMNS_MAX and 1 <= header.entries <= ENTRIES_MAX):
            raise ValueError(f"journal has {header.columns} columns × {header.entries} entries")
        journal._attach(fd, "journal", _size_of(header.columns, header.entries))
        if not 0 <= column < <int> header.columns:
            raise ValueError(f"column must be 0 to {header.columns - 1}, not {column}")
        journal._lay_out()
        journal._column = column
        return journal

    cdef void _lay_out(self) noexcept:
        self.header = <Header *> self.base
        self.columns = <int> self.header.columns
        self.entries = <Py_ssize_t> self.header.entries
        self.column_headers = <Column *> (self.base + lines(sizeof(Header)))
        self.slots = <Slot *> (self.column_headers + self.columns)

    def close(self):
        """Unmap, and close the descriptor if this process created it."""
        self.header = NULL
        SharedMemory.close(self)

    cdef int _check_open(self) except -1:
        if self.header == NULL:
            raise ValueError("the journal is closed")
        return 0

    # -- writing: the column's worker ------------------------------------------------------------

    cdef Slot *begin(self) noexcept:
        """The place of the next entry. Fill it, then ``commit``. The caller has a column."""
        cdef uint64_t written = get_u64(&self.column_headers[self._column].written)
        cdef Slot *slot = &self.slots[
            <size_t> self._column * self.entries + written % <uint64_t> self.entries
        ]
        put_u64(&slot.number, 0)
        write_fence()
        return slot

    cdef void commit(self, Slot *slot) noexcept:
        cdef Column *column = &self.column_headers[self._column]
        cdef uint64_t number = get_u64(&column.written) + 1
        release(&slot.number, number)
        release(&column.written, number)

    def write(self, entry):
        """See the stub."""
        self._check_open()
        if self._column < 0:
            raise ValueError("this process has no column in the journal")
        cdef Slot new
        cdef bytes name = entry.id.encode("ascii")[:ID_MAX_BYTES]
        cdef Slot *slot
        memset(&new, 0, sizeof(Slot))
        new.began_s = entry.began_s
        new.waited_s = entry.waited_s
        new.first_s = -1 if entry.first_s is None else entry.first_s
        new.duration_s = entry.duration_s
        new.model_row = entry.model_row
        new.model_generation = entry.model_generation
        new.row = entry.row
        new.generation = entry.generation
        new.status = entry.status
        new.end = ENDS.index(entry.end)
        new.pick = PICKS.index(entry.pick)
        new.retries = entry.retries
        new.streamed = entry.streamed
        new.estimated_tokens = entry.estimated_tokens
        new.expected_tokens = entry.expected_tokens
        new.prompt_tokens = _stored(entry.prompt_tokens)
        new.cached_tokens = _stored(entry.cached_tokens)
        new.output_tokens = _stored(entry.output_tokens)
        new.id_size = <uint8_t> PyBytes_GET_SIZE(name)
        memcpy(new.id, PyBytes_AS_STRING(name), PyBytes_GET_SIZE(name))
        slot = self.begin()
        memcpy(<char *> slot + sizeof(uint64_t), <char *> &new + sizeof(uint64_t),
               sizeof(Slot) - sizeof(uint64_t))
        self.commit(slot)

    # -- reading: any process --------------------------------------------------------------------

    def read(self, int column, uint64_t after=0):
        """See the stub."""
        self._check_open()
        if not 0 <= column < self.columns:
            raise IndexError(f"column must be 0 to {self.columns - 1}, not {column}")
        cdef uint64_t written = acquire(&self.column_headers[column].written)
        cdef uint64_t number, missed = 0
        cdef const Slot *slot
        cdef Slot copied
        cdef list found = []
        if written > after + <uint64_t> self.entries:
            missed = written - after - <uint64_t> self.entries
            after += missed
        for number in range(after + 1, written + 1):
            slot = &self.slots[
                <size_t> column * self.entries + (number - 1) % <uint64_t> self.entries
            ]
            if acquire(&slot.number) != number:
                continue  # overwritten meanwhile, or its writer was killed
            memcpy(&copied, slot, sizeof(Slot))
            read_fence()
            if get_u64(&slot.number) == number:
                found.append(_entry(&copied))
        return found, max(written, after), missed
