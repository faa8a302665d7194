"""The reasons that KubeAI writes into conditions, Events and pods' statuses, read from its code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from repository import REPOSITORY

WORD = re.compile(r"[A-Z][A-Za-z]+")
# Where a reason is in a call: the position of the argument, counted from 0.
ARGUMENTS = {
    "_condition": 2,
    "Condition": 2,
    "Ignored": 0,
    "ModelError": 2,
    "PhaseOverride": 1,
    "PodError": 1,
    "StartError": 0,
    "Trouble": 0,
    "Waiting": 0,
    "_fail": 0,
    "_failed": 2,
    "_record_event": 2,
    "_with": 3,
    "emit": 1,
}


def constants(trees: list[ast.Module]) -> dict[str, str]:
    """Module constants with a reason."""
    return {
        target.id: node.value.value
        for tree in trees
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name) and isinstance(node.value.value, str)
    }


def words(node: ast.AST | None, names: dict[str, str]) -> Iterator[str]:
    """The reasons that an expression may have."""
    match node:
        case ast.Constant(value=str(text)) if WORD.fullmatch(text):
            yield text
        case ast.Name(id=name) if WORD.fullmatch(names.get(name, "")):
            yield names[name]
        case ast.IfExp(body=one, orelse=other):
            yield from words(one, names)
            yield from words(other, names)
        case ast.BoolOp(values=values):
            for value in values:
                yield from words(value, names)


def reasons_in(tree: ast.Module, names: dict[str, str]) -> Iterator[str]:
    """The reasons in one module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            for keyword in node.keywords:
                if keyword.arg == "reason":
                    yield from words(keyword.value, names)
            position = ARGUMENTS.get(name)
            if position is not None and len(node.args) > position:
                yield from words(node.args[position], names)
        elif isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == "reason":
                    yield from words(value, names)
        elif isinstance(node, ast.Assign) and any(
            getattr(target, "id", "") == "reason" for target in node.targets
        ):
            yield from words(node.value, names)
        elif isinstance(node, ast.FunctionDef):
            defaults = dict(
                zip(reversed(node.args.args), reversed(node.args.defaults), strict=False)
            )
            for argument, default in defaults.items():
                if argument.arg == "reason":
                    yield from words(default, names)


@cache
def parsed(folder: str) -> dict[Path, ast.Module]:
    """The modules in a folder of the package."""
    root = REPOSITORY / "kubeai" / folder
    paths = sorted(root.rglob("*.py")) if root.is_dir() else [root]
    return {path: ast.parse(path.read_text()) for path in paths}


def reasons(*folders: str) -> set[str]:
    """The reasons in folders and modules of the package, and in errors.py."""
    trees = [tree for folder in (*folders, "errors.py") for tree in parsed(folder).values()]
    names = constants(trees)
    return {reason for tree in trees for reason in reasons_in(tree, names)}
