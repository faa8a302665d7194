# cython: language_level=3, nonecheck=True
"""Tables in shared memory: rows × columns of cells, each column with one writer.

:class:`SharedTable` has what the load table, the key table and the queue table have in common: how
they are created and attached, their shape, and the checks of rows and columns. What a row is, and
how cells are laid out, is up to them. There is one column for each worker, and a last one for what
the supervisor records.
"""

from kubeai._shared_memory cimport SharedMemory, read_header

cdef enum:
    ROWS_MAX = 1 << 20


cdef int check_shape(int rows, int workers) except -1:
    """ValueError if a table cannot have this many."""
    if not 1 <= rows <= ROWS_MAX:
        raise ValueError(f"rows must be 1 to {ROWS_MAX}, not {rows}")
    if not 1 <= workers <= WORKERS_MAX:
        raise ValueError(f"workers must be 1 to {WORKERS_MAX}, not {workers}")
    return 0


cdef TableHeader read_table_header(int fd, str what, uint64_t magic, uint64_t version) except *:
    """The header of an existing table; ValueError if it is not one of this kind."""
    cdef bytes start = read_header(fd, what, sizeof(TableHeader), magic, version)
    cdef TableHeader header = (<TableHeader *> <const char *> start)[0]
    if not (1 <= header.rows <= ROWS_MAX and 2 <= header.columns <= WORKERS_MAX + 1):
        raise ValueError(f"{what} has {header.rows} rows × {header.columns} columns")
    return header


cdef class SharedTable(SharedMemory):
    """See the module."""

    def __cinit__(self):
        self._column = -1

    cdef int _create_table(
        self, str name, int rows, int workers, size_t size, uint64_t magic, uint64_t version
    ) except -1:
        """Create a table of this shape, all cells 0. ``name``: shown in /proc."""
        self._create(name, size)
        self.rows = rows
        self.columns = workers + 1
        cdef TableHeader *header = <TableHeader *> self.base
        header.version = version
        header.rows = rows
        header.columns = workers + 1
        header.magic = magic
        return 0

    cdef int _attach_table(
        self, int fd, int column, const TableHeader *header, size_t size
    ) except -1:
        """Map an existing table, whose header implies a ``size``."""
        cdef int last = <int> header.columns - 1 - self.shared_columns
        self._attach(fd, self.what, size)
        if not 0 <= column <= last:
            raise ValueError(f"column must be 0 to {last}, not {column}")
        self.rows = <int> header.rows
        self.columns = <int> header.columns
        self._column = column
        return 0

    @property
    def column(self):
        """The column that this process writes; -1 in the supervisor until it is set."""
        return self._column

    @column.setter
    def column(self, int column):
        cdef int last = self.columns - 1 - self.shared_columns
        if not -1 <= column <= last:
            raise ValueError(f"column must be -1 to {last}, not {column}")
        self._column = column

    cdef int _check_row(self, Py_ssize_t row) except -1:
        if self.base == NULL:
            raise ValueError(f"the {self.what} is closed")
        if not 0 <= row < self.rows:
            raise IndexError(f"row must be 0 to {self.rows - 1}, not {row}")
        return 0

    cdef int _check_writer(self) except -1:
        if self._column < 0:
            raise ValueError(f"this process has no column in the {self.what}")
        return 0

    cdef int _check_column(self, int column) except -1:
        if self.base == NULL:
            raise ValueError(f"the {self.what} is closed")
        if not 0 <= column < self.columns:
            raise IndexError(f"column must be 0 to {self.columns - 1}, not {column}")
        return 0
