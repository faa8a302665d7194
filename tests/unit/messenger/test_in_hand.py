"""The attempts of one message, on virtual time."""

import asyncio

from fakes.broker import MemoryBroker
from fakes.messenger import Scene, error, ok
from fakes.time import FAKE_TIME

from kubeai.messenger.policy import ATTEMPTS_MAX_COUNT, FAILED_MAX_S
from kubeai.messenger.relay_client import Overloaded

pytestmark = FAKE_TIME


async def test_the_wait_for_a_handler_is_no_part_of_a_failed_attempt():
    """A model has become ready, but other messages keep the handlers for long."""
    results = [error(500), ok()]

    async def fails_once(body, gate):
        return results.pop(0)

    async with Scene(MemoryBroker(), handlers=1).running() as scene:
        cold = scene.gateway.cold["cold"] = asyncio.Event()
        scene.gateway.serves["cold"] = fails_once
        scene.gateway.serves["slow"] = lambda *_: asyncio.sleep(FAILED_MAX_S + 1, ok())
        scene.ask("cold")
        await scene.until("it is held", lambda: scene.stream.report().held)
        scene.ask("slow")
        await scene.until("the other has the handler", lambda: scene.gateway.serving)
        cold.set()
        await scene.done(2)
        assert [answer["status_code"] for answer in scene.answers] == [200, 200]


async def test_failed_attempts_may_not_take_longer_than_their_limit_together():
    async with Scene(MemoryBroker()).running() as scene:
        scene.gateway.serves["m"] = lambda *_: asyncio.sleep(FAILED_MAX_S / 2, error(504))
        scene.ask("m")
        await scene.done(1)
        assert len(scene.gateway.requests) == 2
        assert scene.answers[0]["status_code"] == 504


async def test_attempts_that_the_gateway_has_no_room_for_do_not_count():
    attempts = 0

    async def full(body, gate):
        nonlocal attempts
        attempts += 1
        if attempts <= 10 * ATTEMPTS_MAX_COUNT:
            raise Overloaded(error(503))
        return ok()

    async with Scene(MemoryBroker()).running() as scene:
        scene.gateway.serves["m"] = full
        scene.ask("m")
        await scene.done(1)
        assert scene.answers[0]["status_code"] == 200
        assert scene.stream.report().retried == 0
