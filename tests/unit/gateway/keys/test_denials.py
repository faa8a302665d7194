"""Denials: clients with many wrong keys get a 429, and the log samples a flood."""

import pytest
from fakes.api_keys import ALICE, BOB, ask, bearer, error, get, keyed, record
from fakes.wire import says
from structlog.testing import capture_logs

from kubeai.api.config.system import KeysConfig
from kubeai.gateway.keys import FAILING_ADDRESSES_MAX_COUNT, FailureLimit


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
