"""Request bodies: decodes JSON and YAML, and finds duplicate keys.

Duplicate keys in JSON are searched for only on request, because that needs a slower parser.
`requests` calls it.
"""

from __future__ import annotations

import json
from typing import Any

import orjson
import yaml

from kubeai.api.kubernetes_yaml import Loader, check_structure


def read_json(raw: bytes, duplicates: bool = False) -> tuple[Any, list[str]]:
    """Return the value, and the paths of duplicate keys if requested. Raises ValueError."""
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
    """A JSON object as a list of pairs, with its duplicate keys."""


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


def read_yaml(raw: bytes) -> tuple[Any, list[str]]:
    """Return the value as JSON types, and the paths of duplicate keys. Raises ValueError."""
    try:
        return read_json(raw, duplicates=True)  # kubectl sends JSON
    except ValueError:
        pass
    found: list[str] = []
    try:
        check_structure(raw)
        loader = Loader(raw)
        try:
            node = loader.get_single_node()
            _find_repeated_nodes(node, "", found)
            value = loader.construct_document(node) if node is not None else None
        finally:
            loader.dispose()
        return orjson.loads(orjson.dumps(value, option=orjson.OPT_NON_STR_KEYS)), found
    except (yaml.YAMLError, TypeError, RecursionError) as error:
        raise ValueError(f"not YAML: {error}") from None


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
