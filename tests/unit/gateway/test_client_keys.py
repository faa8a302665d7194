"""Clients of OpenAI, Anthropic and Ollama with API keys: exceptions, retries, headers, streams."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import anthropic
import ollama
import openai
import pytest
from fakes.api_keys import CHAT, bearer, keyed, record
from fakes.limited_keys import Rows
from fakes.mock_engine import FAST, serving
from fakes.wire import Message, Wire, answer, post, until

from kubeai._key_table import KeyTable

HELLO: Any = [{"role": "user", "content": "Hello"}]
GOOD, BAD, BOUND, LIMITED, NARROW = "sk-good", "sk-bad", "sk-bound", "sk-limited", "sk-narrow"


@pytest.fixture
async def world(start, request):
    # Ollama's API needs its engine; the others are also served by vLLM.
    kind = getattr(request.node, "callspec", None)
    engine = "OLlama" if kind and kind.params.get("kind") == "ollama" else "VLLM"
    async with serving(*FAST) as mock:
        table = KeyTable.create(4, 1)
        rows = Rows(table)
        row, generation = rows.add("limited")
        narrow, narrows = rows.add("narrow")
        world = await keyed(
            start,
            record("good", GOOD),
            record("bound", BOUND, models="team=search"),
            record("limited", LIMITED, row=row, generation=generation, requests_per_minute=1),
            record("narrow", NARROW, row=narrow, generation=narrows, in_flight_max=1),
        )
        world.context.limits = KeyTable.attach(table.fd, 0)
        address = mock.url.removeprefix("http://")
        world.route("m", {"0": address}, engine=engine, aliases=("gpt-4o",))
        yield world
        world.context.limits.close()
        table.close()


@pytest.fixture
async def client(world) -> AsyncIterator[Callable[..., Any]]:
    """Make a client of a kind with a key."""
    origin = f"http://127.0.0.1:{world.port}"
    async with contextlib.AsyncExitStack() as stack:

        async def client(kind: str, key: str, retries: int = 0) -> Any:
            made: Any
            if kind == "openai":
                made = openai.AsyncOpenAI(
                    base_url=f"{origin}/openai/v1", api_key=key, max_retries=retries
                )
            elif kind == "anthropic":
                made = anthropic.AsyncAnthropic(base_url=origin, api_key=key, max_retries=retries)
            else:
                headers = {"Authorization": f"Bearer {key}"}
                made = ollama.AsyncClient(host=origin, headers=headers)
            stack.push_async_callback(made.close)
            return made

        yield client


async def ask(client: Any, model: str = "m", **options: Any) -> Any:
    if isinstance(client, ollama.AsyncClient):
        return await client.chat(model, HELLO, options={"num_predict": 5}, **options)
    chats = client.chat.completions if isinstance(client, openai.AsyncOpenAI) else client.messages
    return await chats.create(model=model, messages=HELLO, max_tokens=5, **options)


async def streamed(client: Any, model: str = "m", **options: Any) -> list[Any]:
    return [part async for part in await ask(client, model, stream=True, **options)]


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("openai", openai.AuthenticationError),
        ("anthropic", anthropic.AuthenticationError),
        ("ollama", ollama.ResponseError),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_wrong_key_is_an_authentication_error(client, kind, error, stream):
    with pytest.raises(
        error, match=r"The API key in (Authorization|x-api-key) is not valid"
    ) as got:
        await (streamed if stream else ask)(await client(kind, BAD))
    assert got.value.status_code == 401


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("openai", openai.PermissionDeniedError),
        ("anthropic", anthropic.PermissionDeniedError),
        ("ollama", ollama.ResponseError),
    ],
)
@pytest.mark.parametrize("model", ["m", "gpt-4o", "none"])
async def test_a_model_that_the_key_may_not_use_is_a_permission_error(client, kind, error, model):
    with pytest.raises(error, match="does not exist or this API key may not use it") as got:
        await ask(await client(kind, BOUND), model)
    assert got.value.status_code == 403


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("openai", openai.RateLimitError),
        ("anthropic", anthropic.RateLimitError),
        ("ollama", ollama.ResponseError),
    ],
)
async def test_beyond_a_limit_clients_raise_an_error_that_says_when_to_retry(client, kind, error):
    limited = await client(kind, LIMITED)
    await ask(limited)
    with pytest.raises(error, match="may send 1 request per minute") as got:
        await streamed(limited)
    assert got.value.status_code == 429
    if kind != "ollama":  # whose error has no headers
        headers = got.value.response.headers
        assert 50 < int(headers["retry-after"]) <= 61
        assert headers["x-ratelimit-limit-requests"] == "1"
        assert headers["x-ratelimit-remaining-requests"] == "0"
        assert headers["x-ratelimit-reset-requests"].startswith("1m")


@pytest.mark.parametrize("kind", ["openai", "anthropic", "ollama"])
async def test_the_key_of_each_client_is_accepted(client, kind):
    good = await client(kind, GOOD)
    assert (await ask(good)).model == "m"
    assert len(await streamed(good)) >= 5


async def test_a_stream_has_its_usage_only_for_a_client_that_asks(world, client):
    good = await client("openai", GOOD)
    world.context.meter.take()
    plain = await streamed(good, "gpt-4o")
    assert {part.model for part in plain} == {"gpt-4o"}
    assert all(part.choices and part.usage is None for part in plain)
    asked = await streamed(good, "gpt-4o", stream_options={"include_usage": True})
    assert len(asked) == len(plain) + 1
    assert asked[-1].usage.completion_tokens == 5
    await until(lambda: world.in_flight("m") == 0)
    (row,) = world.context.meter.take()
    assert (row.key, row.model, row.requests) == ("good", "m", 2)
    assert (row.estimated_requests, row.completion_tokens) == (0, 10)


@pytest.mark.parametrize("module", [openai, anthropic])
async def test_clients_repeat_a_request_whose_key_has_too_many_in_flight(world, module):
    ended = asyncio.Event()

    async def script(wire: Wire, request: Message) -> None:
        await ended.wait()
        await wire.send(answer(200, b"{}"))

    async def note(response: Any) -> None:
        if response.status_code == 429:
            assert response.headers["retry-after"] == "1"
            ended.set()

    world.route("m", {"0": await world.engine(script)})
    wire = await world.client()
    await wire.send(post(CHAT, b'{"model":"m"}', bearer(NARROW)))
    await until(lambda: world.in_flight("m") == 1)
    origin = f"http://127.0.0.1:{world.port}/openai/v1"
    hooks = {"response": [note]}
    async with module.DefaultAsyncHttpxClient(event_hooks=hooks) as http:
        if module is openai:
            options = {"base_url": origin, "api_key": NARROW, "http_client": http}
            await ask(openai.AsyncOpenAI(max_retries=2, **options))
        else:
            options = {"base_url": origin[:-3], "api_key": NARROW, "http_client": http}
            await ask(anthropic.AsyncAnthropic(max_retries=2, **options))
    assert ended.is_set()
    assert (await wire.answer()).status == 200
