"""Kubernetes label selectors: parsed into predicates over labels. Pure.

Used by the gateway for X-Label-Selector headers, for the selector of an API key (``api_key.py``,
``_keys.pyx``), and by the embedded API for ``?labelSelector=``.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from itertools import islice

from kubeai.errors import quoted

SELECTOR_MAX_CHARS = 4096
REQUIREMENTS_MAX_COUNT = 64  # of a selector, which may be evaluated for every Model

Labels = Mapping[str, str]
Selector = Callable[[Labels], bool]

_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
_DOMAIN = r"[a-z0-9](?:[a-z0-9-]*[a-z0-9])?(?:\.[a-z0-9](?:[a-z0-9-]*[a-z0-9])?)*"
_KEY = re.compile(rf"(?:(?=.{{1,253}}/){_DOMAIN}/)?{_NAME}")
_VALUE = re.compile(rf"(?:{_NAME})?")
_TOKEN = re.compile(r"==|!=|[=!<>(),]|[^\s=!<>(),]+")  # white space matches nothing


def label_selector(text: str) -> Selector:
    """Parse a Kubernetes label selector into a predicate. An empty selector matches everything.

    ``k``, ``!k``, ``k=v``, ``k==v``, ``k!=v``, ``k in (a,b)``, ``k notin (a,b)``, ``k>1``,
    ``k<1``, joined by commas. As in Kubernetes, ``!=`` and ``notin`` also match a missing label.
    ValueError says what is wrong.
    """
    if len(text) > SELECTOR_MAX_CHARS:
        raise ValueError(f"it is longer than {SELECTOR_MAX_CHARS} characters")
    requirements = tuple(islice(_requirements(text), REQUIREMENTS_MAX_COUNT + 1))
    if len(requirements) > REQUIREMENTS_MAX_COUNT:
        raise ValueError(f"it has more than {REQUIREMENTS_MAX_COUNT} requirements")
    return lambda labels: all(requirement(labels) for requirement in requirements)


def _requirements(text: str) -> Iterator[Selector]:
    tokens = deque(_TOKEN.findall(text))
    if not tokens:
        return
    while True:
        yield _requirement(tokens)
        if not tokens:
            return
        if (token := tokens.popleft()) != ",":
            raise ValueError(f"expected a comma, found {quoted(token)}")


def _requirement(tokens: deque[str]) -> Selector:
    """Consume one requirement from the start of ``tokens``."""
    if tokens and tokens[0] == "!":
        tokens.popleft()
        absent = _checked(_KEY, "key", tokens)
        return lambda labels: absent not in labels
    key = _checked(_KEY, "key", tokens)
    operator = tokens.popleft() if tokens and tokens[0] != "," else ""
    if operator == "":
        return lambda labels: key in labels
    if operator in ("in", "notin"):
        values = _value_set(tokens)
        if operator == "in":
            return lambda labels: labels.get(key) in values
        return lambda labels: labels.get(key) not in values
    value = "" if not tokens or tokens[0] == "," else _checked(_VALUE, "value", tokens)
    if operator in ("=", "=="):
        return lambda labels: labels.get(key) == value
    if operator == "!=":
        return lambda labels: labels.get(key) != value
    if operator in (">", "<"):
        sign, bound = (1 if operator == ">" else -1), _integer(value)
        return lambda labels: _exceeds(labels.get(key), bound, sign)
    raise ValueError(f"{quoted(operator)} is not an operator")


def _value_set(tokens: deque[str]) -> frozenset[str]:
    if not tokens or tokens.popleft() != "(":
        raise ValueError("expected a list in parentheses after in or notin")
    values = set()
    while True:
        is_empty = bool(tokens) and tokens[0] in (",", ")")
        values.add("" if is_empty else _checked(_VALUE, "value", tokens))
        token = tokens.popleft() if tokens else "the end"
        if token == ")":
            return frozenset(values)
        if token != ",":
            raise ValueError(f"expected a comma or ), found {quoted(token)}")


def _checked(pattern: re.Pattern[str], what: str, tokens: deque[str]) -> str:
    if not tokens:
        raise ValueError(f"expected a {what} at the end")
    token = tokens.popleft()
    if not pattern.fullmatch(token):
        raise ValueError(f"{quoted(token)} is not a valid label {what}")
    return token


def _integer(value: str) -> int:
    if not re.fullmatch(r"-?[0-9]{1,18}", value):
        raise ValueError(f"{quoted(value)} is not an integer")
    return int(value)


def _exceeds(value: str | None, bound: int, sign: int) -> bool:
    try:
        return value is not None and sign * (_integer(value) - bound) > 0
    except ValueError:
        return False
