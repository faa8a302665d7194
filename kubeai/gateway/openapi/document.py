"""Puts the document together: paths from the route table, and what they share as components."""

from __future__ import annotations

import re
from functools import cache
from typing import Any, get_args

import msgspec

from kubeai.gateway.console import LOGIN_PATH, LOGOUT_PATH, PATH
from kubeai.gateway.local_routes import OWN_ROUTES, ListedModel
from kubeai.gateway.login import FORM_TYPE, HTML_TYPE
from kubeai.gateway.ollama import OllamaShowRequest
from kubeai.gateway.openapi import headers
from kubeai.gateway.openapi.apis import APIS, CONSOLE, GATEWAY, TAGS
from kubeai.gateway.openapi.errors import errors_of
from kubeai.gateway.openapi.schemas import (
    OWN_RESPONSES,
    Schema,
    form_schema,
    own_schemas,
    reference,
    request_schema,
)
from kubeai.openai.errors import AnthropicError, OllamaError, OpenAIError, error_format
from kubeai.openai.request import SHAPES
from kubeai.openai.routes import PREFIX, RESPONSE_ID, Kind, methods_of, route_table
from kubeai.routing.routes import Feature

VERSION = "1"  # of the API; the path of KubeAI's own routes has none
JSON, EVENTS, LINES = "application/json", "text/event-stream", "application/x-ndjson"
_INFO = f"""
The HTTP API of KubeAI's gateway. Each inference route has its path at the root and below
`{PREFIX}`.

The bodies of inference routes belong to the APIs that they follow. This document describes the
members that KubeAI reads; all others are passed on, and the engine validates them. A response of an
engine is passed on unchanged, except for the name of the model.

Every path except `/healthz` and `/readyz` needs an API key if `gateway.keys.required` is true.
`OPTIONS` is answered with 204 and `Allow`. The console's own API, below `{PATH}/api`, is not
public and not described.
""".strip()
_SECURITY: list[dict[str, list[str]]] = [{}, {"bearer": []}, {"x-api-key": []}, {"api-key": []}]
_ROOT: list[Schema] = [{"url": "/", "description": "The root"}]
# Statuses of the gateway's own errors: on any request that needs a key, and on those to an engine.
_ANY = (400, 401, 408, 413, 417, 429, 431, 500, 502, 503)
_INFERENCE = (*_ANY, 403, 404, 504)
_FORMATS: dict[str, type[msgspec.Struct]] = {
    type_.__name__: type_ for type_ in (OpenAIError, AnthropicError, OllamaError)
}
_RESPONSE = re.compile(r'"#/components/responses/(\w+)"')
_RESPONSE_NAME = re.compile(r"([A-Za-z]+?)(\d+)(OrEngine)?")


@cache
def document() -> dict[str, Any]:
    """The OpenAPI document. Do not change it."""
    paths = {**_inference_paths(), **_own_paths(), **_console_paths()}
    names = set(_RESPONSE.findall(msgspec.json.encode(paths).decode()))
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "KubeAI",
            "version": VERSION,
            "description": _INFO,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [*_ROOT, {"url": PREFIX, "description": "As in KubeAI in Go"}],
        "security": _SECURITY,
        "tags": [{"name": name, "description": text} for name, text in TAGS.items()],
        "paths": paths,
        "components": {
            "schemas": {**_request_schemas(), **own_schemas(), "EngineBody": _ENGINE_BODY},
            "parameters": headers.PARAMETERS,
            "headers": headers.HEADERS,
            "responses": {name: _error_response(name) for name in sorted(names)},
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
                "api-key": {"type": "apiKey", "in": "header", "name": "api-key"},
            },
        },
    }


@cache
def document_json() -> bytes:
    """The document as JSON."""
    return msgspec.json.encode(document())


_ENGINE_BODY: Schema = {"description": "A body of the engine. KubeAI does not interpret it."}


# -- inference routes ------------------------------------------------------------------------------


def _inference_paths() -> dict[str, Schema]:
    """The paths without the prefix; the two servers stand for both forms."""
    kinds = {path: kind for path, kind in route_table.items() if not path.startswith(PREFIX)}
    kinds |= {kind.value: kind for kind in Kind if kind.is_stored}
    kinds[Kind.MODELS.value + "/{id}"] = Kind.MODELS
    return {path: _inference_path(path, kind) for path, kind in sorted(kinds.items())}


def _inference_path(path: str, kind: Kind) -> Schema:
    item: Schema = {method.lower(): _operation(method, path, kind) for method in methods_of(kind)}
    if "{id}" in path:
        pattern = {} if kind is Kind.MODELS else {"pattern": f"^{RESPONSE_ID.pattern}$"}
        item["parameters"] = [
            {
                "name": "id",
                "in": "path",
                "required": True,
                "description": "The name of a model, percent-encoded."
                if kind is Kind.MODELS
                else "The ID of a stored response.",
                "schema": {"type": "string", **pattern},
            }
        ]
    return item


def _operation(method: str, path: str, kind: Kind) -> Schema:
    api = APIS[kind]
    one_model = kind is Kind.MODELS and "{id}" in path
    found: Schema = {
        "operationId": _operation_id(method, path),
        "tags": [api.tag],
        "summary": "Describe one model" if one_model else api.summary,
    }
    if api.docs:
        found["externalDocs"] = {"url": api.docs, "description": "The API that the bodies follow"}
    if path != kind.value and not one_model:
        found["description"] = f"The same as `{kind.value}`, which the engine gets."
    found["parameters"] = [*_header_parameters(kind), *_query_parameters(kind, one_model)]
    body = _request_body(kind)
    if body is not None:
        found["requestBody"] = body
    found["responses"] = _responses(method, path, kind, one_model)
    return found


def _header_parameters(kind: Kind) -> list[Schema]:
    names = [headers.SELECTOR, headers.REQUEST_ID]
    if not kind.is_local:
        names += [headers.EXPLAIN] if kind.is_stored else list(headers.OF_INFERENCE)
    if kind in SHAPES:
        names.append(headers.ENCODING)
    return [{"$ref": f"#/components/parameters/{name}"} for name in names]


def _query_parameters(kind: Kind, one_model: bool) -> list[Schema]:
    if kind is Kind.MODELS and not one_model:
        return [
            {
                "name": "feature",
                "in": "query",
                "description": "List only models with one of these features. Default: all; below "
                f"`{PREFIX}`: `TextGeneration`.",
                "schema": {"type": "array", "items": {"enum": list(get_args(Feature))}},
            }
        ]
    if kind is Kind.REALTIME:
        text = "The model. Without it, the first `session.update` names the model."
        return [{"name": "model", "in": "query", "description": text, "schema": {"type": "string"}}]
    return []


def _request_body(kind: Kind) -> Schema | None:
    content: dict[str, Schema] = {}
    if kind in SHAPES:
        content[JSON] = {"schema": {"$ref": f"#/components/schemas/{_schema_name(kind)}"}}
    if kind.is_form:
        content["multipart/form-data"] = {"schema": form_schema()}
    if kind is Kind.OLLAMA_SHOW:
        content[JSON] = {"schema": reference(OllamaShowRequest)}
    return {"required": True, "content": content} if content else None


def _responses(method: str, path: str, kind: Kind, one_model: bool) -> dict[str, Schema]:
    statuses = _ANY if kind.is_local else _INFERENCE
    if one_model or kind is Kind.OLLAMA_SHOW:
        statuses = (*statuses, 403, 404)
    if kind.is_form or kind in SHAPES:
        statuses = (*statuses, 415)
    if kind is Kind.REALTIME:
        statuses = (*statuses, 426)
        found = {"101": _response("The WebSocket is open.", {}, headers.OF_ENGINES)}
    elif kind.is_local:
        type_ = ListedModel if one_model else OWN_RESPONSES[kind]
        content = {} if method == "HEAD" else {JSON: {"schema": reference(type_)}}
        found = {"200": _response("Success.", content)}
    else:
        names = (*headers.OF_ENGINES, *headers.LIMITS)
        found = {"2XX": _response("The engine's response.", _engine_content(kind), names)}
    for status in sorted(set(statuses)):
        found[str(status)] = _error_reference(path, status, or_engine=not kind.is_local)
    if not kind.is_local:
        found["default"] = _response("An error of the engine.", {"*/*": {"schema": _ENGINE}})
    return found


_ENGINE: Schema = {"$ref": "#/components/schemas/EngineBody"}


def _engine_content(kind: Kind) -> dict[str, Schema]:
    if kind is Kind.SPEECH:
        return {"*/*": {"schema": _ENGINE}}
    content = {JSON: {"schema": _ENGINE}}
    if kind.has_streams:
        content[EVENTS] = {"schema": {"type": "string"}}
    if kind in (Kind.OLLAMA_CHAT, Kind.OLLAMA_GENERATE):
        content[LINES] = {"schema": {"type": "string"}}
    if kind in (Kind.TRANSCRIPTIONS, Kind.TRANSLATIONS):
        content["text/*"] = {"schema": {"type": "string"}}
    return content


def _response(description: str, content: Schema, names: tuple[str, ...] = ()) -> Schema:
    found: Schema = {
        "description": description,
        "headers": headers.references((*headers.ON_ALL, *names)),
    }
    return {**found, "content": content} if content else found


def _operation_id(method: str, path: str) -> str:
    words = re.findall(r"[A-Za-z0-9]+", path) or ["root"]
    return "_".join((method.lower(), *words))


# -- the gateway's own -----------------------------------------------------------------------------


def _own_paths() -> dict[str, Schema]:
    paths = {path: _own_path(path) for path in OWN_ROUTES}
    found = {
        "description": "There is a server here.",
        "headers": headers.references(headers.ON_ALL),
    }
    root = _own_operation("HEAD", "/", "Find a server, as Ollama's clients do", {"200": found})
    return {**paths, "/": {"servers": _ROOT, "head": root}}


_OWN: dict[str, tuple[str, str, dict[str, str]]] = {
    "/healthz": ("Whether the worker runs", "text/plain", {}),
    "/readyz": (
        "Whether the worker accepts new requests",
        "text/plain",
        {"503": "It drains, or has no routes yet."},
    ),
    "/openapi.json": ("Get this document", JSON, {}),
}


def _own_path(path: str) -> Schema:
    summary, content_type, others = _OWN[path]
    schema: Schema = {"type": "object" if content_type == JSON else "string"}
    needs_key = path == "/openapi.json"
    item: Schema = {"servers": _ROOT}
    for method in ("GET", "HEAD"):
        content = {content_type: {"schema": schema}} if method == "GET" else {}
        responses = {"200": _response("Success.", content)}
        for status, text in others.items():
            responses[status] = _response(text, content)
        operation = _own_operation(method, path, summary, responses)
        if not needs_key:
            operation["security"] = []
        else:
            for number in _ANY:
                responses[str(number)] = _error_reference(path, number)
        item[method.lower()] = operation
    return item


def _own_operation(method: str, path: str, summary: str, responses: Schema) -> Schema:
    return {
        "operationId": _operation_id(method, path),
        "tags": [GATEWAY],
        "summary": summary,
        "responses": responses,
    }


def _console_paths() -> dict[str, Schema]:
    form: Schema = {
        "type": "object",
        "required": ["key"],
        "properties": {"key": {"type": "string", "description": "The key of an administrator."}},
    }
    page = {HTML_TYPE.partition(";")[0]: {"schema": {"type": "string"}}}
    done = _response("Logged in or out: the cookie is set or removed.", {})
    refused = {
        str(status): _response("Refused; the page says why.", page)
        for status in (400, 401, 403, 413, 415, 429)
    }
    paths: dict[str, Schema] = {}
    for path, summary in ((LOGIN_PATH, "Log in"), (LOGOUT_PATH, "Log out")):
        operation = _own_operation("POST", path, summary, {"303": done, **refused})
        operation |= {"tags": [CONSOLE], "security": []}
        if path == LOGIN_PATH:
            operation["requestBody"] = {"required": True, "content": {FORM_TYPE: {"schema": form}}}
        paths[path] = {"servers": _ROOT, "post": operation}
    return paths


# -- components ------------------------------------------------------------------------------------


def _schema_name(kind: Kind) -> str:
    return "".join(word.title() for word in kind.name.split("_")) + "Request"


def _request_schemas() -> dict[str, Schema]:
    return {_schema_name(kind): request_schema(kind) for kind in SHAPES}


def _error_response(name: str) -> Schema:
    """One of the components that :func:`_error_reference` refers to."""
    found = _RESPONSE_NAME.fullmatch(name)
    assert found is not None, name
    type_, status = _FORMATS[found[1]], int(found[2])
    schema = reference(type_)
    names = headers.OF_ERRORS.get(status, ())
    if found[3]:
        schema = {"anyOf": [schema, _ENGINE]}
        names = (*headers.OF_ENGINES, *names)
    lines = []
    for error in errors_of(status):
        what = "No code" if error.code is None else f"`{error.code}`"
        if type_ is not OpenAIError:
            what = f"`{error.anthropic_type}`" if type_ is AnthropicError else "Error"
        lines.append(f"- {what}: {error.when}.")
    if type_ is AnthropicError:
        names = (*names, "request-id")
    return _response("\n".join(lines), {JSON: {"schema": schema}}, names)


def _error_reference(path: str, status: int, *, or_engine: bool = False) -> Schema:
    suffix = "OrEngine" if or_engine else ""
    return {"$ref": f"#/components/responses/{error_format(path).__name__}{status}{suffix}"}
