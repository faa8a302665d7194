"""A Model with a fallback."""

import pytest
from fakes.chats import ask
from fakes.fallbacks import Full, echo
from fakes.wire import until
from fakes.world import World


@pytest.fixture
async def fallen(start):
    """A world whose Model `b` answers; `m` is routed by the test."""

    async def begin(**config) -> World:
        world = await start(**config)
        world.route("b", {"b-1": await world.engine(echo)})
        return world

    return begin


@pytest.fixture
async def saturated(fallen):
    """A world whose Model `m` serves one request, and has room for no other."""

    async def begin(**fields) -> tuple[World, Full]:
        world, full = await fallen(), Full()
        engine = await world.engine(full)
        world.route("m", {"m-1": engine}, capacity=1, **fields)
        await (await world.client()).send(ask())
        await until(lambda: full.came)
        return world, full

    return begin
