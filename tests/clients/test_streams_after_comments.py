"""Clients of the API receive a stream, or its error, after comments that were sent during a hold.

Each client runs as a user runs it, against one worker in this process. ``openai`` and ``anthropic``
are installed for all tests; LangChain and the AI SDK are installed by .ci/run only.
"""

import asyncio
import json
import os
import shutil
from pathlib import Path

import anthropic
import openai
import pytest
import uvloop
from fakes.wire import CHUNKED, Message, Wire, chunk, post, until
from fakes.world import World

from kubeai.gateway.local_routes import make_app

LOOP_FACTORIES = {"uvloop": uvloop.new_event_loop}  # the event loop of the workers
HELLO = [{"role": "user", "content": "Hello"}]
TIMEOUT_S = 45.0
# Many comments, so that each client reads some before, between and together with other data.
CONFIG = {"hold_comment_after_s": 0.01, "hold_comment_interval_s": 0.005, "hold_timeout_s": 20.0}
COMMENTS = 20
HERE = Path(__file__).parent


def sse(*events: dict, named: bool = False) -> bytes:
    return b"".join(
        (f"event: {event['type']}\n" if named else "").encode()
        + b"data: "
        + json.dumps(event).encode()
        + b"\n\n"
        for event in events
    )


def chat_events() -> bytes:
    base = {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "m"}

    def event(delta: dict, finish: str | None = None) -> dict:
        return base | {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}

    return sse(
        event({"role": "assistant", "content": ""}),
        event({"content": "Hel"}),
        event({"content": "lo"}),
        event({}, "stop"),
    ) + (b"data: [DONE]\n\n")


def completion_events() -> bytes:
    base = {"id": "c1", "object": "text_completion", "created": 1, "model": "m"}
    choices = [
        {"index": 0, "text": text, "finish_reason": finish, "logprobs": None}
        for text, finish in (("Hel", None), ("lo", "stop"))
    ]
    return sse(*(base | {"choices": [choice]} for choice in choices)) + b"data: [DONE]\n\n"


def message_events() -> bytes:
    usage = {"input_tokens": 1, "output_tokens": 1}
    message = {"id": "m1", "type": "message", "role": "assistant", "model": "m", "content": []}
    message |= {"stop_reason": None, "stop_sequence": None, "usage": usage}
    delta = {"stop_reason": "end_turn", "stop_sequence": None}
    return sse(
        {"type": "message_start", "message": message},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        *(
            {
                "type": "content_block_delta",
                "index": 0,
                "delta": {"type": "text_delta", "text": text},
            }
            for text in ("Hel", "lo")
        ),
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": delta, "usage": {"output_tokens": 2}},
        {"type": "message_stop"},
        named=True,
    )


def response_events() -> bytes:
    response = {
        "id": "r1",
        "object": "response",
        "created_at": 1,
        "model": "m",
        "status": "in_progress",
        "output": [],
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "metadata": {},
        "temperature": 1.0,
        "top_p": 1.0,
    }
    part = {"type": "output_text", "text": "", "annotations": []}
    item = {"id": "i1", "type": "message", "role": "assistant", "status": "in_progress"}
    where = {"item_id": "i1", "output_index": 0, "content_index": 0}
    text = part | {"text": "Hello"}
    done = item | {"status": "completed", "content": [text]}
    usage = {
        "input_tokens": 1,
        "output_tokens": 2,
        "total_tokens": 3,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens_details": {"reasoning_tokens": 0},
    }
    events = [
        {"type": "response.created", "response": response},
        {"type": "response.output_item.added", "output_index": 0, "item": item | {"content": []}},
        {"type": "response.content_part.added", "part": part, **where},
        {"type": "response.output_text.delta", "delta": "Hel", "logprobs": [], **where},
        {"type": "response.output_text.delta", "delta": "lo", "logprobs": [], **where},
        {"type": "response.output_text.done", "text": "Hello", "logprobs": [], **where},
        {"type": "response.content_part.done", "part": text, **where},
        {"type": "response.output_item.done", "output_index": 0, "item": done},
        {
            "type": "response.completed",
            "response": response | {"status": "completed", "output": [done], "usage": usage},
        },
    ]
    numbered = ({**event, "sequence_number": number} for number, event in enumerate(events))
    return sse(*numbered, named=True)


EVENTS = {
    "/v1/chat/completions": chat_events(),
    "/v1/completions": completion_events(),
    "/v1/messages": message_events(),
    "/v1/responses": response_events(),
}


async def streams(wire: Wire, request: Message) -> None:
    """Stream "Hello" in the format for the path, one event per write."""
    await wire.send(CHUNKED)
    for event in EVENTS[request.target].split(b"\n\n")[:-1]:
        await wire.send(chunk(event + b"\n\n"))
    await wire.send(b"0\r\n\r\n")


@pytest.fixture
async def world():
    world = await World.start(local_routes=make_app, **CONFIG)
    world.route("m", {}, progress="pulling image, 1 of 3")
    yield world
    await world.close()


@pytest.fixture
def base(world):
    return f"http://127.0.0.1:{world.port}"


async def while_held(world: World, asking, *, ready: bool):
    """The result of a client's request that is held at first; then a replica is ready or none."""
    task = asyncio.ensure_future(asking)
    other = await world.client()
    try:
        await until(lambda: world.held("m") == 1 or task.done(), "held", TIMEOUT_S)
        await other.send(post("/v1/completions", b'{"model":"m","stream":true}'))
        for _ in range(COMMENTS):
            await other.reader.readuntil(b": waiting for a replica")
        if ready:
            world.route("m", {"a": await world.engine(streams)})
        else:
            world.unroute("m")
        async with asyncio.timeout(TIMEOUT_S):
            return await task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


# -- openai ----------------------------------------------------------------------------------------


@pytest.fixture
async def openais(base):
    client = openai.AsyncOpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0)
    async with client:
        yield client


async def openai_chat(client):
    stream = await client.chat.completions.create(model="m", messages=HELLO, stream=True)
    return "".join([event.choices[0].delta.content or "" async for event in stream])


async def openai_completion(client):
    stream = await client.completions.create(model="m", prompt="Hello", stream=True)
    return "".join([event.choices[0].text async for event in stream])


async def openai_response(client):
    stream = await client.responses.create(model="m", input="Hello", stream=True)
    events = [event async for event in stream]
    if events[-1].type == "error":
        raise RuntimeError(events[-1].message)
    return "".join(e.delta for e in events if e.type == "response.output_text.delta")


@pytest.mark.parametrize("ask", [openai_chat, openai_completion, openai_response])
async def test_openai_reads_the_stream_after_the_comments(world, openais, ask):
    assert await while_held(world, ask(openais), ready=True) == "Hello"


@pytest.mark.parametrize("ask", [openai_chat, openai_completion])
async def test_openai_raises_the_error_after_the_comments(world, openais, ask):
    with pytest.raises(openai.APIError, match="'m' does not exist") as caught:
        await while_held(world, ask(openais), ready=False)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


async def test_openai_returns_the_error_event_of_the_responses_api(world, openais):
    with pytest.raises(RuntimeError, match="'m' does not exist"):
        await while_held(world, openai_response(openais), ready=False)


# -- anthropic -------------------------------------------------------------------------------------


@pytest.fixture
async def anthropics(base):
    client = anthropic.AsyncAnthropic(base_url=base, api_key="none", max_retries=0)
    async with client:
        yield client


async def anthropic_message(client):
    async with client.messages.stream(model="m", max_tokens=9, messages=HELLO) as stream:
        return "".join([text async for text in stream.text_stream])


async def test_anthropic_reads_the_stream_after_the_comments(world, anthropics):
    assert await while_held(world, anthropic_message(anthropics), ready=True) == "Hello"


async def test_anthropic_raises_the_error_after_the_comments(world, anthropics):
    with pytest.raises(anthropic.APIError, match="'m' does not exist") as caught:
        await while_held(world, anthropic_message(anthropics), ready=False)
    assert caught.value.body["error"]["type"] == "not_found_error"


# -- LangChain -------------------------------------------------------------------------------------


def langchain_model(base, api):
    from langchain_openai import ChatOpenAI

    return ChatOpenAI(
        model="m",
        base_url=f"{base}/v1",
        api_key="none",
        max_retries=0,
        use_responses_api=api == "responses",
    )


async def langchain_text(model):
    return "".join([part.text async for part in model.astream("Hello")])


@pytest.mark.clients
@pytest.mark.parametrize("api", ["chat", "responses"])
async def test_langchain_reads_the_stream_after_the_comments(world, base, api):
    asking = langchain_text(langchain_model(base, api))
    assert await while_held(world, asking, ready=True) == "Hello"


@pytest.mark.clients
async def test_langchain_raises_the_error_after_the_comments(world, base):
    with pytest.raises(openai.APIError, match="'m' does not exist"):
        await while_held(world, langchain_text(langchain_model(base, "chat")), ready=False)


# -- Vercel's AI SDK -------------------------------------------------------------------------------


@pytest.fixture
def ai_sdk():
    """The folder with the AI SDK's packages: npm installs those that package.json names."""
    folder = HERE.parents[1] / "build" / "ai-sdk"
    assert shutil.which("node"), "node is not installed"
    assert (folder / "node_modules").is_dir(), f"{folder}: run npm install there, as .ci/run does"
    return folder


async def ai_sdk_text(folder, base, provider):
    script = folder / "stream.mjs"
    script.write_text((HERE / "ai-sdk" / "stream.mjs").read_text())
    process = await asyncio.create_subprocess_exec(
        "node",
        str(script),
        provider,
        base,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={"PATH": os.environ["PATH"]},
    )
    try:
        out, errors = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, errors.decode()
    return json.loads(out)


PROVIDERS = ["compatible", "compatible-completion", "openai", "openai-responses", "anthropic"]


@pytest.mark.clients
@pytest.mark.parametrize("provider", PROVIDERS)
async def test_the_ai_sdk_reads_the_stream_after_the_comments(world, base, ai_sdk, provider):
    asking = ai_sdk_text(ai_sdk, base, provider)
    assert await while_held(world, asking, ready=True) == {"text": "Hello", "error": None}


@pytest.mark.clients
@pytest.mark.parametrize("provider", PROVIDERS)
async def test_the_ai_sdk_reports_the_error_after_the_comments(world, base, ai_sdk, provider):
    result = await while_held(world, ai_sdk_text(ai_sdk, base, provider), ready=False)
    assert result["text"] == ""
    assert "'m' does not exist" in result["error"]
