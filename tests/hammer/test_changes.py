"""Routes and engines change at random under load: every request ends, and nothing stays counted."""

import asyncio
import contextlib
import os
import random
from collections import Counter

import pytest
import uvloop
from fakes.wire import CHUNKED, Broken, Engine, Message, Wire, answer, chunk, connect, post, until
from fakes.world import World

from kubeai.gateway.local_routes import make_app

LOOP_FACTORIES = {"uvloop": uvloop.new_event_loop}
SEEDS = int(os.environ.get("HAMMER_SEEDS", "2"))
CHANGES = 60
CLIENTS = 16
FORM = (
    b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nm\r\n'
    b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\nRIFF\r\n--b--\r\n'
)
AUDIO = post(
    "/openai/v1/audio/transcriptions", FORM, "Content-Type: multipart/form-data; boundary=b"
)
CHAT = post(body=b'{"model":"m"}')
BEHAVIOURS = ("good", "good", "slow", "hang", "reset", "close", "503", "504", "break", "junk")


class Changes:
    """Four engines, of which any may fail in any way or leave the routes at any time."""

    def __init__(self, world: World, seed: int) -> None:
        self.world = world
        self.random = random.Random(seed)
        self.strategy = self.random.choice(["LeastLoad", "PrefixHash"])
        self.behaviours: dict[str, str] = {}
        self.engines: dict[str, Engine] = {}
        self.ended = False

    async def start(self) -> None:
        for name in "abcd":
            self.engines[name] = await self.world.engine(
                lambda wire, request, name=name: self._serve(name, wire, request)
            )
        self._route()

    async def _serve(self, name: str, wire: Wire, request: Message) -> None:
        while (behaviour := self.behaviours.get(name, "good")) == "hang":  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        with contextlib.suppress(OSError, RuntimeError):  # the gateway has closed the connection
            if behaviour == "reset":
                wire.reset()
            elif behaviour == "close":
                wire.close()
            elif behaviour == "break":
                await wire.send(CHUNKED + chunk(b"go"))
                wire.reset()
            elif behaviour == "junk":
                await wire.send(b"junk\r\n\r\n")
            elif behaviour == "slow":
                await wire.send(CHUNKED + chunk(b"go"))
                await asyncio.sleep(self.random.random() * 0.05)
                await wire.send(chunk(b"od") + b"0\r\n\r\n")
            elif behaviour == "good":
                await wire.send(answer(200, b"good"))
            else:
                await wire.send(answer(int(behaviour)))

    def _route(self) -> None:
        present = [name for name in self.engines if self.random.random() < 0.7]
        draining = [
            name for name in self.engines if name not in present and self.random.random() < 0.5
        ]
        self.world.publisher.reclaim([self.world.table.version])
        self.world.route(
            "m",
            {name: self.engines[name] for name in present},
            draining=tuple(draining),
            strategy=self.strategy,
        )

    async def change(self) -> None:
        for _ in range(CHANGES):
            await asyncio.sleep(self.random.random() * 0.05)
            self.behaviours[self.random.choice("abcd")] = self.random.choice(BEHAVIOURS)
            if self.random.random() < 0.05:
                self.world.unroute("m")
                self._route()
            elif self.random.random() < 0.4:
                self._route()
        self.behaviours.clear()
        self.world.route("m", dict(self.engines), strategy=self.strategy)
        self.ended = True

    async def ask(self, statuses: Counter) -> None:
        """Requests on one connection after another; some clients leave early."""
        while not self.ended:
            wire = await connect(self.world.port)
            try:
                for _ in range(self.random.randrange(1, 6)):
                    await wire.send(self.random.choice([CHAT, CHAT, AUDIO]))
                    if self.random.random() < 0.1:
                        wire.reset()
                        break
                    response = await wire.answer()
                    statuses[response.status] += 1
                    assert response.status != 200 or response.body == b"good"
            except (Broken, OSError):
                statuses["broken"] += 1
            finally:
                wire.close()


@pytest.mark.parametrize("seed", range(SEEDS))
async def test_every_request_ends_and_is_counted_back_while_routes_and_engines_change(seed):
    world = await World.start(
        local_routes=make_app,
        eject_time_s=0.1,
        eject_max_time_s=0.5,
        first_byte_timeout_s=0.5,
        hold_timeout_s=1.0,
        retry_first_byte_timeout=bool(seed % 2),
    )
    changes = Changes(world, seed)
    await changes.start()
    statuses: Counter = Counter()
    await asyncio.gather(changes.change(), *(changes.ask(statuses) for _ in range(CLIENTS)))
    assert statuses[200] > 0
    assert set(statuses) <= {200, 404, 502, 503, 504, "broken"}, "500 is a fault of the gateway"
    await until(lambda: not world.server.relay.exchanges, "every exchange ends", 10)
    await world.close()
