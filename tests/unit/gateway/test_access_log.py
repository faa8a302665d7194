"""The access log and OpenTelemetry spans: what is recorded for each request."""

import asyncio
import json
import os
import re
import select
import subprocess
import sys
import threading

import pytest
import uvloop
from aiohttp import web
from fakes.wire import CHUNKED, Broken, Message, Wire, answer, chunk, post, says, until
from fakes.world import World
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from kubeai._prompt import BLOCKS_MAX, Prompt
from kubeai.errors import ConfigError
from kubeai.gateway import access_log as observers
from kubeai.gateway import tracing
from kubeai.gateway.access_log import AccessLog, Line, Observers

LOOP_FACTORIES = {"uvloop": uvloop.new_event_loop}  # the event loop of the workers

CHAT = "/openai/v1/chat/completions"
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Lines:
    """The lines that an access log wrote."""

    def __init__(self):
        self.text = b""

    def write(self, data: bytes) -> None:
        self.text += data

    def read(self) -> list[dict]:
        return [json.loads(line) for line in self.text.splitlines()]


@pytest.fixture
async def start():
    worlds = []

    async def start(watching, script=None, strategy="LeastLoad", **config) -> World:
        world = await World.start(observers=watching, **config)
        worlds.append(world)
        world.route("m", {"pod-1": await world.engine(script or says(b"{}"))}, strategy=strategy)
        return world

    yield start
    for world in worlds:
        await world.close()


def line(**fields) -> Line:
    told = {
        "time": "",
        "request_id": "1",
        "client": "",
        "method": "POST",
        "path": "/",
        "status": 200,
        "end": "whole",
        "duration_s": 0.0,
        "request_bytes": 0,
        "answer_bytes": 0,
    }
    return Line(**{**told, **fields})


# -- access log ------------------------------------------------------------------------------------


async def test_each_request_is_one_line(start):
    lines = Lines()
    log = AccessLog(1.0, lines.write)
    world = await start(Observers(log, None))
    wire = await world.client()
    body = b'{"model":"m"}'
    await wire.send(post(CHAT, body, "X-Request-Id: one"))
    await wire.answer()
    await wire.send(post(CHAT, b'{"model":"unknown"}', "X-Request-Id: two"))
    await wire.answer()
    await world.at_rest()
    log.close()
    first, second = lines.read()
    assert first["request_id"] == "one"
    assert (first["method"], first["path"], first["status"]) == ("POST", CHAT, 200)
    assert (first["model"], first["endpoint"], first["end"]) == ("m", "pod-1", "whole")
    assert first["request_bytes"] == len(body)
    assert first["answer_bytes"] > 2
    assert 0 < first["first_byte_s"] <= first["duration_s"] < 5
    assert first["time"].endswith("+00:00")
    assert (second["request_id"], second["status"]) == ("two", 404)
    assert "model" not in second, "names made up by clients are not logged"


async def test_a_line_distinguishes_truncated_responses_from_client_disconnects(start):
    async def script(wire: Wire, request: Message) -> None:
        await wire.send(CHUNKED + chunk(b"x"))
        if b"break" in request.body:
            wire.close()
        else:
            await wire.reader.read()

    lines = Lines()
    log = AccessLog(1.0, lines.write)
    world = await start(Observers(log, None), script)
    wire = await world.client()
    await wire.send(post(CHAT, b'{"model":"m","x":"break"}'))
    with pytest.raises(Broken):
        await wire.answer()
    wire = await world.client()
    await wire.send(post(CHAT))
    await wire.head()
    wire.close()
    await world.at_rest()
    log.close()
    assert [(told["end"], told["status"]) for told in lines.read()] == [
        ("broken", 200),
        ("left", 200),
    ]


async def test_retries_are_logged(start):
    async def script(wire: Wire, request: Message) -> None:
        await wire.send(answer(503))

    lines = Lines()
    log = AccessLog(1.0, lines.write)
    world = await start(Observers(log, None), script, retries=1)
    wire = await world.client()
    await wire.send(post(CHAT))
    await wire.answer()
    await world.at_rest()
    log.close()
    assert [(told["retries"], told["status"]) for told in lines.read()] == [(1, 503)]


@pytest.mark.parametrize("strategy", ["LeastLoad", "PrefixHash", "PrefixCache"])
async def test_prompts_are_logged_under_each_strategy_if_enabled(start, strategy):
    lines = Lines()
    log = AccessLog(1.0, lines.write)
    world = await start(Observers(log, None), access_log_prompts=True, strategy=strategy)
    wire = await world.client()
    large = "x" * (1 << 20)  # takes the path of large bodies
    for text in ("a" * 300, "a" * 300 + "b" * 300, large):
        message = {"role": "user", "content": text}
        await wire.send(
            post(CHAT, json.dumps({"model": "m", "stream": True, "messages": [message]}).encode())
        )
        await wire.answer()
    await world.at_rest()
    log.close()
    first, second, last = (told["prompt"] for told in lines.read())
    assert first["tokens"] == len(json.dumps([{"role": "user", "content": "a" * 300}])) // 4
    assert first["stream"]
    assert first["key"] == second["key"] != last["key"], "they begin alike"
    assert (first["depths"], second["depths"]) == ([64], [64, 128])
    assert first["blocks"] == second["blocks"][:1]
    assert len(last["blocks"]) == len(last["depths"]) > 30
    assert all(re.fullmatch("[0-9a-f]{16}", block) for block in last["blocks"])


async def test_prompts_are_not_logged_by_default(start):
    lines = Lines()
    log = AccessLog(1.0, lines.write)
    world = await start(Observers(log, None), strategy="PrefixHash")
    wire = await world.client()
    await wire.send(post(CHAT, b'{"model":"m","messages":[{"role":"user","content":"hello"}]}'))
    await wire.answer()
    await world.at_rest()
    log.close()
    assert ["prompt" in told for told in lines.read()] == [False]


def test_the_longest_line_is_written_at_once():
    written = []
    log = AccessLog(1.0, written.append)
    deepest = [(1 << 32) - 1] * BLOCKS_MAX
    longest = Prompt((1 << 32) - 1, [(1 << 64) - 1] * BLOCKS_MAX, deepest, (1 << 64) - 1)
    log.add(
        line(
            time="2026-11-29T13:00:00.000+00:00",
            request_id='"' * 128,
            client="f" * 45,
            path='"' * observers.PATH_MAX_CHARS,
            model="m" * 127,
            endpoint="p" * 253,
            duration_s=1234567.123456,
            first_byte_s=1234567.123456,
            request_bytes=1 << 40,
            answer_bytes=1 << 40,
            prompt=longest,
        )
    )
    log.close()
    assert [len(text) <= select.PIPE_BUF for text in written] == [True]


def test_successful_requests_are_sampled():
    chances = iter([0.05, 0.2, 0.09])
    log = AccessLog(0.1, lambda data: None, lambda: next(chances))
    assert [log.wants(200, "whole") for _ in range(3)] == [True, False, True]
    assert log.wants(503, "whole")
    assert log.wants(200, "broken")
    assert log.wants(0, "left")
    log.close()


def test_lines_that_cannot_be_written_in_time_are_counted():
    taken, go, lines = threading.Event(), threading.Event(), Lines()

    def write(data: bytes) -> None:
        taken.set()
        go.wait(10)
        lines.write(data)

    log = AccessLog(1.0, write)
    log.add(line())
    assert taken.wait(10)
    for _ in range(observers.QUEUE_MAX_LINES + 7):
        log.add(line())
    go.set()
    while log._lines.full():
        pass
    log.add(line(request_id="last"))
    log.close()
    told = lines.read()
    assert len(told) == observers.QUEUE_MAX_LINES + 2
    assert (told[-1]["request_id"], told[-1]["dropped"]) == ("last", 7)


def test_a_full_disk_does_not_end_the_log():
    lines, failed = Lines(), threading.Event()

    def write(data: bytes) -> None:
        if not failed.is_set():
            failed.set()
            raise OSError("no space left")
        lines.write(data)

    log = AccessLog(1.0, write)
    log.add(line(request_id="lost"))
    assert failed.wait(10)
    log.add(line(request_id="kept"))
    log.close()
    assert [told["request_id"] for told in lines.read()] == ["kept"]


WRITER = """
import sys
from kubeai.gateway.access_log import AccessLog, Line
log = AccessLog(1.0)
for number in range(int(sys.argv[1])):
    log.add(Line("", sys.argv[2], "", "POST", "/" * 200, 200, "whole", 0.0, 0, number))
sys.stdin.read()
log.close()
"""


def writer(count: int, name: str, stdout: int) -> subprocess.Popen:
    """A process that logs ``count`` lines and exits when its standard input ends."""
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(count), name],
        stdin=subprocess.PIPE,
        stdout=stdout,
        env={key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"},
    )


@pytest.mark.parametrize("count", [1, 3])
def test_lines_are_flushed_before_the_process_exits(count):
    with writer(count, "a", subprocess.PIPE) as process:
        assert select.select([process.stdout], [], [], 20)[0], "nothing was written"
        told = [json.loads(process.stdout.readline()) for _ in range(count)]
        process.stdin.close()
    assert [each["answer_bytes"] for each in told] == list(range(count))


def test_workers_sharing_a_pipe_do_not_interleave_their_lines():
    """The kernel makes writes of up to PIPE_BUF bytes atomic."""
    out, into = os.pipe()
    processes = [writer(3000, name, into) for name in "abcd"]
    os.close(into)
    for process in processes:
        process.stdin.close()
    with open(out, "rb") as lines:
        told = [json.loads(line) for line in lines]
    for process in processes:
        assert process.wait(20) == 0
    for name in "abcd":
        numbers = [each["answer_bytes"] for each in told if each["request_id"] == name]
        assert numbers == list(range(3000))


# -- traces ----------------------------------------------------------------------------------------


@pytest.fixture
async def collector(monkeypatch):
    """An OTLP collector that records the spans it receives."""
    spans = []

    async def take(request: web.Request) -> web.Response:
        message = ExportTraceServiceRequest.FromString(await request.read())
        for resource in message.resource_spans:
            for scope in resource.scope_spans:
                spans.extend(scope.spans)
        return web.Response(content_type="application/x-protobuf")

    app = web.Application()
    app.router.add_post("/v1/traces", take)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    yield spans
    await runner.cleanup()


async def test_a_request_is_a_span_with_the_clients_parent_passed_on_to_the_engine(
    start, collector
):
    watching = Observers(None, tracing.make_tracing())
    got = []

    async def script(wire: Wire, request: Message) -> None:
        got.append(request)
        await wire.send(answer(200))

    world = await start(watching, script)
    wire = await world.client()
    await wire.send(
        post(CHAT, b'{"model":"m"}', f"traceparent: {PARENT}", "tracestate: a=b", "X-Request-Id: 7")
    )
    await wire.answer()
    await until(lambda: collector, "the collector has the span")
    (span,) = collector
    assert span.name == f"POST {CHAT}"
    assert span.trace_id.hex() == "0af7651916cd43dd8448eb211c80319c"
    assert span.parent_span_id.hex() == "b7ad6b7169203331"
    assert got[0].one("traceparent") == f"00-{span.trace_id.hex()}-{span.span_id.hex()}-01"
    assert got[0].one("tracestate") == "a=b"
    told = {a.key: a.value for a in span.attributes}
    assert told["http.response.status_code"].int_value == 200
    assert told["gen_ai.request.model"].string_value == "m"
    assert told["kubeai.endpoint"].string_value == "pod-1"
    assert told["kubeai.request_id"].string_value == "7"
    assert told["kubeai.first_byte_s"].double_value > 0
    await asyncio.to_thread(watching.close)


async def test_a_failure_is_a_span_with_error_status(start, collector):
    watching = Observers(None, tracing.make_tracing())
    world = await start(watching, says(b"", 503), retries=0)
    wire = await world.client()
    await wire.send(post(CHAT))
    await wire.answer()
    await until(lambda: collector, "the collector has the span")
    (span,) = collector
    assert span.status.code == span.status.STATUS_CODE_ERROR
    assert not span.parent_span_id
    await asyncio.to_thread(watching.close)


def test_traces_are_off_by_default(monkeypatch):
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    assert tracing.make_tracing() is None
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
    assert tracing.make_tracing() is None


def test_traces_without_opentelemetry_installed_are_a_clear_error(monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match=r"OTEL_EXPORTER_OTLP_ENDPOINT.*kubeai-gateway\[otel\]"):
        tracing.make_tracing()
