"""Label selectors and field selectors: text in, a predicate over objects out.

Both use Kubernetes' syntax. Invalid text raises a 400 that quotes it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from kubeai.api.labels import label_selector
from kubeai.local.apiserver.errors import bad_request

Object = dict[str, Any]
Match = Callable[[Object], bool]


def labels(text: str) -> Callable[[Mapping[str, str]], bool]:
    """A predicate over labels for ``a=b,c!=d,e in (f,g),h,!i``. Empty text matches all."""
    try:
        return label_selector(text)
    except ValueError as error:
        raise bad_request(f"unable to parse requirement: {error}") from None


def fields(text: str, selectable: tuple[str, ...]) -> Match:
    """A predicate over objects for ``metadata.name=a,spec.nodeName!=b``."""
    tests: list[tuple[tuple[str, ...], bool, str]] = []
    for term in filter(None, (part.strip() for part in _split(text))):
        match = re.fullmatch(r"([^=!]+?)(==|=|!=)(.*)", term, re.DOTALL)
        if match is None:
            raise bad_request(f"invalid selector: '{text}'; can't understand '{term}'")
        if match[1] not in selectable:
            raise bad_request(f"field label not supported: {match[1]}")
        value = re.sub(r"\\([\\,=])", r"\1", match[3])
        tests.append((tuple(match[1].split(".")), match[2] != "!=", value))
    return lambda obj: all((field(obj, path) == value) is same for path, same, value in tests)


def _split(text: str) -> list[str]:
    """Split at commas that are not escaped by a backslash."""
    return re.split(r"(?<!\\),", text)


def field(obj: Object, path: tuple[str, ...]) -> str:
    """Return a field's value as a selector compares it: absent is "", true is "true"."""
    value: Any = obj
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    if value is None:
        return ""
    if isinstance(value, dict):  # the only such field is an Event's source: use its component
        return str(value.get("component", ""))
    return str(value).lower() if isinstance(value, bool) else str(value)


def selector(label_text: str, field_text: str, selectable: tuple[str, ...]) -> Match | None:
    """Combine a label and a field selector; None if both are empty."""
    if not label_text and not field_text:
        return None
    by_label = labels(label_text)
    by_field = fields(field_text, selectable)
    return lambda obj: by_label(obj["metadata"].get("labels") or {}) and by_field(obj)
