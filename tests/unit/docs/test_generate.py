"""The generators of docs/reference leave nothing out."""

from __future__ import annotations

import importlib
import json
import re

import pytest
from repository import REPOSITORY

CHART = REPOSITORY / "charts/kubeai"
SCHEMA = json.loads((CHART / "values.schema.json").read_text())
OF_HELM = {"global", "enabled"}  # Helm's own, for charts that contain this one


@pytest.fixture
def generator(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "docs/generate"))
    return importlib.import_module


def test_every_value_of_the_schema_has_a_row(generator):
    text = (CHART / "values.yaml").read_text()
    rows = [row.path for _, rows in generator("helm").sections(text, SCHEMA) for row in rows]
    assert len(rows) == len(set(rows))
    assert {path.partition(".")[0] for path in rows} == SCHEMA["properties"].keys() - OF_HELM


def test_a_value_without_a_comment_is_an_error_with_its_line(generator):
    schema = {"properties": {"a": {"type": "string"}, "b": {"type": "string"}}}
    text = "# What a is.\na: x\n\nb: y\n"
    with pytest.raises(SystemExit, match=r"values.yaml:4: b has no comment"):
        list(generator("helm").sections(text, schema))


def test_comments_above_and_beside_a_value_describe_it_and_examples_do_not(generator):
    schema = {"properties": {name: {"type": "string"} for name in "abc"}}
    text = (
        "# == Title ----\n# What a\n# is.\na: x\nb: y  # What b is.\n# - k: v\n# What c is.\nc: z\n"
    )
    ((title, rows),) = generator("helm").sections(text, schema)
    assert title == "Title"
    assert [(row.path, row.what) for row in rows] == [
        ("a", "What a is."),
        ("b", "What b is."),
        ("c", "What c is."),
    ]


def test_every_command_and_option_is_listed(generator):
    page = generator("command_line").page()
    for command in ("serve", "local", "key create", "bench run", "mock-engine", "openapi"):
        assert f"\n## kubeai {command}\n" in page
    serve = page.split("## kubeai serve\n")[1].split("\n## ")[0]
    assert re.findall(r"^\| `(--[\w-]+)`", serve, re.MULTILINE) == [
        *("--host", "--port", "--workers", "--log-format"),
    ]
    chat = page.split("## kubeai chat\n")[1].split("\n## ")[0]
    assert "`$KUBEAI_API_KEY`, `$OPENAI_API_KEY`" in chat


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a | b", r"a \| b"),
        ("load hf://<owner>/<name>.", "load `hf://<owner>/<name>`."),
        ("`<kept>` as it is", "`<kept>` as it is"),
        ("two\nlines", "two lines"),
    ],
)
def test_a_cell_is_one_line_of_markdown(generator, text, shown):
    assert generator("tables").cell(text) == shown
