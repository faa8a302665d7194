"""Fixtures of the attack tests."""

import pytest
from fakes.world import World


@pytest.fixture
async def start():
    worlds = []

    async def start(**config) -> World:
        worlds.append(await World.start(**config))
        return worlds[-1]

    yield start
    for world in worlds:
        await world.close()
