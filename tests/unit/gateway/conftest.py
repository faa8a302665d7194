"""Fixtures of the gateway's tests."""

import contextlib

import pytest_asyncio
from fakes.world import start as start


@pytest_asyncio.fixture
async def stack():
    """Closes what a test enters."""
    async with contextlib.AsyncExitStack() as stack:
        yield stack
