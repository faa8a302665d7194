"""Reads YAML or JSON into msgspec Structs, strictly, and names the place of whatever is wrong.

msgspec's own errors leave out the keys of maps and know neither durations nor quantities. This
reader follows the same type information and gives each error its dotted path. A unit stands in the
``extra`` of a field's Meta: ``{"unit": "duration"}`` turns ``1m30s`` into seconds, ``bytes`` turns
``64Mi`` into an integer, ``quantity`` and ``address`` check a string. ``null`` means "not given".

Called by `kubeai.api.config`; `kubeai local` finds repeated keys of manifests with it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any, TypeVar

import msgspec
import yaml
from msgspec import inspect

from kubeai.api.duration import parse_duration
from kubeai.api.quantity import parse_quantity
from kubeai.errors import ConfigError

T = TypeVar("T", bound=msgspec.Struct)
_ADDRESS = re.compile(r"(?P<host>\[[0-9a-fA-F:.%]+\]|[^:\[\]/\s]*):(?P<port>\d{1,5})")


def read_yaml(text: str, source: str) -> Any:
    """The plain value of a YAML (or JSON) text; a key given twice is an error."""
    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            for path, line in repeated_keys(node):
                raise ConfigError(path, f"given twice (again in line {line})")
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source
        raise ConfigError("", f"{place}: not YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError("", f"{source}: not YAML: {error}") from None


def read(value: Any, cls: type[T], path: str = "") -> T:
    """``value`` as a ``cls``; ConfigError carries the dotted path of the first thing wrong."""
    struct = inspect.type_info(cls)
    assert isinstance(struct, inspect.StructType)
    result = _struct(value, struct, path)
    assert isinstance(result, cls)
    return result


def closest(word: str, known: Iterable[str]) -> str | None:
    """The known name that ``word`` is probably a misspelling of."""
    by_lower = {name.lower(): name for name in known}
    close = get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[close[0]] if close else None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` when something known is close, else what is known."""
    known = sorted(known)
    close = closest(word, known)
    if close is not None:
        return f"; did you mean {close!r}?"
    return f"; known are {', '.join(known)}" if known else ""


def repeated_keys(node: yaml.Node) -> Iterator[tuple[str, int]]:
    """The dotted path of each key that its map already has, and the line, counted from 1."""
    return _repeated_keys(node, "", set())


def _repeated_keys(node: yaml.Node, path: str, seen: set[int]) -> Iterator[tuple[str, int]]:
    if id(node) in seen:  # an alias: looked at already
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            yield from _repeated_keys(item, f"{path}[{i}]", seen)
    elif isinstance(node, yaml.MappingNode):
        keys = set()
        for key, item in node.value:
            below = _join(path, str(key.value))
            if isinstance(key, yaml.ScalarNode) and key.value in keys:
                yield below, key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode):
                keys.add(key.value)
            yield from _repeated_keys(item, below, seen)


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _value(value: Any, type_: inspect.Type, path: str, unit: Mapping[str, Any]) -> Any:
    match type_:
        case inspect.Metadata(type=inner, extra=extra):
            return _value(value, inner, path, {**unit, **(extra or {})})
        case inspect.UnionType(types=types):
            (inner,) = (t for t in types if not isinstance(t, inspect.NoneType))
            return _value(value, inner, path, unit)
        case inspect.StructType():
            return _struct(value, type_, path)
        case inspect.DictType():
            items = _mapping(value, path)
            return {k: _value(v, type_.value_type, _join(path, k), {}) for k, v in items.items()}
        case inspect.VarTupleType(item_type=item):
            if not isinstance(value, list):
                raise _wrong(path, "a list", value)
            return tuple(_value(v, item, f"{path}[{i}]", {}) for i, v in enumerate(value))
        case inspect.LiteralType(values=values):
            if value not in values:
                allowed = ", ".join(str(v) for v in values)
                raise ConfigError(path, f"must be one of {allowed}, not {value!r}")
            return value
        case inspect.AnyType():
            return value
    if "unit" in unit:
        return _limited(_UNITS[unit["unit"]](value, path), value, unit, path)
    return _scalar(value, type_, path)


def _scalar(value: Any, type_: inspect.Type, path: str) -> Any:
    match type_:
        case inspect.StrType():
            if not isinstance(value, str):
                hint = "; put it in quotes" if isinstance(value, bool | int | float) else ""
                raise _wrong(path, "a string", value, hint)
            return value
        case inspect.BoolType():
            if not isinstance(value, bool):
                raise _wrong(path, "true or false", value)
            return value
        case inspect.IntType(ge=least, le=most):
            if not isinstance(value, int) or isinstance(value, bool):
                raise _wrong(path, "a whole number", value)
            return _bounded(value, least, most, path)
        case inspect.FloatType(ge=least, le=most):
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise _wrong(path, "a number", value)
            return float(_bounded(value, least, most, path))
    raise TypeError(f"{path}: no reader for {type_!r}")


def _bounded(value: float, least: float | None, most: float | None, path: str) -> float:
    if least is not None and not value >= least:  # NaN is neither
        raise ConfigError(path, f"must be at least {least}, not {value}")
    if most is not None and not value <= most:
        raise ConfigError(path, f"must be at most {most}, not {value}")
    return value


def _struct(value: Any, type_: inspect.StructType, path: str) -> msgspec.Struct:
    items = _mapping(value, path)
    fields = {field.encode_name: field for field in type_.fields}
    for key in items:
        if key not in fields:
            raise ConfigError(_join(path, key), f"unknown key{did_you_mean(key, fields)}")
    given = {}
    for key, field in fields.items():
        if items.get(key) is not None:
            given[field.name] = _value(items[key], field.type, _join(path, key), {})
        elif field.required:
            raise ConfigError(_join(path, key), "must be given")
    struct = type_.cls(**given)
    assert isinstance(struct, msgspec.Struct)
    return struct


def _mapping(value: Any, path: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _wrong(path, "a map", value)
    for key in value:
        if not isinstance(key, str):
            raise ConfigError(path, f"the key {key!r} must be a string; put it in quotes")
    return value


def _wrong(path: str, wanted: str, value: Any, hint: str = "") -> ConfigError:
    kinds = {dict: "a map", list: "a list", str: "the string", bool: "", int: "the number"}
    kind = kinds.get(type(value), "")
    shown = kind if isinstance(value, dict | list) else f"{kind} {value!r}".strip()
    return ConfigError(path, f"must be {wanted}, not {shown}{hint}")


def _limited(result: Any, written: Any, unit: Mapping[str, Any], path: str) -> Any:
    """Numbers are never negative; some must be more than nothing."""
    if isinstance(result, int | float):
        if result < 0:
            raise ConfigError(path, f"must not be negative, not {written!r}")
        if result == 0 and unit.get("positive"):
            raise ConfigError(path, f"must be more than zero, not {written!r}")
    return result


def _duration(value: Any, path: str) -> float:
    if value == 0 and not isinstance(value, bool):
        return 0.0
    if not isinstance(value, str):
        hint = f'; write it with a unit, as "{value}s"' if type(value) in (int, float) else ""
        raise _wrong(path, "a duration", value, hint)
    try:
        return parse_duration(value)
    except ValueError as error:
        raise ConfigError(path, str(error)) from None


def _bytes(value: Any, path: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise _wrong(path, "a size in bytes such as 65536 or 64Mi", value)
    try:
        whole = parse_quantity(value).whole()
    except ValueError as error:
        raise ConfigError(path, str(error)) from None
    if whole is None:
        raise ConfigError(path, f"must be a whole number of bytes, not {value!r}")
    return whole


def _quantity(value: Any, path: str) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise _wrong(path, "a quantity such as 500m or 2Gi", value)
    try:
        quantity = parse_quantity(value)
    except ValueError as error:
        raise ConfigError(path, str(error)) from None
    if quantity.nanos < 0:
        raise ConfigError(path, f"must not be negative, not {value!r}")
    return str(quantity)


def _address(value: Any, path: str) -> str:
    if not isinstance(value, str):
        raise _wrong(path, "an address such as :8080 or 10.0.0.1:8080", value)
    match = _ADDRESS.fullmatch(value)
    if match is None or int(match["port"]) > 65535:
        raise ConfigError(path, f"must be an address such as :8080 or 10.0.0.1:8080, not {value!r}")
    return value


_UNITS: dict[str, Callable[[Any, str], Any]] = {
    "duration": _duration,
    "bytes": _bytes,
    "quantity": _quantity,
    "address": _address,
}
