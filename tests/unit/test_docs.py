"""Tables of docs/reference that are checked against the code.

fields.md: every field, value and condition has a row, and every test it cites exists. http-api:
every route has a row, for both of its paths. engines: every engine has a page, and the tables
agree with the code.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from functools import cache
from typing import get_args

import pytest
import yaml
from doc_pages import rows, sections
from fakes.engine_pods import pod
from repository import REPOSITORY

from kubeai.api.config.system import SystemConfig
from kubeai.api.crd import model_crd
from kubeai.api.model import Engine, Feature, decode_model
from kubeai.errors import ModelError
from kubeai.local.apiserver.schema.structural import Schema
from kubeai.openai.routes import Kind, route_table
from kubeai.operator.conditions import OURS
from kubeai.podspec import build_pod
from kubeai.podspec.sources import model_url
from kubeai.supervisor import cache_sizes

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


# Of fields.md: title → [(first cell, description, cited tests)].
TABLES = {title: rows(text)[2:] for title, text in sections("reference/fields.md").items()}
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
    rows = (REPOSITORY / "docs/reference/http-api/index.md").read_text().splitlines()
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


# -- docs/reference/engines ------------------------------------------------------------------------

ENGINES = get_args(Engine)


def table(title):
    """A table of docs/reference/engines/index.md: its head, and its rows."""
    head, _, *below = rows(sections("reference/engines/index.md")[title])
    return head, below


def test_every_engine_has_a_page_and_a_column():
    text = (REPOSITORY / "docs/reference/engines/index.md").read_text()
    for engine in ENGINES:
        (page,) = re.findall(rf"^\| \[`{engine}`\]\(([\w-]+\.md)\)", text, re.MULTILINE)
        page = (REPOSITORY / "docs/reference/engines" / page).read_text()
        assert f"  engine: {engine}\n" in page
        for section in ("## What KubeAI starts", "## On one machine", "## Limits"):
            assert section in page, (engine, section)
    for title, columns in (("Features", 1), ("Routes", 2)):
        head, rows = table(title)
        assert set(head[columns:]) == set(ENGINES)
        assert {cell for row in rows for cell in row[columns:]} <= {"yes", ""}


def test_the_manifest_of_every_engine_gives_a_pod():
    for page in (REPOSITORY / "docs/reference/engines").glob("*.md"):
        for block in re.findall(r"```yaml\n(apiVersion:.*?)```", page.read_text(), re.DOTALL):
            assert build_pod(decode_model(yaml.safe_load(block)), SystemConfig()), page


@pytest.mark.parametrize("feature", get_args(Feature))
def test_engines_get_pods_for_the_features_that_the_docs_list(feature):
    head, rows = table("Features")
    (row,) = (row for row in rows if row[0] == feature)
    for engine, cell in zip(head[1:], row[1:], strict=True):
        if cell:
            assert pod(engine, features=[feature])
    assert feature in {row[0] for row in table("Routes")[1]}


def test_the_docs_say_which_engines_have_adapters_and_caches():
    head, rows = table("Features")
    cells = {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}
    schema = Schema(SCHEMA)
    adapter = {"name": "a", "url": "hf://o/a"}
    for engine in ENGINES:
        spec = {"url": "hf://o/n", "engine": engine, "features": []}
        root = {"apiVersion": "kubeai.org/v1", "kind": "Model", "metadata": {"name": "m"}}
        with_adapter = root | {"spec": spec | {"adapters": [adapter]}}
        assert (not schema.validate(with_adapter)) == (cells["adapters"][engine] == "yes")
        cached = decode_model({"metadata": {"name": "m"}, "spec": spec | {"cacheProfile": "c"}})
        try:
            cacheable = bool(model_url(cached.spec))
        except ModelError:
            cacheable = False
        assert cacheable == (cells["`cacheProfile`"][engine] == "yes")
        reads = cells["size of the cache, for `PrefixCache`"][engine] == "yes"
        assert (engine in cache_sizes.READERS) == reads


# Routes that the gateway serves by itself.
OWN_ROUTES = {"/v1/models", "/api/tags", "/api/ps", "/api/show", "/api/version"}


def test_every_route_to_an_engine_has_a_row_of_the_engines_that_serve_it():
    named = Counter(row[1] for row in table("Routes")[1])
    assert [name for name, count in named.items() if count > 1] == []
    assert {f"`{kind.value}`" for kind in Kind if kind.value not in OWN_ROUTES} <= set(named)


@pytest.mark.parametrize(
    ("figure", "bar"),
    [
        ("CPU for a chat request", "CPU per chat request of 800 bytes, 32 connections"),
        ("Memory for each open stream", "memory per stream with 9,500 open"),
    ],
)
def test_figures_of_the_home_page_are_those_of_the_performance_page(figure, bar):
    home = (REPOSITORY / "docs/index.md").read_text()
    measured = {row[0]: row[2] for row in rows(sections("explain/performance.md")["The bars"])}
    (shown,) = [row[1] for row in rows(home) if row[0].startswith(figure)]
    assert shown == measured[bar]
