"""The subset of JSONPath that the printer columns of CRDs may use."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

Step = tuple[str, Any]
_STEP = re.compile(
    r"""\.(?P<name>(?:\\.|[^.\[\]\\])+)
      | \[\?\(\s*@\.(?P<where>[^=!\s]+)\s*==\s*(?P<q>["'])(?P<is>.*?)(?P=q)\s*\)\]
      | \[(?P<index>-?\d+)\]
      | \[(?P<star>\*)\]
      | \[(?P<quote>["'])(?P<key>.*?)(?P=quote)\]""",
    re.VERBOSE,
)


def parse_path(text: str) -> list[Step]:
    """Parse a JSONPath such as ``.status.conditions[?(@.type=="Ready")].status``."""
    text = text.strip().removeprefix("{").removesuffix("}").removeprefix("$")
    steps: list[Step] = []
    position = 0
    while position < len(text):
        match = _STEP.match(text, position)
        if match is None:
            raise ValueError(f"{text}: cannot read {text[position:]!r}")
        if match["name"]:
            steps.append(("name", re.sub(r"\\(.)", r"\1", match["name"])))
        elif match["where"]:
            steps.append(("where", (match["where"].split("."), match["is"])))
        elif match["index"]:
            steps.append(("index", int(match["index"])))
        elif match["star"]:
            steps.append(("all", None))
        else:
            steps.append(("name", match["key"]))
        position = match.end()
    return steps


def find(steps: list[Step], obj: Any) -> list[Any]:
    """Return all values that the path matches."""
    found = [obj]
    for kind, what in steps:
        found = [match for value in found for match in _step(kind, what, value)]
    return found


def _step(kind: str, what: Any, value: Any) -> Iterator[Any]:
    if (kind == "name" and isinstance(value, dict) and what in value) or (
        kind == "index" and isinstance(value, list) and -len(value) <= what < len(value)
    ):
        yield value[what]
    elif kind == "all" and isinstance(value, (dict, list)):
        yield from value.values() if isinstance(value, dict) else value
    elif kind == "where" and isinstance(value, list):
        path, wanted = what
        for item in value:
            member: Any = item
            for name in path:
                member = member.get(name) if isinstance(member, dict) else None
            if member == wanted:
                yield item
