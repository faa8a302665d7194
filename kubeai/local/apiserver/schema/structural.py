"""Structural schemas: pruning, defaulting and validation of objects before they are stored.

`Schema` prunes undeclared fields, sets defaults, and validates: JSON schema with jsonschema-rs,
list types here, ``x-kubernetes-validations`` in `rules`. Errors use Kubernetes' wording, one
`Cause` per field. Used for both custom and built-in resources.

Paths are tuples internally, and shown like ``spec.adapters[0].name``.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jsonschema_rs
import orjson

from kubeai.local.apiserver.errors import Cause
from kubeai.local.apiserver.schema.rules import Rules

Object = dict[str, Any]
Path = tuple[str | int, ...]

_PRESERVE = "x-kubernetes-preserve-unknown-fields"
_EMBEDDED = "x-kubernetes-embedded-resource"
_INT_OR_STRING = "x-kubernetes-int-or-string"
_ERRORS_MAX = 50
_TYPE_META = ("apiVersion", "kind", "metadata")
# jsonschema-rs knows more formats than Kubernetes checks; both agree on these.
_FORMATS = {"date-time", "date", "email", "ipv4", "ipv6", "uri", "uuid", "hostname"}
_KEPT = (
    "enum", "pattern", "minLength", "maxLength", "minimum", "maximum", "multipleOf", "minItems",
    "maxItems", "uniqueItems", "minProperties", "maxProperties", "required",
)  # fmt: skip


def show_path(path: Path) -> str:
    """``spec.adapters[0].name``."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def show(value: Any) -> str:
    """Format a value for error messages."""
    return orjson.dumps(value).decode()


class UnknownField(NamedTuple):
    """An undeclared field, and the names declared at the same level."""

    path: Path
    declared: tuple[str, ...]


class Schema:
    """The schema of one version. `definitions` are the targets of ``$ref: #/$defs/…``.

    Only built-in resources have definitions. They have no rules, and their list types only affect
    merging. Raises ValueError if this is not a valid JSON schema.
    """

    def __init__(self, root: Object, definitions: Object | None = None) -> None:
        self.root = root
        self.definitions = definitions or {}
        self._defaults: dict[int, list[tuple[str, Any]]] = {}  # by the id of `properties`
        self._rules = Rules(root)
        self.mistakes = self._rules.mistakes
        if not definitions:
            _ = self._validator

    @functools.cached_property
    def _validator(self) -> jsonschema_rs.Draft202012Validator:
        document = _json_schema(self.root)
        if self.definitions:
            document["$defs"] = {
                name: _json_schema(schema) for name, schema in self.definitions.items()
            }
        return jsonschema_rs.Draft202012Validator(
            document, validate_formats=True, pattern_options=jsonschema_rs.RegexOptions()
        )

    # Pruning.

    def prune(self, obj: Object, embedded: bool = True) -> list[str]:
        """Remove undeclared fields in place. Returns their paths.

        `embedded`: the object is a whole resource; its apiVersion, kind and metadata are kept.
        """
        return [show_path(field.path) for field in self.prune_fields(obj, embedded)]

    def prune_fields(self, obj: Object, embedded: bool = True) -> list[UnknownField]:
        """Like `prune`, but with the names declared at the same level."""
        unknown: list[UnknownField] = []
        self._prune(obj, self.root, (), unknown, embedded)
        return unknown

    def _prune(
        self,
        value: Any,
        schema: Object,
        path: Path,
        unknown: list[UnknownField],
        embedded: bool = False,
    ) -> None:
        schema = self.resolve(schema)
        if isinstance(value, list):
            items = schema.get("items") or {}
            if schema.get(_PRESERVE):  # so does each item, as in Kubernetes
                items = {**self.resolve(items), _PRESERVE: True}
            for index, item in enumerate(value):
                self._prune(item, items, (*path, index), unknown)
        elif isinstance(value, dict):
            embedded = embedded or bool(schema.get(_EMBEDDED))
            for name in list(value):
                if embedded and name in _TYPE_META:
                    continue
                child = self.child(schema, name)
                if child is not None:
                    self._prune(value[name], child, (*path, name), unknown)
                elif not schema.get(_PRESERVE):
                    del value[name]
                    declared = tuple(schema.get("properties") or ())
                    unknown.append(UnknownField((*path, name), declared))

    def resolve(self, schema: Object) -> Object:
        """Follow references to the named definitions."""
        while "$ref" in schema:
            schema = self.definitions[schema["$ref"].rpartition("/")[2]]
        return schema

    def child(self, schema: Object, name: str) -> Object | None:
        """Return the schema of a member, or None if it is not declared."""
        properties = schema.get("properties") or {}
        if name in properties:
            return self.resolve(properties[name])
        extra = schema.get("additionalProperties")
        if isinstance(extra, dict):
            return self.resolve(extra)
        return {_PRESERVE: True} if extra is True else None

    # Defaulting.

    def default(self, obj: Object) -> None:
        """Set defaults in place. Drops nulls in fields that are not nullable."""
        self._default(obj, self.root)

    def _default(self, value: Any, schema: Object) -> None:
        schema = self.resolve(schema)
        if isinstance(value, list):
            for item in value:
                self._default(item, schema.get("items") or {})
        elif isinstance(value, dict):
            properties = schema.get("properties") or {}
            for name in [name for name, member in value.items() if member is None]:
                if name in properties and not self._whole(properties[name]).get("nullable"):
                    del value[name]  # treated as absent
            for name, default in self._defaults_of(properties):
                if name not in value:
                    value[name] = copy.deepcopy(default)
            for name, member in value.items():
                child = self.child(schema, name) if isinstance(member, (dict, list)) else None
                if child is not None:
                    self._default(member, child)

    def _whole(self, declared: Object) -> Object:
        """Return a member's schema: the resolved reference plus keywords beside it."""
        return {**self.resolve(declared), **declared}

    def _defaults_of(self, properties: Object) -> list[tuple[str, Any]]:
        """Return the properties that have defaults. Cached: few of many have one."""
        found = self._defaults.get(id(properties)) if properties else []
        if found is None:
            wholes = ((name, self._whole(declared)) for name, declared in properties.items())
            found = [(name, whole["default"]) for name, whole in wholes if "default" in whole]
            self._defaults[id(properties)] = found
        return found

    # Validation.

    def mismatches(self, obj: Object) -> list[Cause]:
        """Return values of the wrong type, which Go would fail to decode."""
        return [
            _cause(error)
            for error in self._validator.iter_errors(obj)
            if error.kind.name in ("type", "format")
        ]

    def validate(self, obj: Object, old: Object | None = None) -> list[Cause]:
        """Validate a pruned and defaulted object; `old` is the object that it replaces.

        Transition rules need `old`. Unchanged values that were already invalid in `old` pass, so
        that existing objects can still be updated after their CRD became stricter.
        """
        causes: list[Cause] = []
        for error in self._validator.iter_errors(obj):
            if old is None or not _is_unchanged(obj, old, error.instance_path):
                causes.append(_cause(error))
            if len(causes) >= _ERRORS_MAX:
                return causes
        if not self.definitions:
            causes += self._duplicates(obj, self.root, ())
        if not any(cause.reason in _BLOCKING for cause in causes):
            return causes + self._rules.check(obj, old)
        return causes + self._rules.unchecked

    def _duplicates(self, value: Any, schema: Object, path: Path) -> Iterator[Cause]:
        schema = self.resolve(schema)
        if isinstance(value, list):
            yield from _repeated(value, schema, path)
            for index, item in enumerate(value):
                yield from self._duplicates(item, schema.get("items") or {}, (*path, index))
        elif isinstance(value, dict):
            for name, member in value.items():
                child = self.child(schema, name)
                if child is not None and isinstance(member, (dict, list)):
                    yield from self._duplicates(member, child, (*path, name))


# As in Kubernetes, rules are not evaluated on an object with one of these errors.
_BLOCKING = (
    "FieldValueNotSupported", "FieldValueRequired", "FieldValueTooLong", "FieldValueTooMany",
    "FieldValueTypeInvalid",
)  # fmt: skip


def _is_unchanged(new: Any, old: Any, path: Sequence[str | int]) -> bool:
    """Whether the value at the path, or a parent, is unchanged. List items never match."""
    for part in path:
        if isinstance(part, int) or not (isinstance(old, dict) and part in old):
            return False
        new, old = new[part], old[part]
        if new == old:
            return True
    return False


def _repeated(items: list[Any], schema: Object, path: Path) -> Iterator[Cause]:
    kind = schema.get("x-kubernetes-list-type")
    if kind not in ("set", "map"):
        return
    keys = schema.get("x-kubernetes-list-map-keys") or []
    seen = set()
    for index, item in enumerate(items):
        if kind == "map" and not isinstance(item, dict):
            continue  # reported as a type error
        identity = item if kind == "set" else {key: item.get(key) for key in keys}
        text = show(identity)
        if text in seen:
            field = show_path((*path, index))
            yield Cause("FieldValueDuplicate", f"Duplicate value: {text}", field)
        seen.add(text)


def _json_schema(schema: Object) -> Object:
    """Convert the plain JSON schema part of a structural schema to draft 2020-12."""
    if "$ref" in schema:
        return {"$ref": schema["$ref"]}
    out: Object = {name: schema[name] for name in _KEPT if name in schema}
    kind = schema.get("type")
    if schema.get(_INT_OR_STRING):
        kind = ["integer", "string"]
    if kind:
        nullable = schema.get("nullable")
        kinds = kind if isinstance(kind, list) else [kind]
        out["type"] = [*kinds, "null"] if nullable else kind
        if nullable and "enum" in out:
            out["enum"] = [*out["enum"], None]
    if schema.get("format") in _FORMATS:
        out["format"] = schema["format"]
    for name in ("minimum", "maximum"):  # booleans in OpenAPI 3.0, numbers in draft 2020-12
        strict = "exclusive" + name.capitalize()
        if schema.get(strict) is True and name in out:
            out[strict] = out.pop(name)
    for name in ("properties", "patternProperties"):
        if schema.get(name):
            out[name] = {key: _json_schema(value) for key, value in schema[name].items()}
    for name in ("items", "additionalProperties", "not"):
        if isinstance(schema.get(name), dict):
            out[name] = _json_schema(schema[name])
    for name in ("allOf", "anyOf", "oneOf"):
        if schema.get(name):
            out[name] = [_json_schema(value) for value in schema[name]]
    return out


_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array",
          dict: "object", type(None): "null"}  # fmt: skip


def _cause(error: jsonschema_rs.ValidationError) -> Cause:
    """Convert a JSON schema error to Kubernetes' wording."""
    path: Path = tuple(error.instance_path)
    field, value, limit = show_path(path), error.instance, error.kind.value
    keyword = error.kind.name
    if keyword == "required":
        return Cause("FieldValueRequired", "Required value", show_path((*path, str(limit))))
    if keyword == "enum":
        options = ", ".join(show(option) for option in limit if option is not None)
        return Cause(
            "FieldValueNotSupported",
            f"Unsupported value: {show(value)}: supported values: {options}",
            field,
        )
    if keyword == "maxLength":
        return Cause("FieldValueTooLong", f"Too long: may not be more than {limit} bytes", field)
    if keyword == "maxItems":
        count = len(value) if isinstance(value, list) else 0
        why = f"Too many: {count}: must have at most {limit} items"
        return Cause("FieldValueTooMany", why, field)
    if keyword == "type":
        kind = show(_TYPES[type(value)])
        wanted = ",".join(str(name) for name in limit if name != "null")
        return Cause(
            "FieldValueTypeInvalid",
            f"Invalid value: {kind}: {field} in body must be of type {wanted}: {kind}",
            field,
        )
    message = _MESSAGES.get(keyword)
    what = message.format(limit) if message else f"is not valid: {error.message}"
    why = f"Invalid value: {show(value)}: {field} in body {what}"
    return Cause("FieldValueInvalid", why, field)


_MESSAGES = {
    "minimum": "should be greater than or equal to {}",
    "maximum": "should be less than or equal to {}",
    "exclusiveMinimum": "should be greater than {}",
    "exclusiveMaximum": "should be less than {}",
    "multipleOf": "should be a multiple of {}",
    "pattern": "should match '{}'",
    "minLength": "should be at least {} chars long",
    "minItems": "should have at least {} items",
    "uniqueItems": "shouldn't contain duplicates",
    "minProperties": "should have at least {} properties",
    "maxProperties": "should have at most {} properties",
    "format": "must be of type {}",
    "oneOf": "must validate one and only one schema (oneOf)",
    "anyOf": "must validate at least one schema (anyOf)",
    "allOf": "must validate all the schemas (allOf)",
    "not": "must not validate the schema (not)",
}
