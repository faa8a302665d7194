"""The inference routes: which paths and methods the gateway serves.

The APIs are OpenAI's, Anthropic's, those that vLLM adds to them, and Ollama's. Each route has its
path at the root and below ``/openai`` (as in KubeAI in Go). Routes that vLLM has at the root are
served below ``/v1``, too, where an OpenAI client sends everything: ``/v1/tokenize`` and
``/tokenize`` are one route.

Nothing is decoded, normalized or repaired. Scheme and authority of a target in absolute form are
removed, everything after the first ``?`` is the query, and the rest must match a listed path
*exactly*: ``%63hat``, ``//``, ``/./``, ``..``, ``;x``, a trailing slash or different case all get
404. An engine receives the path from the table, never the client's spelling. Paths with an ID are
``/v1/models/{id}``, which is served by the gateway, and those below ``/v1/responses/``. The ID of a
response is ``resp_`` and letters, digits, ``-`` and ``_``: ``/v1/responses/render`` has none.
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import NamedTuple

PREFIX = "/openai"


class Kind(StrEnum):
    """The API of a request; the value is the path at the engine."""

    CHAT = "/v1/chat/completions"
    CHAT_BATCH = "/v1/chat/completions/batch"
    COMPLETIONS = "/v1/completions"
    RESPONSES = "/v1/responses"
    STORED_RESPONSE = "/v1/responses/{id}"
    CANCEL_RESPONSE = "/v1/responses/{id}/cancel"
    MESSAGES = "/v1/messages"
    COUNT_TOKENS = "/v1/messages/count_tokens"
    SYSTEM_ONE = "/v1/systemone"  # structured decisions
    EMBEDDINGS = "/v1/embeddings"
    EMBED_V2 = "/v2/embed"  # Cohere's
    RERANK = "/v1/rerank"
    SCORE = "/v1/score"
    GENERATIVE_SCORING = "/generative_scoring"
    POOLING = "/pooling"
    CLASSIFY = "/classify"
    TOKENIZE = "/tokenize"
    DETOKENIZE = "/detokenize"
    SPEECH = "/v1/audio/speech"
    TRANSCRIPTIONS = "/v1/audio/transcriptions"
    TRANSLATIONS = "/v1/audio/translations"
    REALTIME = "/v1/realtime"  # a WebSocket
    IMAGES = "/v1/images/generations"
    IMAGE_EDITS = "/v1/images/edits"
    IMAGE_VARIATIONS = "/v1/images/variations"
    OLLAMA_CHAT = "/api/chat"
    OLLAMA_GENERATE = "/api/generate"
    OLLAMA_EMBED = "/api/embed"
    OLLAMA_EMBEDDINGS = "/api/embeddings"
    # served by the gateway itself
    OLLAMA_TAGS = "/api/tags"
    OLLAMA_PS = "/api/ps"
    OLLAMA_SHOW = "/api/show"
    OLLAMA_VERSION = "/api/version"
    MODELS = "/v1/models"

    @property
    def is_local(self) -> bool:
        """Whether the gateway serves it without an engine."""
        return self in _LOCAL

    @property
    def is_form(self) -> bool:
        """Whether the request is a POST with a multipart form."""
        return self in _FORMS

    @property
    def is_json(self) -> bool:
        """Whether the request is a POST with a JSON body that names the model, for an engine."""
        return not (self in _LOCAL or self in _FORMS or self in _STORED or self is Kind.REALTIME)

    @property
    def is_stored(self) -> bool:
        """Whether the request is for a response that one replica of an engine has stored."""
        return self in _STORED

    @property
    def is_ollama(self) -> bool:
        """Whether the route belongs to Ollama's own API."""
        return self.value.startswith(OLLAMA_PREFIX)

    @property
    def has_streams(self) -> bool:
        """Whether ``"stream": true`` in the body asks for server-sent events."""
        return self in _STREAMED


OLLAMA_PREFIX = "/api/"
_OLLAMA_LOCAL = frozenset((Kind.OLLAMA_TAGS, Kind.OLLAMA_PS, Kind.OLLAMA_SHOW, Kind.OLLAMA_VERSION))
_LOCAL = _OLLAMA_LOCAL | {Kind.MODELS}
_FORMS = frozenset(
    (Kind.TRANSCRIPTIONS, Kind.TRANSLATIONS, Kind.IMAGE_EDITS, Kind.IMAGE_VARIATIONS)
)
_STORED = frozenset((Kind.STORED_RESPONSE, Kind.CANCEL_RESPONSE))
_STREAMED = frozenset((Kind.CHAT, Kind.COMPLETIONS, Kind.RESPONSES, Kind.MESSAGES))

# Further paths of a route, which vLLM has too and to which Jina's and Cohere's clients send. The
# engine gets the path of the Kind.
_ALIASES: dict[Kind, tuple[str, ...]] = {
    Kind.RERANK: ("/rerank", "/v2/rerank"),
    Kind.SCORE: ("/score",),
    Kind.GENERATIVE_SCORING: ("/v1/generative_scoring",),
    Kind.POOLING: ("/v1/pooling",),
    Kind.CLASSIFY: ("/v1/classify",),
    Kind.TOKENIZE: ("/v1/tokenize",),
    Kind.DETOKENIZE: ("/v1/detokenize",),
}
_PREFIXES = (PREFIX, "")
route_table: dict[str, Kind] = {
    prefix + path: kind
    for prefix in _PREFIXES
    for kind in Kind
    if kind not in _STORED
    for path in (kind.value, *_ALIASES.get(kind, ()))
}
_MODEL_PATHS = tuple(f"{prefix}{Kind.MODELS.value}/" for prefix in _PREFIXES)
RESPONSE_ID = re.compile("resp_[A-Za-z0-9_-]{1,128}")
_RESPONSE_PATH = re.compile(rf"(?:/openai)?/v1/responses/({RESPONSE_ID.pattern})(/cancel)?")
_GET = ("GET", "HEAD")
_POST = ("POST",)


def methods_of(kind: Kind) -> tuple[str, ...]:
    """The methods of a route."""
    if kind is Kind.REALTIME or kind is Kind.STORED_RESPONSE:
        return ("GET",)
    return _GET if kind in _LOCAL and kind is not Kind.OLLAMA_SHOW else _POST


class RouteMatch(NamedTuple):
    """The route of a request. ``kind`` is set for status 200; else 404, or 405 with ``allow``."""

    status: int
    kind: Kind | None = None
    query: str = ""  # without the "?", unchanged
    id: str | None = None  # in the path; that of a model is still percent-encoded
    allow: tuple[str, ...] = ()


_EXACT = {
    (method, path): RouteMatch(200, kind)
    for path, kind in route_table.items()
    for method in methods_of(kind)
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
    kind, id = route_table.get(path), None
    if kind is None:
        kind, id = _with_id(path)
        if kind is None:
            return RouteMatch(404)
    allow = methods_of(kind)
    if method not in allow:
        return RouteMatch(405, allow=allow)
    return RouteMatch(200, kind, query, id)


def path_template(path: str) -> str:
    """A path, with ``{id}`` instead of the ID of a stored response: one of few, for telemetry."""
    found = _RESPONSE_PATH.fullmatch(path)
    return path if found is None else f"{path[: found.start(1)]}{{id}}{path[found.end(1) :]}"


def origin_form(target: str) -> str:
    """A request target without scheme and authority."""
    if not target.startswith("/"):
        _, separator, rest = target.partition("://")
        if separator:
            return "/" + rest.partition("/")[2]
    return target


def _with_id(path: str) -> tuple[Kind | None, str | None]:
    """The route of a path with an ID, and the ID; (None, None) for other paths."""
    if found := _RESPONSE_PATH.fullmatch(path):
        return Kind.CANCEL_RESPONSE if found[2] else Kind.STORED_RESPONSE, found[1]
    for prefix in _MODEL_PATHS:
        if path.startswith(prefix):
            model_id = path[len(prefix) :]
            if model_id and "/" not in model_id:
                return Kind.MODELS, model_id
    return None, None
