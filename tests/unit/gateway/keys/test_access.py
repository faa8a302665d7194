"""What an API key may use: the Models of its selector, and the responses of its tenant."""

import gzip
import json

import pytest
from fakes.api_keys import ALICE, BOB, ask, bearer, change, error, get, keyed, record, sent
from fakes.wire import Message, says

from kubeai.openai.request import LARGE_BYTES


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
