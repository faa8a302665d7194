"""Clients of ``/v1/realtime`` transcribe through a gateway, with the mock engine behind it.

vLLM's clients name the model in an event, OpenAI's in the query.
"""

import base64
import contextlib
import json

import aiohttp
import openai
import pytest
import uvloop
import websockets
from fakes.mock_engine import FAST, serving
from fakes.world import World
from websockets.asyncio.client import ClientConnection, connect

from kubeai.gateway.local_routes import make_app

LOOP_FACTORIES = {"uvloop": uvloop.new_event_loop}  # the event loop of the workers
AUDIO = [bytes([i]) * 32_000 for i in range(3)]


@pytest.fixture
async def world():
    """A gateway with the model ``m`` and its adapter ``a``, on a mock engine."""
    async with contextlib.AsyncExitStack() as stack:
        served = await stack.enter_async_context(serving(*FAST))
        served.mock.adapters["a"] = "/a"
        world = await World.start(local_routes=make_app)
        stack.push_async_callback(world.close)
        address = served.url.removeprefix("http://")
        world.route("m", {"pod-1": (address, ["a"])}, adapters=("a",))
        yield world


def events(model: str) -> list[str]:
    """What vLLM's example client sends."""
    sent = [
        {"type": "session.update", "model": model},
        {"type": "input_audio_buffer.commit"},
        *(
            {"type": "input_audio_buffer.append", "audio": base64.b64encode(audio).decode()}
            for audio in AUDIO
        ),
        {"type": "input_audio_buffer.commit", "final": True},
    ]
    return [json.dumps(event) for event in sent]


async def transcribe(socket: ClientConnection, *sent: str) -> list[dict]:
    """Send events, and receive those of one utterance, or an error."""
    for event in sent:
        await socket.send(event)
    received = []
    while not received or received[-1]["type"] not in ("transcription.done", "error"):
        received.append(json.loads(await socket.recv()))
    return received


def is_transcript(received: list[dict]) -> bool:
    *deltas, done = received
    assert [event["type"] for event in deltas] == ["transcription.delta"] * len(AUDIO)
    assert done["type"] == "transcription.done"
    assert done["usage"]["total_tokens"] > 0
    return done["text"] == "".join(event["delta"] for event in deltas)


@pytest.mark.parametrize(
    ("query", "model"),
    [("?model=m", "m"), ("", "m"), ("", "m_a"), ("?model=m_a", "a"), ("?user=x", "m")],
)
@pytest.mark.parametrize("compression", [None, "deflate"])
async def test_websockets_transcribes(world, query, model, compression):
    url = f"ws://127.0.0.1:{world.port}/v1/realtime{query}"
    async with connect(url, compression=compression) as socket:
        assert json.loads(await socket.recv())["type"] == "session.created"
        assert is_transcript(await transcribe(socket, *events(model)))
        assert is_transcript(await transcribe(socket, *events(model)[1:]))
        assert world.active("m") == 1
    await world.at_rest()
    assert world.outcomes("m")["2xx"] == 1


async def test_aiohttp_transcribes(world):
    url = f"http://127.0.0.1:{world.port}/openai/v1/realtime?model=m"
    async with aiohttp.ClientSession() as session, session.ws_connect(url) as socket:
        assert (await socket.receive_json())["type"] == "session.created"
        for event in events("m"):
            await socket.send_str(event)
        received = [await socket.receive_json() for _ in range(4)]
        assert is_transcript(received)
    await world.at_rest()


async def test_openais_client_receives_events(world):
    client = openai.AsyncOpenAI(
        api_key="none",
        base_url=f"http://127.0.0.1:{world.port}/v1",
        websocket_base_url=f"ws://127.0.0.1:{world.port}/v1",
    )
    async with client, client.realtime.connect(model="m") as connection:
        created = await connection.recv()
        assert created.type == "session.created"
        for event in events("m"):
            await connection.send(json.loads(event))
        received = [await connection.recv() for _ in range(4)]
        assert [event.type for event in received][-1] == "transcription.done"


async def test_a_model_that_does_not_exist_is_an_event_and_a_close_code(world):
    url = f"ws://127.0.0.1:{world.port}/v1/realtime"
    async with connect(url) as socket:
        await socket.recv()
        (error,) = await transcribe(socket, *events("none")[:1])
        assert (error["type"], error["code"]) == ("error", "model_not_found")
        with pytest.raises(websockets.ConnectionClosedError):
            await socket.recv()
        assert socket.close_code == 1008


async def test_a_model_in_the_query_that_does_not_exist_is_a_404(world):
    with pytest.raises(websockets.InvalidStatus) as caught:
        await connect(f"ws://127.0.0.1:{world.port}/v1/realtime?model=none")
    response = caught.value.response
    assert response.status_code == 404
    assert b"model_not_found" in response.body


async def test_a_client_is_answered_pings_while_its_model_starts(world):
    address = world.routes["m"].endpoints[0].address
    world.route("late", {})
    async with connect(
        f"ws://127.0.0.1:{world.port}/v1/realtime", ping_interval=0.02, ping_timeout=2
    ) as socket:
        await socket.recv()
        await socket.send(events("m")[0].replace('"m"', '"late"'))
        for _ in range(5):
            await (await socket.ping())
        assert world.held("late") == 1
        world.route("late", {"pod-1": address})
        await socket.send(json.dumps({"type": "input_audio_buffer.commit"}))
        error = json.loads(await socket.recv())
        assert "`late`" in error["error"]  # from the engine, which serves another model
    await world.at_rest()
