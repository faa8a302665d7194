"""What users rely on, compared with the last release: nothing disappears without an announcement.

The surface is read from files that tests keep up to date: the CRD, the schemas of the charts'
values, and the reference pages. A name that the base had and this tree lacks must be in backquotes
in an entry of CHANGELOG.md that starts with **Breaking:**, in a section that the base did not have.
Such entries need a version that allows them; `release.notes.check` refuses others.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from release import notes, versions
from release.errors import ReleaseError

METRIC = re.compile(r"^\| `(kubeai_[a-z_]+)` \| \w+ \|([^|]*)\|", re.M)
SETTING = re.compile(r"^\| `([a-z][\w.<>\[\]]*)` \|", re.M)
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
ROUTE = re.compile(r"`((?:GET|POST|PUT|PATCH|DELETE) /[^` ]*)`|`(/[a-z][^` ]*)`")


def schema_paths(schema: dict[str, Any], path: str = "") -> Iterator[str]:
    """Yield the paths of all fields of a JSON schema, and the values of their enumerations."""
    for name, field in schema.get("properties", {}).items():
        if isinstance(field, dict):
            yield f"{path}.{name}"
            yield from schema_paths(field, f"{path}.{name}")
    for part, mark in (("items", "[]"), ("additionalProperties", ".*")):
        if isinstance(schema.get(part), dict):
            yield from schema_paths(schema[part], path + mark)
    for part in ("anyOf", "oneOf", "allOf"):
        for each in schema.get(part, ()):
            yield from schema_paths(each, path)
    for value in schema.get("enum", ()):
        yield f"{path}={value}"


def crd_fields(text: str) -> set[str]:
    """Return the fields of each version of the custom resource."""
    crd = yaml.safe_load(text)
    found = set()
    for each in crd["spec"]["versions"]:
        if each["served"]:
            schema = each["schema"]["openAPIV3Schema"]
            found |= {f"{each['name']}{path}" for path in schema_paths(schema)}
    return found


def values(text: str) -> set[str]:
    """Return the fields of the values of a chart."""
    return {path.removeprefix(".") for path in schema_paths(json.loads(text))}


def metrics(text: str) -> set[str]:
    """Return the metrics of the reference page, and each with each of its labels."""
    found = set()
    for name, labels in METRIC.findall(text):
        found |= {name, *(f"{name}{{{label}}}" for label in re.findall(r"`([a-z_]+)`", labels))}
    return found


def settings(text: str) -> set[str]:
    """Return the keys of the system config that the reference page has."""
    return set(SETTING.findall(text))


def options(text: str) -> set[str]:
    """Return the command-line options that the reference page has."""
    return set(OPTION.findall(text))


def routes(text: str) -> set[str]:
    """Return the routes that the reference page of the HTTP API has."""
    return {first or second for first, second in ROUTE.findall(text)}


def operations(text: str) -> set[str]:
    """Return the paths of an OpenAPI document, and each with its methods."""
    paths: dict[str, dict[str, Any]] = json.loads(text)["paths"]
    methods = {f"{path} {method}" for path, item in paths.items() for method in item}
    return methods | paths.keys()


SURFACE: dict[str, tuple[str, Callable[[str], set[str]]]] = {
    "field of a Model": ("charts/kubeai/files/kubeai.org_models.yaml", crd_fields),
    "value of the chart kubeai": ("charts/kubeai/values.schema.json", values),
    "value of the chart models": ("charts/models/values.schema.json", values),
    "key of the system config": ("docs/reference/configuration.md", settings),
    "metric": ("docs/reference/metrics.md", metrics),
    "option": ("docs/reference/command-line.md", options),
    "route": ("docs/reference/http-api/index.md", routes),
    "operation": ("docs/reference/openapi.json", operations),
}


def removed(old: Callable[[str], str | None], new: Callable[[str], str | None]) -> list[str]:
    """Return what the old tree had and the new one lacks, as "kind name".

    Both functions map a path to the file's text, or None. A file that the old tree lacks promised
    nothing. A whole branch of fields counts once, by its top.
    """
    found = []
    for kind, (path, read) in SURFACE.items():
        before = old(path)
        if before is None:
            continue
        after = new(path)
        gone = read(before) - (read(after) if after is not None else set())
        found += [
            f"{kind} {name}"
            for name in sorted(gone)
            if not any(name != top and re.match(re.escape(top) + r"[.\[={]", name) for top in gone)
        ]
    return found


def announced(name: str, entries: list[str]) -> bool:
    """Whether an entry names what was removed in backquotes: its path, or the end of its path."""
    tail = name.split(" ")[-1].split(".", 1)[-1]
    quoted = {each for entry in entries for each in re.findall(r"`([^`]+)`", entry)}
    return any(
        tail == each or tail.endswith(f".{each}") or name.endswith(f" {each}") for each in quoted
    )


def new_entries(old: str, new: str) -> list[str]:
    """Return the announcements of incompatible changes in sections that `old` does not have."""
    known = notes.sections(old).keys() - {"Unreleased"}
    return [
        entry
        for name, text in notes.sections(new).items()
        if name not in known
        for entry in notes.breaking(text)
    ]


def check(repository: Path, base: str | None) -> None:
    """Compare the working tree with `base`, or with the last release; there may be none."""
    if base is None:
        released = versions.latest(repository)
        if released is None:
            print("there is no release yet, so there is nothing to keep")
            return
        base = f"v{released}"

    def old(path: str) -> str | None:
        done = subprocess.run(
            ("git", "show", f"{base}:{path}"), cwd=repository, capture_output=True, text=True
        )
        return None if done.returncode else done.stdout

    def new(path: str) -> str | None:
        file = repository / path
        return file.read_text(encoding="utf-8") if file.exists() else None

    before = old("CHANGELOG.md")
    if before is None:
        raise ReleaseError(f"{base} is not a commit of KubeAI")
    entries = new_entries(before, new("CHANGELOG.md") or "")
    found = removed(old, new)
    silent = [each for each in found if not announced(each, entries)]
    print(f"compared with {base}: {len(found)} removals, {len(silent)} of them not announced")
    if silent:
        raise ReleaseError(
            "removed; keep these, or name them in a **Breaking:** entry of CHANGELOG.md:\n"
            + "\n".join(silent)
        )
