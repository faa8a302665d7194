"""Bodies of requests: JSON or YAML, with the keys that a map holds twice.

JSON is read fast; its duplicates are looked for only when the client wants to hear of mistakes,
because that takes a slower reader. The server calls it.
"""

from __future__ import annotations

import json
from typing import Any

import orjson
import yaml

DEPTH_MAX = 100  # of YAML
_TIMESTAMP = "tag:yaml.org,2002:timestamp"
# Kubernetes reads what looks like a date as a string.
RESOLVERS = {
    first: [pair for pair in pairs if pair[0] != _TIMESTAMP]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_json(raw: bytes, duplicates: bool = False) -> tuple[Any, list[str]]:
    """The value, and the paths of duplicate keys if they are wanted. Raises ValueError."""
    value = orjson.loads(raw)
    if not duplicates:
        return value, []
    found: list[str] = []
    try:
        _find_repeated(json.loads(raw, object_pairs_hook=_Pairs), "", found)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value, found


class _Pairs(list[tuple[str, Any]]):
    """A JSON object before the last of its equal keys wins."""


def _find_repeated(value: Any, path: str, found: list[str]) -> None:
    if isinstance(value, _Pairs):
        seen = set()
        for name, member in value:
            below = f"{path}.{name}" if path else name
            if name in seen and below not in found:
                found.append(below)
            seen.add(name)
            _find_repeated(member, below, found)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _find_repeated(item, f"{path}[{index}]", found)


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML as Kubernetes reads it."""

    yaml_implicit_resolvers = RESOLVERS


def read_yaml(raw: bytes) -> tuple[Any, list[str]]:
    """The value as JSON has it, and the paths of duplicate keys. Raises ValueError.

    Aliases are refused: a few of them, nested, make a body of a few bytes endless. So is deep
    nesting, before anything follows it down: the C library would run out of its stack.
    """
    try:
        return read_json(raw, duplicates=True)  # which is what kubectl sends
    except ValueError:
        pass
    found: list[str] = []
    try:
        _check_events(raw)
        loader = _Loader(raw)
        try:
            node = loader.get_single_node()
            _find_repeated_nodes(node, "", found)
            value = loader.construct_document(node) if node is not None else None
        finally:
            loader.dispose()
        return orjson.loads(orjson.dumps(value, option=orjson.OPT_NON_STR_KEYS)), found
    except (yaml.YAMLError, TypeError, RecursionError) as error:
        raise ValueError(f"not YAML: {error}") from None


def _check_events(raw: bytes) -> None:
    depth = 0
    for event in yaml.parse(raw, Loader=_Loader):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError("YAML aliases are not accepted here")
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > DEPTH_MAX:
            raise ValueError(f"YAML nested more than {DEPTH_MAX} levels deep is not accepted here")


def _find_repeated_nodes(node: yaml.Node | None, path: str, found: list[str]) -> None:
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _find_repeated_nodes(item, f"{path}[{index}]", found)
    elif isinstance(node, yaml.MappingNode):
        names = set()
        for key, item in node.value:
            below = f"{path}.{key.value}" if path else str(key.value)
            if below in names and below not in found:
                found.append(below)
            names.add(below)
            _find_repeated_nodes(item, below, found)
