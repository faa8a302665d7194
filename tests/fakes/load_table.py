"""The size of the load table under test, and reservations in it."""

from kubeai._load import LoadTable
from kubeai._ring import Ring

WORKERS = 2


def reserve(table: LoadTable, row: int, model_row: int = 0, tokens: int = 0):
    """A pick of the endpoint in ``row``, counted on the model in ``model_row`` too."""
    ring = Ring(table, model_row, table.generation(model_row))
    ring.set("pod", row, table.generation(row))
    return ring.pick_least(tokens=tokens)
