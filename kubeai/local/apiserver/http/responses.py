"""Responses: objects, lists and events, in the form that the client asked for.

The forms are full objects, a Table, or metadata only (PartialObjectMetadata). Everything is JSON,
even for clients that send protobuf.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import orjson
from aiohttp import web

from kubeai.local.apiserver.http import requests
from kubeai.local.apiserver.http.requests import JSON, PARTIAL, PARTIAL_LIST, TABLE
from kubeai.local.apiserver.kinds import printing
from kubeai.local.apiserver.kinds.resources import Resource
from kubeai.local.apiserver.storage import watching
from kubeai.local.apiserver.storage.store import Stored

Object = dict[str, Any]


def object_response(
    request: web.Request,
    resource: Resource,
    stored: Stored,
    code: int = 200,
    warnings: list[str] | None = None,
) -> web.Response:
    """Return the object's response, with a Warning header for each of the write's warnings."""
    form = requests.form(request, PARTIAL)
    if form.kind == TABLE:
        metadata = {"resourceVersion": stored.metadata.get("resourceVersion", "")}
        include = request.query.get("includeObject", "Metadata")
        table = printing.table(resource, [_at_version(resource, stored)], metadata, include)
        response = json_response(table, code, form.content_type)
    elif form.kind:
        response = json_response(printing.partial(stored.object), code, form.content_type)
    else:
        response = raw_response(request, _encoded(resource, stored), code)
    for text in warnings or ():
        response.headers.add("Warning", f"299 - {orjson.dumps(text).decode()}")
    return response


def list_response(request: web.Request, resource: Resource, page: watching.Page) -> web.Response:
    """Return the response for one page of a list."""
    form = requests.form(request, PARTIAL_LIST)
    if form.kind == TABLE:
        table = printing.table(
            resource,
            [_at_version(resource, stored) for stored in page.items],
            page.metadata,
            request.query.get("includeObject", "Metadata"),
        )
        return json_response(table, content_type=form.content_type)
    if form.kind:
        items = [printing.partial(stored.object) for stored in page.items]
        listed: Object = {"kind": form.kind, "apiVersion": "meta.k8s.io/v1"}
        listed |= {"metadata": page.metadata, "items": items}
        return json_response(listed, content_type=form.content_type)
    head = {
        "kind": resource.lists,
        "apiVersion": resource.api_version,
        "metadata": page.metadata,
    }
    items_raw = b",".join(_encoded(resource, stored) for stored in page.items)
    body = orjson.dumps(head)[:-1] + b',"items":[' + items_raw + b"]}"
    return raw_response(request, body)


def event_encoder(
    request: web.Request, resource: Resource
) -> Callable[[watching.WatchEvent], bytes]:
    """Return a function that encodes events as lines in the form that the client asked for."""
    form = requests.form(request, PARTIAL)
    include = request.query.get("includeObject", "Metadata")
    headers = True

    def encode(event: watching.WatchEvent) -> bytes:
        nonlocal headers
        if event.stored is not None and not form.kind:
            raw = _encoded(resource, event.stored)
        elif form.kind == TABLE and event.type != "ERROR":
            obj = {**event.object, "apiVersion": resource.api_version}
            metadata = {"resourceVersion": obj["metadata"]["resourceVersion"]}
            shown = [] if event.type == "BOOKMARK" else [obj]
            table = printing.table(resource, shown, metadata, include, headers)
            if event.type == "BOOKMARK":
                table["rows"] = [{"cells": [], "object": printing.partial(obj)}]
            raw, headers = orjson.dumps(table), False
        elif form.kind and event.type != "ERROR":
            raw = orjson.dumps(printing.partial(event.object))
        else:
            raw = orjson.dumps(event.object)
        return b'{"type":"' + event.type.encode() + b'","object":' + raw + b"}\n"

    return encode


def _at_version(resource: Resource, stored: Stored) -> Object:
    """Return the object at the requested API version (versions differ in name only)."""
    if stored.object["apiVersion"] == resource.api_version:
        return stored.object
    return {**stored.object, "apiVersion": resource.api_version}


def _encoded(resource: Resource, stored: Stored) -> bytes:
    if stored.object["apiVersion"] == resource.api_version:
        return stored.raw
    return orjson.dumps(_at_version(resource, stored))


def raw_response(request: web.Request, body: bytes, code: int = 200) -> web.Response:
    """Return the response for encoded JSON, indented if the client asked for that."""
    if request.query.get("pretty", "").lower() in ("1", "true"):
        body = orjson.dumps(orjson.loads(body), option=orjson.OPT_INDENT_2)
    return web.Response(body=body, status=code, headers={"Content-Type": JSON})


def json_response(body: Object, code: int = 200, content_type: str = JSON) -> web.Response:
    """Encode a document as the response."""
    headers = {"Content-Type": content_type}
    return web.Response(body=orjson.dumps(body), status=code, headers=headers)
