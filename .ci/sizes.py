"""Fail on functions that do not fit on a screen, and on files that are too long.

    python .ci/sizes.py

Reads all tracked files of Python and Cython. A function counts from ``def`` to its last line, with
its docstring. `.ci/sizes.txt` lists what was longer before the limits were checked, with its lines:
an entry may only become smaller, and goes once its function or file is within the limit.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

from words import tracked

FUNCTION_LINES_MAX = 60
FILE_LINES_MAX = {".py": 499, ".pyx": 599, ".pxd": 599}
LISTED = Path(__file__).with_name("sizes.txt")


def functions(tree: ast.AST, inside: str = "") -> Iterator[tuple[str, int]]:
    """Each function's name, with those of its classes and functions, and its lines."""
    for node in ast.iter_child_nodes(tree):
        name = inside
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = f"{inside}.{node.name}" if inside else node.name
            if not isinstance(node, ast.ClassDef) and node.end_lineno is not None:
                yield name, node.end_lineno - node.lineno + 1
        yield from functions(node, name)


def too_long(paths: list[Path]) -> dict[str, int]:
    """The lines of what is over a limit, by ``path`` or ``path::function``."""
    found: dict[str, int] = {}
    for path in paths:
        text = path.read_text()
        lines = text.count("\n")
        if lines > FILE_LINES_MAX[path.suffix]:
            found[str(path)] = lines
        if path.suffix != ".py":
            continue
        for name, lines in functions(ast.parse(text)):
            if lines > FUNCTION_LINES_MAX:
                key = f"{path}::{name}"  # overloads and branches may define a name twice
                found[key] = max(lines, found.get(key, 0))
    return found


def allowed() -> dict[str, int]:
    lines = [line.split() for line in LISTED.read_text().splitlines()]
    return {words[0]: int(words[1]) for words in lines if words and not words[0].startswith("#")}


def problems(found: dict[str, int], listed: dict[str, int]) -> list[str]:
    texts = []
    for what, lines in found.items():
        path, function = Path(what.partition("::")[0]), "::" in what
        most = listed.get(what, FUNCTION_LINES_MAX if function else FILE_LINES_MAX[path.suffix])
        if lines > most:
            texts.append(f"{what}: {lines} lines, more than {most}: split it by what it does")
        elif lines < most:
            texts.append(f"{what}: {lines} lines: lower its {most} in {LISTED.name}")
    texts += [
        f"{what}: within the limit or gone: delete it from {LISTED.name}"
        for what in listed.keys() - found.keys()
    ]
    return sorted(texts)


def main() -> int:
    paths = [path for path in tracked() if path.suffix in FILE_LINES_MAX and path.exists()]
    texts = problems(too_long(paths), allowed())
    print(*texts, sep="\n", end="\n" if texts else "")
    return min(len(texts), 1)


if __name__ == "__main__":
    sys.exit(main())
