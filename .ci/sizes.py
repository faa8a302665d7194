"""Fail on functions that do not fit on a screen, and on files and lines that are too long.

    python .ci/sizes.py

Reads all tracked files of Python and Cython. A function counts from ``def`` to its last line, with
its docstring. Ruff does not check the lines of Cython and of stubs, nor those with a pragma.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

from words import tracked

FUNCTION_LINES_MAX = 60
FILE_LINES_MAX = {".py": 499, ".pyx": 599, ".pxd": 599, ".pyi": 499}
LINE_CHARS_MAX = 100
TABLES = Path("docs/generate")  # rows of tables in Markdown


def functions(tree: ast.AST, inside: str = "") -> Iterator[tuple[str, int]]:
    """Each function's name, with those of its classes and functions, and its lines."""
    for node in ast.iter_child_nodes(tree):
        name = inside
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = f"{inside}.{node.name}" if inside else node.name
            if not isinstance(node, ast.ClassDef) and node.end_lineno is not None:
                yield name, node.end_lineno - node.lineno + 1
        yield from functions(node, name)


def problems(path: Path) -> Iterator[str]:
    """What is over a limit in a file."""
    text = path.read_text()
    most = FILE_LINES_MAX[path.suffix]
    if (lines := text.count("\n")) > most:
        yield f"{path}: {lines} lines, more than {most}: split it by what it does"
    for number, line in enumerate(text.splitlines(), 1):
        if len(line) > LINE_CHARS_MAX and TABLES not in path.parents:
            yield f"{path}:{number}: {len(line)} characters, more than {LINE_CHARS_MAX}"
    if path.suffix == ".py":
        for name, lines in functions(ast.parse(text)):
            if lines > FUNCTION_LINES_MAX:
                yield f"{path}::{name}: {lines} lines, more than {FUNCTION_LINES_MAX}"


def main() -> int:
    paths = [path for path in tracked() if path.suffix in FILE_LINES_MAX and path.exists()]
    texts = [text for path in paths for text in problems(path)]
    print(*texts, sep="\n", end="\n" if texts else "")
    return min(len(texts), 1)


if __name__ == "__main__":
    sys.exit(main())
