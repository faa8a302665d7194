"""The mock engine in real time: rates, batches, and clients that disconnect."""

from __future__ import annotations

import asyncio
import itertools
import json
import time

import pytest
from fakes.mock_engine import FAST, HELLO, serving, until

from kubeai.mock_engine.formats.base import GenerationRequest, Meta
from kubeai.mock_engine.formats.completions import Chat
from kubeai.mock_engine.options import parse
from kubeai.mock_engine.pacing import Job, Pacer, StreamingGroup
from kubeai.simulation.engine import Engine, EngineConfig
from kubeai.simulation.text import reply


class Gone:
    """The transport of a disconnected client, as in uvloop."""

    def is_closing(self):
        return True

    def write(self, data):
        raise RuntimeError("unable to perform operation; the handler is closed")


class There(Gone):
    def __init__(self):
        self.written = []

    def is_closing(self):
        return False

    def write(self, data):
        self.written.append(data)


def stream_to(transport, pacer: Pacer, tokens: int) -> StreamingGroup:
    """A chat's stream of ``tokens`` tokens."""
    said = reply(b"x" * 40, limit=tokens)
    request = GenerationRequest("m", [b""], [], tokens, True, False)
    chat = Chat(Meta("chatcmpl-1", 0, "m", "r"), request)
    return StreamingGroup(pacer, chat, [said], transport, chunked=True)


RATE = ("--prefill-tokens-per-second=0", "--decode-tokens-per-second=100")


async def test_tokens_are_not_generated_faster_than_the_given_rate():
    async with serving(*RATE) as served:
        started = time.perf_counter()
        stream = await served.client.chat.completions.create(
            model="m", messages=HELLO, max_tokens=31, stream=True
        )
        tokens = [chunk async for chunk in stream if chunk.choices[0].delta.content]
        assert len(tokens) == 31
        assert time.perf_counter() - started >= 0.3


@pytest.mark.looptime
async def test_tokens_are_generated_at_the_given_rate():
    times = []

    class Timed(There):
        def write(self, data):
            times.append(asyncio.get_running_loop().time())

    pacer = Pacer(Engine(parse(RATE)[0].config))
    await stream_to(Timed(), pacer, tokens=31).run([Job(10, 31)])
    assert len(times) == 30, "the last one is sent with the end"
    assert [later - earlier for earlier, later in itertools.pairwise(times)] == [
        pytest.approx(0.01)
    ] * 29


async def test_streams_run_in_parallel_up_to_the_batch_size_and_the_others_wait():
    async with serving("--decode-tokens-per-second=50", "--max-batch=2") as served:
        body = {"model": "m", "messages": HELLO, "max_tokens": 10}
        chats = [asyncio.create_task(served.events("/v1/chat/completions", body)) for _ in range(3)]
        engine = served.mock.engine
        await until(lambda: (engine.running, engine.waiting) == (2, 1))
        assert all(len(events) == 12 for events in await asyncio.gather(*chats))


async def test_a_client_that_disconnects_frees_its_slot():
    async with serving("--decode-tokens-per-second=5") as served:
        body = {"model": "m", "messages": HELLO, "max_tokens": 1000}
        engine = served.mock.engine
        for stream in (True, False):
            leaving = asyncio.create_task(
                served.post("/v1/chat/completions", body | {"stream": stream})
            )
            await until(lambda: engine.running == 1)
            leaving.cancel()
            await until(lambda: engine.running == 0)
        await until(lambda: served.mock.request_log.aborted == 2)


async def test_during_the_start_up_delay_it_is_unhealthy_and_rejects_requests():
    body = {"messages": HELLO, "max_tokens": 1}

    async def health(served):
        async with served.session.get("/health") as response:
            return response.status

    async with serving(*FAST, "--startup-delay=60s") as served:
        assert await health(served) == 503
        assert (await served.post("/v1/chat/completions", body))[0] == 503
    async with serving(*FAST, "--startup-delay=300ms") as served:
        async with asyncio.timeout(5):
            while (status := await health(served)) != 200:
                assert status == 503
        assert (await served.post("/v1/chat/completions", body))[0] == 200


async def test_many_simultaneous_streams_all_complete(served):
    body = {"model": "m", "messages": HELLO, "max_tokens": 20}
    results = await asyncio.gather(
        *(served.events("/v1/chat/completions", body) for _ in range(300))
    )
    assert {len(events) for events in results} == {22}
    assert served.mock.request_log.total == 300


async def test_an_http_1_0_client_gets_its_stream_unchunked(served):
    reader, writer = await asyncio.open_connection("127.0.0.1", int(served.url.rsplit(":", 1)[1]))
    body = json.dumps({"messages": HELLO, "max_tokens": 3, "stream": True})
    writer.write(
        f"POST /v1/chat/completions HTTP/1.0\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
    )
    answer = await asyncio.wait_for(reader.read(), 5)
    writer.close()
    head, _, events = answer.partition(b"\r\n\r\n")
    assert b"chunked" not in head
    assert events.startswith(b"data: {")
    assert events.endswith(b"data: [DONE]\n\n")
    assert events.count(b"data: ") == 5


async def test_a_client_that_disconnects_during_a_step_does_not_delay_others():
    pacer = Pacer(Engine(EngineConfig(prefill_tokens_per_s=0, decode_tokens_per_s=200)))
    there = There()
    streams = [stream_to(transport, pacer, tokens=5) for transport in (Gone(), there)]
    async with asyncio.timeout(10):
        await asyncio.gather(*(stream.run([Job(10, 5)]) for stream in streams))
    assert len(there.written) == 4, "the last one is sent with the end"
