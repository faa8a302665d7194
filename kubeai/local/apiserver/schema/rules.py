"""``x-kubernetes-validations``: CEL rules at every level of a structural schema.

Rules are compiled with the schema, and evaluated on objects that are valid under it. A rule that
uses `oldSelf` is a transition rule: it runs on updates, if the old object has a value at the same
path (items of map-type lists are matched by their keys; items of other lists are not matched).

CEL is evaluated by common-expression-language, extended with Kubernetes' string and list functions.
``.?`` and ``[?…]`` are not supported. A CRD that uses them, or an unknown function, is rejected
when it is created.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from types import ModuleType
from typing import Any

import orjson

from kubeai.local.apiserver.errors import Cause

# `import cel` also imports the package's command line, which needs prompt_toolkit and rich: a third
# of the API server's start, and 12 MB. An empty module takes its place meanwhile.
sys.modules["cel.cli"] = ModuleType("cel.cli")
import cel  # noqa: E402

del sys.modules["cel.cli"]

Object = dict[str, Any]

CAUSES_MAX = 50


@dataclass(slots=True, frozen=True)
class _Rule:
    program: cel.Program
    source: str
    message: str
    message_program: cel.Program | None
    reason: str
    field_path: str
    transition: bool
    optional_old: bool


@dataclass(slots=True)
class _Node:
    """A schema node that has rules, or has nodes with rules below it."""

    schema: Object
    rules: list[_Rule] = field(default_factory=list)
    members: dict[str, _Node] = field(default_factory=dict)
    each: _Node | None = None  # items of a list, or values of a map
    keys: tuple[str, ...] = ()  # merge keys of a map-type list

    def __bool__(self) -> bool:
        return bool(self.rules or self.members or self.each)


_UNCHECKED = Cause(
    "FieldValueInvalid",
    "Invalid value: null: some validation rules were not checked because the object was invalid; "
    "correct the existing errors to complete validation",
    "<nil>",
)


class Rules:
    """The rules of one schema."""

    def __init__(self, root: Object) -> None:
        self.mistakes: list[Cause] = []  # rules that do not compile, by their path in the schema
        self._root = self._compile(root, "")
        self._context = cel.Context(functions=_FUNCTIONS)
        # Reported instead when the object is too invalid to evaluate rules on.
        self.unchecked = [_UNCHECKED] if self._root else []

    def check(self, obj: Object, old: Object | None) -> list[Cause]:
        """Return the rules that a valid object violates."""
        if not self._root:
            return []
        known = ("name", "generateName")
        shown = {**obj, "metadata": {k: v for k, v in obj["metadata"].items() if k in known}}
        before = None
        if old is not None:
            metadata = {k: v for k, v in old["metadata"].items() if k in known}
            before = {**old, "metadata": metadata}
        causes = []
        for cause in self._check(self._root, shown, before, "", old is not None):
            causes.append(cause)
            if len(causes) >= CAUSES_MAX:
                break
        return causes

    # Compiling.

    def _compile(self, schema: Object, path: str) -> _Node:
        node = _Node(schema)
        for index, rule in enumerate(schema.get("x-kubernetes-validations") or ()):
            compiled = self._compile_rule(rule, f"{path}.x-kubernetes-validations[{index}]")
            if compiled is not None:
                node.rules.append(compiled)
        for name, child in (schema.get("properties") or {}).items():
            below = self._compile(child, f"{path}.properties[{name}]")
            if below:
                node.members[name] = below
        for name in ("items", "additionalProperties"):
            if isinstance(schema.get(name), dict):
                below = self._compile(schema[name], f"{path}.{name}")
                if below:
                    node.each = below
        if schema.get("x-kubernetes-list-type") == "map":
            node.keys = tuple(schema.get("x-kubernetes-list-map-keys") or ())
        return node

    def _compile_rule(self, rule: Object, path: str) -> _Rule | None:
        program = self._program(str(rule.get("rule", "")), f"{path}.rule")
        message_program = None
        if rule.get("messageExpression"):
            message_program = self._program(
                str(rule["messageExpression"]), f"{path}.messageExpression"
            )
        if program is None:
            return None
        source = str(rule["rule"])
        return _Rule(
            program,
            source,
            str(rule.get("message") or f"failed rule: {source.strip()}"),
            message_program,
            str(rule.get("reason") or "FieldValueInvalid"),
            str(rule.get("fieldPath") or ""),
            "oldSelf" in program.variables(),
            bool(rule.get("optionalOldSelf")),
        )

    def _program(self, source: str, path: str) -> cel.Program | None:
        try:
            program = cel.compile(source)
            unknown = [name for name in program.functions() if not _is_known(name)]
            if unknown:
                raise ValueError(f"undeclared reference to '{unknown[0]}'")
        except ValueError as error:
            why = f'Invalid value: "{source}": compilation failed: {error}'
            self.mistakes.append(Cause("FieldValueInvalid", why, path))
            return None
        return program

    # Evaluating.

    def _check(
        self, node: _Node, value: Any, old: Any, path: str, has_old: bool
    ) -> Iterator[Cause]:
        if value is None:
            return
        for rule in node.rules:
            cause = self._evaluate(rule, node.schema, value, old, path, has_old)
            if cause is not None:
                yield cause
        if isinstance(value, dict):
            for name, below, where in self._below(node, value, path):
                before = old.get(name) if has_old and isinstance(old, dict) else None
                known = has_old and isinstance(old, dict) and name in old
                yield from self._check(below, value[name], before, where, known)
        elif isinstance(value, list) and node.each is not None:
            earlier = _by_keys(old, node.keys) if has_old and node.keys else {}
            for index, item in enumerate(value):
                identity = _identity(item, node.keys)
                yield from self._check(
                    node.each, item, earlier.get(identity), f"{path}[{index}]", identity in earlier
                )

    @staticmethod
    def _below(node: _Node, value: Object, path: str) -> Iterator[tuple[str, _Node, str]]:
        """Yield members with rules, and their paths: ``path.name``, or ``path[key]`` in a map."""
        properties = node.schema.get("properties") or {}
        for name in value:
            below, where = node.members.get(name), f"{path}.{name}" if path else name
            if below is None and name not in properties:
                below, where = node.each, f"{path}[{name}]"
            if below:
                yield name, below, where

    def _evaluate(
        self, rule: _Rule, schema: Object, value: Any, old: Any, path: str, has_old: bool
    ) -> Cause | None:
        if rule.transition and not has_old and not rule.optional_old:
            return None
        variables = {"self": _shown(value, schema)}
        if rule.transition:
            variables["oldSelf"] = _shown(old, schema) if has_old else None
            if rule.optional_old:
                some = cel.OptionalValue
                variables["oldSelf"] = some.of(variables["oldSelf"]) if has_old else some.none()
        self._context.update(variables)
        where = (path + rule.field_path).removeprefix("." if not path else "")
        kind = schema.get("type", "")
        try:
            if rule.program.execute(self._context) is True:
                return None
        except (KeyError, RuntimeError, TypeError, ValueError, OverflowError) as error:
            reason = f"no such key: {error.args[0]}" if isinstance(error, KeyError) else str(error)
            why = f'Invalid value: "{kind}": {reason} evaluating rule: {rule.message}'
            return Cause("FieldValueInvalid", why, where or "<nil>")
        if not rule.transition and has_old and value == old:
            return None  # already violated, and unchanged by this write
        return _broken(rule, self._message(rule), value, where or "<nil>")

    def _message(self, rule: _Rule) -> str:
        if rule.message_program is None:
            return rule.message
        try:
            message = rule.message_program.execute(self._context)
        except (KeyError, RuntimeError, TypeError, ValueError, OverflowError):
            return rule.message
        return message.strip() if isinstance(message, str) and message.strip() else rule.message


def _broken(rule: _Rule, message: str, value: Any, where: str) -> Cause:
    if rule.reason == "FieldValueRequired":
        return Cause(rule.reason, f"Required value: {message}", where)
    if rule.reason == "FieldValueForbidden":
        return Cause(rule.reason, f"Forbidden: {message}", where)
    shown = "" if isinstance(value, (dict, list)) else f"{orjson.dumps(value).decode()}: "
    if rule.reason == "FieldValueDuplicate":
        return Cause(rule.reason, f"Duplicate value: {shown.removesuffix(': ')}", where)
    return Cause("FieldValueInvalid", f"Invalid value: {shown}{message}", where)


def _identity(item: Any, keys: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(repr(item.get(key)) for key in keys) if isinstance(item, dict) else ()


def _by_keys(items: Any, keys: tuple[str, ...]) -> dict[tuple[str, ...], Any]:
    return {_identity(item, keys): item for item in items} if isinstance(items, list) else {}


# Values as CEL sees them.

_RESERVED = frozenset((
    "true", "false", "null", "in", "as", "break", "const", "continue", "else", "for",
    "function", "if", "import", "let", "loop", "package", "namespace", "return", "var",
    "void", "while",
))  # fmt: skip


def _escaped(name: str) -> str:
    """Escape a property's name for CEL, which reserves some words and characters."""
    if name in _RESERVED:
        return f"__{name}__"
    for plain, word in (("__", "__underscores__"), (".", "__dot__"), ("-", "__dash__"),
                        ("/", "__slash__")):  # fmt: skip
        name = name.replace(plain, word)
    return name


def _shown(value: Any, schema: Object) -> Any:
    """Convert a value for CEL: escape property names (not map keys), parse date-times."""
    if isinstance(value, dict):
        properties = schema.get("properties") or {}
        extra = schema.get("additionalProperties")
        extra = extra if isinstance(extra, dict) else {}
        return {
            _escaped(name) if name in properties else name: _shown(
                member, properties.get(name, extra)
            )
            for name, member in value.items()
        }
    if isinstance(value, list):
        return [_shown(item, schema.get("items") or {}) for item in value]
    if isinstance(value, str) and schema.get("format") == "date-time":
        return datetime.fromisoformat(value)
    if isinstance(value, int) and schema.get("type") == "number":
        return float(value)
    return value


# Kubernetes' extensions to CEL. Each is called as a method of its first argument.


def _replace(text: str, old: str, new: str, limit: int = -1) -> str:
    return text.replace(old, new, limit)


def _split(text: str, separator: str, limit: int = -1) -> list[str]:
    if limit == 0:
        return []
    if not separator:
        return list(text)
    return text.split(separator, limit - 1 if limit > 0 else -1)


def _substring(text: str, start: int, end: int | None = None) -> str:
    end = len(text) if end is None else end
    if not 0 <= start <= end <= len(text):
        raise ValueError("index out of range")
    return text[start:end]


def _char_at(text: str, index: int) -> str:
    if not 0 <= index <= len(text):
        raise ValueError("index out of range")
    return text[index : index + 1]


def _index_of(where: Any, what: Any, start: int = 0) -> int:
    if isinstance(where, str):
        return where.find(what, start)
    return where.index(what) if what in where else -1


def _last_index_of(where: Any, what: Any) -> int:
    if isinstance(where, str):
        return where.rfind(what)
    return len(where) - 1 - where[::-1].index(what) if what in where else -1


def _is_sorted(items: list[Any]) -> bool:
    return all(a <= b for a, b in itertools.pairwise(items))


def _find(text: str, pattern: str) -> str:
    match = re.search(pattern, text)
    return match[0] if match else ""


def _find_all(text: str, pattern: str, limit: int = -1) -> list[str]:
    found = [match[0] for match in re.finditer(pattern, text)]
    return found if limit < 0 else found[:limit]


def _join(items: list[str], separator: str = "") -> str:
    return separator.join(items)


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "charAt": _char_at,
    "find": _find,
    "findAll": _find_all,
    "indexOf": _index_of,
    "isSorted": _is_sorted,
    "join": _join,
    "lastIndexOf": _last_index_of,
    "lowerAscii": lambda text: text.lower(),
    "max": lambda items: max(items),
    "min": lambda items: min(items),
    "replace": _replace,
    "reverse": lambda value: value[::-1],
    "split": _split,
    "substring": _substring,
    "sum": lambda items: sum(items),
    "trim": lambda text: text.strip(),
    "upperAscii": lambda text: text.upper(),
}
_STANDARD = frozenset((
    "size", "contains", "startsWith", "endsWith", "matches", "type", "string", "int", "uint",
    "double", "bytes", "dyn", "duration", "timestamp", "getFullYear", "getMonth",
    "getDayOfYear", "getDayOfMonth", "getDate", "getDayOfWeek", "getHours", "getMinutes",
    "getSeconds", "getMilliseconds", "all", "exists", "exists_one", "map", "filter", "has",
    "of", "none", "ofNonZeroValue", "hasValue", "value", "orValue", "or", "optMap",
))  # fmt: skip


def _is_known(name: str) -> bool:
    return name in _STANDARD or name in _FUNCTIONS or not name[0].isalpha()
