"""The mock engine's HTTP server: aiohttp in front of one simulated engine that runs in real time.

There is one timer per engine step, not one per token or request: the end of a step calls every
stream that got a token, and each writes its event immediately. One core serves thousands of
streams.

Limits: a body is at most ``BODY_MAX_BYTES`` (audio ``AUDIO_MAX_BYTES``, streamed); a slow client
buffers at most one reply, which ``--max-model-len`` bounds; the request log keeps the last
``RECORD_MAX_COUNT`` requests; a drain ends after ``DRAIN_TIMEOUT_S``.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from kubeai.errors import KubeAIError
from kubeai.http import aiohttp, web
from kubeai.logs import get_logger
from kubeai.mock_engine import dialects
from kubeai.mock_engine.dialects import Dialect, Meta, Refused, Usage
from kubeai.mock_engine.options import Options
from kubeai.simulation import text
from kubeai.simulation.engine import Engine
from kubeai.simulation.engine import Sequence as Running
from kubeai.simulation.text import Reply

log = get_logger(__name__)

BODY_MAX_BYTES = 64 << 20
AUDIO_MAX_BYTES = 1 << 30
FIELD_MAX_BYTES = 64 << 10  # of a form field that is not the file
WAV_HEAD_MAX_BYTES = 64 << 10
RECORD_MAX_COUNT = 10_000
DRAIN_TIMEOUT_S = 300.0
BACKLOG = 4096
# A timer later than this shifts the schedule; smaller delays are caught up.
LAG_MAX_S = 0.05
# Whisper's encoder: 30 s of audio per window, 50 positions per second.
AUDIO_WINDOW_S = 30.0
AUDIO_TOKENS_PER_S = 50
DIED = 70  # exit status of --die-after-requests

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Pacer:
    """Runs the simulated engine in real time.

    The ``owner`` of each sequence is called (``advanced(sequence)``) for every token.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.Handle | None = None

    def submit(
        self, prompt_tokens: int, output_tokens: int, hashes: Sequence[int], owner: Group
    ) -> Running:
        now = self._loop.time()
        sequence = self.engine.submit(now, prompt_tokens, output_tokens, hashes, owner)
        if self._timer is None:
            # Deferred, so that requests arriving in the same loop iteration share the first step.
            self._timer = self._loop.call_soon(self._tick, now)
        return sequence

    def _tick(self, due: float) -> None:
        now = self._loop.time()
        step = self.engine.step(due if now - due < LAG_MAX_S else now)
        for sequence in step.advanced:
            owner = sequence.owner
            assert isinstance(owner, Group)
            owner.advanced(sequence)
        if step.next_s is None:
            self._timer = None
        else:
            self._timer = self._loop.call_at(step.next_s, self._tick, step.next_s)


class Job(NamedTuple):
    """One sequence to run: its prompt and output lengths in tokens."""

    prompt_tokens: int
    output_tokens: int = 0
    hashes: Sequence[int] = ()


class Group:
    """The sequences of one request; ``await run(...)`` returns when all of them are done.

    Cancellation (the client disconnected) removes them from the engine.
    """

    def __init__(self, pacer: Pacer) -> None:
        self._pacer = pacer
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.sequences: list[Running] = []
        self.left = 0

    async def run(self, jobs: Sequence[Job]) -> None:
        self.left = len(jobs)
        self.sequences = [self._pacer.submit(*job, self) for job in jobs]
        try:
            await self._done
        finally:
            for sequence in self.sequences:
                self._pacer.engine.cancel(sequence)

    def advanced(self, sequence: Running) -> None:
        if sequence.done:
            self.left -= 1
            if not self.left and not self._done.done():
                self._done.set_result(None)

    def usage(self) -> Usage:
        return Usage(
            sum(sequence.prompt_tokens for sequence in self.sequences),
            sum(sequence.cached_tokens for sequence in self.sequences),
            sum(sequence.produced for sequence in self.sequences),
        )


class Stream(Group):
    """A Group whose tokens are written to the client as they are generated.

    Tokens are written directly to the transport: waking a task per token and stream would cost
    three times as much. The response is already prepared; ``chunked`` tells how its body is framed.
    The handler sends the last event (``rest``) together with the end of the body.
    """

    def __init__(
        self,
        pacer: Pacer,
        dialect: Dialect,
        replies: list[Reply],
        transport: asyncio.WriteTransport,
        chunked: bool,
    ) -> None:
        super().__init__(pacer)
        self.rest = b""
        self._dialect = dialect
        self._replies = replies
        self._pieces = [[piece.encode() for piece in dialects.pieces(reply)] for reply in replies]
        self._index: dict[int, int] = {}
        self._transport = transport
        self._chunked = chunked
        self._opened = False

    def advanced(self, sequence: Running) -> None:
        super().advanced(sequence)
        index = self._index_of(sequence)
        number = sequence.produced - 1
        piece = self._pieces[index][number]
        if sequence.done:
            event = self._dialect.last(index, piece.decode(), self._replies[index])
        else:
            event = self._dialect.token(index, number, piece)
        if not self._opened:
            self._opened = True
            event = self._dialect.opening(self.usage()) + event
        if not self.left:
            self.rest = event
        elif self._transport.is_closing():
            pass  # the client disconnected; the handler is about to be cancelled
        elif self._chunked:
            self._transport.write(b"%x\r\n%b\r\n" % (len(event), event))
        else:
            self._transport.write(event)

    def _index_of(self, sequence: Running) -> int:
        if len(self.sequences) == 1:
            return 0
        if not self._index:
            self._index = {id(one): index for index, one in enumerate(self.sequences)}
        return self._index[id(sequence)]


class Record:
    """A log of received requests, so that tests can prove that none arrived twice."""

    def __init__(self) -> None:
        self.received: Counter[str] = Counter()  # by path
        self.answered: Counter[int] = Counter()  # by status
        self.aborted = 0  # the client disconnected or the connection broke
        self.total = 0
        self._last: deque[dict[str, str]] = deque(maxlen=RECORD_MAX_COUNT)

    def add(self, request: web.Request) -> None:
        self.total += 1
        resource = request.match_info.route.resource
        path = "other" if resource is None else resource.canonical  # bounds the number of entries
        self.received[path] += 1
        self._last.append({"id": request.headers.get("X-Request-Id", ""), "path": path})

    def report(self) -> dict[str, Any]:
        return {
            "total": self.total,
            "received": dict(self.received),
            "answered": {str(status): number for status, number in self.answered.items()},
            "aborted": self.aborted,
            "requests": list(self._last),
            "forgotten": self.total - len(self._last),
        }


class MockEngine:
    """The application. ``replica`` is the name in every response's X-Mock-Replica header."""

    def __init__(self, options: Options, replica: str = "") -> None:
        self.options = options
        self.replica = replica
        self.engine = Engine(options.config)
        self.record = Record()
        self.adapters: dict[str, str] = {}  # name → path
        self._pacer: Pacer | None = None
        self._created = int(time.time())
        self._ready_s = 0.0
        self._numbers = count(1)
        self._metrics: Any = None  # a prometheus_client registry, created on the first scrape

    def app(self) -> web.Application:
        app = web.Application(middlewares=[self._middleware], client_max_size=BODY_MAX_BYTES)
        app.on_startup.append(self._started)
        app.on_response_prepare.append(self._sign)
        post, get = app.router.add_post, app.router.add_get
        post("/v1/chat/completions", self._generator(dialects.Chat))
        post("/v1/completions", self._generator(dialects.Completions))
        post("/v1/responses", self._generator(dialects.Responses))
        post("/v1/messages", self._generator(dialects.AnthropicMessages))
        post("/v1/embeddings", self.embeddings)
        post("/v1/rerank", self.rerank)
        post("/rerank", self.rerank)
        post("/v1/audio/transcriptions", self.transcribe)
        post("/v1/load_lora_adapter", self.load_adapter)
        post("/v1/unload_lora_adapter", self.unload_adapter)
        get("/v1/models", self.models)
        get("/health", self.health)
        get("/metrics", self.metrics)
        get("/mock/requests", self.requests)
        return app

    # -- around every request --------------------------------------------------------------------

    async def _started(self, _: web.Application) -> None:
        self._pacer = Pacer(self.engine)
        self._ready_s = asyncio.get_running_loop().time() + self.options.startup_delay_s

    @property
    def starting(self) -> bool:
        return asyncio.get_running_loop().time() < self._ready_s

    async def _sign(self, request: web.Request, response: web.StreamResponse) -> None:
        response.headers["X-Mock-Replica"] = self.replica
        if (given := request.headers.get("X-Request-Id")) is not None:
            response.headers["X-Request-Id"] = given

    @web.middleware
    async def _middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        counted = request.method == "POST"
        try:
            if counted:
                self.record.add(request)
                self._inject_faults()
            response = await handler(request)
        except Refused as refused:
            response = _refusal(request, refused)
        except web.HTTPException as error:
            response = _refusal(request, _http_error(error))
        except (asyncio.CancelledError, ConnectionError):
            self.record.aborted += counted
            raise
        if counted:
            self.record.answered[response.status] += 1
        return response

    def _inject_faults(self) -> None:
        options = self.options
        if self.starting:
            raise Refused("The engine is still starting", 503, "ServiceUnavailableError")
        if options.die_after_requests and self.record.total > options.die_after_requests:
            log.warning("exiting (--die-after-requests)", after_requests=options.die_after_requests)
            os._exit(DIED)
        if options.fail_every and self.record.total % options.fail_every == 0:
            raise Refused("Injected failure (--fail-every)", 500, "InternalServerError")

    # -- text ------------------------------------------------------------------------------------

    def _generator(self, dialect: type[Dialect]) -> Handler:
        async def generate(request: web.Request) -> web.StreamResponse:
            ask = dialect.read(await request.read())
            model, adapter = self._served(ask.model)
            replies, jobs = [], []
            for prompt in ask.prompts:
                reply, job = self._plan(prompt or bytes(text.TOKEN_BYTES), ask, adapter)
                replies.append(reply)
                jobs.append(job)
            answer = dialect(self._meta(request, dialect.prefix, model), ask)
            if ask.stream:
                return await self._stream(request, answer, replies, jobs)
            group = Group(self._running())
            await group.run(jobs)
            return _json(answer.whole(replies, group.usage()))

        return generate

    def _plan(self, prompt: bytes, ask: dialects.Ask, adapter: str) -> tuple[Reply, Job]:
        tokens = text.count(prompt)
        room = self._room(tokens)
        if ask.limit is not None and ask.limit > room:
            raise Refused(
                f"'max_tokens' or 'max_completion_tokens' is too large: {ask.limit}. The model's "
                f"context is {self.options.max_model_len} tokens and the prompt takes {tokens}.",
                param="max_tokens",
            )
        reply = text.reply(
            prompt,
            limit=ask.limit,
            room=room,
            typical=self.options.reply_tokens,
            stops=ask.stops,
            salt=adapter,
        )
        hashes = text.block_hashes(
            prompt + text.pack(reply.text), adapter, self.options.config.block_tokens
        )
        return reply, Job(tokens, reply.tokens, hashes)

    async def _stream(
        self, request: web.Request, dialect: Dialect, replies: list[Reply], jobs: list[Job]
    ) -> web.StreamResponse:
        chunked = request.version >= aiohttp.HttpVersion11
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        response.headers["Cache-Control"] = "no-cache"
        if chunked:
            response.enable_chunked_encoding()
        await response.prepare(request)
        transport = request.transport
        if transport is None:
            raise ConnectionResetError("the client disconnected")
        stream = Stream(self._running(), dialect, replies, transport, chunked)
        await stream.run(jobs)
        await response.write_eof(stream.rest + dialect.closing(replies, stream.usage()))
        return response

    # -- embeddings, rerank, audio -----------------------------------------------------------------

    async def embeddings(self, request: web.Request) -> web.Response:
        asked = dialects.decode(await request.read(), dialects.EmbeddingRequest)
        model, _ = self._served(asked.model)
        prompts = asked.prompts()
        tokens = await self._compute([text.count(prompt) for prompt in prompts])
        return _json(asked.answer(self._meta(request, "embd-", model), prompts, tokens))

    async def rerank(self, request: web.Request) -> web.Response:
        asked = dialects.decode(await request.read(), dialects.RerankRequest)
        model, _ = self._served(asked.model)
        query = text.count(text.pack(asked.query))
        tokens = await self._compute(
            [query + text.count(text.pack(document)) for document in asked.texts()]
        )
        return _json(asked.answer(self._meta(request, "rerank-", model), tokens))

    async def _compute(self, prompts: Sequence[int]) -> int:
        """Compute prompts of these lengths without output; returns the total number of tokens."""
        jobs = [Job(max(1, tokens)) for tokens in prompts]
        for job in jobs:
            self._room(job.prompt_tokens - 1)
        group = Group(self._running())
        await group.run(jobs)
        return sum(job.prompt_tokens for job in jobs)

    async def transcribe(self, request: web.Request) -> web.Response:
        if not request.content_type.startswith("multipart/form-data"):
            raise Refused("the body is not multipart/form-data")
        try:
            fields, digest, head, size = await _read_form(request)
        except ValueError as error:  # a missing boundary or a malformed part
            raise Refused(f"multipart: {error}") from None
        self._served(fields.get("model"))
        if fields.get("stream", "").lower() == "true":
            raise Refused("stream: the mock engine does not stream transcriptions", param="stream")
        if digest is None:
            raise Refused("file: is required", param="file")
        seconds = dialects.audio_seconds(head, size)
        said = dialects.transcript(digest, seconds)
        kind, body = dialects.transcription(fields.get("response_format", "json"), said, seconds)
        await Group(self._running()).run(self._windows(seconds, said))
        return web.Response(body=body, content_type=kind, charset="utf-8")

    def _windows(self, seconds: float, said: str) -> list[Job]:
        windows = max(1, -int(-seconds // AUDIO_WINDOW_S))
        tokens = int(AUDIO_TOKENS_PER_S * seconds / windows) + 1
        words = len(said) // text.TOKEN_BYTES // windows + 1
        room = self.options.max_model_len
        return [Job(min(tokens, max(1, room - words)), min(words, room - 1))] * windows

    # -- models and adapters ----------------------------------------------------------------------

    async def models(self, request: web.Request) -> web.Response:
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
        raise Refused(f"The model `{name}` does not exist.", 404, "NotFoundError", "model")

    async def load_adapter(self, request: web.Request) -> web.Response:
        asked = dialects.decode(await request.read(), AdapterRequest)
        self._load(asked)
        log.info("loaded an adapter", adapter=asked.lora_name, path=asked.lora_path)
        text = f"Success: LoRA adapter '{asked.lora_name}' added successfully."
        return web.Response(text=text)

    def _load(self, asked: AdapterRequest) -> None:
        name = asked.lora_name
        if not name or not asked.lora_path:
            raise Refused("Both 'lora_name' and 'lora_path' must be provided.", 400, _USER_INPUT)
        if name in self.adapters and not asked.load_inplace:
            raise Refused(f"The lora adapter '{name}' has already been loaded.", 400, _USER_INPUT)
        if asked.lora_path.startswith("/") and not Path(asked.lora_path).is_dir():
            message = f"Loading lora {name} failed: No adapter found for {asked.lora_path}"
            raise Refused(message, 404, "NotFoundError")
        self.adapters[name] = asked.lora_path

    async def unload_adapter(self, request: web.Request) -> web.Response:
        name = dialects.decode(await request.read(), AdapterRequest).lora_name
        if not name:
            raise Refused("'lora_name' needs to be provided.", 400, _USER_INPUT)
        if self.adapters.pop(name, None) is None:
            message = f"The lora adapter '{name}' cannot be found."
            raise Refused(message, 404, "NotFoundError")
        log.info("unloaded an adapter", adapter=name)
        return web.Response(text=f"Success: LoRA adapter '{name}' removed successfully.")

    # -- health, metrics ---------------------------------------------------------------------------

    async def health(self, request: web.Request) -> web.Response:
        return web.Response(status=503 if self.starting else 200)

    async def requests(self, request: web.Request) -> web.Response:
        return _json({"replica": self.replica} | self.record.report())

    async def metrics(self, request: web.Request) -> web.Response:
        from prometheus_client import CollectorRegistry, generate_latest  # 100 ms to import

        from kubeai.mock_engine.metrics import Collector

        if self._metrics is None:
            self._metrics = CollectorRegistry()
            self._metrics.register(
                Collector(self.engine, self.record, self.options.served_model_names[0])
            )
        return web.Response(
            body=generate_latest(self._metrics),
            headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"},
        )

    # -- helpers -----------------------------------------------------------------------------------

    def _running(self) -> Pacer:
        assert self._pacer is not None
        return self._pacer

    def _room(self, tokens: int) -> int:
        room = self.options.max_model_len - tokens
        if room < 1:
            raise Refused(
                f"This model's maximum context length is {self.options.max_model_len} tokens, "
                f"but the request has {tokens} input tokens."
            )
        return room

    def _meta(self, request: web.Request, prefix: str, model: str) -> Meta:
        given = request.headers.get("X-Request-Id") or f"{self.replica}-{next(self._numbers)}"
        return Meta(prefix + given, int(time.time()), model, self.replica)


class AdapterRequest(msgspec.Struct):
    lora_name: str = ""
    lora_path: str = ""
    load_inplace: bool = False


_USER_INPUT = "InvalidUserInput"


async def _read_form(request: web.Request) -> tuple[dict[str, str], bytes | None, bytes, int]:
    """The form fields, and the file's digest (None if there is no file), first bytes and size."""
    fields: dict[str, str] = {}
    digest: bytes | None = None
    head, size = b"", 0
    async for part in await request.multipart():
        if not isinstance(part, aiohttp.BodyPartReader):
            raise Refused("nested multipart bodies are not supported")
        if part.name != "file":
            fields[part.name or ""] = await _read_field(part)
            continue
        whole = hashlib.sha256()
        while chunk := await part.read_chunk(1 << 16):
            whole.update(chunk)
            size += len(chunk)
            head += chunk[: WAV_HEAD_MAX_BYTES - len(head)]
            if size > AUDIO_MAX_BYTES:
                raise Refused("file: is too large", 413)
        digest = whole.digest()
    return fields, digest, head, size


async def _read_field(part: aiohttp.BodyPartReader) -> str:
    value = b""
    while chunk := await part.read_chunk():
        value += chunk
        if len(value) > FIELD_MAX_BYTES:
            raise Refused(f"{part.name}: is too large", 413, param=part.name)
    return value.decode("utf-8", "replace")


def _json(value: Any, status: int = 200) -> web.Response:
    return web.Response(
        body=msgspec.json.encode(value), status=status, content_type="application/json"
    )


def _refusal(request: web.Request, refused: Refused) -> web.Response:
    if request.path != "/v1/messages":
        return _json(refused.body(), refused.status)
    kinds = {400: "invalid_request_error", 404: "not_found_error"}
    kind = kinds.get(refused.status, "api_error")
    return _json(
        {"type": "error", "error": {"type": kind, "message": refused.message}}, refused.status
    )


def _http_error(error: web.HTTPException) -> Refused:
    return Refused(
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
