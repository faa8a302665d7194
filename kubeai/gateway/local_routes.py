"""The local routes: all requests except inference POSTs.

The relay forwards those requests to this aiohttp application, one at a time on each connection. It
serves the list of models (also in the format of Ollama's API), health, the description of the API,
and 404 and 405 responses for everything that is not in the route table (formatted by errors.py).
The worker runs it with :func:`make_runner`.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from functools import partial
from typing import TYPE_CHECKING
from urllib.parse import unquote

import aiohttp
import msgspec
from aiohttp import web

from kubeai.errors import QUOTED_MAX_CHARS
from kubeai.gateway import login, ollama
from kubeai.gateway._credentials import Problem
from kubeai.gateway._names import find_model
from kubeai.gateway.console import PATH as CONSOLE_PATH
from kubeai.gateway.context import Context
from kubeai.gateway.denials import model_not_allowed, no_valid_key
from kubeai.gateway.holding import advice
from kubeai.gateway.internal_headers import DENIED_HEADER, KEY_HEADER
from kubeai.gateway.keys import HEALTH_PATHS, check_credential
from kubeai.http_errors import error_middleware
from kubeai.openai.errors import ErrorResponse, error_answer, model_not_found
from kubeai.openai.request import named, parse_selectors
from kubeai.openai.routes import PREFIX, Kind, RouteMatch, classify
from kubeai.routing.routes import Route

if TYPE_CHECKING:
    from kubeai._keys import Key

CONTEXT = web.AppKey("context", Context)
DEFAULT_FEATURE = "TextGeneration"  # of the list below /openai/v1, as in KubeAI in Go


def make_runner(context: Context) -> web.AppRunner:
    """A runner for the application; ``runner.server`` creates a connection's protocol.

    A client disconnect cancels the handler. The limits on the head match the relay's, so that every
    head that the relay accepted is accepted here.
    """
    return web.AppRunner(
        make_app(context),
        access_log=None,
        handler_cancellation=True,
        shutdown_timeout=1.0,  # the worker has drained by then
        auto_decompress=False,
        max_line_size=context.config.head_max_bytes,
        max_field_size=context.config.head_max_bytes,
        max_headers=context.config.head_max_count + 10,  # plus those that the relay adds
    )


def make_app(context: Context) -> web.Application:
    """The application, without a server."""
    internal = ErrorResponse("Internal error in the gateway. See its log.", status=500)
    app = web.Application(middlewares=[error_middleware(_answer, internal)])
    app[CONTEXT] = context
    app.on_response_prepare.append(_unsigned)
    app.router.add_route("*", "/{path:.*}", _dispatch)
    return app


async def _unsigned(_: web.Request, response: web.StreamResponse) -> None:
    """Remove aiohttp's Server header; an engine's Server header is kept."""
    if response.headers.get("Server") == aiohttp.http.SERVER_SOFTWARE:
        del response.headers["Server"]


async def _dispatch(request: web.Request) -> web.StreamResponse:
    context = request.app[CONTEXT]
    if context.key_table is not None:
        if denied := request.headers.get(DENIED_HEADER.decode()):
            status, _, message = denied.partition(" ")
            return login.login_response(int(status), message)
        if login.is_login(request.method, request.path) and context.console is not None:
            return await login.answer(request, partial(check_credential, context))
    if own := OWN_ROUTES.get(request.path):
        if request.method not in ("GET", "HEAD"):
            return _not_allowed(request, ("GET", "HEAD"))
        return own(request)
    if request.path == "/" and request.method == "HEAD":  # how Ollama's clients look for a server
        return web.Response()
    if request.path == "/" and context.console is not None:
        return web.Response(status=307, headers={"Location": CONSOLE_PATH + "/"})
    target = classify(request.method, request.raw_path)
    if request.method == "OPTIONS" and target.status == 405:
        return web.Response(status=204, headers={"Allow": ", ".join((*target.allow, "OPTIONS"))})
    if target.status == 405:
        return _not_allowed(request, target.allow)
    if target.kind is Kind.MODELS:
        return _models(request, target)
    if target.kind is not None and target.kind.is_ollama:
        return await _describe(request, target.kind)
    # Echo the raw path: decoded, it could look like a path that exists.
    path = request.raw_path.partition("?")[0][:QUOTED_MAX_CHARS]
    if error := ollama.not_served(request.method, path):
        return _refusal(request, error)
    scheme = "https" if request.headers.get("X-Forwarded-Proto") == "https" else "http"
    # The relay's own Host header is not the client's.
    host = request.headers.get("X-Forwarded-Host", request.host)
    base = f"{scheme}://{host}"[:QUOTED_MAX_CHARS]
    message = (
        f"Invalid URL ({request.method} {path}). Use the base URL {base}/v1 or {base}{PREFIX}/v1; "
        f"clients of Anthropic and Ollama need {base}"
    )
    return _refusal(request, ErrorResponse(message, status=404, code="unknown_url"))


def _client_key(request: web.Request) -> Key | None:
    """The client's key; None if keys are not required. ErrorResponse 401 if it has been revoked."""
    keys = request.app[CONTEXT].key_table
    if keys is None:
        return None
    key = keys.by_name.get(request.headers.get(KEY_HEADER.decode(), ""))
    if key is None:
        raise no_valid_key(Problem.INVALID, 0)
    return key


def _answer(request: web.Request, error: ErrorResponse) -> web.Response:
    _note_denial(request, error)
    return _refusal(request, error, advice(error))


def _note_denial(request: web.Request, error: ErrorResponse) -> None:
    keys = request.app[CONTEXT].key_table
    if keys is not None:
        keys.audit.note(
            error,
            # The relay has appended the client's address.
            client=request.headers.get("X-Forwarded-For", "").rpartition(",")[2].strip(),
            method=request.method,
            target=request.raw_path,
            request_id=request.headers.get("X-Request-Id"),
            key=keys.by_name.get(request.headers.get(KEY_HEADER.decode(), "")),
        )


def _refusal(
    request: web.Request, error: ErrorResponse, headers: dict[str, str] | None = None
) -> web.Response:
    # The relay assigns an ID to every request.
    request_id = request.headers.get("X-Request-Id")
    body, more = error_answer(error, request.raw_path, request_id)
    return _json(body, error.status, {**(headers or {}), **more})


def _json(body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(body=body, status=status, content_type="application/json", headers=headers)


def _not_allowed(request: web.Request, methods: tuple[str, ...]) -> web.Response:
    allow = ", ".join(methods)
    message = f"The method {request.method} is not allowed. Use {allow}."
    error = ErrorResponse(message, status=405, code="method_not_allowed")
    return _refusal(request, error, {"Allow": allow})


def _health(request: web.Request) -> web.Response:
    """``/healthz``: this worker's event loop runs. ``/readyz``: it accepts new requests."""
    context = request.app[CONTEXT]
    if request.path == "/healthz" or (context.ready and not context.draining):
        return web.Response(text="ok\n")
    return web.Response(status=503, text="draining\n" if context.draining else "not ready\n")


def _openapi(_: web.Request) -> web.Response:
    """The description of the API, which is made when it is first requested."""
    from kubeai.gateway.openapi import document_json

    return _json(document_json())


# Besides the inference routes. With GET and HEAD.
OWN_ROUTES: dict[str, Callable[[web.Request], web.Response]] = {
    **dict.fromkeys(sorted(HEALTH_PATHS), _health),
    "/openapi.json": _openapi,
}


# -- models ----------------------------------------------------------------------------------------


class ListedModel(msgspec.Struct):
    """A model of the list: a Model, an alias, or either with an adapter."""

    id: str
    created: int
    object: str
    owned_by: str
    features: tuple[str, ...]


class ModelList(msgspec.Struct):
    """The response of ``/v1/models``."""

    object: str
    data: list[ListedModel]


def _models(request: web.Request, target: RouteMatch) -> web.Response:
    context = request.app[CONTEXT]
    if target.id is not None:
        return _json(msgspec.json.encode(_one_model(request, target.id)))
    default = [DEFAULT_FEATURE] if request.raw_path.startswith(PREFIX) else []
    features = set(request.query.getall("feature", default))
    selected = _selection(request)
    routes = (model.route for model in context.routes)
    items = [
        item
        for route in sorted(routes, key=lambda route: route.model)
        if (not features or features.intersection(route.features)) and selected(route)
        for item in _items(route, context.aliases)
    ]
    return _json(msgspec.json.encode(ModelList("list", items)))


def _selection(request: web.Request) -> Callable[[Route], bool]:
    """A predicate for routes that the client's key and every X-Label-Selector allow."""
    key = _client_key(request)
    selectors = parse_selectors(request.headers.getall("X-Label-Selector", []))
    if key is not None:
        selectors.append(key.allows_labels)
    return lambda route: all(selector(route.labels) for selector in selectors)


def _missing(request: web.Request) -> Callable[[str], ErrorResponse]:
    """The error for a model that does not exist, or that the client may not use."""
    key = _client_key(request)
    return model_not_allowed if key is not None and key.restricted else model_not_found


def _one_model(request: web.Request, encoded_id: str) -> ListedModel:
    model_id = unquote(encoded_id)
    context = request.app[CONTEXT]
    found = find_model(context.models, context.aliases, named(Kind.MODELS, model_id))
    if found is None or not _selection(request)(found.route):
        raise _missing(request)(model_id)
    return _item(found.route, model_id)


def _items(route: Route, aliases: Container[str]) -> Iterable[ListedModel]:
    """One item for the model and each alias, each with one for each adapter of the model.

    ``aliases``: of all models. One that looks like another one's with an adapter is itself.
    """
    for name in (route.model, *route.aliases):
        yield _item(route, name)
        for adapter in route.adapters:
            if f"{name}_{adapter}" not in aliases:
                yield _item(route, f"{name}_{adapter}")


def _item(route: Route, name: str) -> ListedModel:
    return ListedModel(name, route.created_s, "model", route.owner, route.features)


async def _describe(request: web.Request, kind: Kind) -> web.Response:
    """The models, in the format of Ollama's API."""
    selected = _selection(request)
    routes = [model.route for model in request.app[CONTEXT].routes if selected(model.route)]
    if kind is Kind.OLLAMA_SHOW:
        return _json(ollama.shown(await request.read(), routes, _missing(request)))
    if kind is Kind.OLLAMA_TAGS:
        return _json(ollama.tags(routes))
    return _json(ollama.running(routes) if kind is Kind.OLLAMA_PS else ollama.version())
