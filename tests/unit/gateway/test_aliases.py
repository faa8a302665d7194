"""A Model answers to its aliases: requests are routed and renamed, lists show them."""

import gzip
import json
from urllib.parse import quote

import httpx
import pytest
from fakes.mock_engine import FAST, serving
from fakes.wire import CHUNKED, Message, Wire, answer, chunk, post, until
from fakes.world import World

from kubeai.gateway.local_routes import make_app
from kubeai.gateway.proxy import Proxy

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello"}]
ALIASES = ("meta-llama/Llama-3.1-8B-Instruct", "gpt-4o", "qwen2.5:7b", "my_model", 'Ü "quoted" \\')
EVENTS = b'data: {"model":"m","choices":[{"text":"\\"model\\":\\"m\\""}]}\n\ndata: [DONE]\n\n'


async def echo(wire: Wire, request: Message) -> None:
    """An engine that answers with the model that it is asked for, as engines do."""
    asked = json.loads(request.body)
    if asked.get("stream"):
        name = json.dumps(asked["model"]).encode()
        await wire.send(CHUNKED + chunk(EVENTS.replace(b'"m"', name, 1)) + chunk(b""))
        return
    body = json.dumps({"model": asked["model"], "object": "chat.completion"}).encode()
    await wire.send(answer(200, body, "Content-Type: application/json"))


@pytest.fixture
async def world(start):
    world = await start()
    engine = await world.engine(echo)
    world.route("m", {"pod-1": (engine, ["fin"])}, adapters=("fin",), aliases=ALIASES)
    return world


async def got(world: World, model: object, *headers: str, path: str = CHAT, **fields) -> Message:
    wire = await world.client()
    await wire.send(post(path, json.dumps({"model": model, **fields}).encode(), *headers))
    return await wire.answer()


def asked(world: World) -> list[str]:
    """The models that the engines were asked for."""
    return [
        json.loads(request.body)["model"]
        for engine in world.engines.values()
        for request in engine.requests
    ]


@pytest.mark.parametrize("alias", ALIASES)
async def test_the_engine_gets_the_models_name_and_the_client_its_own(world, alias):
    answered = await got(world, alias, messages=[])
    assert (answered.status, json.loads(answered.body)["model"]) == (200, alias)
    assert answered.one("x-kubeai-model") is None
    assert asked(world) == ["m"]
    assert world.outcomes("m")["2xx"] == 1


@pytest.mark.parametrize("alias", ALIASES)
async def test_each_event_of_a_stream_has_the_alias(world, alias):
    answered = await got(world, alias, stream=True)
    name = json.dumps(alias).encode()
    assert answered.body == EVENTS.replace(b'"m"', name, 1)


@pytest.mark.parametrize("alias", ALIASES)
async def test_an_alias_takes_the_fast_path(world, alias, monkeypatch):
    monkeypatch.setattr(Proxy, "on_body", lambda self: self.answer(500, b"the slow path"))
    assert (await got(world, alias)).status == 200


async def test_a_name_with_escapes_is_answered_as_it_was_written(world):
    wire = await world.client()
    await wire.send(post(CHAT, rb'{"model":"\u0067pt-4o"}'))
    assert b'"\\u0067pt-4o"' in (await wire.answer()).body


@pytest.mark.parametrize("model", ["m", "gpt-4o", "m_fin"])
async def test_the_engine_is_asked_for_a_response_that_can_be_renamed(world, model):
    await got(world, model, "Accept-Encoding: gzip")
    ((request,),) = [engine.requests for engine in world.engines.values()]
    assert request.all("accept-encoding") == ["gzip" if model == "m" else "identity"]


@pytest.mark.parametrize("alias", ["gpt-4o", "my_model", ALIASES[0]])
async def test_an_alias_takes_an_adapter(world, alias):
    answered = await got(world, f"{alias}_fin")
    assert json.loads(answered.body)["model"] == f"{alias}_fin"
    assert asked(world) == ["fin"]


@pytest.mark.parametrize(
    "model", ["gpt-4", "gpt-4o_x", "GPT-4o", "gpt-4o ", "my", "_", "m_x", "x_fin"]
)
async def test_other_names_are_not_found(world, model):
    answered = await got(world, model)
    assert answered.status == 404
    assert json.loads(answered.body)["error"]["code"] == "model_not_found"


async def test_a_models_own_name_and_adapters_win_over_an_alias(world):
    other = await world.engine(echo)
    world.route("n", {"pod-2": other}, aliases=("m", "m_fin"))
    for model in ("m", "m_fin"):
        assert json.loads((await got(world, model)).body)["model"] == model
    assert other.requests == []


async def test_an_alias_that_moves_to_another_model_is_never_missing(world):
    other = await world.engine(echo)
    world.route("n", {"pod-2": other}, aliases=("gpt-4o",))
    assert (await got(world, "gpt-4o")).status == 200
    world.route("m", {}, aliases=ALIASES[2:])
    assert (await got(world, "gpt-4o")).status == 200
    assert len(other.requests) == 2
    world.unroute("n")
    assert (await got(world, "gpt-4o")).status == 404
    assert world.table.aliases == dict.fromkeys(ALIASES[2:], "m")


async def test_selectors_apply_to_aliases(start):
    world = await start()
    engine = await world.engine(echo)
    world.route("m", {"pod-1": engine}, aliases=("x",), labels={"team": "a"})
    assert (await got(world, "x", "X-Label-Selector: team=a")).status == 200
    assert (await got(world, "x", "X-Label-Selector: team=b")).status == 404


async def test_large_and_compressed_bodies_are_rewritten(world):
    body = json.dumps({"model": "gpt-4o", "prompt": "x" * (2 << 20)}).encode()
    wire = await world.client()
    await wire.send(post(CHAT, body))
    assert b'"gpt-4o"' in (await wire.answer()).body
    small = gzip.compress(b'{"model":"gpt-4o"}')
    await wire.send(post(CHAT, small, "Content-Encoding: gzip"))
    assert b'"gpt-4o"' in (await wire.answer()).body
    assert asked(world) == ["m", "m"]


async def test_both_names_share_the_prompts_that_an_engine_has_cached(start):
    world = await start(tick_s=60)
    engines = {name: await world.engine(echo) for name in "ab"}
    world.route("m", engines, strategy="PrefixCache", aliases=("x",))
    prompt = [{"role": "user", "content": "the same long beginning " * 200}]
    for model in ("m", "x") * 4:
        assert (await got(world, model, messages=prompt)).status == 200
    assert sorted(len(engine.requests) for engine in engines.values()) == [0, 8]


async def test_a_held_request_waits_for_the_model(world):
    world.route("m", {}, aliases=("x",))
    wire = await world.client()
    await wire.send(post(CHAT, b'{"model":"x"}'))
    await until(lambda: world.held("m") == 1)
    assert world.demanded == ["m"]
    world.route("m", {"pod-1": await world.engine(echo)}, aliases=("x",))
    assert json.loads((await wire.answer()).body)["model"] == "x"


# -- lists -----------------------------------------------------------------------------------------


@pytest.fixture
async def listing(start):
    world = await start(local_routes=make_app)
    world.route(
        "m",
        {},
        engine="OLlama",
        adapters=("fin",),
        aliases=("a/b", "q:7b"),
        created_s=1_700_000_000,
    )
    world.route("n", {}, engine="OLlama", aliases=("q:7b_fin",), features=("TextGeneration",))
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{world.port}") as client:
        yield world, client


async def test_the_list_of_models_has_the_aliases(listing):
    _, client = listing
    ids = [item["id"] for item in (await client.get("/v1/models")).json()["data"]]
    assert ids == ["m", "m_fin", "a/b", "a/b_fin", "q:7b", "n", "q:7b_fin"]
    for name in ids:
        found = await client.get("/v1/models/" + quote(name, safe=""))
        assert (found.status_code, found.json()["id"]) == (200, name)
    assert (await client.get("/v1/models/other")).status_code == 404


async def test_ollamas_lists_have_the_aliases(listing):
    _, client = listing
    names = [model["name"] for model in (await client.get("/api/tags")).json()["models"]]
    assert names == ["m:latest", "a/b:latest", "q:7b", "n:latest", "q:7b_fin"]
    for name in (*names, "a/b", "m"):
        assert (await client.post("/api/show", json={"model": name})).status_code == 200
    assert (await client.post("/api/show", json={"model": "q"})).status_code == 404
    assert (await client.get("/api/ps")).json()["models"] == []


@pytest.mark.parametrize("name", ["x:7b", "y", "y:latest", "z:latest", "z"])
async def test_ollamas_clients_chat_by_alias(start, name):
    world = await start()
    async with serving(*FAST) as served:
        address = served.url.removeprefix("http://")
        aliases = ("x:7b", "y", "z:latest")
        world.route("m", {"m-0": address}, engine="OLlama", aliases=aliases)
        answered = await got(world, name, path="/api/chat", messages=HELLO, stream=False)
        assert (answered.status, json.loads(answered.body)["model"]) == (200, name)
