"""API keys of clients: which requests have one, and what engines get of it."""

import gzip
import json
import time

import pytest
from fakes.api_keys import ALICE, BOB, ask, bearer, change, error, get, give, keyed, record
from fakes.wire import Message, Wire, answer, says
from structlog.testing import capture_logs

from kubeai.api.config.system import KeysConfig
from kubeai.gateway.event_counts import EventCounter
from kubeai.gateway.keys import FAILING_ADDRESSES_MAX_COUNT, FailureLimit, Keys, check_credential
from kubeai.gateway.local_routes import make_app
from kubeai.openai.errors import BadRequest
from kubeai.openai.request import LARGE_BYTES
from kubeai.routing.keys import KeyDelta, KeySnapshot


@pytest.fixture
async def world(start):
    world = await keyed(start, record("alice", ALICE), record("bob", BOB))
    world.route("m", {"pod-1": await world.engine(says(b"served"))})
    return world


def sent(world) -> list[Message]:
    return [request for engine in world.engines.values() for request in engine.requests]


# -- where a key may be --------------------------------------------------------------------------


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


# -- routes that need none -----------------------------------------------------------------------


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


# -- models --------------------------------------------------------------------------------------


@pytest.fixture
async def teams(start):
    world = await keyed(
        start,
        record("all", ALICE),
        record("a", BOB, models="team in (a)"),
    )
    for team in ("a", "b"):
        endpoints = {f"{team}-1": (await world.engine(says(team.encode())), ["ad"])}
        labels = {"team": team, "x": "1"}
        world.route(team, endpoints, labels=labels, adapters=("ad",), engine="OLlama")
    return world


async def test_a_key_uses_only_the_models_that_its_selector_selects(teams):
    wire = await teams.client()

    async def status(key: str, model: str, *headers: str, path="/v1/chat/completions") -> int:
        body = json.dumps({"model": model}).encode()
        return (await ask(wire, bearer(key), *headers, path=path, body=body)).status

    assert [await status(ALICE, model) for model in ("a", "b", "b_ad", "c")] == [200, 200, 200, 404]
    assert [await status(BOB, model) for model in ("a", "a_ad", "a_no")] == [200, 200, 404]
    assert [await status(BOB, model) for model in ("b", "b_ad", "b_no", "c", "")] == [403] * 4 + [
        400
    ]
    assert await status(BOB, "b", "X-Label-Selector: team=b") == 403
    assert await status(BOB, "a", "X-Label-Selector: team=b") == 404
    assert await status(BOB, "a", "X-Label-Selector: x=1") == 200
    assert await status(BOB, "b", path="/api/chat") == 403
    assert await status(BOB, "b:latest", path="/api/chat") == 403
    assert await status(BOB, "a:latest", path="/api/chat") == 200


async def test_a_model_that_is_not_allowed_and_a_missing_one_look_the_same(teams):
    wire = await teams.client()

    async def seen(model: str) -> str:
        response = await ask(wire, bearer(BOB), body=json.dumps({"model": model}).encode())
        assert error(response)["code"] == "model_not_allowed"
        return str(error(response)).replace(model, "?")

    assert await seen("b") == await seen("z")
    assert sum(teams.outcomes("b").values()) == 0


async def test_lists_show_what_the_key_may_use(teams):
    wire = await teams.client()

    async def ids(key: str, path: str, *headers: str) -> list[str]:
        shown = json.loads((await get(wire, path, bearer(key), *headers)).body)
        return [each.get("id") or each["name"] for each in shown.get("data") or shown["models"]]

    path = "/openai/v1/models?feature="
    assert await ids(ALICE, "/api/tags") == ["a:latest", "b:latest"]
    for path in ("/api/tags", "/api/ps"):
        assert await ids(BOB, path) == ["a:latest"]
        assert await ids(BOB, path, "X-Label-Selector: team=b") == []
    assert await ids(ALICE, "/v1/models") == ["a", "a_ad", "b", "b_ad"]
    assert await ids(BOB, "/v1/models") == ["a", "a_ad"]


async def test_one_model_is_shown_only_to_keys_that_may_use_it(teams):
    wire = await teams.client()

    async def status(key: str, model: str) -> tuple[int, int]:
        one = await get(wire, f"/v1/models/{model}", bearer(key))
        body = json.dumps({"model": model}).encode()
        return one.status, (await ask(wire, bearer(key), path="/api/show", body=body)).status

    assert await status(ALICE, "b") == (200, 200)
    assert await status(ALICE, "z") == (404, 404)
    assert await status(BOB, "a") == (200, 200)
    assert await status(BOB, "b") == (403, 403)
    assert await status(BOB, "z") == (403, 403)


async def test_changed_labels_and_a_changed_selector_apply_to_the_next_request(teams):
    wire = await teams.client()
    b = b'{"model":"b"}'
    assert (await ask(wire, bearer(BOB), body=b)).status == 403
    engine = next(iter(teams.engines.values()))
    teams.route("b", {"b-1": engine}, labels={"team": "a"})
    assert (await ask(wire, bearer(BOB), body=b)).status == 200
    change(teams, "a", record("a", BOB, models="team=c"))
    assert (await ask(wire, bearer(BOB), body=b)).status == 403


# -- stored responses ----------------------------------------------------------------------------


def stored_by(request: Message) -> str:
    return json.loads(request.body)["request_id"]


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (b'{"model":"m","input":"x"}', ()),
        (b' {"model":"m","request_id":"resp_mine"}\r\n ', ()),
        (b'{"request\\u005fid":"resp_mine","model":"m"}', ()),
        (gzip.compress(b'{"model":"m"}'), ("Content-Encoding: gzip",)),
        (b'{"model":"m","input":"%s"}' % (b"x" * 70_000), ()),
    ],
    ids=["plain", "own ID", "escaped", "gzip", "large"],
)
async def test_the_gateway_gives_a_stored_response_an_id_of_the_tenant(world, body, headers):
    wire = await world.client()
    for key in (ALICE, BOB, ALICE):
        response = await ask(wire, bearer(key), *headers, path="/v1/responses", body=body)
        assert response.status == 200
    first, other, second = map(stored_by, sent(world))
    assert first[:21] == second[:21] != other[:21]
    assert len({first, other, second}) == 3
    assert all(request.all("content-encoding") == [] for request in sent(world))


async def test_a_stored_response_belongs_to_the_tenant_that_made_it(start):
    tenants = record("alice", ALICE, tenant="t"), record("carol", "sk-c", tenant="t")
    world = await keyed(start, *tenants, record("bob", BOB))
    world.route("m", {"pod-1": await world.engine(says(b'{"id":"it"}'))})
    wire = await world.client()
    await ask(wire, bearer(ALICE), path="/v1/responses")
    (made,) = sent(world)
    response_id = stored_by(made)

    async def statuses(key: str, response_id: str) -> list[int]:
        path = f"/v1/responses/{response_id}"
        follow = json.dumps({"model": "m", "previous_response_id": response_id}).encode()
        return [
            (await get(wire, path, bearer(key))).status,
            (await ask(wire, bearer(key), path=f"{path}/cancel", body=b"")).status,
            (await ask(wire, bearer(key), path="/v1/responses", body=follow)).status,
        ]

    assert await statuses(ALICE, response_id) == [200, 200, 200]
    assert await statuses("sk-c", response_id) == [200, 200, 200]
    before = len(sent(world))
    assert await statuses(BOB, response_id) == [404, 404, 404]
    assert await statuses(ALICE, "resp_0123456789abcdef") == [404, 404, 404]
    assert len(sent(world)) == before
    twice = b'{"model":"m","previous_response_id":"%s","previous_response_id":"%s"}' % (
        b"resp_x",
        response_id.encode(),
    )
    assert (await ask(wire, bearer(BOB), path="/v1/responses", body=twice)).status == 404
    escaped = b'{"model":"m","previous_response_\\u0069d":"%b"}' % response_id.encode()
    assert (await ask(wire, bearer(BOB), path="/v1/responses", body=escaped)).status == 404
    large = escaped[:-1] + b',"input":"%b"}' % (b"x" * LARGE_BYTES)
    assert (await ask(wire, bearer(BOB), path="/v1/responses", body=large)).status == 404
    assert len(sent(world)) == before


# -- failures ------------------------------------------------------------------------------------


async def test_a_client_with_many_wrong_keys_gets_429_and_a_valid_key_passes(start):
    config = KeysConfig(required=True, failures_per_minute=3)
    world = await keyed(start, record("alice", ALICE), keys=config)
    world.route("m", {"pod-1": await world.engine(says(b"served"))})
    wire = await world.client()
    statuses = [(await ask(wire, bearer(f"wrong-{n}"))).status for n in range(4)]
    assert statuses == [401, 401, 401, 429]
    assert await wire.ended() is False
    wire = await world.client()
    assert [(await ask(wire)).status for _ in range(5)] == [401] * 5  # no key: nothing is guessed
    assert (await ask(wire, bearer(ALICE))).status == 200
    response = await ask(wire, bearer("wrong"))
    assert (response.status, error(response)["code"]) == (429, "rate_limit_exceeded")
    assert 1 <= int(response.one("retry-after")) <= 20
    assert response.one("connection") == "close"


def test_failures_are_limited_by_address_and_recover():
    now = [0.0]
    limit = FailureLimit(2, lambda: now[0])
    assert [limit.take("192.0.2.1") for _ in range(3)] == [0, 0, 30]
    assert limit.take("192.0.2.2") == 0
    now[0] = 29.0
    assert limit.take("192.0.2.1") == pytest.approx(1)
    now[0] = 30.0
    assert limit.take("192.0.2.1") == 0
    assert limit.take("192.0.2.1") > 0
    now[0] = 1e6
    assert [limit.take("192.0.2.1") for _ in range(3)] == [0, 0, 30]


def test_an_ipv6_client_has_one_limit_for_its_network():
    limit = FailureLimit(1, lambda: 0.0)
    assert limit.take("2001:db8::1") == 0
    assert limit.take("2001:db8::ffff:1") > 0
    assert limit.take("2001:db8:0:1::1") == 0
    assert limit.take("::ffff:192.0.2.1") == 0
    assert limit.take("192.0.2.1") > 0
    assert limit.take("not::an::address") == 0


def test_the_number_of_remembered_addresses_is_limited():
    limit = FailureLimit(1, lambda: 0.0)
    for n in range(FAILING_ADDRESSES_MAX_COUNT + 100):
        limit.take(f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}")
    assert len(limit) == FAILING_ADDRESSES_MAX_COUNT
    assert limit.take("10.0.0.0") == 0  # forgotten


def test_no_limit_remembers_nobody():
    limit = FailureLimit(0, lambda: 0.0)
    assert {limit.take("192.0.2.1") for _ in range(1000)} == {0.0}
    assert len(limit) == 0


# -- logs ----------------------------------------------------------------------------------------


async def test_every_denial_is_logged_without_the_key(teams):
    wire = await teams.client()
    with capture_logs() as logs:
        await ask(wire, bearer("sk-wrong"), path=f"/v1/chat/completions?api_key={ALICE}")
        await ask(wire, "X-Request-Id: r-1")
        await ask(wire, bearer(BOB), body=b'{"model":"b"}')
        await get(wire, "/v1/models/b?x=1", bearer(BOB))
    denied = [line for line in logs if line["event"] == "request denied"]
    assert [(line["status"], line["code"], line["key"]) for line in denied] == [
        (401, "invalid_api_key", None),
        (401, "invalid_api_key", None),
        (403, "model_not_allowed", "a"),
        (403, "model_not_allowed", "a"),
    ]
    assert denied[1]["request_id"] == "r-1"
    assert {line["client"] for line in denied} == {"127.0.0.1"}
    assert denied[3]["path"] == "/v1/models/b"
    assert not any(secret in str(logs) for secret in (ALICE, BOB, "sk-wrong"))


async def test_a_flood_of_denials_is_sampled_and_the_others_are_counted(world):
    wire = await world.client()
    with capture_logs() as logs:
        for _ in range(300):
            assert (await ask(wire)).status == 401
    lines = [line for line in logs if line["event"] == "request denied"]
    assert 100 <= len(lines) < 300
    assert all(line["suppressed"] == 0 for line in lines[:100])
    assert world.context.events._counts["denial", ("invalid_api_key",)] == 300


# -- the table -----------------------------------------------------------------------------------


def keys() -> Keys:
    table = Keys({}, 0, EventCounter())
    table.apply(KeySnapshot(1, (record("a", "ka"), record("b", "kb", models="x"))))
    return table


def test_a_snapshot_replaces_all_keys():
    table = keys()
    a, b = table.by_name["a"], table.by_name["b"]
    assert table.apply(KeySnapshot(2, (record("a", "ka", priority=3), record("c", "kc"))))
    assert table.by_name["a"] is a
    assert (a.priority, a.is_revoked, b.is_revoked) == (3, False, True)
    assert set(table.by_digest.values()) == set(table.by_name.values())
    assert set(table.by_name) == {"a", "c"}
    assert not table.apply(KeySnapshot(2, (record("a", "ka"), record("c", "kc"))))


def test_changed_limits_change_the_key_that_requests_have():
    table = keys()
    b = table.by_name["b"]
    changed = record("b", "kb", tenant="t", tokens_per_minute=5, is_admin=True)
    assert not table.apply(KeyDelta(2, "b", changed))
    assert table.by_name["b"] is b
    assert (b.tenant, b.tokens_per_minute, b.is_admin, b.restricted) == ("t", 5, True, False)


def test_another_digest_revokes_the_key_and_another_row_replaces_it():
    table = keys()
    a, b = table.by_name["a"], table.by_name["b"]
    assert table.apply(KeyDelta(2, "a", record("a", "new")))
    assert not table.apply(KeyDelta(3, "b", record("b", "kb", row=7)))
    assert table.apply(KeyDelta(4, "a", None))
    assert not table.apply(KeyDelta(5, "a", None))
    assert (a.is_revoked, b.is_revoked, table.by_name["b"].row) == (True, False, 7)
    assert set(table.by_digest.values()) == {table.by_name["b"]}


def test_a_key_that_moves_to_another_secret_stays_usable():
    table = keys()
    table.apply(KeyDelta(2, "z", record("z", "ka")))
    table.apply(KeyDelta(3, "a", None))
    assert table.by_digest[record("z", "ka").digest].name == "z"


def test_an_invalid_selector_selects_nothing():
    table = Keys({}, 0, EventCounter())
    table.apply(KeyDelta(1, "a", record("a", "ka", models="x in (")))
    key = table.by_name["a"]
    assert key.restricted
    assert not key.selects({"x": "1"})


async def test_a_credential_from_elsewhere_is_checked_and_counted():
    class Context:
        key_table = Keys({}, 1, EventCounter())

    context = Context()
    context.key_table.apply(KeyDelta(1, "a", record("a", "ka", is_admin=True)))
    context.key_table.apply(KeyDelta(2, "b", record("b", "kb")))
    with capture_logs() as logs:
        assert check_credential(context, b"ka", "192.0.2.1").name == "a"
        for status in (401, 429):
            with pytest.raises(BadRequest) as refused:
                check_credential(context, b"wrong", "192.0.2.1")
            assert refused.value.status == status
        with pytest.raises(BadRequest, match="The API key in the login is not valid"):
            check_credential(context, b"", "192.0.2.2")
        assert check_credential(context, b"ka", "192.0.2.1").name == "a"
        with pytest.raises(BadRequest, match="administrator"):
            check_credential(context, b"kb", "192.0.2.3")
    assert [line["path"] for line in logs] == ["/ui/login"] * 4
    assert (logs[-1]["code"], logs[-1]["key"]) == ("admin_required", "b")
    assert len(context.key_table.failures) == 2  # a valid key is no failure of its address


async def test_a_worker_without_its_keys_rejects_everything(start):
    world = await start(local_routes=make_app, keys=KeysConfig(required=True))
    assert (await ask(await world.client(), bearer(ALICE))).status == 401
    give(world, record("alice", ALICE))
    assert (await ask(await world.client(), bearer(ALICE))).status == 404


async def test_a_process_without_keys_of_its_own_acknowledges_their_changes(start):
    world = await start()
    change(world, "alice", record("alice", ALICE))
    assert world.context.key_table is None
    assert world.supervisors.acknowledged(0) == world.publisher.version == 1
