"""Strictly decodes YAML or JSON into msgspec Structs, with the path of each error.

msgspec's own errors omit the keys of maps, and msgspec supports neither durations nor quantities.
This reader uses the same type information and gives each error a dotted path. A field's unit is set
in the ``extra`` of its Meta: ``{"unit": "duration"}`` turns ``1m30s`` into seconds, ``bytes`` turns
``64Mi`` into an integer, ``quantity``, ``size``, ``address`` and ``origin`` validate a string.

A key counts as not given, and keeps its default, if it is ``null`` or has Go's zero value for its
type (``0``, ``0s``, ``""``, ``{}``, ``[]``), because Go programs write those for unset fields. If
zero is a meaningful value, the Meta has ``{"zero": True}``. For booleans, quantities and optional
fields zero is always meaningful.

Called by `kubeai.api.config.system`, and by `kubeai local` and the console to find duplicate keys
in manifests.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import get_close_matches
from functools import lru_cache
from typing import Any, TypeVar

import msgspec
import yaml
from msgspec import UNSET, inspect
from msgspec.structs import replace

from kubeai.api.config.duration import parse_duration
from kubeai.api.config.quantity import parse_quantity
from kubeai.errors import ConfigError

T = TypeVar("T", bound=msgspec.Struct)
# Go reads a number as nanoseconds. A smaller number is rejected as a missing unit.
NANOSECONDS_MIN = 100_000_000
_ORIGIN = re.compile(
    r"\*|[a-z][a-z0-9+.-]*://([a-z0-9_.-]+|\[[0-9a-f:.]+\])(:(?P<port>\d{1,5}|\*))?", re.I | re.A
)
_ADDRESS = re.compile(r"(?P<host>\[[0-9a-fA-F:.%]+\]|[^:\[\]/\s]*):(?P<port>\d{1,5})")


def read_yaml(text: str, source: str) -> Any:
    """Parse YAML or JSON text into plain values. ConfigError if it is invalid or repeats a key."""
    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            for path, line in repeated_keys(node):
                raise ConfigError(path, f"duplicate key (line {line})")
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source
        raise ConfigError("", f"{place}: invalid YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError("", f"{source}: invalid YAML: {error}") from None


_type_info = lru_cache(maxsize=16)(inspect.type_info)  # takes 4 ms for the whole config


def read(value: Any, default: T) -> T:
    """Decode ``value`` into a Struct of ``default``'s type, which supplies keys not given.

    ConfigError has the dotted path of the first error.
    """
    struct = _type_info(type(default))
    assert isinstance(struct, inspect.StructType)
    result = _struct(value, struct, "", default)
    assert isinstance(result, type(default))
    return result


def closest(word: str, known: Iterable[str]) -> str | None:
    """The known name that ``word`` is probably a misspelling of."""
    by_lower = {name.lower(): name for name in known}
    close = get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[close[0]] if close else None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint: ``; did you mean 'x'?`` if a known name is close, else the known names."""
    known = sorted(known)
    close = closest(word, known)
    if close is not None:
        return f"; did you mean {close!r}?"
    return f"; known: {', '.join(known)}" if known else ""


def repeated_keys(node: yaml.Node) -> Iterator[tuple[str, int]]:
    """The dotted path and 1-based line of each key that its map already has."""
    return _repeated_keys(node, "", set())


def _repeated_keys(node: yaml.Node, path: str, seen: set[int]) -> Iterator[tuple[str, int]]:
    if id(node) in seen:  # an alias, already visited
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


def _value(
    value: Any, type_: inspect.Type, path: str, unit: Mapping[str, Any], default: Any = None
) -> Any:
    match type_:
        case inspect.Metadata(type=inner, extra=extra):
            return _value(value, inner, path, {**unit, **(extra or {})}, default)
        case inspect.UnionType(types=types):
            (inner,) = (t for t in types if not isinstance(t, inspect.NoneType))
            return _value(value, inner, path, unit, default)
        case inspect.StructType():
            return _struct(value, type_, path, default)
        case inspect.DictType(value_type=inner):
            items = {k: v for k, v in _mapping(value, path).items() if v is not None}
            return {k: _value(v, inner, _join(path, k), {}) for k, v in items.items()}
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
        return _not_negative(_UNITS[unit["unit"]](value, path), value, path)
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
    if least is not None and not value >= least:  # also rejects NaN
        raise ConfigError(path, f"must be at least {least}, not {value}")
    if most is not None and not value <= most:
        raise ConfigError(path, f"must be at most {most}, not {value}")
    return value


def _struct(
    value: Any, type_: inspect.StructType, path: str, default: msgspec.Struct | None = None
) -> msgspec.Struct:
    """Decode a Struct. ``default`` supplies the keys that are not given."""
    items = _mapping(value, path)
    fields = {field.encode_name: field for field in type_.fields}
    for key in items:
        if key not in fields:
            raise ConfigError(_join(path, key), f"unknown key{did_you_mean(key, fields)}")
    given = {}
    for key, field in fields.items():
        below = _default(field) if default is None else getattr(default, field.name)
        result = _given(items.get(key), field.type, _join(path, key), below)
        if result is not UNSET:
            given[field.name] = result
        elif field.required and default is None:
            raise ConfigError(_join(path, key), "is required")
    struct = type_.cls(**given) if default is None else replace(default, **given)
    assert isinstance(struct, msgspec.Struct)
    return struct


def _default(field: inspect.Field) -> Any:
    if field.default_factory is not msgspec.NODEFAULT:
        return field.default_factory()
    return None if field.default is msgspec.NODEFAULT else field.default


def _given(value: Any, type_: inspect.Type, path: str, default: Any) -> Any:
    """The value of a key; UNSET if it means the default."""
    kind, unit = _unwrap(type_)
    if value is None or any(type(value) is type(z) and value == z for z in _zeros(kind, unit)):
        return UNSET
    result = _value(value, type_, path, {}, default)
    parsed_to_zero = unit.get("unit") in ("duration", "bytes", "size") and not result
    return UNSET if parsed_to_zero and not unit.get("zero") else result


def _unwrap(type_: inspect.Type) -> tuple[inspect.Type, dict[str, Any]]:
    """The underlying type and its unit. For an optional field zero is a meaningful value."""
    unit: dict[str, Any] = {}
    while isinstance(type_, inspect.Metadata | inspect.UnionType):
        if isinstance(type_, inspect.Metadata):
            unit, type_ = unit | (type_.extra or {}), type_.type
        else:
            unit["zero"] = True
            (type_,) = (t for t in type_.types if not isinstance(t, inspect.NoneType))
    return type_, unit


def _zeros(type_: inspect.Type, unit: Mapping[str, Any]) -> tuple[Any, ...]:
    """The written values of a type that mean the default."""
    zero = unit.get("zero", False)
    match type_:
        case inspect.StructType() | inspect.DictType():
            return ({},)
        case inspect.VarTupleType():
            return () if zero else ([],)
        case inspect.StrType() | inspect.LiteralType():
            return () if zero else ("",)
        case inspect.IntType() | inspect.FloatType():
            numbers = () if zero else (0, 0.0)
            return (*numbers, "") if "unit" in unit else numbers
    return ()


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


def _not_negative(result: Any, written: Any, path: str) -> Any:
    if isinstance(result, int | float) and result < 0:
        raise ConfigError(path, f"must not be negative, not {written!r}")
    return result


def _duration(value: Any, path: str) -> float:
    if type(value) in (int, float) and (value == 0 or value >= NANOSECONDS_MIN):
        return float(value) / 1e9
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


def _size(value: Any, path: str) -> str:
    """A quantity; 0 means that it is not given."""
    text = _quantity(value, path)
    return "" if text == "0" else text


def check_address(value: Any, path: str) -> str:
    """Check for ``host:port``, where the host may be empty. ConfigError otherwise."""
    if not isinstance(value, str):
        raise _wrong(path, "an address such as :8080 or 10.0.0.1:8080", value)
    match = _ADDRESS.fullmatch(value)
    if match is None or int(match["port"]) > 65535:
        raise ConfigError(path, f"must be an address such as :8080 or 10.0.0.1:8080, not {value!r}")
    return value


def _origin(value: Any, path: str) -> str:
    """The origin of a web page in lower case, or "*"."""
    example = "https://chat.example.com, http://localhost:* or *"
    if not isinstance(value, str):
        raise _wrong(path, f"an origin such as {example}", value)
    match = _ORIGIN.fullmatch(value)
    if match is None or int((match["port"] or "0").replace("*", "0")) > 65535:
        hint = "; an origin has no path" if value.partition("://")[2].count("/") else ""
        raise ConfigError(path, f"must be an origin such as {example}, not {value!r}{hint}")
    return value.lower()


_UNITS: dict[str, Callable[[Any, str], Any]] = {
    "duration": _duration,
    "bytes": _bytes,
    "quantity": _quantity,
    "size": _size,
    "address": check_address,
    "origin": _origin,
}
