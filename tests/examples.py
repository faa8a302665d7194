"""How many examples each property test runs."""

import os


def some(examples: int) -> int:
    """Return ``examples`` times EXAMPLES_FACTOR (5 in CI)."""
    return examples * int(os.environ.get("EXAMPLES_FACTOR", "1"))
