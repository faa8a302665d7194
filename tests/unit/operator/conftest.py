"""The operator's surroundings in memory."""

from __future__ import annotations

import pytest
from fakes.kube import World


@pytest.fixture
async def world():
    world = World()
    yield world
    await world.stop()
