"""The drain of a stream, on virtual time."""

import asyncio

from fakes import broker as broker_module
from fakes.broker import MemoryBroker, MemorySubscription, faults
from fakes.messenger import Scene, error, ok
from fakes.time import FAKE_TIME
from typing_extensions import override

from kubeai.messenger.in_hand import InHand

pytestmark = FAKE_TIME


def now():
    return asyncio.get_running_loop().time()


async def test_a_drain_finishes_what_is_served_and_gives_back_the_rest():
    async with Scene(MemoryBroker(), handlers=2).running() as scene:
        scene.gateway.cold["cold"] = asyncio.Event()
        scene.gateway.serves["bad"] = lambda *_: asyncio.sleep(0, error(503))
        for model in ("cold", "bad"):
            scene.ask(model)
        await scene.until("both are parked", lambda: scene.stream.report().retried)
        served = [scene.ask("m", number) for number in range(2)]
        await scene.until("two are served", lambda: scene.gateway.serving == 2)
        scene.ask("m", "later")
        began_s = now()
        await scene.stream.drain(60)
        assert now() - began_s <= 1
        assert set(scene.answered) == set(served)
        queue = scene.broker.queue("requests")
        assert len(queue.waiting) == 3
        assert not queue.unacknowledged
        await asyncio.sleep(100)
        assert len(queue.waiting) == 3, "nothing is received any more"


async def test_a_drain_has_a_limit():
    async with Scene(MemoryBroker()).running() as scene:
        scene.gateway.serves["slow"] = lambda *_: asyncio.sleep(1000, ok())
        scene.ask("slow")
        await scene.until("it is served", lambda: scene.gateway.serving)
        began_s = now()
        await scene.stream.drain(60)
        assert 60 <= now() - began_s < 61
        assert len(scene.broker.queue("requests").waiting) == 1
        assert scene.gateway.serving == 0, "the request was cancelled"


async def test_a_drain_waits_for_the_confirmation_of_a_response():
    async with Scene(MemoryBroker()).running() as scene:
        scene.broker.fault = faults(*["publish"] * 4)
        scene.ask()
        await scene.until("publishing fails", lambda: scene.stream.report().publish_failures)
        await scene.stream.drain(60)
        assert len(scene.answers) == 1
        assert scene.broker.is_empty("requests")


async def test_a_drain_publishes_even_if_the_requests_connection_is_lost_meanwhile():
    async with Scene(MemoryBroker(ack_deadline_s=30)).running() as scene:
        scene.gateway.serves["slow"] = lambda *_: asyncio.sleep(100, ok())
        message = scene.ask("slow")
        await scene.until("it is served", lambda: scene.gateway.serving)
        drain = asyncio.create_task(scene.stream.drain(300))
        await asyncio.sleep(1)
        scene.broker.cut()
        await drain
        assert scene.answered == {message: 1}


async def test_a_drain_gives_back_what_has_only_just_been_received():
    async with Scene(MemoryBroker()).running() as scene:
        await scene.until("it is connected", lambda: scene.stream.report().responses.connected)
        taken = scene.stream._take

        def take(connection, delivery):
            drains.append(asyncio.create_task(scene.stream.drain(60)))  # its turn comes first
            taken(connection, delivery)

        drains = []
        scene.stream._take = take
        scene.ask("m")
        began_s = now()
        await scene.until("it is drained", lambda: drains and drains[0].done())
        assert now() - began_s < 10
        assert scene.broker.queue("requests").waiting or scene.answers


class StubbornSubscription(MemorySubscription):
    """Returns what has arrived although it is cancelled, like asyncio.wait_for in Python 3.11."""

    @override
    async def receive(self, count_max):
        try:
            return await super().receive(count_max)
        except asyncio.CancelledError:
            self.queue.arrived.set()
            return await super().receive(count_max)


async def test_a_drain_ends_even_if_the_cancellation_of_receive_gets_lost(monkeypatch):
    monkeypatch.setattr(broker_module, "MemorySubscription", StubbornSubscription)
    async with Scene(MemoryBroker(), handlers=2).running() as scene:
        await scene.until("it receives", lambda: scene.broker.received_max)
        queue = scene.broker.queue("requests")
        for number in range(20):  # unnoticed, until the receiver is cancelled
            scene.ask("m", number)
        queue.arrived.clear()
        drain = asyncio.create_task(scene.stream.drain(60))
        await drain
        await asyncio.sleep(10)
        assert len(queue.waiting) + len(scene.answers) == 20
        assert len(scene.answers) <= 2, "nothing is received after the drain has begun"


async def test_a_drain_without_a_connection_ends():
    broker = MemoryBroker()
    broker.fault = faults(*["subscribe"] * 1000)
    async with Scene(broker).running() as scene:
        await asyncio.sleep(10)
        await scene.stream.drain(60)


async def test_a_handler_that_is_granted_to_an_ended_attempt_is_not_lost():
    """The gateway notices later than the message that its request has ended."""
    scene = Scene(MemoryBroker(), handlers=1)
    blocker = asyncio.Event()
    granted = []

    async def held(body, gate: InHand):
        async def go_on():
            await gate.on_endpoint()
            granted.append(True)

        gate.on_hold()
        await scene.until("the other has the handler", lambda: scene.gateway.serving == 2)
        asyncio.create_task(go_on())  # noqa: RUF006 (like the gateway's task, it ends by itself)
        await asyncio.sleep(0.1)
        return error(400)

    async def blocks(*_):
        await blocker.wait()
        return ok()

    async with scene.running():
        scene.gateway.serves |= {"held": held, "blocks": blocks}
        scene.ask("held")
        scene.ask("blocks")
        await scene.until("the first one has ended", lambda: scene.answers)
        blocker.set()
        await scene.done(2)
        assert granted
        scene.ask("m")
        await scene.done(3, within_s=5)
