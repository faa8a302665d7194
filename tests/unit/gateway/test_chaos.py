"""Clients and engines fail at random: every count returns to zero."""

import asyncio
import random

import pytest
import uvloop
from fakes.chats import ask
from fakes.wire import CHUNKED, Broken, Message, Wire, answer, chunk
from fakes.world import World

LOOP_FACTORIES = {"uvloop": uvloop.new_event_loop}  # the event loop of the workers


class Chaos:
    """Clients and engines that close, reset, stall and fail at random, reproducibly by seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.answered = 0

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def end(self, wire: Wire) -> None:
        self.random.choice([wire.close, wire.reset])()

    async def engine(self, wire: Wire, request: Message) -> None:
        what = self.random.randrange(12)
        if what == 0:
            self.end(wire)
        elif what == 1:
            await wire.send(answer(self.random.choice([500, 503, 404]), b"failed"))
        elif what == 2:
            await wire.send(b"HTTP/1.1 200")
            self.end(wire)
        elif what == 3:
            await wire.reader.read()  # sends nothing
        elif what == 4:
            await wire.send(b"HTTP/1.1 200 OK\r\n\r\nsome")
            self.end(wire)
        elif what < 8:
            await wire.send(answer(200, b"y" * self.random.randrange(200_000)))
        else:
            await wire.send(CHUNKED)
            for _ in range(self.random.randrange(10)):
                await wire.send(chunk(b"z" * self.random.randrange(1, 20_000)))
                if self.chance(0.05):
                    return self.end(wire)
                await asyncio.sleep(0)
            await wire.send(b"0\r\n\r\n")
        return None

    def request(self) -> bytes:
        what = self.random.randrange(10)
        if what == 0:
            return b"GET /page HTTP/1.1\r\nHost: h\r\n\r\n"
        if what == 1:
            upload = b"POST /page HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n"
            return upload + chunk(b"s" * 30_000) + b"0\r\n\r\n"
        model = self.random.choice(["m", "m", "m", "m", "cold", "none"])
        request = ask(model, prompt="q" * self.random.randrange(100_000))
        return request * 2 if what == 2 else request

    async def client(self, world: World) -> None:
        for _ in range(15):
            wire = await world.client()
            try:
                while await self.exchange(wire):
                    pass
            except (Broken, ConnectionError):
                pass
            self.end(wire)

    async def exchange(self, wire: Wire) -> bool:
        request = self.request()
        if self.chance(0.2):
            await wire.send(request[: self.random.randrange(len(request))])
            await asyncio.sleep(self.random.random() * 0.01)
            return False
        await wire.send(request)
        if self.chance(0.15):
            await asyncio.sleep(self.random.random() * 0.01)
            return False
        head = await wire.head()
        if self.chance(0.1):
            return False
        await wire.body(head, until_close=True)
        self.answered += 1
        return self.chance(0.6)


@pytest.mark.parametrize("seed", range(3))
async def test_every_count_returns_to_zero_after_random_failures(start, seed):
    short = 0.15
    world = await start(
        hold_timeout_s=short,
        head_timeout_s=short,
        body_timeout_s=short,
        first_byte_timeout_s=short,
        between_bytes_timeout_s=short,
    )
    chaos = Chaos(seed)
    engines = {name: await world.engine(chaos.engine) for name in "abcd"}
    world.route("m", engines, strategy="PrefixHash" if seed else "LeastLoad")
    world.route("cold", {})
    await asyncio.gather(*(chaos.client(world) for _ in range(16)))
    assert chaos.answered > 100
    await world.at_rest()
