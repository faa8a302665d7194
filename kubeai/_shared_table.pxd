"""Declarations of ``_shared_table.pyx``."""

from libc.stdint cimport uint64_t

from kubeai._shared_memory cimport SharedMemory

cdef enum:
    WORKERS_MAX = 63


cdef struct TableHeader:  # a cache line; every table's begins with these
    uint64_t magic
    uint64_t version
    uint64_t rows
    uint64_t columns
    uint64_t rows_used  # rows from this index on were never opened
    uint64_t spare[3]  # a table's own


cdef class SharedTable(SharedMemory):
    cdef readonly int rows
    cdef readonly int columns
    cdef int _column
    cdef str what  # for errors, such as "load table"
    cdef int shared_columns  # at the end, which no process has as its own
    cdef int _create_table(
        self, str name, int rows, int workers, size_t size, uint64_t magic, uint64_t version
    ) except -1
    cdef int _attach_table(
        self, int fd, int column, const TableHeader *header, size_t size
    ) except -1
    cdef int _check_row(self, Py_ssize_t row) except -1
    cdef int _check_writer(self) except -1
    cdef int _check_column(self, int column) except -1


cdef int check_shape(int rows, int workers) except -1


cdef TableHeader read_table_header(int fd, str what, uint64_t magic, uint64_t version) except *


cdef inline size_t stride_of(size_t columns) noexcept:
    """The cells of a row of columns: a power of two, so up to 8 never straddle two cache lines."""
    cdef size_t stride = 1
    while stride < columns:
        stride *= 2
    return stride
