"""Ollama's own API: the routes that the gateway itself answers.

Chats, generation and embeddings go to engines that have this API; :func:`check_engine` rejects
requests for other Models. The routes that describe models are answered here, so that listing models
starts no replica. Ollama's clients name a Model ``<Model>:latest``, and so each of its aliases that
has no tag. Models are created and deleted only through the Kubernetes API. Called by proxy.py and
local_routes.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta

import msgspec

from kubeai.errors import decode_problem
from kubeai.openai.errors import ErrorResponse, model_not_found
from kubeai.openai.routes import OLLAMA_PREFIX, PREFIX, Kind
from kubeai.routing.routes import Feature, Route

ENGINES = frozenset(("OLlama", "SGLang"))  # that have Ollama's API
VERSION = "0.17.4"  # of the API
LATEST = ":latest"
_CAPABILITIES: dict[Feature, str] = {"TextGeneration": "completion", "TextEmbedding": "embedding"}
# `/api/ps` says when a model will be unloaded. Replicas never unload theirs.
_KEPT = timedelta(days=365)


def check_engine(kind: Kind, route: Route) -> None:
    """ErrorResponse if the request is one of Ollama's API, which the Model's engine lacks."""
    if kind.is_ollama and route.engine not in ENGINES:
        raise ErrorResponse(
            f"The model {route.model!r} is served by {route.engine}, which does not have Ollama's "
            "API. Use an OpenAI client, with a base URL that ends in /v1.",
            param="model",
        )


def not_served(method: str, path: str) -> ErrorResponse | None:
    """404 for the routes by which Ollama's clients change models; None for all other paths."""
    if not path.removeprefix(PREFIX).startswith(OLLAMA_PREFIX):
        return None
    return ErrorResponse(
        f"{method} {path} is not supported. The models are Models in Kubernetes; use kubectl or "
        "Helm to create, change or delete them.",
        status=404,
    )


class OllamaDetails(msgspec.Struct):
    """Of the model's file, which the gateway does not read."""

    parent_model: str = ""
    format: str = ""
    family: str = ""
    families: tuple[str, ...] = ()
    parameter_size: str = ""
    quantization_level: str = ""


class OllamaModel(msgspec.Struct, omit_defaults=True):
    """A Model in the lists of Ollama's API."""

    name: str
    model: str
    digest: str  # Ollama's command line shows its first 12 characters
    details: OllamaDetails
    size: int | None = None
    modified_at: str = ""
    # of a running model
    expires_at: str = ""
    size_vram: int | None = None
    context_length: int | None = None


class OllamaModels(msgspec.Struct):
    """The response of ``/api/tags`` and ``/api/ps``."""

    models: list[OllamaModel]


class OllamaShown(msgspec.Struct):
    """The response of ``/api/show``."""

    details: OllamaDetails
    model_info: dict[str, str]
    capabilities: tuple[str, ...]
    modified_at: str
    modelfile: str = ""
    parameters: str = ""
    template: str = ""


class OllamaShowRequest(msgspec.Struct):
    """The body of a request to ``/api/show``."""

    model: str = ""
    name: str = ""  # what older clients send instead


class OllamaVersion(msgspec.Struct):
    """The response of ``/api/version``."""

    version: str


def tags(routes: Iterable[Route]) -> bytes:
    """The response of ``/api/tags``: all Models that Ollama's API can use."""
    return _list(
        _listed(route, name, modified_at=_time(route))
        for route in _usable(routes)
        for name in _names(route)
    )


def running(routes: Iterable[Route]) -> bytes:
    """The response of ``/api/ps``: those that have a ready replica."""
    until = (datetime.now(UTC) + _KEPT).isoformat(timespec="seconds")
    return _list(
        _listed(route, name, expires_at=until, size_vram=0, context_length=0)
        for route in _usable(routes)
        if route.endpoints
        for name in _names(route)
    )


def shown(
    body: bytes, routes: Iterable[Route], missing: Callable[[str], ErrorResponse] = model_not_found
) -> bytes:
    """The response of ``/api/show`` to a request with this body.

    ``routes``: those that the client may use; ``missing``: the error for the name of another model.
    """
    try:
        request = msgspec.json.decode(body, type=OllamaShowRequest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        problem = decode_problem(error)
        raise ErrorResponse(f"The body is not a JSON object with a model: {problem}.") from None
    name = request.model or request.name
    for route in routes:
        if _tagged(name) in _names(route):
            check_engine(Kind.OLLAMA_SHOW, route)
            able = tuple(_CAPABILITIES[each] for each in route.features if each in _CAPABILITIES)
            return msgspec.json.encode(OllamaShown(OllamaDetails(), {}, able, _time(route)))
    raise missing(name)


def version() -> bytes:
    """The response of ``/api/version``."""
    return msgspec.json.encode(OllamaVersion(VERSION))


def _usable(routes: Iterable[Route]) -> list[Route]:
    usable = (route for route in routes if route.engine in ENGINES)
    return sorted(usable, key=lambda route: route.model)


def _names(route: Route) -> list[str]:
    """The Model's names, each with a tag, as Ollama's clients expect."""
    return [_tagged(name) for name in (route.model, *route.aliases)]


def _tagged(name: str) -> str:
    return name if ":" in name.rpartition("/")[2] else name + LATEST


def _listed(
    route: Route,
    name: str,
    *,
    modified_at: str = "",
    expires_at: str = "",
    size_vram: int | None = None,
    context_length: int | None = None,
) -> OllamaModel:
    digest = hashlib.sha256(f"{name} {route.created_s}".encode()).hexdigest()
    return OllamaModel(
        name, name, digest, OllamaDetails(), 0, modified_at, expires_at, size_vram, context_length
    )


def _list(items: Iterable[OllamaModel]) -> bytes:
    return msgspec.json.encode(OllamaModels(list(items)))


def _time(route: Route) -> str:
    return datetime.fromtimestamp(route.created_s, UTC).isoformat(timespec="seconds")
