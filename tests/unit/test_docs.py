"""docs/fields.md: every field, value and condition has a row, and every test it cites exists.

docs/http-api.md: every route has a row, for both of its paths.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from functools import cache

import pytest
from repository import REPOSITORY

from kubeai.api.crd import model_crd
from kubeai.openai.routes import route_table
from kubeai.operator.conditions import OURS

SCHEMA = model_crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
TEST = re.compile(r"`([^`]+\.py)::(\w+)`")


def leaves(schema, path=""):
    """Every field without subfields, by its path, with its schema."""
    for name, below in schema.get("properties", {}).items():
        where, item = f"{path}{name}", below.get("items", {})
        if below.get("properties"):
            yield from leaves(below, f"{where}.")
        elif item.get("properties"):
            yield from leaves(item, f"{where}[].")
        else:
            yield where, below


def sections():
    """The tables: title → [(first cell, description, cited tests)]."""
    text = (REPOSITORY / "docs/fields.md").read_text()
    tables = {}
    for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        lines = [line for line in part.splitlines() if line.startswith("|")][2:]
        tables[part.splitlines()[0]] = [
            [c.strip() for c in line.split("|")[1:-1]] for line in lines
        ]
    return tables


TABLES = sections()
ROWS = [row for rows in TABLES.values() for row in rows]


def named_once(title):
    """The first cells of a table; none may occur twice."""
    names = Counter(row[0] for row in TABLES[title])
    assert [name for name, count in names.items() if count > 1] == []
    return set(names)


def test_every_field_of_the_crd_has_one_row_and_nothing_else_has():
    assert named_once("Fields") == {f"`{path}`" for path, _ in leaves(SCHEMA)}


def test_every_enum_value_has_one_row():
    choices = [
        f"`{path}` `{word}`"
        for path, schema in leaves(SCHEMA)
        for word in schema.get("enum") or schema.get("items", {}).get("enum", ())
    ]
    assert named_once("Values") == set(choices)


def test_every_condition_that_the_operator_writes_has_a_row():
    assert named_once("Conditions") >= {f"`{type_}`" for type_ in OURS}


def test_every_route_has_a_row():
    rows = (REPOSITORY / "docs/http-api.md").read_text().splitlines()
    for path in route_table:
        assert any(row.startswith("| ") and f"`{path}`" in row for row in rows), path


@cache
def names_in(file):
    """The names of the tests in a file, parametrised or not."""
    path = REPOSITORY / file
    assert path.is_file(), f"{file} does not exist"
    nodes = ast.walk(ast.parse(path.read_text()))
    functions = (node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    return {node.name for node in functions if node.name.startswith("test_")}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0].replace("`", ""))
def test_each_row_has_a_one_line_description_and_cites_existing_tests(row):
    name, what, shown = row
    assert what
    assert not what.endswith("."), f"{name}: write a phrase without a full stop"
    tests = TEST.findall(shown)
    assert tests, f"{name}: no test is cited"
    assert TEST.sub("", shown).strip(", ") == "", f"{name}: {shown}"
    for file, test in tests:
        assert test in names_in(file), f"{name}: {file} has no {test}"
