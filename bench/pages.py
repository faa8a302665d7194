"""What benchmarks write into the docs: tables, and plots whose bytes depend only on the data."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs/explain"


def filled(page: str, part: str, lines: list[str]) -> str:
    """The page with these lines between the comments that mark the beginning and end of a part."""
    begin, end = f"<!-- {part}: begin -->\n", f"<!-- {part}: end -->"
    before, rest = page.split(begin)
    _, after = rest.split(end)
    return before + begin + "\n".join(lines) + "\n" + end + after


@contextlib.contextmanager
def plot(
    name: str,
    size: tuple[float, float],
    rows: int = 1,
    columns: int = 1,
    *,
    font_size: int = 9,
    **more: Any,
) -> Iterator[Any]:
    """The axes of a figure, written to ``docs/explain/<name>.svg`` when the block ends.

    ``size``: in inches. ``more``: for ``pyplot.subplots``. Needs ``pip install matplotlib``.
    """
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    mpl.rcParams.update({"svg.hashsalt": "kubeai", "svg.fonttype": "none", "font.size": font_size})
    mpl.rcParams.update({"path.simplify_threshold": 0.5})
    figure, axes = plt.subplots(rows, columns, figsize=size, **more)
    yield axes
    figure.tight_layout()
    path = DOCS / f"{name}.svg"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    plt.close(figure)
