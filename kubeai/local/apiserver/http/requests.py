"""Parsing of requests to the embedded API: body, query and Accept header.

Called by the server. Invalid input raises a `StatusError`.
"""

from __future__ import annotations

import asyncio
import random
from typing import Any, NamedTuple

import orjson
from aiohttp import web

from kubeai.local.apiserver import errors
from kubeai.local.apiserver.apply.patch import APPLY
from kubeai.local.apiserver.errors import Cause, StatusError
from kubeai.local.apiserver.http import bodies, protobuf
from kubeai.local.apiserver.kinds.resources import Resource
from kubeai.local.apiserver.storage import selectors
from kubeai.local.apiserver.storage.options import DeleteOptions, WriteOptions
from kubeai.local.apiserver.storage.watching import ListOptions

WATCH_TIMEOUT_S = (1800.0, 3600.0)
MANAGER_MAX_BYTES = 128
ASIDE_MIN_BYTES = 64 << 10  # larger bodies take over 10 ms to parse strictly: use a thread
JSON, YAML = "application/json", "application/yaml"
JSON_RANGES = (JSON, "*/*", "application/*")
TABLE, PARTIAL, PARTIAL_LIST = "Table", "PartialObjectMetadata", "PartialObjectMetadataList"


class Form(NamedTuple):
    """The representation that the client asks for: full objects, a Table, or metadata only."""

    kind: str = ""

    @property
    def content_type(self) -> str:
        """The Content-Type of a response in this form."""
        return f"{JSON};as={self.kind};v=v1;g=meta.k8s.io" if self.kind else JSON


async def read_body(
    request: web.Request, options: WriteOptions | None = None, anything: bool = False
) -> Any:
    """Return the decoded body. It must be an object unless `anything` is set.

    If the client asked for field validation, duplicate keys are recorded in `options`.
    """
    raw, kind = await request.read(), request.content_type
    if kind == protobuf.CONTENT_TYPE and not anything:
        return protobuf.decode(raw)
    if not anything and kind not in (JSON, YAML, APPLY, "application/octet-stream"):
        accepted = (JSON, YAML, protobuf.CONTENT_TYPE)
        raise errors.unsupported_media_type(kind, accepted)
    strictly = request.query.get("fieldValidation") in ("Strict", "Warn")
    try:
        if kind in (YAML, APPLY):
            body, duplicates = await asyncio.to_thread(bodies.read_yaml, raw)
        elif strictly and len(raw) > ASIDE_MIN_BYTES:
            body, duplicates = await asyncio.to_thread(bodies.read_json, raw, True)
        else:
            body, duplicates = bodies.read_json(raw, strictly)
    except ValueError as error:
        raise errors.bad_request(f"error decoding the body of the request: {error}") from None
    if not anything and not isinstance(body, dict):
        raise errors.bad_request("the body of the request is not an object")
    if options is not None and strictly:
        options.duplicates = duplicates
    return body


def write_options(request: web.Request) -> WriteOptions:
    """Read the options of a write from the query."""
    query = request.query
    validation = query.get("fieldValidation") or "Warn"
    if validation not in ("Ignore", "Strict", "Warn"):
        why = f'Unsupported value: "{validation}": supported values: "Ignore", "Strict", "Warn"'
        raise _wrong_options(request, Cause("FieldValueNotSupported", why, "fieldValidation"))
    return WriteOptions(
        _dry_run(_all(request, "dryRun")),
        validation,
        manager=_manager(request),
        force=query.get("force", "").lower() in ("1", "true", "t"),
    )


def _wrong_options(request: web.Request, cause: Cause) -> StatusError:
    return errors.invalid("meta.k8s.io", _OPTIONS.get(request.method, "Options"), "", [cause])


_OPTIONS = {"POST": "CreateOptions", "PUT": "UpdateOptions", "PATCH": "PatchOptions"}


def _manager(request: web.Request) -> str:
    """Return the field manager: ``fieldManager``, or else the program in the User-Agent."""
    given, applies = request.query.get("fieldManager", ""), request.content_type == APPLY
    cause = None
    if len(given.encode()) > MANAGER_MAX_BYTES:
        why = f"Too long: may not be more than {MANAGER_MAX_BYTES} bytes"
        cause = Cause("FieldValueTooLong", why, "fieldManager")
    elif not given.isprintable():
        at = next(at for at, char in enumerate(given) if not char.isprintable())
        why = f"invalid character U+{ord(given[at]):04X} (at position {at})"
        why = f"Invalid value: {orjson.dumps(given).decode()}: {why}"
        cause = Cause("FieldValueInvalid", why, "fieldManager")
    elif applies and not given:
        why = "Required value: is required for apply patch"
        cause = Cause("FieldValueRequired", why, "fieldManager")
    elif "force" in request.query and request.method == "PATCH" and not applies:
        why = "Forbidden: may not be specified for non-apply patch"
        cause = Cause("FieldValueForbidden", why, "force")
    if cause is not None:
        raise _wrong_options(request, cause)
    program = request.headers.get("User-Agent", "").partition("/")[0]
    program = "".join(filter(str.isprintable, program))
    short = program.encode()[:MANAGER_MAX_BYTES].decode(errors="ignore")
    return given or short or "unknown"


def _all(request: web.Request, name: str) -> list[str]:
    return [value for key, value in request.query.items() if key == name]


def _dry_run(given: list[str]) -> bool:
    if given not in ([], ["All"]):
        raise errors.bad_request(f"dryRun: Unsupported value: {given!r}")
    return bool(given)


async def delete_options(request: web.Request) -> DeleteOptions:
    """Read the options of a delete from the body, or else from the query."""
    body = await read_body(request) if request.can_read_body and await request.read() else {}
    query = request.query
    conditions = body.get("preconditions") or {}
    grace = body.get("gracePeriodSeconds", query.get("gracePeriodSeconds"))
    try:
        grace_s = None if grace is None else int(grace)
    except (TypeError, ValueError):
        raise errors.bad_request(f"gracePeriodSeconds: not a number: {grace!r}") from None
    propagation = body.get("propagationPolicy") or query.get("propagationPolicy")
    orphan = body.get("orphanDependents")
    if orphan is None and "orphanDependents" in query:
        orphan = query["orphanDependents"] == "true"
    if orphan is not None and not propagation:
        propagation = "Orphan" if orphan else "Background"
    return DeleteOptions(
        grace_s,
        conditions.get("uid"),
        conditions.get("resourceVersion"),
        propagation,
        _dry_run(body.get("dryRun") or _all(request, "dryRun")),
    )


def list_options(request: web.Request, resource: Resource, namespace: str) -> ListOptions:
    """Read the query of a list or watch."""
    query = request.query
    match = selectors.selector(
        query.get("labelSelector", ""),
        query.get("fieldSelector", ""),
        resource.selectable,
    )
    timeout_s = _number(query.get("timeoutSeconds"), "timeoutSeconds")
    return ListOptions(
        namespace=namespace,
        match=match,
        limit=_number(query.get("limit"), "limit"),
        continue_=query.get("continue", ""),
        resource_version=query.get("resourceVersion", ""),
        version_match=query.get("resourceVersionMatch", ""),
        timeout_s=timeout_s or random.uniform(*WATCH_TIMEOUT_S),
        bookmarks=query.get("allowWatchBookmarks", "").lower() in ("1", "true"),
        initial_events=query.get("sendInitialEvents", "").lower() in ("1", "true"),
    )


def _number(text: str | None, name: str) -> int:
    if not text:
        return 0
    if not text.isdecimal():
        raise errors.bad_request(f"{name}: not a number: {text!r}")
    return int(text)


def accepts(request: web.Request) -> list[tuple[str, dict[str, str]]]:
    """Return the accepted media types and their parameters, in the client's order."""
    found = []
    for item in (request.headers.get("Accept") or "*/*").split(","):
        kind, *parameters = (part.strip() for part in item.split(";"))
        found.append((kind, dict(p.partition("=")[::2] for p in parameters)))
    return found


def check_accepts_json(request: web.Request) -> None:
    """Raise a 406 if the client accepts no JSON."""
    if not any(kind in JSON_RANGES for kind, _ in accepts(request)):
        raise errors.not_acceptable((JSON,))


def wants_aggregated(request: web.Request) -> str:
    """Return the version of aggregated discovery that the client prefers, or an empty string."""
    for kind, parameters in accepts(request):
        if kind == JSON and parameters.get("as") == "APIGroupDiscoveryList":
            if parameters.get("v") in ("v2", "v2beta1"):
                return parameters["v"]
        elif kind in (JSON, "*/*"):
            return ""
    return ""


def form(request: web.Request, partial: str) -> Form:
    """Return the first supported form in the Accept header."""
    for kind, parameters in accepts(request):
        if kind not in JSON_RANGES:
            continue
        wanted = parameters.get("as", "")
        if not wanted:
            return Form()
        if parameters.get("v") == "v1" and parameters.get("g") == "meta.k8s.io":
            if wanted == TABLE:
                return Form(TABLE)
            if wanted in (PARTIAL, PARTIAL_LIST):
                return Form(partial)
    raise errors.not_acceptable((JSON, f"{JSON};as=Table;v=v1;g=meta.k8s.io"))
