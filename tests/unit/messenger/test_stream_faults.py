"""Nothing is lost: random faults of the broker, the engines and the process, on virtual time.

Messages may be answered more than once, because delivery is at least once. Each is answered, and in
the end the broker has none left.
"""

import asyncio
import json
import random

import pytest
from fakes.broker import MemoryBroker
from fakes.messenger import Scene, error, ok
from fakes.time import FAKE_TIME

from examples import some
from kubeai.brokers.base import BrokerUnavailable

pytestmark = FAKE_TIME

MESSAGES = 60
MODELS = "warm", "cold", "flaky", "slow"
FAULTY_S = 300.0  # then the faults end


class Chaos:
    """Two messengers that compete for a queue, and what happens to them."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.broker = MemoryBroker(
            ack_deadline_s=self.random.choice([None, 5, 60]),
            counts=self.random.random() < 0.7,
            unique_ids=self.random.random() < 0.7,
        )
        self.share = self.random.choice([0.0, 0.02, 0.2])  # of operations that fail
        self.broker.fault = self._fault
        self.faulty = True
        self.warm = asyncio.Event()
        self.scenes = [self._scene(), self._scene()]
        self.tasks = [asyncio.create_task(scene.stream.run()) for scene in self.scenes]

    def _fault(self, operation: str) -> None:
        if self.faulty and self.random.random() < self.share:
            raise BrokerUnavailable(operation)

    def _scene(self) -> Scene:
        scene = Scene(self.broker, handlers=self.random.choice([1, 3, 20]), backoff_max_s=10)
        scene.gateway.cold["cold"] = self.warm
        scene.gateway.serves |= {"flaky": self._flaky, "slow": self._slow}
        return scene

    async def _flaky(self, body, gate):
        await asyncio.sleep(self.random.random())
        chance = self.random.random() if self.faulty else 1
        if chance < 0.2:
            return error(503)
        if chance < 0.3:  # all its replicas go away
            gate.on_hold()
            await asyncio.sleep(self.random.random() * 20)
            if self.random.random() < 0.5:
                return error(504)
            await gate.on_endpoint()
        return ok(prompt=body["prompt"])

    async def _slow(self, body, gate):
        await asyncio.sleep(self.random.random() * 60)
        return ok(prompt=body["prompt"])

    async def disturb(self) -> None:
        """Kill, drain, cut and send until the faults end."""
        clock = asyncio.get_running_loop().time
        until_s = clock() + FAULTY_S
        asyncio.get_running_loop().call_later(self.random.random() * FAULTY_S, self.warm.set)
        left = MESSAGES
        while clock() < until_s or left:
            await asyncio.sleep(self.random.random() * 10)
            sent = min(left, self.random.randint(0, 10))
            left -= sent
            for _ in range(sent):
                number = len(self.broker.queue("requests").published)
                self.scenes[0].ask(self.random.choice(MODELS), number)
            chance = self.random.random()
            if chance < 0.1:
                await self._replace(kill=True)
            elif chance < 0.2:
                await self._replace(kill=False)
            elif chance < 0.3:
                self.broker.cut()

    async def _replace(self, *, kill: bool) -> None:
        """End a messenger and start its successor. A killed one gives nothing back itself."""
        n = self.random.randrange(2)
        if kill:
            for connection in list(self.broker.connections):
                if self.random.random() < 0.5:
                    connection.end()
        else:
            await self.scenes[n].stream.drain(self.random.random() * 30)
        self.tasks[n].cancel()
        await asyncio.gather(self.tasks[n], return_exceptions=True)
        self.scenes[n] = self._scene()
        self.tasks[n] = asyncio.create_task(self.scenes[n].stream.run())

    async def settle(self) -> None:
        self.faulty = False
        self.warm.set()
        requests = self.broker.queue("requests")
        await self.scenes[0].until(
            "every message was answered and acknowledged",
            lambda: len(requests.published) == MESSAGES and self.broker.is_empty("requests"),
            3600,
        )

    async def end(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


@pytest.mark.parametrize("seed", range(some(20)))
async def test_every_message_gets_a_response(seed):
    chaos = Chaos(seed)
    try:
        await chaos.disturb()
        await chaos.settle()
    finally:
        await chaos.end()
    sent = {stored.id for stored in chaos.broker.queue("requests").published}
    responses = chaos.broker.queue("responses").published
    assert {stored.attributes["request_message_id"] for stored in responses} == sent
    for stored in responses:
        answer = json.loads(stored.body)
        if answer["status_code"] == 200:
            assert answer["metadata"] == {"prompt": answer["body"]["prompt"]}
    for scene in chaos.scenes:
        assert not scene.stream._in_hand
        assert scene.gateway.serving == 0
        assert scene.stream._shared.handlers._value == scene.settings.max_handlers
        assert not +scene.stream._shared.phases
