"""A World that requires keys."""

import pytest
from fakes.api_keys import ALICE, BOB, keyed, record
from fakes.wire import says


@pytest.fixture
async def world(start):
    world = await keyed(start, record("alice", ALICE), record("bob", BOB))
    world.route("m", {"pod-1": await world.engine(says(b"served"))})
    return world


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
