"""The root of the working tree, whose charts, docs and examples the tests read."""

from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
