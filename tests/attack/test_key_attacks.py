"""Attacks on a gateway that requires API keys: none reaches an engine or another's data."""

import asyncio
import contextlib
import json
import os
import re
import time
from pathlib import Path
from statistics import median

import pytest
from fakes.api_keys import ALICE, BOB, CHAT, ask, bearer, change, error, get, keyed, record
from fakes.wire import Broken, Message, Wire, post, says, until
from structlog.testing import capture_logs

from kubeai._keys import Key
from kubeai.api.config.system import KeysConfig
from kubeai.gateway._credentials import Problem, check
from kubeai.gateway.access_log import AccessLog, Observers
from kubeai.gateway.keys import FailureLimit
from kubeai.openai.routes import Kind, route_table

TEAM_A = record("a", BOB, models="team=a")


@pytest.fixture
async def world(start):
    return await attacked(start)


async def attacked(start, **config):
    """A World with Models of two teams, that fails a test when its engines are reached."""
    world = await keyed(start, record("alice", ALICE), TEAM_A, **config)
    for team in ("a", "b"):
        engine = await world.engine(says(b"served"))
        world.route(team, {f"{team}-1": engine}, labels={"team": team}, engine="OLlama")
    return world


def reached(world) -> int:
    return sum(len(engine.requests) for engine in world.engines.values())


# -- routes --------------------------------------------------------------------------------------

LISTED = sorted(route_table)
WITH_IDS = [
    "/v1/models/a",
    "/openai/v1/models/a",
    "/v1/responses/resp_0123456789abcdef",
    "/openai/v1/responses/resp_0123456789abcdef/cancel",
]
UNLISTED = [
    *("/", "/v1", "/v1/", "/metrics", "/ui", "/ui/", "/ui/api/state", "/ui/login", "/favicon.ico"),
    *("//healthz", "/healthz/", "/healthz/x", "/HEALTHZ", "/%68ealthz", "/./healthz", "/readyz;x"),
    *("/healthz%3fx", "/healthz/../v1/models", "/v1/models/../../healthz", "/api/pull"),
    *("/v1/chat/completions/", "//v1/chat/completions", "/openai//v1/models", "/v1/%6dodels"),
    *("/openapi.json", "/openapi.json?x", "/openai/openapi.json", "//openapi.json"),
    *("*", "http://x/v1/models", "http://x/ui/", "http:///healthz/x", "/v1/models?/healthz"),
]
METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND"]


@pytest.mark.parametrize("headers", [(), ("Upgrade: websocket", "Connection: Upgrade")])
async def test_every_route_listed_or_not_is_401_without_a_key(world, headers):
    wire = await world.client()
    for path in LISTED + WITH_IDS + UNLISTED:
        for method in METHODS:
            response = await get(wire, path, *headers, method=method)
            assert response.status == 401, (method, path)
    assert reached(world) == 0
    assert sum(sum(world.outcomes(model).values()) for model in "ab") == 0


async def test_what_needs_no_key_shows_nothing_and_starts_nothing(world):
    wire = await world.client()
    for path in ("/healthz", "/readyz", "http://x/healthz", "/healthz?/v1/models"):
        response = await get(wire, path, "X-KubeAI-Key: alice", "X-KubeAI-Denied: 200 x")
        assert response.status in (200, 503)
        assert b"team" not in response.body
    for path in LISTED:
        asks = "Access-Control-Request-Method: POST"
        response = await get(wire, path, asks, "X-KubeAI-Key: alice", method="OPTIONS")
        assert (response.status, response.body) == (204, b"")
    assert reached(world) == 0


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/b", "/api/tags"])
async def test_the_name_of_a_key_is_no_key(world, path):
    wire = await world.client()
    internal = "X-KubeAI-Key: alice", "X-Kubeai-Key: alice"
    assert (await get(wire, path, *internal)).status == 401
    response = await get(wire, path, *internal, bearer(BOB))
    assert response.status == (403 if path.endswith("/b") else 200)
    assert b'"b' not in response.body


# -- keys in other places, and tricks with headers -----------------------------------------------

PLACES = {
    "query": (CHAT + f"?api_key={ALICE}&api-key={ALICE}&key={ALICE}&access_token={ALICE}", ()),
    "user info": (f"http://user:{ALICE}@gateway{CHAT}", ()),
    "basic": (CHAT, (f"Authorization: Basic {ALICE}",)),
    "token": (CHAT, (f"Authorization: Token {ALICE}",)),
    "no scheme": (CHAT, (f"Authorization: {ALICE}",)),
    "quoted": (CHAT, (f'Authorization: Bearer "{ALICE}"',)),
    "list": (CHAT, (f"Authorization: Bearer {ALICE},Bearer {ALICE}",)),
    "proxy": (CHAT, (f"Proxy-Authorization: Bearer {ALICE}",)),
    "underscore": (CHAT, (f"x_api_key: {ALICE}", f"api_key: {ALICE}")),
    "like": (CHAT, (f"x-api-keys: {ALICE}", f"xx-api-key: {ALICE}", f"Authorizatio: {ALICE}")),
    "goog": (CHAT, (f"x-goog-api-key: {ALICE}",)),
    "cookie": (CHAT, (f"Cookie: kubeai_key={ALICE}; api-key={ALICE}",)),
    "forwarded": (CHAT, (f"X-Forwarded-Authorization: Bearer {ALICE}",)),
    "hop by hop": (CHAT, (bearer(ALICE), "Connection: authorization")),
    "named twice": (CHAT, (f"api-key: {ALICE}", "Connection: close, API-Key")),
    "upper": (CHAT, (bearer(ALICE.upper()),)),
    "shorter": (CHAT, (bearer(ALICE[:-1]),)),
    "longer": (CHAT, (bearer(ALICE + "0"),)),
    "digest": (CHAT, (bearer(record("x", ALICE).digest.hex()),)),
    "latin-1": (CHAT, (bearer(ALICE + "\xe9"),)),
    "long": (CHAT, (bearer("x" * 60_000),)),
    "protocol": (
        "/v1/realtime?model=a",
        (f"Sec-WebSocket-Protocol: openai-insecure-api-key.{ALICE}",),
    ),
}


@pytest.mark.parametrize("place", PLACES)
async def test_a_key_in_another_place_is_none(world, place):
    path, headers = PLACES[place]
    body = json.dumps({"model": "a", "api_key": ALICE, "key": ALICE}).encode()
    wire = await world.client()
    await wire.send(post(path, body, *headers).decode().encode("latin-1"))
    response = await wire.answer()
    assert response.status == 401
    assert ALICE not in response.body.decode()
    assert reached(world) == 0


MALFORMED = [
    f"Authorization : Bearer {ALICE}",
    f" Authorization: Bearer {ALICE}",
    f"X: 1\r\n Authorization: Bearer {ALICE}",
    f"X: 1\nAuthorization: Bearer {ALICE}",
    f"X: 1\rAuthorization: Bearer {ALICE}",
    f"Authorization\x00: Bearer {ALICE}",
    f"Authorization: Bearer {ALICE}\x00",
    f"Authorization: Bearer\r\n {ALICE}",
]


@pytest.mark.parametrize("line", MALFORMED)
async def test_a_malformed_header_is_400_and_never_a_key(world, line):
    wire = await world.client()
    await wire.send(post(CHAT, b'{"model":"a"}', line))
    assert (await wire.answer()).status == 400
    assert reached(world) == 0


async def test_a_smuggled_second_key_is_never_the_one_that_counts(world):
    wire = await world.client()
    first, second = bearer(BOB), bearer(ALICE)
    for headers in (
        (first, second),
        (second, first),
        (first, f"x-api-key: {ALICE}"),
        (first, f"API-KEY: {ALICE}", f"x-api-key: {BOB}"),
    ):
        response = await ask(wire, *headers, body=b'{"model":"b"}')
        assert (response.status, error(response)["code"]) == (401, "invalid_api_key")
        assert "different API keys" in error(response)["message"]
    assert reached(world) == 0


async def test_a_request_smuggled_in_a_body_has_no_key(world):
    """The second request is no part of the first, and needs a key of its own."""
    wire = await world.client()
    inner = post(CHAT, b'{"model":"a"}')
    await wire.send(post(CHAT, b'{"model":"a"}', bearer(ALICE)) + inner)
    assert [(await wire.answer()).status for _ in range(2)] == [200, 401]
    chunked = f"{bearer(ALICE)}\r\nTransfer-Encoding: chunked"
    await wire.send(post(CHAT, b"0\r\n\r\n" + inner, chunked))
    assert (await wire.answer()).status == 400
    assert reached(world) == 1


# -- selectors -----------------------------------------------------------------------------------

ESCAPES = [
    *(
        "team=b",
        "team in (a,b)",
        "team notin (a)",
        "team!=a",
        "!x",
        "team",
        "",
        ",",
        "team=a,team=b",
    ),
    *("team=a)(team=b", "team in (a", "*", "team=*", "'", "team=a\tteam=b", "x" * 5000),
]


@pytest.mark.parametrize("selector", ESCAPES)
async def test_no_selector_of_a_client_widens_that_of_its_key(world, selector):
    wire = await world.client()
    header = f"X-Label-Selector: {selector}"
    for path, body in ((CHAT, b'{"model":"b"}'), ("/api/chat", b'{"model":"b:latest"}')):
        response = await ask(wire, bearer(BOB), header, path=path, body=body)
        assert response.status == 403
    assert (await ask(wire, bearer(BOB), header, header, body=b'{"model":"b"}')).status == 403
    listed = await get(wire, "/v1/models", bearer(BOB), header)
    assert listed.status in (200, 400)
    assert b'"b"' not in listed.body
    assert reached(world) == 0


NAMES = ["b", "b_", "b_x", "B", " b", "b ", "b:latest", "b\x00", "\u0431", "b/a", "a/../b", "c"]


@pytest.mark.parametrize("name", NAMES)
async def test_no_spelling_of_a_name_reaches_a_model_that_is_not_allowed(world, name):
    wire = await world.client()
    for path in (CHAT, "/v1/responses", "/v1/embeddings", "/api/generate"):
        for field in ({"model": name}, {"model": name, "x": "a" * 70_000}):
            response = await ask(wire, bearer(BOB), path=path, body=json.dumps(field).encode())
            assert response.status == 403
    form = (
        f'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\n{name}\r\n'
        '--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nx\r\n--b--\r\n'
    ).encode()
    multipart = "Content-Type: multipart/form-data; boundary=b"
    path = "/v1/audio/transcriptions"
    assert (await ask(wire, bearer(BOB), multipart, path=path, body=form)).status in (400, 403)
    assert reached(world) == 0


async def test_two_models_in_a_body_are_rejected(world):
    wire = await world.client()
    for body in (b'{"model":"a","model":"b"}', b'{"model":"a","Model":"b"}'):
        assert (await ask(wire, bearer(BOB), body=body)).status == 400
    assert reached(world) == 0


# -- wrong keys ----------------------------------------------------------------------------------


def test_the_time_for_a_wrong_key_does_not_tell_how_wrong_it_is():
    """Best times of interleaved batches: a busy machine makes single ones longer, not all.

    Where the digest of a wrong key falls in the dictionary is chance, and costs it up to a tenth
    more or less. So a batch has many keys of each kind.
    """
    keys = {}
    for n in range(1000):
        key = Key(record(f"k{n}", f"sk-{n:045}"))
        keys[key.digest] = key
    near = [b"sk-%044dx" % n for n in range(1000)]  # valid but for the last character
    far = [b"zz%046d" % n for n in range(1000)]
    assert all(check(keys, wrong)[1] == Problem.INVALID for wrong in near + far)

    def batch(wrong_keys: list[bytes]) -> float:
        began_s = time.perf_counter()
        for wrong in wrong_keys:
            check(keys, wrong)
        return time.perf_counter() - began_s

    ratios = []
    for _ in range(10):
        best = [1.0, 1.0]
        for _ in range(20):
            for i, wrong_keys in enumerate((near, far)):
                best[i] = min(best[i], batch(wrong_keys))
        ratios.append(best[0] / best[1])
        if 0.95 < median(ratios) < 1.05:
            return
    raise AssertionError(f"a key that is almost right takes a different time: {ratios}")


def rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


async def flood(world, count: int, per_write: int = 500) -> None:
    """Send requests with wrong keys over one connection, many at a time."""
    wire = await world.client()
    for begin in range(0, count, per_write):
        batch = b"".join(
            b"GET /v1/models HTTP/1.1\r\nHost: h\r\nx-api-key: sk-%d\r\n\r\n" % (begin + n)
            for n in range(per_write)
        )
        wire.writer.write(batch)
        left = per_write
        while left:
            left -= (await wire.reader.readuntil(b"}}")).count(b"HTTP/1.1 401 ")


async def grown_bytes(start, count: int) -> int:
    """How much memory a worker has more after this many wrong keys than after a tenth of them."""
    config = KeysConfig(required=True, failures_per_minute=0)
    world = await attacked(start, keys=config)
    with capture_logs() as logs:
        await flood(world, count // 10)
        before = rss_bytes()
        logs.clear()
        await flood(world, count)
        logs.clear()
    assert world.server.relay.requests >= count
    return rss_bytes() - before


async def test_wrong_keys_leave_nothing_in_memory(start):
    assert await grown_bytes(start, 20_000) < 4 << 20


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_a_million_wrong_keys_leave_nothing_in_memory(start):
    assert await grown_bytes(start, 1_000_000) < 8 << 20


async def test_wrong_keys_cost_their_sender_the_connection_and_nobody_else_anything(world):
    async def guess() -> list[int]:
        wire, statuses = await world.client(), []
        try:
            for n in range(100):
                response = await ask(wire, bearer(f"guess-{n}"))
                statuses.append(response.status)
        except (Broken, ConnectionError):
            pass
        return statuses

    guesses = await asyncio.gather(*(guess() for _ in range(5)))
    flat = [status for statuses in guesses for status in statuses]
    assert flat.count(401) in range(60, 70)  # the limit, and what is restored meanwhile
    assert flat.count(429) == 5
    assert (await ask(await world.client(), bearer(ALICE), body=b'{"model":"a"}')).status == 200


# -- time ----------------------------------------------------------------------------------------


def test_a_jump_of_the_wall_clock_changes_no_limit(monkeypatch):
    now_s = [1000.0]
    limit = FailureLimit(1, lambda: now_s[0])
    assert limit.take("192.0.2.1") == 0
    for wall_s in (0.0, 4e9):
        monkeypatch.setattr(time, "time", lambda wall_s=wall_s: wall_s)
        assert limit.take("192.0.2.1") == pytest.approx(60)
    now_s[0] -= 500  # even if the monotonic clock went back
    assert limit.take("192.0.2.1") > 0


async def test_an_end_takes_effect_when_the_wall_clock_reaches_it(world):
    wire = await world.client()
    change(world, "alice", record("alice", ALICE, expires_s=time.time() + 2.0))
    body = b'{"model":"a"}'
    assert (await ask(wire, bearer(ALICE), body=body)).status == 200
    await until(lambda: time.time() > world.context.key_table.by_name["alice"].expires_s)
    assert (await ask(wire, bearer(ALICE), body=body)).status == 401
    change(world, "alice", record("alice", ALICE, expires_s=time.time() + 1000))
    assert (await ask(wire, bearer(ALICE), body=body)).status == 200


# -- what is left behind -------------------------------------------------------------------------


async def test_no_key_or_digest_is_in_a_log_or_an_error(start):
    lines = []
    observers = Observers(AccessLog(1.0, lines.append), None)
    world = await attacked(start, observers=observers)
    wire = await world.client()
    seen: list[Message] = []
    with capture_logs() as logs:
        for path in (CHAT, f"{CHAT}?api_key={ALICE}", f"/v1/models?key={ALICE}", f"/x?k={ALICE}"):
            for header in (bearer(ALICE), f"x-api-key: {BOB}", bearer("sk-guessed-key")):
                response = await ask(wire, header, path=path, body=b'{"model":"b"}')
                seen.append(response)
    observers.close()  # so that all lines are written
    written = str(logs) + b"".join(lines).decode() + "".join(m.body.decode() for m in seen)
    assert '"status":401' in written
    assert "request denied" in written
    for secret in (ALICE, BOB, "sk-guessed-key"):
        assert secret not in written
        assert record("x", secret).digest.hex() not in written


async def test_two_keys_in_two_requests_at_once_are_not_mixed_up(world):
    async def use(key: str, model: str, status: int, wire: Wire) -> None:
        for _ in range(30):
            body = json.dumps({"model": model}).encode()
            assert (await ask(wire, bearer(key), body=body)).status == status

    uses = [(ALICE, "b", 200), (BOB, "b", 403), (BOB, "a", 200), ("no", "a", 401)] * 2
    async with asyncio.TaskGroup() as group:
        for key, model, status in uses:
            if key != "no":
                group.create_task(use(key, model, status, await world.client()))


def test_every_kind_of_route_was_tried():
    assert {kind for kind in Kind if not kind.is_stored} == set(route_table.values())


CORPUS = sorted((Path(__file__).parents[1] / "fuzz/corpus/requests").iterdir())


async def test_no_request_of_the_fuzzers_reaches_an_engine_without_a_key(start):
    world = await attacked(start)
    endpoints = dict.fromkeys(("m", "w"), await world.engine(says(b"served")))
    for name, engine in endpoints.items():
        world.route(name, {f"{name}-1": engine}, adapters=("a",))
    seen = b""
    for path in CORPUS:
        wire = await world.client()
        await wire.send(path.read_bytes())
        wire.writer.write_eof()
        with contextlib.suppress(ConnectionError):
            seen += await wire.reader.read()
    statuses = set(re.findall(rb"^HTTP/1.1 (\d+) ", seen, re.MULTILINE))
    assert b"401" in statuses
    assert all(status >= b"400" for status in statuses)
    assert reached(world) == 0
