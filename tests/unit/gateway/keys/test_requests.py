"""API keys of clients: which requests need one, and what engines get of it."""

import json
import time

import pytest
from fakes.api_keys import ALICE, BOB, ask, bearer, error, get, keyed, record, sent
from fakes.wire import Message, Wire, answer, says


@pytest.mark.parametrize(
    "header",
    [
        f"Authorization: Bearer {ALICE}",
        f"authorization: bearer {ALICE}",
        f"AUTHORIZATION:   BEARER    {ALICE}  ",
        f"Authorization: Bearer\t{ALICE}",
        f"x-api-key: {ALICE}",
        f"X-API-Key: {ALICE}",
        f"api-key: {ALICE}",
        f"Api-Key:{ALICE}",
    ],
)
async def test_each_header_is_accepted_and_no_engine_gets_it(world, header):
    wire = await world.client()
    assert (
        await ask(wire, "X-Kept: 1", header, "Proxy-Authorization: a", "Y: 2")
    ).body == b"served"
    (request,) = sent(world)
    assert ALICE not in str(request.headers)
    names = {name.lower() for name, _ in request.headers}
    assert names & {"authorization", "x-api-key", "api-key", "proxy-authorization"} == set()
    assert (request.one("x-kept"), request.one("y")) == ("1", "2")


@pytest.mark.parametrize(
    "headers",
    [
        (bearer(ALICE), f"x-api-key: {ALICE}"),
        (f"x-api-key: {ALICE}", f"x-api-key: {ALICE}", f"api-key: {ALICE}"),
        ("Authorization: Bearer", f"x-api-key: {ALICE}"),
        ("Authorization:", f"x-api-key: {ALICE}"),
        ("x-api-key:", f"api-key: {ALICE}", bearer("")),
        ("Authorization: Basic dXNlcjpwYXNz", f"x-api-key: {ALICE}"),
    ],
)
async def test_headers_without_a_key_or_with_the_same_one_do_not_matter(world, headers):
    assert (await ask(await world.client(), *headers)).body == b"served"
    (request,) = sent(world)
    assert "authorization" not in str(request.headers).lower()


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ((), "This API needs a key. Send it as 'Authorization: Bearer <key>'"),
        (("Authorization: ",), "This API needs a key"),
        ((bearer("sk-wrong"),), "The API key in Authorization is not valid."),
        (("x-api-key: sk-wrong",), "The API key in x-api-key is not valid."),
        (("api-key: sk-wrong",), "The API key in api-key is not valid."),
        (("Authorization: Basic dXNlcg==",), "Authorization is not of the form 'Bearer <key>'."),
        ((f"Authorization: {ALICE}",), "Authorization is not of the form 'Bearer <key>'."),
        ((f"Authorization: Bearer{ALICE}",), "Authorization is not of the form"),
        ((bearer(f"{ALICE}, Bearer {ALICE}"),), "The API key in Authorization is not valid."),
        (
            (bearer(ALICE), f"x-api-key: {BOB}"),
            "Authorization and x-api-key have different API keys.",
        ),
        ((f"x-api-key: {ALICE}", "api-key: x"), "x-api-key and api-key have different API keys."),
        (
            (bearer(ALICE), bearer(BOB)),
            "Authorization is given several times, with different API keys.",
        ),
    ],
)
async def test_without_one_valid_key_the_request_is_401(world, headers, message):
    response = await ask(await world.client(), *headers)
    assert response.status == 401
    assert response.one("www-authenticate") == "Bearer"
    assert error(response)["code"] == "invalid_api_key"
    assert message in error(response)["message"]
    assert ALICE not in response.body.decode()
    assert sent(world) == []
    assert sum(world.outcomes("m").values()) == 0


@pytest.mark.parametrize(
    ("path", "shape"),
    [
        ("/v1/messages", {"type": "error", "error": {"type": "authentication_error"}}),
        ("/api/chat", {"error": str}),
        ("/v1/chat/completions", {"error": {"code": "invalid_api_key", "param": None}}),
    ],
)
async def test_the_error_has_the_format_of_the_api(world, path, shape):
    body = json.loads((await ask(await world.client(), path=path)).body)
    if shape["error"] is str:
        assert isinstance(body["error"], str)
        return
    assert {**body, **shape, "error": {**body["error"], **shape["error"]}} == body


async def test_the_request_is_rejected_before_its_body_is_read(world):
    wire = await world.client()
    await wire.send(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: h\r\nContent-Length: 1000\r\n"
        b"Expect: 100-continue\r\n\r\n"
    )
    response = await wire.answer()
    assert (response.status, response.one("connection")) == (401, "close")
    assert await wire.ended() is False


async def test_a_connection_serves_requests_with_different_keys_and_none(world):
    wire = await world.client()
    for headers, status in [((bearer(ALICE),), 200), ((), 401), ((bearer(BOB),), 200)]:
        response = await ask(wire, *headers)
        assert (response.status, response.one("connection")) == (status, None)


async def test_an_expired_key_is_401_and_says_so(start):
    now = time.time()
    keys = record("old", ALICE, expires_s=now - 1), record("new", BOB, expires_s=now + 1000)
    world = await keyed(start, *keys)
    world.route("m", {"pod-1": await world.engine(says(b"served"))})
    wire = await world.client()
    response = await ask(wire, f"api-key: {ALICE}")
    assert response.status == 401
    assert error(response)["message"] == "The API key in api-key has expired."
    assert (await ask(wire, bearer(BOB))).status == 200


async def test_without_required_keys_the_headers_reach_engines(start):
    world = await start()
    world.route("m", {"pod-1": await world.engine(says(b"served"))})
    headers = bearer("engine's own"), "x-api-key: a", "api-key: b", "Cookie: kubeai_key=c"
    assert (await ask(await world.client(), *headers)).status == 200
    (request,) = sent(world)
    assert request.one("authorization") == "Bearer engine's own"
    assert (request.one("x-api-key"), request.one("api-key")) == ("a", "b")
    assert request.one("cookie") == "kubeai_key=c"


async def test_a_retry_and_an_upload_carry_no_key_either(start):
    world = await keyed(start, record("alice", ALICE))
    form = (
        b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nm\r\n'
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nx\r\n--b--\r\n'
    )

    async def failing(wire: Wire, request: Message) -> None:
        await wire.send(answer(503))

    endpoints = {"a": await world.engine(failing), "b": await world.engine(says(b"served"))}
    world.route("m", endpoints, engine="FasterWhisper")
    wire = await world.client()
    for _ in range(4):
        assert (await ask(wire, bearer(ALICE), f"api-key: {ALICE}")).body == b"served"
        multipart = "Content-Type: multipart/form-data; boundary=b"
        path = "/v1/audio/transcriptions"
        response = await ask(wire, multipart, f"x-api-key: {ALICE}", path=path, body=form)
        assert response.body == b"served"
    assert len(sent(world)) > 8
    assert all(ALICE not in str(request.headers) for request in sent(world))


async def test_the_logins_cookie_reaches_no_engine_and_is_no_key_there(world):
    wire = await world.client()
    assert (await ask(wire, f"Cookie: kubeai_key={ALICE}")).status == 401
    cookies = f"Cookie: a=1; kubeai_key={BOB}; b=2", "Cookie: c=3"
    assert (await ask(wire, bearer(ALICE), *cookies)).status == 200
    (request,) = sent(world)
    assert request.all("cookie") == ["a=1; b=2; c=3"]


async def test_responses_are_not_compressed_so_that_tokens_can_be_counted(world):
    await ask(await world.client(), bearer(ALICE), "Accept-Encoding: gzip")
    (request,) = sent(world)
    assert request.all("accept-encoding") == []


async def test_health_needs_no_key(world):
    world.context.ready = True
    wire = await world.client()
    for path in ("/healthz", "/readyz", "/healthz?x=1"):
        for headers in ((), (bearer("wrong"),)):
            assert (await get(wire, path, *headers)).status == 200
    assert (await get(wire, "/%68ealthz")).status == 401
    assert (await get(wire, "/healthz/")).status == 401
    assert (await ask(wire, path="/healthz")).status == 401


async def test_a_preflight_needs_no_key_and_the_401_can_be_read_by_the_page(start):
    world = await keyed(start, record("alice", ALICE), cors_origins=("https://app.example",))
    wire = await world.client()
    origin, asks = "Origin: https://app.example", "Access-Control-Request-Method: POST"
    wants = "Access-Control-Request-Headers: authorization"
    preflight = await get(wire, "/v1/chat/completions", origin, asks, wants, method="OPTIONS")
    assert preflight.status == 204
    assert preflight.one("access-control-allow-headers") == "authorization"
    response = await ask(wire, origin)
    assert response.status == 401
    assert response.one("access-control-allow-origin") == "https://app.example"
    assert (await get(wire, "/v1/chat/completions", origin, method="OPTIONS")).status == 401
