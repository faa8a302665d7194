"""The routes of the OpenAI-compatible API: which paths and methods the gateway serves.

Each route has two paths, below ``/openai/v1`` (as in KubeAI in Go) and below ``/v1``.

Nothing is decoded, normalized or repaired. Scheme and authority of a target in absolute form are
removed, everything after the first ``?`` is the query, and the rest must match a listed path
*exactly*: ``%63hat``, ``//``, ``/./``, ``..``, ``;x``, a trailing slash or different case all get
404. An engine receives the path from the table, never the client's spelling. The only variable
path, ``/v1/models/{id}``, is served by the gateway and never reaches an engine.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

PREFIX = "/openai"


class Kind(StrEnum):
    """The API of a request; the value is the path at the engine."""

    CHAT = "/v1/chat/completions"
    COMPLETIONS = "/v1/completions"
    EMBEDDINGS = "/v1/embeddings"
    RERANK = "/v1/rerank"
    TRANSCRIPTIONS = "/v1/audio/transcriptions"
    RESPONSES = "/v1/responses"
    MESSAGES = "/v1/messages"
    MODELS = "/v1/models"  # served by the gateway itself

    @property
    def is_json(self) -> bool:
        """Whether the request is a POST with a JSON body."""
        return self not in (Kind.TRANSCRIPTIONS, Kind.MODELS)

    @property
    def has_streams(self) -> bool:
        """Whether ``"stream": true`` in the body asks for server-sent events."""
        return self in (Kind.CHAT, Kind.COMPLETIONS, Kind.RESPONSES, Kind.MESSAGES)


_PREFIXES = (PREFIX, "")
route_table: dict[str, Kind] = {prefix + kind.value: kind for prefix in _PREFIXES for kind in Kind}
_MODEL_PATHS = tuple(f"{prefix}{Kind.MODELS.value}/" for prefix in _PREFIXES)
_GET = ("GET", "HEAD")
_POST = ("POST",)


class RouteMatch(NamedTuple):
    """The route of a request. ``kind`` is set for status 200; else 404, or 405 with ``allow``."""

    status: int
    kind: Kind | None = None
    query: str = ""  # without the "?", unchanged
    model_id: str | None = None  # of GET /v1/models/{id}, still percent-encoded
    allow: tuple[str, ...] = ()


_EXACT = {
    (method, path): RouteMatch(200, kind)
    for path, kind in route_table.items()
    for method in (_GET if kind is Kind.MODELS else _POST)
}


def classify(method: str, target: str) -> RouteMatch:
    """Look a request line up in the route table; see the module's docstring for the rules."""
    if found := _EXACT.get((method, target)):
        return found
    if not target.startswith("/"):  # absolute form: http://authority/path
        scheme, separator, rest = target.partition("://")
        if not separator or scheme.lower() not in ("http", "https"):
            return RouteMatch(404)
        slash = rest.find("/")
        target = rest[slash:] if slash >= 0 else "/"
    path, _, query = target.partition("?")
    kind = route_table.get(path)
    model_id = None
    if kind is None:
        model_id = _model_id(path)
        if not model_id:
            return RouteMatch(404)
        kind = Kind.MODELS
    allow = _GET if kind is Kind.MODELS else _POST
    if method not in allow:
        return RouteMatch(405, allow=allow)
    return RouteMatch(200, kind, query, model_id)


def origin_form(target: str) -> str:
    """A request target without scheme and authority."""
    if not target.startswith("/"):
        _, separator, rest = target.partition("://")
        if separator:
            return "/" + rest.partition("/")[2]
    return target


def _model_id(path: str) -> str:
    """The ID in the path of one model; empty for other paths."""
    for prefix in _MODEL_PATHS:
        if path.startswith(prefix):
            model_id = path[len(prefix) :]
            return "" if "/" in model_id else model_id
    return ""
