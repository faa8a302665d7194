"""Which web pages may use the API, and the headers that say so."""

import json

import pytest
import uvloop
from fakes.chats import CHAT, failing
from fakes.wire import CHUNKED, Message, Wire, answer, chunk, post, says, until

from kubeai.gateway.cors import CorsPolicy
from kubeai.gateway.local_routes import make_app

LOOP_FACTORIES = {"uvloop": uvloop.new_event_loop}  # the event loop of the workers
PAGE = "https://chat.example.com"
ORIGIN = f"Origin: {PAGE}"
ALLOW = "access-control-allow-origin"


def get(path: str, *headers: str, method: str = "GET") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: h", *headers, "", ""]).encode()


async def served(start, *origins: str, **config):
    world = await start(local_routes=make_app, cors_origins=origins, **config)
    world.context.ready = True
    return world, await world.client()


@pytest.mark.parametrize(
    ("allowed", "origin", "is_allowed"),
    [
        ("https://a.example", "https://a.example", True),
        ("https://a.example", "HTTPS://A.example", True),
        ("https://a.example", "http://a.example", False),
        ("https://a.example", "https://a.example:8443", False),
        ("https://a.example", "https://a.example.evil.example", False),
        ("https://a.example:8443", "https://a.example:8443", True),
        ("http://localhost:*", "http://localhost:3000", True),
        ("http://localhost:*", "http://localhost", True),
        ("http://localhost:*", "http://localhost.evil.example:3000", False),
        ("http://localhost:*", "http://localhost:3000.evil.example", False),
        ("http://localhost:*", "null", False),
        ("http://[::1]:*", "http://[::1]:3000", True),
        ("*", "https://anything.example", True),
        ("*", "null", True),
    ],
)
def test_an_origin_is_compared_by_scheme_host_and_port(allowed, origin, is_allowed):
    assert CorsPolicy((allowed,)).allows(origin) is is_allowed


async def test_without_origins_in_the_config_nothing_is_added_or_removed(start):
    world, wire = await served(start)

    async def script(wire: Wire, request: Message) -> None:
        await wire.send(answer(200, b"", "Access-Control-Allow-Origin: *"))

    engine = await world.engine(script)
    world.route("m", {"a": engine})
    await wire.send(post(CHAT, b'{"model":"m"}', ORIGIN))
    assert (await wire.answer()).one(ALLOW) == "*"
    assert engine.requests[0].one("origin") == PAGE
    await wire.send(get("/v1/models", ORIGIN))
    answered = await wire.answer()
    assert (answered.one(ALLOW), answered.one("vary")) == (None, None)


async def test_responses_of_engines_and_of_the_gateway_have_the_headers(start):
    world, wire = await served(start, PAGE, body_max_bytes=100)
    world.route("m", {"a": await world.engine(says(b"{}"))})
    world.route("bad", {"a": await world.engine(failing(400))})
    too_long = post(CHAT, b'{"model":"m"}' + b" " * 100, ORIGIN)
    for request, status in (
        (post(CHAT, b'{"model":"m"}', ORIGIN), 200),
        (post(CHAT, b'{"model":"bad"}', ORIGIN), 400),
        (post(CHAT, b'{"model":"none"}', ORIGIN), 404),
        (post(CHAT, b"{", ORIGIN), 400),
        (get("/v1/models", ORIGIN), 200),
        (get("/nowhere", ORIGIN), 404),
        (get("/healthz", ORIGIN), 200),
        (get(CHAT, ORIGIN), 405),
        (too_long, 413),
    ):
        await wire.send(request)
        answered = await wire.answer()
        assert answered.status == status
        assert answered.one(ALLOW) == PAGE
        assert answered.one("vary") == "Origin"
        exposed = answered.one("access-control-expose-headers").split(", ")
        assert {"X-Request-Id", "X-KubeAI-Waited", "X-KubeAI-Explain"} <= set(exposed)


async def test_a_stream_that_begins_while_it_is_held_has_the_headers(start):
    world, wire = await served(start, PAGE, hold_comment_after_s=0.01)
    world.route("m", {})
    await wire.send(post(CHAT, b'{"model":"m","stream":true}', ORIGIN))
    head = await wire.head()
    assert head.one(ALLOW) == PAGE

    async def script(wire: Wire, request: Message) -> None:
        await wire.send(CHUNKED + chunk(b"data: 1\n\n") + b"0\r\n\r\n")

    world.route("m", {"a": await world.engine(script)})
    assert (await wire.body(head)).body.endswith(b"data: 1\n\n")


async def test_other_origins_and_requests_without_one_only_learn_that_it_matters(start):
    world, wire = await served(start, PAGE)
    world.route("m", {"a": await world.engine(says(b""))})
    for headers in ((), ("Origin: https://evil.example",), (ORIGIN, ORIGIN)):
        await wire.send(post(CHAT, b'{"model":"m"}', *headers))
        answered = await wire.answer()
        assert (answered.status, answered.one("vary")) == (200, "Origin")
        assert not any(name.lower().startswith("access-control") for name, _ in answered.headers)


async def test_the_engines_own_policy_is_replaced(start):
    world, wire = await served(start, "*")

    async def script(wire: Wire, request: Message) -> None:
        theirs = ("access-control-allow-origin: http://localhost", "Vary: Accept")
        await wire.send(answer(200, b"", *theirs, "Access-Control-Allow-Credentials: true"))

    engine = await world.engine(script)
    world.route("m", {"a": engine})
    await wire.send(post(CHAT, b'{"model":"m"}', ORIGIN))
    answered = await wire.answer()
    assert answered.all(ALLOW) == ["*"]
    assert answered.all("access-control-allow-credentials") == []
    assert answered.all("vary") == ["Accept"]
    assert engine.requests[0].all("origin") == []


async def test_a_preflight_request_is_answered(start):
    world, wire = await served(start, PAGE)
    asks = (
        ORIGIN,
        "Access-Control-Request-Method: POST",
        "Access-Control-Request-Headers: authorization,content-type,x-kubeai-max-wait",
    )
    for path in (CHAT, "/v1/messages", "/v1/models"):
        await wire.send(get(path, *asks, method="OPTIONS"))
        answered = await wire.answer()
        assert (answered.status, answered.one(ALLOW)) == (204, PAGE)
        assert "POST" in answered.one("access-control-allow-methods")
        allowed = answered.one("access-control-allow-headers")
        assert allowed == "authorization,content-type,x-kubeai-max-wait"
        assert int(answered.one("access-control-max-age")) > 0
    long = "Access-Control-Request-Headers: " + ",".join(["x-header"] * 1000)
    await wire.send(get(CHAT, *asks[:2], long, method="OPTIONS"))
    assert (await wire.answer()).one("access-control-allow-headers") is None
    await wire.send(get(CHAT, "Origin: https://evil.example", *asks[1:], method="OPTIONS"))
    assert (await wire.answer()).one("access-control-allow-methods") is None
    assert world.server.relay.exchanges == 0


async def test_each_request_on_a_connection_has_the_headers_of_its_own_origin(start):
    _, wire = await served(start, PAGE, "http://localhost:*")
    for origin in (PAGE, "http://localhost:3000", None, PAGE):
        await wire.send(get("/v1/models", *([f"Origin: {origin}"] if origin else [])))
        assert (await wire.answer()).one(ALLOW) == origin
    await wire.send(b"GET /v1/models HTTP/1.1\r\nno colon\r\n\r\n")
    assert (await wire.answer()).one(ALLOW) is None  # the head was not read


async def test_the_console_has_no_headers_and_sees_the_origin(start):
    seen = []

    def app(context):
        made = make_app(context)

        async def note(request, response):
            seen.append((request.path, request.headers.get("Origin")))

        made.on_response_prepare.append(note)
        return made

    world = await start(local_routes=app, cors_origins=("*",))
    wire = await world.client()
    for path in ("/ui/", "/ui", "/ui?x", "/ui/api/state", "http://h/ui/", "/uikit"):
        await wire.send(get(path, ORIGIN))
        answered = await wire.answer()
        is_console = path != "/uikit"
        assert answered.one(ALLOW) == (None if is_console else "*")
        assert seen[-1][1] == (PAGE if is_console else None)


async def test_an_upload_has_the_headers(start):
    world, wire = await served(start, "*", hold_timeout_s=0.01)
    world.route("m", {})
    form = b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\nm\r\n--x--\r\n'
    kind = "Content-Type: multipart/form-data; boundary=x"
    await wire.send(post("/v1/audio/transcriptions", form, kind, ORIGIN))
    answered = await wire.answer()
    assert (answered.status, answered.one(ALLOW)) == (504, "*")
    assert json.loads(answered.body)["error"]["code"] == "timeout"
    await until(lambda: world.server.relay.exchanges == 0)
