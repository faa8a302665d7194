"""The console is relayed to the supervisor's socket, for clients on this machine only."""

import asyncio
import contextlib
import json

import pytest
from aiohttp import web
from fakes.wire import Wire, until

from kubeai.api.config.system import ConsoleConfig
from kubeai.gateway.console import check_client, is_console
from kubeai.gateway.local_routes import make_app
from kubeai.openai.errors import ErrorResponse


class Supervisor:
    """Serves what a test wants on a Unix socket."""

    def __init__(self, path):
        self.path = str(path)
        self.requests = []
        self.left = 0
        self.app = web.Application()
        self.app.router.add_get("/ui/api/events", self.events)
        self.app.router.add_route("*", "/ui{path:.*}", self.say)

    async def say(self, request):
        body = (await request.read()).decode()
        self.requests.append((request.method, request.raw_path, dict(request.headers), body))
        return web.json_response({"said": body}, headers={"X-Kept": "yes"})

    async def events(self, request):
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        try:
            for number in range(1_000_000):
                await response.write(b"data: %d\n\n" % number)
                await asyncio.sleep(0.001)
        finally:
            self.left += 1
        return response


@pytest.fixture
async def supervisor(tmp_path):
    supervisor = Supervisor(tmp_path / "console")
    runner = web.AppRunner(supervisor.app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    site = web.UnixSite(runner, supervisor.path)
    await site.start()
    yield supervisor
    await runner.cleanup()


def get(target="/ui/", *headers, method="GET", host="localhost", body=b""):
    lines = [f"{method} {target} HTTP/1.1", f"Host: {host}", *headers]
    if body:
        lines.append(f"Content-Length: {len(body)}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + body


async def ask(client: Wire, *args, **kwargs):
    await client.send(get(*args, **kwargs))
    return await client.answer(kwargs.get("method", "GET"))


async def test_requests_of_all_methods_are_relayed(start, supervisor):
    world = await start(console_path=supervisor.path)
    client = await world.client()
    assert (await ask(client, "/ui/?x=1")).status == 200
    answer = await ask(client, "/ui/api/apply", "X-KubeAI-UI: 1", method="POST", body=b"kind: x")
    assert json.loads(answer.body) == {"said": "kind: x"}
    assert answer.one("x-kept") == "yes"
    assert (await ask(client, "/ui/api/models/m", method="DELETE")).status == 200
    asked = [(method, path, body) for method, path, _, body in supervisor.requests]
    assert asked == [
        ("GET", "/ui/?x=1", ""),
        ("POST", "/ui/api/apply", "kind: x"),
        ("DELETE", "/ui/api/models/m", ""),
    ]
    assert supervisor.requests[1][2]["X-KubeAI-UI"] == "1"


async def test_a_stream_arrives_as_it_is_sent_and_ends_with_its_client(start, supervisor):
    world = await start(console_path=supervisor.path)
    client = await world.client()
    await client.send(get("/ui/api/events"))
    assert (await client.head()).status == 200
    await client.reader.readuntil(b"data: 5\n\n")
    client.close()
    await until(lambda: supervisor.left == 1, "the supervisor sees that the client has left")


async def test_the_root_leads_there(start, supervisor):
    world = await start(console_path=supervisor.path, local_routes=make_app)
    answer = await ask(await world.client(), "/")
    assert (answer.status, answer.one("location")) == (307, "/ui/")


async def test_nothing_is_there_while_it_is_not_enabled(start):
    world = await start(local_routes=make_app)
    client = await world.client()
    for path in ("/", "/ui", "/ui/", "/ui/api/state"):
        answer = await ask(client, path)
        assert (answer.status, b"Invalid URL" in answer.body) == (404, True)


@pytest.mark.parametrize("path", ["/ui2", "/UI/", "/uI", "/x/ui/", "/%75i/", "//ui/"])
async def test_other_paths_are_not_relayed(start, supervisor, path):
    world = await start(console_path=supervisor.path, local_routes=make_app)
    assert (await ask(await world.client(), path)).status == 404
    assert supervisor.requests == []


@pytest.mark.parametrize(
    ("headers", "host", "status", "code"),
    [
        ((), "evil.example", 421, "unknown_host"),
        ((), "localhost.evil.example:80", 421, "unknown_host"),
        ((), "127.0.0.1.evil.example", 421, "unknown_host"),
        (("Origin: http://evil.example",), "localhost", 403, "foreign_origin"),
        (("Origin: null",), "localhost", 403, "foreign_origin"),
        (("Origin: http://localhost:1",), "localhost:2", 403, "foreign_origin"),
        (("X-Forwarded-For: 192.0.2.1",), "localhost", 403, "not_loopback"),
        (("Forwarded: for=192.0.2.1",), "localhost", 403, "not_loopback"),
        (("Via: 1.1 proxy",), "localhost", 403, "not_loopback"),
    ],
)
async def test_other_sites_and_proxies_are_refused(start, supervisor, headers, host, status, code):
    world = await start(console_path=supervisor.path)
    answer = await ask(await world.client(), "/ui/api/state", *headers, host=host)
    assert answer.status == status
    assert json.loads(answer.body)["error"]["code"] == code
    assert supervisor.requests == []


@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
async def test_origins_that_may_use_the_api_may_not_use_the_console(start, supervisor, method):
    world = await start(console_path=supervisor.path, cors_origins=("*",))
    asks = ("Origin: http://localhost:1", "Access-Control-Request-Method: POST")
    answer = await ask(await world.client(), "/ui/api/apply", *asks, method=method)
    assert answer.status == 403
    assert supervisor.requests == []


@pytest.mark.parametrize(
    "host", ["localhost", "LocalHost:8000", "a.localhost", "127.0.0.1:80", "[::1]:80", "Box:80"]
)
async def test_this_machine_and_configured_hosts_are_served(start, supervisor, host):
    world = await start(console_path=supervisor.path, ui=ConsoleConfig(hosts=("box",)))
    answer = await ask(await world.client(), "/ui/", f"Origin: http://{host}", host=host)
    assert answer.status == 200


@pytest.mark.parametrize("peer", ["192.0.2.1", "::ffff:192.0.2.1", "fe80::1", "unknown", ""])
def test_only_loopback_addresses_are_served(peer):
    with pytest.raises(ErrorResponse, match="kubectl port-forward") as refused:
        check_client(peer, "localhost", [], forwarded=False)
    assert refused.value.status == 403
    for loopback in ("127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"):
        check_client(loopback, "localhost", [], forwarded=False)


def test_a_missing_host_is_refused():
    with pytest.raises(ErrorResponse) as refused:
        check_client("127.0.0.1", None, [], forwarded=False)
    assert refused.value.status == 421


def test_paths():
    assert all(map(is_console, ("/ui", "/ui/", "/ui?x", "/ui/api/x?y=/")))
    assert not any(map(is_console, ("/", "/uix", "/u", "ui/")))


async def test_a_dead_supervisor_is_a_502_in_json(start, tmp_path):
    world = await start(console_path=str(tmp_path / "nobody"))
    answer = await ask(await world.client(), "/ui/api/state")
    assert answer.status == 502
    assert "supervisor" in json.loads(answer.body)["error"]["message"]


async def test_a_supervisor_that_dies_ends_the_stream_without_an_end(start, tmp_path):
    async def serve(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_unix_server(serve, str(tmp_path / "dying")):
        world = await start(console_path=str(tmp_path / "dying"))
        client = await world.client()
        await client.send(get())
        assert (await client.head()).status == 200
        with contextlib.suppress(ConnectionError):
            assert b"0\r\n\r\n" not in await client.reader.read()


async def test_a_large_body_is_refused(start, supervisor):
    world = await start(console_path=supervisor.path)
    client = await world.client()
    await client.send(
        b"POST /ui/api/apply HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999999\r\n\r\n"
    )
    assert (await client.answer()).status == 413
    assert supervisor.requests == []
