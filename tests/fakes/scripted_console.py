"""The console's back end and the public API, scripted: a world that a test changes at will.

It serves the page as the supervisor does, with the same Content-Security-Policy, and the console's
API under /ui/api. `stop` and `start` on the same port are a supervisor that dies and comes back.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import yaml
from aiohttp import web

import kubeai
from kubeai._keys import Key
from kubeai.api.usage import KeyUsage, encode_usage
from kubeai.gateway import login
from kubeai.openai.errors import ErrorResponse
from kubeai.routing.keys import KeyRecord
from kubeai.supervisor.console.usage import table_of

STATIC = Path(kubeai.__file__).parent / "supervisor" / "console" / "static"
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@dataclasses.dataclass
class Chat:
    """How chats are answered. The comments are sent until ``go`` is set, then the pieces."""

    comments: tuple[str, ...] = ()
    held_s: float = 0.0  # a comment before the pieces says so
    pieces: tuple[str, ...] = ("Hello ", "there.")
    refusal: tuple[int, str] | None = None  # status and message, instead of a stream
    error: str = ""  # an error event after the pieces, instead of [DONE]
    pace_s: float = 0.0  # before each piece
    usage: dict[str, Any] = dataclasses.field(
        default_factory=lambda: {"prompt_tokens": 12, "completion_tokens": 2}
    )
    go: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)
    end: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)

    @classmethod
    def at_once(cls, **fields: Any) -> Chat:
        chat = cls(**fields)
        chat.go.set()
        chat.end.set()
        return chat


def summary(name: str, **fields: Any) -> dict[str, Any]:
    """A ModelSummary: ready, with one replica and without load, unless ``fields`` say otherwise."""
    return {
        "name": name,
        "state": "Ready",
        "reason": "",
        "message": "",
        "engine": "VLLM",
        "url": f"hf://example/{name}",
        "features": ["TextGeneration"],
        "owner": "",
        "strategy": "PrefixHash",
        "adapters": [],
        "replicas": {"ready": 1, "desired": 1, "min": 0, "max": 3},
        "in_flight": 0,
        "held": 0,
        "rates": {
            "window_s": 60,
            "requests_per_s": 0.0,
            "prompt_tokens_per_s": 0.0,
            "output_tokens_per_s": 0.0,
        },
        "ttft_s": {"window_s": 300, "count": 0, "p50": None, "p99": None},
    } | fields


def pod(name: str, **fields: Any) -> dict[str, Any]:
    """A ready pod without load."""
    return {
        "name": name,
        "address": "127.0.0.2:8000",
        "phase": "Running",
        "ready": True,
        "reason": "",
        "message": "",
        "in_flight": 0,
        "pending_tokens": 0,
        "ring_share": 1.0,
        "cached_share": None,
        "restarts": 0,
        "ejected": False,
        "created_s": time.time() - 90,
    } | fields


def record(number: int, model: str = "chat", **fields: Any) -> dict[str, Any]:
    """A Request record of a whole answer."""
    return {
        "id": f"req-{number}",
        "time_s": time.time(),
        "model": model,
        "endpoint": f"model-{model}-0",
        "status": 200,
        "end": "whole",
        "ttft_s": 0.1,
        "duration_s": 1.0,
        "waited_s": 0.0,
        "prompt_tokens": 400,
        "cached_tokens": 300,
        "output_tokens": 50,
        "retries": 0,
        "pick": "cached",
        "why": "It has the most of the prompt cached.",
    } | fields


def error(status: int, message: str) -> web.Response:
    body = {"error": {"message": message, "type": "invalid_request_error", "code": None}}
    return web.json_response(body, status=status)


class ScriptedConsole:
    """``await start()`` … ``await stop()``; ``push()`` sends the state to all open pages."""

    def __init__(self) -> None:
        self.models: dict[str, dict[str, Any]] = {}
        self.details: dict[str, dict[str, Any]] = {}  # what ModelDetail adds to the summary
        self.logs: dict[str, list[str]] = {}
        self.requests: list[dict[str, Any]] = []
        self.workers = [{"worker": 0, "ready": True, "restarts": 0}]
        self.stream_problems: list[str] = []
        self.can = {"scale": True, "apply": True, "delete": True}
        self.refusals: dict[str, tuple[int, str]] = {}  # path below /ui/api → status, message
        self.chat = Chat.at_once()
        self.calls: list[tuple[str, str, Any]] = []  # method, path, body of requests that change
        self.asked: list[dict[str, Any]] = []  # bodies of requests to the public API
        self.usage: dict[str, KeyUsage] = {}  # by key
        self.admins_key = ""  # empty: no keys are required
        self.left = asyncio.Event()  # a client left before its chat was answered
        self.port = 0
        self._streams: set[asyncio.Queue[tuple[str, Any]]] = set()
        self._log_streams: dict[str, set[asyncio.Queue[str]]] = {}
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        app = web.Application(client_max_size=64 << 20, middlewares=[self._check_key])
        app.on_response_prepare.append(_headers)
        app.router.add_get("/ui/", self._index)
        app.router.add_static("/ui/static", STATIC)
        app.router.add_get("/ui/api/events", self._events)
        app.router.add_get("/ui/api/usage", self._usage)
        app.router.add_get("/ui/api/models/{name}", self._model)
        app.router.add_get("/ui/api/models/{name}/log", self._log)
        app.router.add_post("/ui/api/models/{name}/scale", self._scale)
        app.router.add_delete("/ui/api/models/{name}", self._delete)
        app.router.add_post("/ui/api/apply", self._apply)
        app.router.add_post("/ui/openai/v1/chat/completions", self._chat)  # with keys
        app.router.add_post("/openai/v1/chat/completions", self._chat)
        app.router.add_post("/openai/v1/embeddings", self._embeddings)
        app.router.add_post("/openai/v1/rerank", self._rerank)
        app.router.add_post("/openai/v1/audio/transcriptions", self._transcriptions)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True).start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
        self._runner = None

    # -- what tests change -----------------------------------------------------------------------

    def put(self, name: str, **fields: Any) -> dict[str, Any]:
        """Add a Model or change its fields, and send the state."""
        self.models[name] = (self.models.get(name) or summary(name)) | fields
        self.push()
        return self.models[name]

    def detail(self, name: str, **fields: Any) -> None:
        """Change what the Model's own view shows, and send the state."""
        self.details[name] = self.details.get(name, {}) | fields
        self.push()

    def push(self) -> None:
        for queue in self._streams:
            queue.put_nowait(("state", self.state()))

    def served(self, *records: dict[str, Any]) -> None:
        """Requests have ended, the newest last."""
        newest_first = list(reversed(records))
        self.requests = [*newest_first, *self.requests][:200]
        for queue in self._streams:
            queue.put_nowait(("requests", newest_first))

    def log(self, pod_name: str, *lines: str) -> None:
        self.logs.setdefault(pod_name, []).extend(lines)
        for queue in self._log_streams.get(pod_name, ()):
            queue.put_nowait("".join(f"{line}\n" for line in lines))

    def state(self) -> dict[str, Any]:
        return {
            "version": "1.2.3",
            "time_s": time.time(),
            "local": True,
            "namespace": "default",
            "synced": True,
            "can": self.can,
            "workers": self.workers,
            "stream_problems": self.stream_problems,
            "models": [self.models[name] for name in sorted(self.models)],
            "keys": bool(self.admins_key),
        }

    @property
    def pages(self) -> int:
        """How many pages read the events."""
        return len(self._streams)

    # -- keys, as a gateway's worker checks them ---------------------------------------------------

    @web.middleware
    async def _check_key(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if not self.admins_key:
            return await handler(request)
        if login.is_login(request.method, request.path):
            return await login.answer(request, self._find_key)
        is_own = request.path.startswith("/ui") and (
            "/openai/" not in request.path or request.headers.get("X-KubeAI-UI") == "1"
        )
        if is_own and request.cookies.get(login.COOKIE_NAME) == self.admins_key:
            return await handler(request)
        if request.method == "GET" and "text/html" in request.headers.get("Accept", ""):
            return login.login_response(401, "" if not request.cookies else "No longer valid.")
        return error(401, "This API needs a key.")

    def _find_key(self, credential: bytes, _: str) -> Key:
        if credential.decode() != self.admins_key:
            raise ErrorResponse("The API key is not valid.", status=401)
        return Key(KeyRecord("admin", b"", "admin", is_admin=True))

    # -- the page and its API --------------------------------------------------------------------

    async def _index(self, _: web.Request) -> web.StreamResponse:
        return web.FileResponse(STATIC / "index.html")

    async def _usage(self, request: web.Request) -> web.StreamResponse:
        if "usage" in self.refusals:
            return error(*self.refusals["usage"])
        data = {key: encode_usage(usage) for key, usage in self.usage.items()}
        table = table_of([data], request.query["by"])
        return web.json_response(msgspec.to_builtins(table))

    async def _events(self, request: web.Request) -> web.StreamResponse:
        if refusal := self.refusals.get("events"):
            return error(*refusal)
        queue: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
        self._streams.add(queue)
        try:
            response = await _stream(request, "text/event-stream")
            queue.put_nowait(("state", self.state()))
            queue.put_nowait(("requests", self.requests))
            while True:
                event, data = await queue.get()
                await response.write(f"event: {event}\ndata: {json.dumps(data)}\n\n".encode())
        finally:
            self._streams.discard(queue)

    async def _model(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if name not in self.models:
            return error(404, f"There is no Model {name!r}.")
        bare = {"conditions": [], "pods": [], "timeline": [], "yaml": "kind: Model\n"}
        return web.json_response(self.models[name] | bare | self.details.get(name, {}))

    async def _log(self, request: web.Request) -> web.StreamResponse:
        name = request.query["pod"]
        if refusal := self.refusals.get("log"):
            return error(*refusal)
        queue: asyncio.Queue[str] = asyncio.Queue()
        for line in self.logs.get(name, ())[-int(request.query["tail"]) :]:
            queue.put_nowait(f"{line}\n")
        streams = self._log_streams.setdefault(name, set())
        streams.add(queue)
        try:
            response = await _stream(request, "text/plain; charset=utf-8")
            while True:
                await response.write((await queue.get()).encode())
        finally:
            streams.discard(queue)

    async def _scale(self, request: web.Request) -> web.Response:
        name, body = request.match_info["name"], await self._change(request)
        if refusal := self.refusals.get("scale"):
            return error(*refusal)
        replicas = self.models[name]["replicas"] | {"desired": body["replicas"]}
        self.put(name, replicas=replicas)
        return web.json_response({})

    async def _delete(self, request: web.Request) -> web.Response:
        await self._change(request)
        del self.models[request.match_info["name"]]
        self.push()
        return web.json_response({})

    async def _apply(self, request: web.Request) -> web.Response:
        text = await self._change(request)
        if refusal := self.refusals.get("apply"):
            return error(*refusal)
        names = [each["metadata"]["name"] for each in yaml.safe_load_all(text)]
        for name in names:
            self.put(name)
        return web.json_response({"applied": names})

    async def _change(self, request: web.Request) -> Any:
        """The body; refuses what the real back end takes for a request of another site."""
        if request.headers.get("X-KubeAI-UI") != "1":
            raise web.HTTPForbidden(text="no X-KubeAI-UI")
        kind = request.content_type
        if kind not in ("application/json", "application/yaml"):
            raise web.HTTPUnsupportedMediaType(text=kind)
        body = await (request.json() if kind == "application/json" else request.text())
        self.calls.append((request.method, request.path, body))
        return body

    # -- the public API --------------------------------------------------------------------------

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(await request.json())
        chat = self.chat
        if chat.refusal:
            return error(*chat.refusal)
        with _noted(self.left):
            response = await _stream(request, "text/event-stream")
            for comment in chat.comments:
                await response.write(f": {comment}\n\n".encode())
            await chat.go.wait()
            if chat.held_s:
                await response.write(f": waited {chat.held_s:.3f} s\n\n".encode())
            for piece in chat.pieces:
                await asyncio.sleep(chat.pace_s)
                delta = {"choices": [{"index": 0, "delta": {"content": piece}}]}
                await response.write(f"data: {json.dumps(delta)}\n\n".encode())
            await chat.end.wait()
            if chat.error:
                failure = {"error": {"message": chat.error, "type": "server_error"}}
                await response.write(f"event: error\ndata: {json.dumps(failure)}\n\n".encode())
                return response
            usage = {"choices": [], "usage": chat.usage}
            await response.write(f"data: {json.dumps(usage)}\n\ndata: [DONE]\n\n".encode())
            return response

    async def _embeddings(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.asked.append(body)
        vectors = {"king": [1.0, 0.0, 0.0], "queen": [0.6, 0.8, 0.0]}
        data = [
            {"object": "embedding", "index": index, "embedding": vectors.get(text, [0.0, 0.0, 1.0])}
            for index, text in enumerate(body["input"])
        ]
        return web.json_response({"data": data, "usage": {"prompt_tokens": 2}})

    async def _rerank(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.asked.append(body)
        scores = (body["query"] in document for document in body["documents"])
        results = [
            {"index": index, "relevance_score": score / 2} for index, score in enumerate(scores)
        ]
        return web.json_response({"results": results})

    async def _transcriptions(self, request: web.Request) -> web.Response:
        form = await request.post()
        file = form["file"]
        content = file.file.read()
        self.asked.append({"model": form["model"], "file": file.filename, "bytes": len(content)})
        return web.json_response({"text": f"{len(content)} bytes of {file.filename}"})


async def _headers(_: web.Request, response: web.StreamResponse) -> None:
    for name, value in HEADERS.items():
        response.headers.setdefault(name, value)  # the login form has a policy of its own


async def _stream(request: web.Request, kind: str) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": kind})
    await response.prepare(request)
    return response


@contextlib.contextmanager
def _noted(left: asyncio.Event) -> Any:
    try:
        yield
    except (asyncio.CancelledError, ConnectionError):
        left.set()
        raise


@contextlib.asynccontextmanager
async def scripted_console() -> AsyncIterator[ScriptedConsole]:
    console = ScriptedConsole()
    await console.start()
    try:
        yield console
    finally:
        await console.stop()
