"""Candidates for leadership."""

from __future__ import annotations

import pytest
from fakes.candidates import World


@pytest.fixture
async def world():
    world = World()
    yield world
    for candidate in world.candidates:
        await candidate.freeze()
