"""Fixtures of the console's tests."""

import pytest
from fakes.console import running


@pytest.fixture
async def world():
    async with running() as world:
        yield world
