"""Connections between replicas: silent, hung, invalid and slow peers, and their number."""

import asyncio
import contextlib

import aiohttp
import pytest
from aiohttp import web
from fakes.peers import Replica, page
from harness import until

from kubeai.framing import frame, read_frame
from kubeai.supervisor.peers import wire
from kubeai.supervisor.peers.feed import LISTENERS_MAX
from kubeai.supervisor.peers.peers import LOADS_PATH
from kubeai.supervisor.peers.view import HOLD_S, NAMES_MAX, STALE_S


async def test_the_last_report_of_a_silent_peer_expires():
    async def hung(request):
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(wire.encode(wire.Hello("hung")))
        await response.write(wire.encode(wire.Loads({"m": (7, 0)}, {"a": 4})))
        await asyncio.Event().wait()

    async with page(hung) as address, Replica("two", [address]) as other:
        other.route("a")
        assert not other.peers.complete(), "no peer has reported yet"
        await until("the peer's load is seen", lambda: other.in_flight("a") == 4)
        assert other.peers.complete()
        other.clock.now_s += STALE_S + 0.1
        assert not other.peers.complete()
        assert (other.in_flight("a"), other.peers.active("m")) == (4, 7), (
            "missing data does not mean zero"
        )
        other.clock.now_s += HOLD_S
        await until("its load is dropped", lambda: other.in_flight("a") == 0)
        assert other.peers.active("m") == 0
        assert other.peers.complete(), "it is not waited for any longer"


async def test_a_peer_that_never_responds_is_waited_for_only_for_a_time():
    async def never(request):
        await asyncio.Event().wait()

    async with page(never) as address, Replica("two", [address]) as other:
        assert not other.peers.complete()
        other.clock.now_s += HOLD_S + 0.1
        assert other.peers.complete()


async def test_a_hung_peer_does_not_delay_the_others():
    async def never(request):
        await asyncio.Event().wait()

    async with (
        page(never) as hung,
        Replica("one") as one,
        Replica("two", [hung, one.address]) as other,
    ):
        one.route("a"), other.route("a")
        one.serve("a", 2)
        await until("the good one is seen", lambda: other.in_flight("a") == 2, 2.0)


BAD = {
    "a number below 0": wire.encode(wire.Loads({}, {"a": -2})),
    "too large a number": wire.encode(wire.Loads({}, {"a": wire.COUNT_MAX + 1})),
    "active below 0": wire.encode(wire.Loads({"m": (-1, 0)})),
    "another type": frame(b"\x93abc"[:3]),
    "no msgpack": frame(b"\xc1"),
    "a frame too long": (wire.FRAME_MAX_BYTES + 1).to_bytes(4, "big"),
    "too many names": wire.encode(wire.Loads({}, {str(n): 0 for n in range(NAMES_MAX + 1)})),
    "the end": b"",
}


@pytest.mark.parametrize("frame", BAD.values(), ids=BAD.keys())
async def test_an_invalid_frame_disconnects_the_peer(frame):
    calls = 0

    async def lying(request):
        nonlocal calls
        calls += 1
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(wire.encode(wire.Hello("liar")) + frame)
        return response

    async with page(lying) as address, Replica("two", [address]) as other:
        other.route("a")
        await until("the connection was retried", lambda: calls >= 2)
        assert other.in_flight("a") == 0
        assert other.peers.active("m") == 0


async def test_a_reconnected_peer_sends_its_complete_state():
    words = [wire.Loads({"m": (1, 9)}, {"a": 4, "b": 1}), wire.Loads({}, {"b": 2})]

    async def restarting(request):
        response = web.StreamResponse()
        await response.prepare(request)
        word = words.pop(0)
        await response.write(wire.encode(wire.Hello("one")) + wire.encode(word))
        if not words:
            await asyncio.Event().wait()
        return response  # it dies

    async with page(restarting) as address, Replica("two", [address]) as other:
        other.route("a", "b")
        await until(
            "the peer is back", lambda: (other.in_flight("a"), other.in_flight("b")) == (0, 2)
        )
        assert other.peers.active("m") == 0
        assert not other.peers.routes("a")


async def test_frames_are_merged_for_a_slow_listener():
    async with Replica("one") as one, aiohttp.ClientSession() as session:
        pods = [f"pod-{n:04}-{'x' * 200}" for n in range(50)]
        one.route(*pods)
        async with session.get(f"http://{one.address}{LOADS_PATH}") as response:
            stream = response.content
            await frame_of(stream)
            whole = await frame_of(stream)
            assert set(whole.endpoints) == set(pods)
            for _ in range(200):  # 50 names of 200 letters each: 2 MB if all were queued
                one.serve(pods[0])
                one.held.pop()
                one.serve(pods[1])
                one.peers._feed.read()
            told = await frame_of(stream)
            assert told.endpoints[pods[1]] == 200


async def frame_of(stream):
    return wire.decode(await read_frame(stream, wire.FRAME_MAX_BYTES))


async def test_the_number_of_listeners_is_limited():
    async with Replica("one") as one, aiohttp.ClientSession() as session:
        url = f"http://{one.address}{LOADS_PATH}"
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(LISTENERS_MAX):
                await stack.enter_async_context(session.get(url))
            async with session.get(url) as response:
                assert response.status == 503
                assert str(LISTENERS_MAX) in await response.text()
