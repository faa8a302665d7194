"""How many examples a property gets."""

import os


def some(examples: int) -> int:
    """So many, times EXAMPLES_FACTOR (5 in CI)."""
    return examples * int(os.environ.get("EXAMPLES_FACTOR", "1"))
