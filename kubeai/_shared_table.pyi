from kubeai._shared_memory import SharedMemory

class SharedTable(SharedMemory):
    """Rows × columns of cells in one memfd, each column with one writer."""

    rows: int
    columns: int  # workers + 1
    column: int  # the column that this process writes; -1 in the supervisor until set
