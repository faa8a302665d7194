"""Ollama's own client, at a gateway whose Models have Ollama's API and others."""

import contextlib
import json

import httpx
import ollama
import pytest
from fakes.mock_engine import FAST, serving
from fakes.wire import Message, Wire, answer, chunk, post, says, until
from fakes.world import World

from kubeai.gateway.local_routes import make_app
from kubeai.routing.routes import Block

HELLO = [{"role": "user", "content": "Hello"}]
NDJSON = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n"
)


@pytest.fixture
async def start():
    """A worker with its real local routes, and a client of it."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(path: str = "", **config) -> tuple[World, ollama.AsyncClient]:
            world = await World.start(local_routes=make_app, **config)
            stack.push_async_callback(world.close)
            client = ollama.AsyncClient(host=f"http://127.0.0.1:{world.port}{path}")
            stack.push_async_callback(client.close)
            return world, client

        yield start


@pytest.fixture
async def mock():
    async with serving(*FAST) as served:
        yield served


def route(world: World, served, model: str = "m", **fields) -> None:
    fields = {"engine": "OLlama", "created_s": 1_700_000_000, **fields}
    world.route(model, {f"{model}-0": served.url.removeprefix("http://")}, **fields)


@pytest.mark.parametrize("path", ["", "/openai"])
@pytest.mark.parametrize("name", ["m", "m:latest"])
async def test_the_client_chats_generates_and_embeds(start, mock, path, name):
    world, client = await start(path)
    route(world, mock)
    options = {"num_predict": 7}
    chat = await client.chat(name, messages=HELLO, options=options)
    assert chat.message.content.startswith("mock ")
    assert (chat.done, chat.done_reason, chat.eval_count) == (True, "length", 7)
    parts = [part async for part in await client.chat(name, HELLO, stream=True, options=options)]
    assert len(parts) == 8
    assert "".join(part.message.content for part in parts) == chat.message.content
    assert [part.done for part in parts] == [False] * 7 + [True]
    whole = await client.generate(name, "Hello", options=options)
    parts = [p async for p in await client.generate(name, "Hello", stream=True, options=options)]
    assert "".join(part.response for part in parts) == whole.response != ""
    vectors = (await client.embed(name, input=["one", "two"])).embeddings
    assert len(vectors) == 2
    assert (await client.embeddings(name, "one")).embedding == vectors[0]
    assert world.outcomes("m")["2xx"] == 6


async def test_the_client_gets_decisions(start, mock):
    world, client = await start()
    route(world, mock)
    decision = await client.systemone(
        "m",
        "The lights are on",
        {
            "on": {"type": "noul", "instructions": "Are they?"},
            "room": {"type": "choice", "instructions": "?", "criteria": {"a": "on", "b": None}},
            "how": {"type": "score", "instructions": "?", "criteria": ["dark", "bright"]},
        },
    )
    assert set(decision.answers) == {"on", "room", "how"}
    assert sum(decision.answers["room"].probabilities.values()) == pytest.approx(1)


async def test_models_are_listed_under_names_that_requests_may_use(start, mock):
    world, client = await start()
    route(world, mock, "chat", features=("TextGeneration",))
    route(world, mock, "embed", features=("TextEmbedding",))
    world.route("idle", {}, engine="SGLang")
    world.route("other", {}, engine="VLLM")
    listed = (await client.list()).models
    assert [each.model for each in listed] == ["chat:latest", "embed:latest", "idle:latest"]
    assert listed[0].modified_at.timestamp() == 1_700_000_000
    assert len({each.digest for each in listed}) == 3
    assert all(len(each.digest) == 64 and each.details is not None for each in listed)
    assert [each.model for each in (await client.ps()).models] == ["chat:latest", "embed:latest"]
    for name in ("chat", "chat:latest"):
        shown = await client.show(name)
        assert shown.capabilities == ["completion"]
        assert shown.modified_at == listed[0].modified_at
    assert (await client.show("embed")).capabilities == ["embedding"]
    for name in ("nope", "chat:7b", ":latest"):
        with pytest.raises(ollama.ResponseError) as caught:
            await client.show(name)
        assert caught.value.status_code == 404
    assert world.demanded == []


async def test_the_lists_obey_label_selectors(start, mock):
    world, _ = await start()
    route(world, mock, "a", labels={"team": "a"})
    route(world, mock, "b", labels={"team": "b"})
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{world.port}") as http:
        for path in ("/api/tags", "/openai/api/ps"):
            found = (await http.get(path, headers={"X-Label-Selector": "team=b"})).json()["models"]
            assert [each["name"] for each in found] == ["b:latest"]
        hidden = await http.post(
            "/api/show", json={"name": "a"}, headers={"X-Label-Selector": "team=b"}
        )
        assert hidden.status_code == 404
        bad = await http.get("/api/tags", headers={"X-Label-Selector": "team in"})
        assert (bad.status_code, list(bad.json())) == (400, ["error"])
        assert (await http.get("/api/version")).json().keys() == {"version"}
        assert (await http.head("/")).status_code == 200


async def test_models_cannot_be_changed(start, mock):
    world, client = await start()
    route(world, mock)
    for asking in (
        client.pull("m"),
        client.push("m"),
        client.copy("m", "n"),
        client.delete("m"),
        client.create("n", from_="m"),
    ):
        with pytest.raises(ollama.ResponseError, match="Models in Kubernetes") as caught:
            await asking
        assert caught.value.status_code == 404
    assert mock.mock.request_log.total == 0


async def test_a_model_of_another_engine_is_an_error_that_says_so(start):
    world, client = await start()
    engine = await world.engine(says(b"{}"))
    world.route("m", {"0": engine}, engine="VLLM")
    for asking in (
        client.chat("m", HELLO),
        client.generate("m", "Hello"),
        client.embed("m", "Hello"),
        client.show("m"),
    ):
        with pytest.raises(ollama.ResponseError, match="served by VLLM") as caught:
            await asking
        assert caught.value.status_code == 400
    assert engine.requests == []


@pytest.mark.parametrize(
    ("config", "fields", "status", "text"),
    [
        ({"hold_timeout_s": 0.01}, {}, 504, "became ready in time"),
        ({"hold_max_requests": 0}, {}, 503, "Too many requests"),
        ({}, {"block": Block("Broken", "it is", 0.0, False)}, 503, "Broken: it is"),
    ],
)
async def test_the_gateways_errors_have_ollamas_shape(start, config, fields, status, text):
    world, client = await start(**config)
    world.route("m", {}, engine="OLlama", **fields)
    with pytest.raises(ollama.ResponseError, match=text) as caught:
        await client.chat("m", HELLO)
    assert caught.value.status_code == status
    with pytest.raises(ollama.ResponseError, match="'nope' does not exist") as caught:
        await client.chat("nope", HELLO)
    assert caught.value.status_code == 404


@pytest.mark.parametrize("stream", [b"", b',"stream":true', b',"stream":null'])
async def test_a_held_stream_of_json_lines_has_no_comments(start, stream):
    world, _ = await start(hold_comment_after_s=0.01, hold_comment_interval_s=0.01)

    async def lines(wire: Wire, request: Message) -> None:
        await wire.send(NDJSON, chunk(b'{"done":true}\n'), b"0\r\n\r\n")

    world.route("m", {}, engine="OLlama")
    body = b'{"model":"m:latest"' + stream + b"}"
    client = await world.client()
    await client.send(answer_head(body) + body)
    await until(lambda: world.held("m") == 1, "the request is held")
    other = await world.client()  # held later, and gets comments
    await other.send(post(body=b'{"model":"m","stream":true}'))
    await other.reader.readuntil(b": waiting")
    await other.reader.readuntil(b": waiting")
    other.close()
    engine = await world.engine(lines)
    world.route("m", {"0": engine}, engine="OLlama")
    found = await client.answer()
    assert found.one("content-type") == "application/x-ndjson"
    assert json.loads(found.body) == {"done": True}
    assert engine.requests[0].body == body


def answer_head(body: bytes) -> bytes:
    return b"POST /api/chat HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n" % len(body)


async def test_an_engines_own_error_passes_through(start):
    world, client = await start()

    async def script(wire: Wire, request: Message) -> None:
        await wire.send(answer(400, b'{"error":"does not support chat"}'))

    world.route("m", {"0": await world.engine(script)}, engine="OLlama")
    with pytest.raises(ollama.ResponseError, match="does not support chat"):
        await client.chat("m", HELLO)
