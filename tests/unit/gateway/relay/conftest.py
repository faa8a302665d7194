"""Fixtures of the relay's tests."""

import pytest
from fakes.relay import Running, pages
from fakes.wire import says
from fakes.world import World


@pytest.fixture
async def start():
    worlds = []

    async def start(script=None, **config) -> Running:
        world = await World.start(app=pages(), **config)
        worlds.append(world)
        engine = await world.engine(script or says(b"{}"))
        world.route("m", {"pod-1": engine})
        return Running(world, engine)

    yield start
    for world in worlds:
        await world.close()
