"""Errors as in Kubernetes: an HTTP code, a machine-readable reason, and a message.

Code that rejects a request raises `StatusError`; the server turns it into a metav1.Status. Messages
use the wording of a real API server, because clients and people match on it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

Object = dict[str, Any]


class Cause(NamedTuple):
    """One invalid field. `reason` is a CauseType such as ``FieldValueInvalid``."""

    reason: str
    message: str
    field: str

    def line(self) -> str:
        """Return the cause as one line of a message."""
        return f"{self.field}: {self.message}" if self.field else self.message


class StatusError(Exception):
    """A request is rejected."""

    def __init__(self, code: int, reason: str, message: str, details: Object | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.message = message
        self.details = details

    def body(self) -> Object:
        """Return the metav1.Status."""
        return {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": self.message,
            "reason": self.reason,
            "code": self.code,
            # Always present: kubectl dereferences the details of a 404.
            "details": self.details or {},
        }


def success(name: str, group: str, kind: str, uid: str) -> Object:
    """Return the Status for a completed delete. `kind` is the resource's plural."""
    details = {"name": name, "group": group, "kind": kind, "uid": uid}
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Success",
        "details": {key: value for key, value in details.items() if value},
    }


def created() -> Object:
    """Return the Status for a create whose response is no object (a Binding)."""
    return {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201}


def group_resource(group: str, plural: str) -> str:
    """Return ``plural.group``, or the plural for the core group."""
    return f"{plural}.{group}" if group else plural


def _details(group: str, kind: str, name: str) -> Object:
    details = {"name": name, "group": group, "kind": kind}
    return {key: value for key, value in details.items() if value}


def bad_request(message: str) -> StatusError:
    """A 400: the request or its body is malformed."""
    return StatusError(400, "BadRequest", message)


def not_found(group: str, plural: str, name: str) -> StatusError:
    """A 404 that names the missing object."""
    message = f'{group_resource(group, plural)} "{name}" not found'
    return StatusError(404, "NotFound", message, _details(group, plural, name))


def no_such_path() -> StatusError:
    """A 404 for a path that the API does not serve."""
    return StatusError(404, "NotFound", "the server could not find the requested resource")


def already_exists(group: str, plural: str, name: str) -> StatusError:
    """A 409 for a create with an existing name."""
    message = f'{group_resource(group, plural)} "{name}" already exists'
    return StatusError(409, "AlreadyExists", message, _details(group, plural, name))


def conflict(group: str, plural: str, name: str, why: str) -> StatusError:
    """A 409 for a write that is based on another version of the object."""
    message = f'Operation cannot be fulfilled on {group_resource(group, plural)} "{name}": {why}'
    return StatusError(409, "Conflict", message, _details(group, plural, name))


MODIFIED = (
    "the object has been modified; please apply your changes to the latest version and try again"
)


def apply_conflict(found: list[tuple[str, list[str]]]) -> StatusError:
    """An apply conflicts with other managers; `found` is (manager, field paths) pairs."""
    causes = [
        {"reason": "FieldManagerConflict", "message": f"conflict with {who}", "field": path}
        for who, paths in found
        for path in paths
    ]
    if len(causes) == 1:
        message = f"Apply failed with 1 conflict: {causes[0]['message']}: {causes[0]['field']}"
    else:
        lists = (
            "\n".join((f"conflicts with {who}:", *(f"- {path}" for path in paths)))
            for who, paths in found
        )
        message = f"Apply failed with {len(causes)} conflicts: " + "\n".join(lists)
    return StatusError(409, "Conflict", message, {"causes": causes})


def forbidden(group: str, plural: str, name: str, why: str) -> StatusError:
    """A 403 for a write that the object's state does not allow."""
    message = f'{group_resource(group, plural)} "{name}" is forbidden: {why}'
    return StatusError(403, "Forbidden", message, _details(group, plural, name))


def invalid(group: str, kind: str, name: str, causes: list[Cause]) -> StatusError:
    """A 422 that lists all invalid fields."""
    lines = list(dict.fromkeys(cause.line() for cause in causes))
    listed = lines[0] if len(lines) == 1 else "[" + ", ".join(lines) + "]"
    of = f"{kind}.{group}" if group else kind
    details = _details(group, kind, name)
    details["causes"] = [
        {"reason": cause.reason, "message": cause.message, "field": cause.field} for cause in causes
    ]
    return StatusError(422, "Invalid", f'{of} "{name}" is invalid: {listed}', details)


def expired(why: str) -> StatusError:
    """A 410: the revision is no longer available."""
    return StatusError(410, "Expired", why)


def method_not_allowed() -> StatusError:
    """A 405."""
    return StatusError(
        405, "MethodNotAllowed", "the server does not allow this method on the requested resource"
    )


def not_acceptable(accepted: tuple[str, ...]) -> StatusError:
    """A 406 that lists the media types that the server can send."""
    message = f"only the following media types are accepted: {', '.join(accepted)}"
    return StatusError(406, "NotAcceptable", message)


def unsupported_media_type(got: str, accepted: tuple[str, ...]) -> StatusError:
    """A 415 that lists the media types that the server can read."""
    message = (
        "the body of the request was in an unknown format - accepted media types include: "
        f"{', '.join(accepted)} (not {got or 'none'})"
    )
    return StatusError(415, "UnsupportedMediaType", message)


def too_large(limit_bytes: int) -> StatusError:
    """A 413: the body exceeds the limit."""
    message = f"the request is too large: the limit is {limit_bytes} bytes"
    return StatusError(413, "RequestEntityTooLarge", message)
