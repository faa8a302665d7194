"""What a release removes must be announced as breaking, by name."""

from __future__ import annotations

import json
import subprocess

import pytest
import yaml
from repository import REPOSITORY

from release import compatibility, notes, versions
from release.errors import ReleaseError

PATHS = {kind: path for kind, (path, _) in compatibility.SURFACE.items()}
OLD = "# Changelog\n\n## Unreleased\n\n## 1.0.0 - 2026-01-01\n\n### Added\n\n- **Breaking:** `y`.\n"


def crd(*fields, served=True, values="AB"):
    properties = {name: {"type": "string", "enum": list(values)} for name in fields}
    schema = {"properties": {"spec": {"properties": properties}}}
    version = {"name": "v1", "served": served, "schema": {"openAPIV3Schema": schema}}
    return yaml.safe_dump({"spec": {"versions": [version]}})


def removed(old: dict[str, str], new: dict[str, str]) -> list[str]:
    return compatibility.removed(
        lambda path: {PATHS[kind]: text for kind, text in old.items()}.get(path),
        lambda path: {PATHS[kind]: text for kind, text in new.items()}.get(path),
    )


def schema(*names):
    fields = {
        name: {"properties": {"deep": {"items": {"properties": {"x": {}}}}}} for name in names
    }
    return json.dumps({"properties": fields})


@pytest.mark.parametrize(
    ("kind", "old", "new", "gone"),
    [
        ("field of a Model", crd("x", "y"), crd("x"), ["field of a Model v1.spec.y"]),
        ("field of a Model", crd("x"), crd("x", "y"), []),
        ("field of a Model", crd("x"), crd("x", served=False), ["field of a Model v1.spec"]),
        (
            "field of a Model",
            crd("x"),
            crd("x", values="A"),
            ["field of a Model v1.spec.x=B"],
        ),
        (
            "value of the chart kubeai",
            schema("a", "b"),
            schema("a"),
            ["value of the chart kubeai b"],
        ),
        (
            "metric",
            "| `kubeai_a` | gauge | `m`, `n` | x |\n",
            "| `kubeai_a` | gauge | `m` | x |\n",
            ["metric kubeai_a{n}"],
        ),
        ("metric", "| `kubeai_a` | gauge | `m` | x |\n", "", ["metric kubeai_a"]),
        (
            "key of the system config",
            "| `a.b` | `c` | x |\n",
            "| `a.c` | `b` | x |\n",
            ["key of the system config a.b"],
        ),
        ("option", "`--port N`, `--host`", "`--port`", ["option --host"]),
        ("route", "`GET /v1/models` `/healthz`", "`/healthz`", ["route GET /v1/models"]),
        (
            "operation",
            '{"paths": {"/a": {"get": {}, "post": {}}}}',
            '{"paths": {"/a": {"get": {}}}}',
            ["operation /a post"],
        ),
    ],
)
def test_what_is_gone_is_found_once(kind, old, new, gone):
    assert removed({kind: old}, {kind: new}) == gone


def test_a_file_that_the_base_lacks_promised_nothing_and_a_deleted_one_is_all_gone():
    assert removed({}, {"option": "`--port`"}) == []
    assert removed({"option": "`--port`"}, {}) == ["option --port"]


@pytest.mark.parametrize(
    ("name", "entry", "known"),
    [
        ("field of a Model v1.spec.y", "**Breaking:** `spec.y` is gone.", True),
        ("field of a Model v1.spec.y", "**Breaking:** `y` is gone.", True),
        ("field of a Model v1.spec.y", "**Breaking:** `spec.yy` is gone.", False),
        ("field of a Model v1.spec.y", "**Breaking:** spec.y is gone.", False),
        ("metric kubeai_a", "**Breaking:** `kubeai_a` is gone.", True),
        ("option --host", "**Breaking:** `--host` is gone.", True),
    ],
)
def test_an_entry_announces_what_it_quotes(name, entry, known):
    assert compatibility.announced(name, [entry]) is known


@pytest.fixture
def tree(tmp_path):
    def git(*arguments):
        names = ("-c", "user.name=A", "-c", "user.email=a@example.com")
        subprocess.run(("git", *names, *arguments), cwd=tmp_path, check=True, capture_output=True)

    path = tmp_path / PATHS["option"]
    path.parent.mkdir(parents=True)
    path.write_text("`--port` `--host`")
    (tmp_path / "CHANGELOG.md").write_text(OLD)
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "one")
    compatibility.check(tmp_path, None)  # there is no release yet
    git("tag", "v1.0.0")
    git("commit", "-q", "--allow-empty", "-m", "two")
    return tmp_path


def test_a_silent_removal_since_the_last_release_is_refused(tree):
    compatibility.check(tree, None)
    (tree / PATHS["option"]).write_text("`--port`")
    with pytest.raises(ReleaseError, match="option --host"):
        compatibility.check(tree, None)
    entry = "## Unreleased\n\n### Removed\n\n- **Breaking:** `--host` is gone.\n"
    (tree / "CHANGELOG.md").write_text(OLD.replace("## Unreleased\n", entry))
    compatibility.check(tree, None)
    prepared = notes.prepare(
        (tree / "CHANGELOG.md").read_text(), versions.parse("1.1.0"), "2026-02-01"
    )
    with pytest.raises(ReleaseError, match="does not allow"):
        notes.check(prepared, versions.parse("1.1.0"), versions.parse("1.0.0"))


def test_announcements_of_earlier_releases_do_not_count(tree):
    assert compatibility.new_entries(OLD, OLD) == []
    (tree / PATHS["option"]).write_text("`--host`")
    (tree / "CHANGELOG.md").write_text(OLD.replace("`y`", "`--port`"))
    with pytest.raises(ReleaseError, match="option --port"):
        compatibility.check(tree, None)


def test_an_unknown_base_is_an_error(tree):
    with pytest.raises(ReleaseError, match="not a commit"):
        compatibility.check(tree, "v9.9.9")


@pytest.mark.parametrize("kind", [each for each in PATHS if each != "operation"])
def test_the_surface_of_this_tree_is_read(kind):
    path, read = compatibility.SURFACE[kind]
    assert len(read((REPOSITORY / path).read_text())) > 10
