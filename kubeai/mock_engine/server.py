"""The mock engine's HTTP server: aiohttp handlers in front of one simulated engine.

``formats`` parses requests and formats responses; ``pacing`` runs the engine in real time.

Limits: a body is at most ``BODY_MAX_BYTES`` (audio ``forms.AUDIO_MAX_BYTES``, streamed); a slow
client buffers at most one reply, which ``--max-model-len`` bounds; the request log keeps the last
``request_log.REQUESTS_MAX`` requests; a drain ends after ``DRAIN_TIMEOUT_S``.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
from aiohttp import web

from kubeai.errors import KubeAIError
from kubeai.logs import get_logger
from kubeai.mock_engine.formats.base import ApiError, ApiFormat, GenerationRequest, Meta, decode
from kubeai.mock_engine.formats.computed import ComputedRequest, Media
from kubeai.mock_engine.formats.media import ImageRequest, images
from kubeai.mock_engine.formats.responses import Responses
from kubeai.mock_engine.formats.transcriptions import audio_seconds, transcript, transcription
from kubeai.mock_engine.forms import read_form
from kubeai.mock_engine.options import Options
from kubeai.mock_engine.pacing import Job, Pacer, SequenceGroup, StreamingGroup
from kubeai.mock_engine.realtime import Realtime
from kubeai.mock_engine.request_log import RequestLog
from kubeai.mock_engine.routes import COMPUTED, GENERATED
from kubeai.simulation import text
from kubeai.simulation.engine import Engine
from kubeai.simulation.text import Reply

log = get_logger(__name__)

BODY_MAX_BYTES = 64 << 20
DRAIN_TIMEOUT_S = 300.0
BACKLOG = 4096
# Whisper's encoder: 30 s of audio per window, 50 positions per second.
AUDIO_WINDOW_S = 30.0
AUDIO_TOKENS_PER_S = 50
DIED = 70  # exit status of --die-after-requests

STORED_MAX = 1000  # responses of the responses API

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class MockEngine:
    """The application. ``replica`` is the name in every response's X-Mock-Replica header."""

    def __init__(self, options: Options, replica: str = "") -> None:
        self.options = options
        self.replica = replica
        self.engine = Engine(options.config)
        self.request_log = RequestLog()
        self.adapters: dict[str, str] = {}  # name → path
        self.stored: dict[str, dict[str, Any]] = {}  # responses by ID, oldest first
        self._pacer: Pacer | None = None
        self._created = int(time.time())
        self._ready_s = 0.0
        self._numbers = count(1)
        self._metrics: Any = None  # a prometheus_client registry, created on the first scrape

    def app(self) -> web.Application:
        """The aiohttp application with all routes."""
        app = web.Application(middlewares=[self._middleware], client_max_size=BODY_MAX_BYTES)
        app.on_startup.append(self._started)
        app.on_response_prepare.append(self._sign)
        post, get = app.router.add_post, app.router.add_get
        for path, api in GENERATED.items():
            post(path, self._generator(api))
        for path, kind in COMPUTED.items():
            post(path, self._computer(kind))
        realtime = Realtime(self._served, self._run)
        app.on_shutdown.append(realtime.close)
        get("/v1/realtime", realtime.serve)
        get("/v1/responses/{id}", self.stored_response)
        post("/v1/responses/{id}/cancel", self.cancel_response)
        post("/v1/audio/transcriptions", self.transcribe)
        post("/v1/audio/translations", self.transcribe)
        post("/v1/images/edits", self.edit_image)
        post("/v1/images/variations", self.edit_image)
        post("/v1/load_lora_adapter", self.load_adapter)
        post("/v1/unload_lora_adapter", self.unload_adapter)
        get("/v1/models", self.models)
        get("/health", self.health)
        get("/version", self.version)
        get("/metrics", self.metrics)
        get("/mock/requests", self.requests)
        return app

    # -- around every request --------------------------------------------------------------------

    async def _started(self, _: web.Application) -> None:
        self._pacer = Pacer(self.engine)
        self._ready_s = asyncio.get_running_loop().time() + self.options.startup_delay_s

    @property
    def starting(self) -> bool:
        """Whether ``--startup-delay`` has not passed yet."""
        return asyncio.get_running_loop().time() < self._ready_s

    async def _sign(self, request: web.Request, response: web.StreamResponse) -> None:
        response.headers["X-Mock-Replica"] = self.replica
        if (given := request.headers.get("X-Request-Id")) is not None:
            response.headers["X-Request-Id"] = given

    @web.middleware
    async def _middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        counted = request.method == "POST" or request.path == "/v1/realtime"
        try:
            if counted:
                self.request_log.add(request)
                self._inject_faults()
            response = await handler(request)
        except ApiError as error:
            response = _error_response(request, error)
        except web.HTTPException as error:
            response = _error_response(request, _http_error(error))
        except (asyncio.CancelledError, ConnectionError):
            self.request_log.aborted += counted
            raise
        if counted:
            self.request_log.answered[response.status] += 1
        return response

    def _inject_faults(self) -> None:
        options = self.options
        if self.starting:
            raise ApiError("The engine is still starting", 503, "ServiceUnavailableError")
        if options.die_after_requests and self.request_log.total > options.die_after_requests:
            log.warning("exiting (--die-after-requests)", after_requests=options.die_after_requests)
            os._exit(DIED)
        if options.fail_every and self.request_log.total % options.fail_every == 0:
            raise ApiError("Injected failure (--fail-every)", 500, "InternalServerError")

    # -- text ------------------------------------------------------------------------------------

    def _generator(self, api: type[ApiFormat]) -> Handler:
        async def generate(request: web.Request) -> web.StreamResponse:
            generation = api.parse(await request.read())
            model, adapter = self._served(generation.model)
            if generation.previous is not None:
                self._stored_response(generation.previous)
            replies, jobs = [], []
            for prompt in generation.prompts:
                reply, job = self._plan(prompt or bytes(text.TOKEN_BYTES), generation, adapter)
                replies.append(reply)
                jobs.append(job)
            meta = self._meta(request, api.prefix, model)
            if generation.response_id is not None:
                meta = meta._replace(id=generation.response_id)
            formatted = api(meta, generation)
            if generation.stream:
                return await self._stream(request, formatted, replies, jobs)
            group = SequenceGroup(self._running())
            await group.run(jobs)
            response = formatted.response(replies, group.usage())
            self._store(formatted, response)
            return _json(response)

        return generate

    def _plan(
        self, prompt: bytes, generation: GenerationRequest, adapter: str
    ) -> tuple[Reply, Job]:
        tokens = text.count(prompt)
        room = self._room(tokens)
        if generation.limit is not None and generation.limit > room:
            raise ApiError(
                f"'max_tokens' or 'max_completion_tokens' is too large: {generation.limit}. "
                f"The model's context is {self.options.max_model_len} tokens and the prompt takes "
                f"{tokens}.",
                param="max_tokens",
            )
        reply = text.reply(
            prompt,
            limit=generation.limit,
            room=room,
            typical=self.options.reply_tokens,
            end_early=self.options.end_early,
            stops=generation.stops,
            salt=adapter,
        )
        hashes = text.block_hashes(
            prompt + text.pack(reply.text), adapter, self.options.config.block_tokens
        )
        return reply, Job(tokens, reply.tokens, hashes)

    async def _stream(
        self, request: web.Request, api: ApiFormat, replies: list[Reply], jobs: list[Job]
    ) -> web.StreamResponse:
        chunked = request.version >= aiohttp.HttpVersion11
        response = web.StreamResponse(headers={"Content-Type": api.stream_type})
        response.headers["Cache-Control"] = "no-cache"
        if chunked:
            response.enable_chunked_encoding()
        await response.prepare(request)
        transport = request.transport
        if transport is None:
            raise ConnectionResetError("the client disconnected")
        stream = StreamingGroup(self._running(), api, replies, transport, chunked)
        await stream.run(jobs)
        self._store(api, api.response(replies, stream.usage()))
        await response.write_eof(stream.last_event + api.closing(replies, stream.usage()))
        return response

    def _store(self, api: ApiFormat, response: dict[str, Any]) -> None:
        if isinstance(api, Responses):
            self.stored[response["id"]] = response
            if len(self.stored) > STORED_MAX:
                del self.stored[next(iter(self.stored))]

    async def stored_response(self, request: web.Request) -> web.Response:
        """``GET /v1/responses/{id}``."""
        return _json(self._stored_response(request.match_info["id"]))

    def _stored_response(self, response_id: str) -> dict[str, Any]:
        if response_id not in self.stored:
            message = f"Response with id '{response_id}' not found."
            raise ApiError(message, 404, "invalid_request_error")
        return self.stored[response_id]

    async def cancel_response(self, request: web.Request) -> web.Response:
        """``POST /v1/responses/{id}/cancel``. Responses are stored when they are complete."""
        await self.stored_response(request)
        raise ApiError("Cannot cancel a synchronous response.", param="response_id")

    # -- embeddings, scores, audio, images ---------------------------------------------------------

    def _computer(self, kind: type[ComputedRequest]) -> Handler:
        async def compute(request: web.Request) -> web.StreamResponse:
            parsed = decode(await request.read(), kind)
            model, _ = self._served(parsed.model and parsed.model.removesuffix(":latest"))
            tokens = await self._compute(parsed.lengths())
            answer = parsed.response(self._meta(request, kind.prefix, model), tokens)
            if isinstance(answer, Media):
                return web.Response(body=answer.body, content_type=answer.content_type)
            return _json(answer)

        return compute

    async def _compute(self, prompts: Sequence[int]) -> int:
        """Compute prompts of these lengths without output; returns the total number of tokens."""
        if not prompts:
            return 0
        jobs = [Job(max(1, tokens)) for tokens in prompts]
        for job in jobs:
            self._room(job.prompt_tokens - 1)
        group = SequenceGroup(self._running())
        await group.run(jobs)
        return sum(job.prompt_tokens for job in jobs)

    async def transcribe(self, request: web.Request) -> web.Response:
        """``POST /v1/audio/transcriptions`` and ``translations``. Does not stream."""
        fields, digest, head, size = await self._form(request)
        if fields.get("stream", "").lower() == "true":
            raise ApiError("stream: the mock engine does not stream transcriptions", param="stream")
        if digest is None:
            raise ApiError("file: is required", param="file")
        seconds = audio_seconds(head, size)
        content = transcript(digest, seconds)
        kind, body = transcription(fields.get("response_format", "json"), content, seconds)
        await SequenceGroup(self._running()).run(self._windows(seconds, content))
        return web.Response(body=body, content_type=kind, charset="utf-8")

    async def edit_image(self, request: web.Request) -> web.StreamResponse:
        """``POST /v1/images/edits`` (a form or JSON) and ``variations``."""
        if request.content_type == "application/json":
            return await self._computer(ImageRequest)(request)
        fields, digest, _, _ = await self._form(request)
        if digest is None:
            raise ApiError("image: is required", param="image")
        tokens = text.count(text.pack(fields.get("prompt", "")))
        await self._compute([tokens])
        return _json(images(self._meta(request, "", ""), digest, 1))

    async def _form(self, request: web.Request) -> tuple[dict[str, str], bytes | None, bytes, int]:
        if not request.content_type.startswith("multipart/form-data"):
            raise ApiError("the body is not multipart/form-data")
        try:
            form = await read_form(request)
        except ValueError as error:  # a missing boundary or a malformed part
            raise ApiError(f"multipart: {error}") from None
        self._served(form[0].get("model"))
        return form

    def _windows(self, seconds: float, content: str) -> list[Job]:
        windows = max(1, -int(-seconds // AUDIO_WINDOW_S))
        tokens = int(AUDIO_TOKENS_PER_S * seconds / windows) + 1
        words = len(content) // text.TOKEN_BYTES // windows + 1
        room = self.options.max_model_len
        return [Job(min(tokens, max(1, room - words)), min(words, room - 1))] * windows

    # -- models and adapters ----------------------------------------------------------------------

    async def models(self, request: web.Request) -> web.Response:
        """``GET /v1/models``: the served model names and the loaded adapters."""
        names = self.options.served_model_names
        cards = [
            self._card(name, self.options.model, None, self.options.max_model_len) for name in names
        ]
        cards += [self._card(name, path, names[0], None) for name, path in self.adapters.items()]
        return _json({"object": "list", "data": cards})

    def _card(self, name: str, root: str, parent: str | None, length: int | None) -> dict[str, Any]:
        card = {"id": name, "object": "model", "created": self._created, "owned_by": "vllm"}
        return card | {"root": root, "parent": parent, "max_model_len": length, "permission": []}

    def _served(self, name: str | None) -> tuple[str, str]:
        """The model name of the response and the adapter ("" if none). Default: the first model."""
        if not name:
            return self.options.served_model_names[0], ""
        if name in self.options.served_model_names:
            return name, ""
        if name in self.adapters:
            return name, name
        raise ApiError(f"The model `{name}` does not exist.", 404, "NotFoundError", "model")

    async def load_adapter(self, request: web.Request) -> web.Response:
        """``POST /v1/load_lora_adapter``."""
        parsed = decode(await request.read(), AdapterRequest)
        self._load(parsed)
        log.info("loaded an adapter", adapter=parsed.lora_name, path=parsed.lora_path)
        text = f"Success: LoRA adapter '{parsed.lora_name}' added successfully."
        return web.Response(text=text)

    def _load(self, parsed: AdapterRequest) -> None:
        name = parsed.lora_name
        if not name or not parsed.lora_path:
            raise ApiError("Both 'lora_name' and 'lora_path' must be provided.", 400, _USER_INPUT)
        if name in self.adapters and not parsed.load_inplace:
            raise ApiError(f"The lora adapter '{name}' has already been loaded.", 400, _USER_INPUT)
        if parsed.lora_path.startswith("/") and not Path(parsed.lora_path).is_dir():
            message = f"Loading lora {name} failed: No adapter found for {parsed.lora_path}"
            raise ApiError(message, 404, "NotFoundError")
        self.adapters[name] = parsed.lora_path

    async def unload_adapter(self, request: web.Request) -> web.Response:
        """``POST /v1/unload_lora_adapter``."""
        name = decode(await request.read(), AdapterRequest).lora_name
        if not name:
            raise ApiError("'lora_name' needs to be provided.", 400, _USER_INPUT)
        if self.adapters.pop(name, None) is None:
            message = f"The lora adapter '{name}' cannot be found."
            raise ApiError(message, 404, "NotFoundError")
        log.info("unloaded an adapter", adapter=name)
        return web.Response(text=f"Success: LoRA adapter '{name}' removed successfully.")

    # -- health, metrics ---------------------------------------------------------------------------

    async def health(self, request: web.Request) -> web.Response:
        """``GET /health``: 503 while the engine is starting."""
        return web.Response(status=503 if self.starting else 200)

    async def version(self, request: web.Request) -> web.Response:
        """``GET /version``: KubeAI's version."""
        from kubeai import __version__  # 40 ms to import

        return _json({"version": __version__})

    async def requests(self, request: web.Request) -> web.Response:
        """``GET /mock/requests``: the request log."""
        return _json({"replica": self.replica} | self.request_log.report())

    async def metrics(self, request: web.Request) -> web.Response:
        """``GET /metrics``."""
        from prometheus_client import CollectorRegistry, generate_latest  # 100 ms to import

        from kubeai.mock_engine.metrics import Collector

        if self._metrics is None:
            self._metrics = CollectorRegistry()
            self._metrics.register(
                Collector(
                    self.engine,
                    self.request_log,
                    self.options.served_model_names[0],
                    self.options.engine,
                )
            )
        return web.Response(
            body=generate_latest(self._metrics),
            headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"},
        )

    # -- helpers -----------------------------------------------------------------------------------

    async def _run(self, prompt_tokens: int, output_tokens: int) -> None:
        await SequenceGroup(self._running()).run([Job(prompt_tokens, output_tokens)])

    def _running(self) -> Pacer:
        assert self._pacer is not None
        return self._pacer

    def _room(self, tokens: int) -> int:
        room = self.options.max_model_len - tokens
        if room < 1:
            raise ApiError(
                f"This model's maximum context length is {self.options.max_model_len} tokens, "
                f"but the request has {tokens} input tokens."
            )
        return room

    def _meta(self, request: web.Request, prefix: str, model: str) -> Meta:
        given = request.headers.get("X-Request-Id") or f"{self.replica}-{next(self._numbers)}"
        return Meta(prefix + given, int(time.time()), model, self.replica)


class AdapterRequest(msgspec.Struct):
    """The body of a request to load or unload an adapter."""

    lora_name: str = ""
    lora_path: str = ""
    load_inplace: bool = False


_USER_INPUT = "InvalidUserInput"


def _json(value: Any, status: int = 200) -> web.Response:
    return web.Response(
        body=msgspec.json.encode(value), status=status, content_type="application/json"
    )


def _error_response(request: web.Request, error: ApiError) -> web.Response:
    if request.path.startswith("/api/"):
        return _json({"error": error.message}, error.status)
    if not request.path.startswith("/v1/messages"):
        return _json(error.body(), error.status)
    kinds = {400: "invalid_request_error", 404: "not_found_error"}
    kind = kinds.get(error.status, "api_error")
    return _json({"type": "error", "error": {"type": kind, "message": error.message}}, error.status)


def _http_error(error: web.HTTPException) -> ApiError:
    return ApiError(
        error.text or error.reason, error.status, error.reason.replace(" ", "") + "Error"
    )


# -- the process -----------------------------------------------------------------------------------


def run(options: Options) -> None:
    """Serve until SIGTERM or SIGINT, then drain. KubeAIError if it cannot listen."""
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(options))


async def _serve(options: Options) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    mock = MockEngine(options)
    runner = web.AppRunner(
        mock.app(),
        access_log=None,
        handle_signals=False,
        handler_cancellation=True,  # a disconnected client frees its place in the batch
        shutdown_timeout=DRAIN_TIMEOUT_S,
        keepalive_timeout=75.0,
    )
    await runner.setup()
    try:
        await web.TCPSite(runner, options.host, options.port, backlog=BACKLOG).start()
    except OSError as error:
        await runner.cleanup()
        where = f"{options.host}:{options.port}"
        raise KubeAIError(f"cannot listen on {where}: {error.strerror or error}") from None
    host, port = runner.addresses[0][:2]
    mock.replica = os.environ.get("POD_NAME") or f"{host}:{port}"
    log.info(
        "mock engine listens",
        address=f"{host}:{port}",
        engine=options.engine,
        models=options.served_model_names,
        replica=mock.replica,
    )
    await stop.wait()
    log.info("draining", running=mock.engine.running, waiting=mock.engine.waiting)
    await runner.cleanup()
