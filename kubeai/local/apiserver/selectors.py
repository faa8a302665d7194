"""Label selectors and field selectors: text in, a predicate over objects out.

Both are Kubernetes' own syntax. Bad text raises a 400 that names it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from kubeai.local.apiserver.status import bad_request

Object = dict[str, Any]
Match = Callable[[Object], bool]

_KEY = r"(?:[A-Za-z0-9][-A-Za-z0-9_.]*/)?[A-Za-z0-9](?:[-A-Za-z0-9_.]*[A-Za-z0-9])?"
_VALUE = r"(?:[A-Za-z0-9](?:[-A-Za-z0-9_.]*[A-Za-z0-9])?)?"
_REQUIREMENT = re.compile(
    rf"""\s*(?:
      (?P<absent>!)\s*(?P<absent_key>{_KEY})
    | (?P<key>{_KEY})(?:
          \s+(?P<set>in|notin)\s*\((?P<values>[^()]*)\)
        | \s*(?P<op>==|=|!=|<|>)\s*(?P<value>{_VALUE})
      )?
    )\s*(?:,(?=\s*\S)|$)""",
    re.VERBOSE,
)


def labels(text: str) -> Callable[[Mapping[str, str]], bool]:
    """A predicate over labels for ``a=b,c!=d,e in (f,g),h,!i``. Empty text matches all."""
    tests: list[Callable[[Mapping[str, str]], bool]] = []
    position = 0
    while position < len(text.rstrip()):
        match = _REQUIREMENT.match(text, position)
        if match is None:
            raise bad_request(f'unable to parse requirement: found "{text[position:]}"')
        tests.append(_label_test(match))
        position = match.end()
    return lambda found: all(test(found) for test in tests)


def _label_test(match: re.Match[str]) -> Callable[[Mapping[str, str]], bool]:
    if match["absent"]:
        return lambda found, key=match["absent_key"]: key not in found  # type: ignore[misc]
    key = match["key"]
    if match["set"]:
        values = {value.strip() for value in match["values"].split(",")}
        for value in values:
            if not re.fullmatch(_VALUE, value):
                raise bad_request(f'invalid label value: "{value}"')
        if match["set"] == "in":
            return lambda found: key in found and found[key] in values
        return lambda found: found.get(key) not in values
    wanted, operator = match["value"], match["op"]
    if operator is None:
        return lambda found: key in found
    if operator == "!=":
        return lambda found: found.get(key) != wanted
    if operator in "<>":
        return _number_test(key, operator, wanted)
    return lambda found: found.get(key) == wanted


def _number_test(key: str, operator: str, text: str) -> Callable[[Mapping[str, str]], bool]:
    try:
        bound = int(text)
    except ValueError:
        raise bad_request(f'for {operator} the value must be an integer: "{text}"') from None

    def test(found: Mapping[str, str]) -> bool:
        try:
            value = int(found[key])
        except (KeyError, ValueError):
            return False
        return value > bound if operator == ">" else value < bound

    return test


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
    """At commas that no backslash escapes."""
    return re.split(r"(?<!\\),", text)


def field(obj: Object, path: tuple[str, ...]) -> str:
    """The field as a selector sees it: absent is "", true is "true"."""
    value: Any = obj
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    if value is None:
        return ""
    if isinstance(value, dict):  # the one such field: an Event's source means its component
        return str(value.get("component", ""))
    return str(value).lower() if isinstance(value, bool) else str(value)


def selector(label_text: str, field_text: str, selectable: tuple[str, ...]) -> Match | None:
    """Both at once; None when everything matches."""
    if not label_text and not field_text:
        return None
    by_label = labels(label_text)
    by_field = fields(field_text, selectable)
    return lambda obj: by_label(obj["metadata"].get("labels") or {}) and by_field(obj)
