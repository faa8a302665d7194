"""The console's table of what API keys have used."""

import json

import pytest

from kubeai.api.usage import KeyUsage, UsageCounts, encode_usage
from kubeai.kube.errors import ApiError
from kubeai.supervisor.console import usage

ALICE = KeyUsage(
    "acme",
    {
        "chat": UsageCounts(3, 1, 300, 100, 50, "2026-11-30"),
        "embed": UsageCounts(9, 0, 40, 0, 0, "2026-11-29"),
    },
)
BOB = KeyUsage("acme", {"chat": UsageCounts(1, 0, 1000, 0, 500, "2026-11-28")})


def maps(**usages):
    return [{"data": {key: encode_usage(each)}} for key, each in usages.items()]


async def get(world, by="", status=200):
    async with world.client.get("/ui/api/usage", params={"by": by}) as response:
        body = await response.read()
        assert response.status == status, body
        return json.loads(body)


def tokens(row):
    return row["requests"], row["prompt_tokens"], row["completion_tokens"], row["last_day"]


@pytest.mark.parametrize(
    ("by", "names", "rows"),
    [
        (
            "",
            ("key", "tenant", "model"),
            {
                ("bob", "acme", "chat"): (1, 1000, 500, "2026-11-28"),
                ("alice", "acme", "chat"): (3, 300, 50, "2026-11-30"),
                ("alice", "acme", "embed"): (9, 40, 0, "2026-11-29"),
            },
        ),
        (
            "key",
            ("key", "tenant"),
            {
                ("bob", "acme"): (1, 1000, 500, "2026-11-28"),
                ("alice", "acme"): (12, 340, 50, "2026-11-30"),
            },
        ),
        ("tenant", ("tenant",), {("acme",): (13, 1340, 550, "2026-11-30")}),
        (
            "model",
            ("model",),
            {
                ("chat",): (4, 1300, 550, "2026-11-30"),
                ("embed",): (9, 40, 0, "2026-11-29"),
            },
        ),
    ],
)
async def test_usage_of_all_config_maps_is_added_up_with_most_tokens_first(world, by, names, rows):
    world.kube.config_maps = [*maps(alice=ALICE), *maps(bob=BOB), {"data": None}]
    found = await get(world, by)
    assert {tuple(row[name] for name in names): tokens(row) for row in found["rows"]} == rows
    assert [tuple(row[name] for name in names) for row in found["rows"]] == list(rows)
    assert found["count"] == len(rows)
    assert tokens(found["total"]) == (13, 1340, 550, "2026-11-30")
    assert world.kube.calls == [("list", "configmaps", "default", "kubeai.org/usage=true")]


async def test_without_usage_the_table_is_empty(world):
    found = await get(world)
    assert (found["rows"], found["count"], found["total"]["requests"]) == ([], 0, 0)


async def test_only_the_rows_with_the_most_tokens_are_sent(world, monkeypatch):
    monkeypatch.setattr(usage, "ROWS_MAX_COUNT", 1)
    world.kube.config_maps = maps(alice=ALICE, bob=BOB)
    found = await get(world, "key")
    assert ([row["key"] for row in found["rows"]], found["count"]) == (["bob"], 2)
    assert found["total"]["requests"] == 13


async def test_another_group_is_an_error(world):
    assert "by: 'day'" in (await get(world, "day", 422))["error"]["message"]
    assert world.kube.calls == []


async def test_usage_that_cannot_be_read_is_an_error_that_says_why(world):
    world.kube.config_maps = [{"data": {"alice": "[]"}}]
    assert "the stored usage of the key alice is" in (await get(world, "", 500))["error"]["message"]
    world.kube.fault = ApiError(403, "Forbidden", "configmaps is forbidden")
    assert (await get(world, "", 403))["error"]["code"] == "forbidden"
