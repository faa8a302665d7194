"""Object metadata: schema, validation and timestamps."""

from __future__ import annotations

import re
import secrets
from datetime import UTC, datetime
from typing import Any

from kubeai.local.apiserver.errors import Cause, bad_request
from kubeai.local.apiserver.schema.structural import Schema, show

Object = dict[str, Any]

NAME_MAX_CHARS = 253
LABEL_VALUE_MAX_CHARS = 63
ANNOTATIONS_MAX_BYTES = 256 << 10
# Like Kubernetes, without vowels and lookalikes, so that no words appear by chance.
_SUFFIX = "bcdfghjklmnpqrstvwxz2456789"
_SUFFIX_CHARS = 5
_LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_SUBDOMAIN = re.compile(rf"{_LABEL}(\.{_LABEL})*")
_QUALIFIED = re.compile(r"([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]")
_VALUE = re.compile(r"(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?")

_STRING: Object = {"type": "string"}
_STRINGS: Object = {"type": "object", "additionalProperties": _STRING}
_TIME: Object = {"type": "string", "format": "date-time"}
OWNER: Object = {
    "type": "object",
    "properties": {
        **dict.fromkeys(("apiVersion", "kind", "name", "uid"), _STRING),
        "controller": {"type": "boolean"},
        "blockOwnerDeletion": {"type": "boolean"},
    },
}
OBJECT_META: Object = {
    "type": "object",
    "properties": {
        **dict.fromkeys(
            ("name", "generateName", "namespace", "uid", "resourceVersion", "selfLink"), _STRING
        ),
        "generation": {"type": "integer"},
        "creationTimestamp": _TIME,
        "deletionTimestamp": _TIME,
        "deletionGracePeriodSeconds": {"type": "integer"},
        "labels": _STRINGS,
        "annotations": _STRINGS,
        "finalizers": {"type": "array", "items": _STRING},
        "ownerReferences": {"type": "array", "items": OWNER},
        "managedFields": {"type": "array", "items": {"type": "object"}},
    },
}
_SCHEMA = Schema(OBJECT_META)
_STANDARD_FINALIZERS = (
    "orphan", "foregroundDeletion", "kubernetes",
    "customresourcecleanup.apiextensions.k8s.io",
)  # fmt: skip
_DROPPED_WHEN_EMPTY = ("labels", "annotations", "finalizers", "ownerReferences")


def now() -> str:
    """Return the current time in Kubernetes' format, in whole seconds."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def parse_time(text: str) -> datetime:
    """Parse an RFC 3339 timestamp."""
    return datetime.fromisoformat(text)


def random_suffix() -> str:
    """Return random characters for a generated name."""
    return "".join(secrets.choice(_SUFFIX) for _ in range(_SUFFIX_CHARS))


def tidy_metadata(obj: Object, version: str, kind: str) -> tuple[list[str], list[Object] | None]:
    """Validate the types in metadata; drop unknown and empty fields in place.

    Returns the paths of unknown fields, and `managedFields`, which it removes.
    """
    metadata = obj.setdefault("metadata", {})
    unknown: list[str] = []
    managed = None
    if isinstance(metadata, dict):
        if _are_objects(metadata.get("managedFields")):
            managed = metadata.pop("managedFields")
        unknown = [f"metadata.{path}" for path in _SCHEMA.prune(metadata, embedded=False)]
        _SCHEMA.default(metadata)  # this drops nulls
    causes = _SCHEMA.validate(metadata)
    if causes:
        wrong = f"metadata.{causes[0].line()}".replace(".:", ":")
        raise bad_request(f'{kind} in version "{version}" cannot be handled as a {kind}: {wrong}')
    metadata.pop("selfLink", None)
    for name in _DROPPED_WHEN_EMPTY:
        if name in metadata and not metadata[name]:
            del metadata[name]
    return unknown, managed


def _are_objects(items: Any) -> bool:
    return isinstance(items, list) and all(isinstance(item, dict) for item in items)


def check_metadata(metadata: Object, one_label: bool = False, custom: bool = False) -> list[Cause]:
    """Validate names, labels, annotations, finalizers and owner references.

    `one_label`: the name must be a DNS label, not a subdomain. `custom`: this is a custom resource,
    whose finalizers need no domain prefix.
    """
    causes = [*_check_name(metadata.get("name", ""), one_label)]
    for key, value in (metadata.get("labels") or {}).items():
        causes += _check_label(key, value)
    annotations = metadata.get("annotations") or {}
    for key in annotations:
        causes += _check_key(key.lower(), "metadata.annotations")
    size = sum(len(key) + len(value.encode()) for key, value in annotations.items())
    if size > ANNOTATIONS_MAX_BYTES:
        causes.append(
            Cause(
                "FieldValueTooLong",
                f"Too long: may not be more than {ANNOTATIONS_MAX_BYTES} bytes",
                "metadata.annotations",
            )
        )
    for index, finalizer in enumerate(metadata.get("finalizers") or ()):
        causes += _check_key(finalizer, "metadata.finalizers")
        if not custom and "/" not in finalizer and finalizer not in _STANDARD_FINALIZERS:
            why = "name is neither a standard finalizer name nor is it fully qualified"
            causes.append(_invalid(finalizer, why, f"metadata.finalizers[{index}]"))
    return causes + _check_owners(metadata.get("ownerReferences") or [])


def check_metadata_unchanged(metadata: Object, old: Object) -> list[Cause]:
    """Reject changes of immutable fields. Fields that a write omits are kept."""
    causes = []
    for name in ("deletionTimestamp", "deletionGracePeriodSeconds"):
        given, kept = metadata.get(name), old.get(name)
        same = given == kept
        if isinstance(given, str) and isinstance(kept, str):
            same = parse_time(given) == parse_time(kept)
        if given is not None and not same:
            why = f"Invalid value: {show(given)}: field is immutable"
            causes.append(Cause("FieldValueInvalid", why, f"metadata.{name}"))
    return causes


def _invalid(value: str, why: str, field: str) -> Cause:
    return Cause("FieldValueInvalid", f'Invalid value: "{value}": {why}', field)


def _check_name(name: str, one_label: bool) -> list[Cause]:
    if not name:
        why = "name or generateName is required"
        return [Cause("FieldValueRequired", f"Required value: {why}", "metadata.name")]
    if one_label and (len(name) > LABEL_VALUE_MAX_CHARS or not re.fullmatch(_LABEL, name)):
        why = (
            "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or "
            "'-', and must start and end with an alphanumeric character (e.g. 'my-name',  or "
            "'123-abc', regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?')"
        )
        return [_invalid(name, why, "metadata.name")]
    if len(name) > NAME_MAX_CHARS:
        return [_invalid(name, f"must be no more than {NAME_MAX_CHARS} bytes", "metadata.name")]
    if not _SUBDOMAIN.fullmatch(name):
        why = (
            "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, "
            "'-' or '.', and must start and end with an alphanumeric character (e.g. "
            "'example.com', regex used for validation is "
            r"'[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')"
        )
        return [_invalid(name, why, "metadata.name")]
    return []


def _check_key(key: str, field: str) -> list[Cause]:
    prefix, slash, name = key.rpartition("/")
    if slash and (len(prefix) > NAME_MAX_CHARS or not _SUBDOMAIN.fullmatch(prefix)):
        return [_invalid(key, "prefix part a lowercase RFC 1123 subdomain is expected", field)]
    if len(name) > LABEL_VALUE_MAX_CHARS:
        why = f"name part must be no more than {LABEL_VALUE_MAX_CHARS} bytes"
        return [_invalid(key, why, field)]
    if not _QUALIFIED.fullmatch(name):
        why = (
            "name part must consist of alphanumeric characters, '-', '_' or '.', and must start "
            "and end with an alphanumeric character (e.g. 'MyName',  or 'my.name',  or "
            "'123-abc', regex used for validation is '([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]')"
        )
        return [_invalid(key, why, field)]
    return []


def _check_label(key: str, value: str) -> list[Cause]:
    causes = _check_key(key, "metadata.labels")
    if len(value) > LABEL_VALUE_MAX_CHARS:
        why = f"must be no more than {LABEL_VALUE_MAX_CHARS} bytes"
        causes.append(_invalid(value, why, "metadata.labels"))
    elif not _VALUE.fullmatch(value):
        why = (
            "a valid label must be an empty string or consist of alphanumeric characters, '-', "
            "'_' or '.', and must start and end with an alphanumeric character (e.g. 'MyValue',  "
            "or 'my_value',  or '12345', regex used for validation is "
            "'(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?')"
        )
        causes.append(_invalid(value, why, "metadata.labels"))
    return causes


def _check_owners(owners: list[Object]) -> list[Cause]:
    causes: list[Cause] = []
    for index, owner in enumerate(owners):
        for name in ("apiVersion", "kind", "name", "uid"):
            if not owner.get(name):
                field = f"metadata.ownerReferences[{index}].{name}"
                why = "version must not be empty" if name == "apiVersion" else "must not be empty"
                causes.append(_invalid("", why, field))
    controllers = [owner.get("name", "") for owner in owners if owner.get("controller")]
    if len(controllers) > 1:
        why = (
            "Only one reference can have Controller set to true. Found "
            f'"true" in references for {" and ".join(controllers)}'
        )
        causes.append(Cause("FieldValueInvalid", f"Invalid value: {why}",
                            "metadata.ownerReferences"))  # fmt: skip
    return causes
