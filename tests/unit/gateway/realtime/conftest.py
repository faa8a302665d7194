"""Engines that accept WebSockets."""

import pytest
from fakes.realtime_sessions import RecordingEngine
from fakes.websocket import echo


@pytest.fixture
async def echoing(start):
    world = await start()
    engine = await world.engine(echo)
    world.route("m", {"pod-1": engine})
    return world, engine


@pytest.fixture
async def serving(start):
    world = await start()
    script = RecordingEngine()
    engine = await world.engine(script)
    world.route("m", {"pod-1": (engine, ["a"])}, adapters=("a",))
    return world, script, engine
