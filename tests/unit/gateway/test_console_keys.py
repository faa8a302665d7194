"""The console where keys are required: administrators may come from anywhere."""

import asyncio
import json

import pytest
from aiohttp import web
from fakes.api_keys import ask, bearer, change, error, get, keyed, record
from fakes.wire import says

from kubeai.api.config.system import ConsoleConfig

ADMIN, USER = "sk-admin", "sk-user"
KEYS = record("admin", ADMIN, is_admin=True), record("user", USER)
FORWARDED = "X-Forwarded-For: 192.0.2.1"


class Supervisor:
    """Serves everything on a Unix socket."""

    def __init__(self, path):
        self.path = str(path)
        self.requests = []
        self.holds = False  # its responses do not end

    async def say(self, request):
        self.requests.append(request)
        if self.holds:
            response = web.StreamResponse()
            await response.prepare(request)
            await response.write(b"data: 1\n\n")
            await asyncio.Event().wait()
        return web.json_response({})


@pytest.fixture
async def supervisor(tmp_path):
    supervisor = Supervisor(tmp_path / "console")
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", supervisor.say)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    await web.UnixSite(runner, supervisor.path).start()
    yield supervisor
    await runner.cleanup()


@pytest.fixture
async def world(start, supervisor):
    ui = ConsoleConfig(hosts=("gateway",))
    world = await keyed(start, *KEYS, console_path=supervisor.path, ui=ui)
    endpoints = {"pod-1": await world.engine(says(b"served"))}
    world.route("m", endpoints, features=("TextGeneration",))
    return world


def cookie(key: str) -> str:
    return f"Cookie: theme=dark; kubeai_key={key}"


@pytest.mark.parametrize("header", [bearer(ADMIN), f"x-api-key: {ADMIN}", cookie(ADMIN)])
async def test_an_admin_is_served_from_anywhere_and_the_key_is_not_passed_on(
    world, supervisor, header
):
    response = await get(await world.client(), "/ui/api/state", FORWARDED, header)
    assert response.status == 200
    (request,) = supervisor.requests
    assert ADMIN not in str(request.headers)
    if header.startswith("Cookie"):
        assert request.headers["Cookie"] == "theme=dark"


@pytest.mark.parametrize("header", [bearer(USER), cookie(USER)])
async def test_other_keys_are_403(world, supervisor, header):
    response = await get(await world.client(), "/ui/api/state", header)
    assert (response.status, error(response)["code"]) == (403, "admin_required")
    assert supervisor.requests == []


@pytest.mark.parametrize(
    "headers",
    [
        (),
        (cookie("wrong"),),
        (cookie(""),),
        (cookie(ADMIN), f"Cookie: kubeai_key={USER}"),
        (f"Cookie: KUBEAI_KEY={ADMIN}",),
        (f"Cookie: x=kubeai_key={ADMIN}",),
        (cookie(ADMIN), bearer("wrong")),
    ],
)
async def test_without_a_valid_key_it_is_401_also_on_this_machine(world, supervisor, headers):
    wire = await world.client()
    for path in ("/ui", "/ui/", "/ui/api/state", "/ui/static/app.js", "/ui/login"):
        response = await get(wire, path, *headers)
        assert (response.status, error(response)["code"]) == (401, "invalid_api_key")
    assert supervisor.requests == []


async def test_a_browser_must_know_the_console_by_its_name_and_a_program_need_not(
    world, supervisor
):
    wire, evil = await world.client(), "Host: evil.example"
    lines = "GET /ui/ HTTP/1.1", evil
    for header, status in ((cookie(ADMIN), 421), ("Accept: text/html", 421), (bearer(ADMIN), 200)):
        await wire.send(("\r\n".join((*lines, header)) + "\r\n\r\n").encode())
        assert (await wire.answer()).status == status
    form = "Content-Type: application/x-www-form-urlencoded"
    body = f"key={ADMIN}".encode()
    response = await ask(wire, form, path="/ui/login", body=body, host="evil.example")
    assert (response.status, response.all("set-cookie")) == (421, [])
    assert len(supervisor.requests) == 1


async def test_the_cookie_is_no_key_outside_the_console(world):
    wire = await world.client()
    for path in ("/v1/models", "/", "/uix", "/healthz/", "/openai/v1/models"):
        assert (await get(wire, path, cookie(ADMIN))).status == 401


async def test_pages_of_other_sites_may_not_use_the_cookie(world, supervisor):
    wire = await world.client()
    for origin in ("http://evil.example", "null", "http://gateway:81"):
        response = await ask(wire, f"Origin: {origin}", cookie(ADMIN), path="/ui/api/apply")
        assert (response.status, error(response)["code"]) == (403, "foreign_origin")
    assert supervisor.requests == []
    assert (
        await ask(wire, "Origin: http://gateway", cookie(ADMIN), path="/ui/api/apply")
    ).status == 200


async def test_a_browser_without_a_valid_key_gets_the_login_page(world, supervisor):
    wire, page = await world.client(), "Accept: text/html,*/*"
    for path in ("/", "/ui", "/ui/", "/ui/?x=1"):
        for headers in ((), (cookie("wrong"),)):
            response = await get(wire, path, page, *headers)
            assert (response.status, response.one("www-authenticate")) == (401, None)
            assert response.one("content-type").startswith("text/html")
            assert b"<form" in response.body
            # The browser sends the cookie below /ui only.
            assert (b"not valid" in response.body) is (bool(headers) and path != "/")
    response = await get(wire, "/ui/", page, cookie(USER))
    assert (response.status, b"administrator" in response.body) == (403, True)
    assert (await get(wire, "/v1/models", page)).one("content-type") == "application/json"
    assert supervisor.requests == []


async def test_a_login_needs_no_key_and_gives_the_cookie(world):
    wire, form = await world.client(), "Content-Type: application/x-www-form-urlencoded"
    response = await ask(wire, form, path="/ui/login", body=f"key={ADMIN}".encode())
    assert (response.status, response.one("location")) == (303, "/ui/")
    given = response.one("set-cookie").partition(";")[0]
    assert (await get(wire, "/ui/api/state", f"Cookie: {given}")).status == 200
    for key, status in (("wrong", 401), (USER, 403)):
        response = await ask(wire, form, path="/ui/login", body=f"key={key}".encode())
        assert (response.status, response.all("set-cookie")) == (status, [])
    evil = "Origin: http://evil.example"
    response = await ask(wire, form, evil, path="/ui/login", body=f"key={ADMIN}".encode())
    assert response.status == 403
    assert (await ask(wire, form, path="/ui/logout", body=b"")).status == 303
    assert (await ask(wire, form, path="/ui/login?x", body=f"key={ADMIN}".encode())).status == 401


async def test_an_admin_that_is_none_any_more_is_403(world):
    change(world, "admin", record("admin", ADMIN))
    assert (await get(await world.client(), "/ui/", bearer(ADMIN))).status == 403


@pytest.mark.parametrize("key", [record("admin", ADMIN), None], ids=["no admin", "revoked"])
async def test_the_consoles_events_end_when_the_key_loses_its_rights(world, supervisor, key):
    supervisor.holds = True
    wire = await world.client()
    await wire.send(
        f"GET /ui/api/events HTTP/1.1\r\nHost: gateway\r\n{bearer(ADMIN)}\r\n\r\n".encode()
    )
    assert (await wire.head()).status == 200
    change(world, "user", record("user", USER, priority=1))
    assert world.server.relay.exchanges == 1
    change(world, "admin", key)
    with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
        await wire.reader.readexactly(1000)


async def test_the_playground_uses_the_api_with_the_cookie(world):
    wire = await world.client()
    path = "/ui/openai/v1/chat/completions"
    ours, origin = "X-KubeAI-UI: 1", "Origin: http://gateway"
    response = await ask(wire, ours, origin, cookie(USER), path=path)
    assert response.body == b"served"
    (engine,) = world.engines.values()
    (request,) = engine.requests
    assert request.target == "/v1/chat/completions"
    assert USER not in str(request.headers)
    assert (await ask(wire, ours, path=path)).status == 401
    assert (await ask(wire, ours, cookie("wrong"), path=path)).status == 401
    assert (await ask(wire, ours, "Origin: http://evil", cookie(USER), path=path)).status == 403
    assert (await ask(wire, cookie(USER), path=path)).status == 403  # not from the console's page
    assert len(engine.requests) == 1
    models = await get(wire, "/ui/openai/v1/models", ours, cookie(USER))
    assert [item["id"] for item in json.loads(models.body)["data"]] == ["m"]


async def test_without_keys_the_playgrounds_path_is_the_consoles(start, supervisor):
    world = await start(console_path=supervisor.path)
    path = "/ui/openai/v1/chat/completions"
    response = await ask(await world.client(), "X-KubeAI-UI: 1", host="localhost", path=path)
    assert response.status == 200
    assert [request.path for request in supervisor.requests] == [path]


async def test_where_the_console_is_not_served_its_paths_need_a_key_like_all_others(start):
    world = await keyed(start, *KEYS)
    wire = await world.client()
    assert (await get(wire, "/ui/", cookie(ADMIN))).status == 401
    assert (await ask(wire, path="/ui/login")).status == 401
    assert (await get(wire, "/ui/", bearer(ADMIN))).status == 404
