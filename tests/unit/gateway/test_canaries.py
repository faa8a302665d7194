"""A part of a Model's clients is served by another Model, and each client always by the same."""

import json
from collections import Counter

import pytest
from fakes.chats import ask, failing
from fakes.wire import Message, Wire, answer, post
from fakes.world import World

from kubeai._keys import Key
from kubeai.gateway._names import bucket_of
from kubeai.gateway.proxy import Proxy
from kubeai.routing.keys import KeyRecord

FORM = (
    b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\nm\r\n'
    b'--x\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\naudio\r\n--x--\r\n'
)


async def echo(wire: Wire, request: Message) -> None:
    try:
        name = json.loads(request.body)["model"]
    except ValueError:
        name = "form"
    await wire.send(
        answer(200, json.dumps({"model": name}).encode(), "Content-Type: application/json")
    )


@pytest.fixture
async def split(start):
    """A world whose Model `m` has a canary for a percentage of the clients."""

    async def begin(percent: int = 30, stable=echo, canary=echo, **fields) -> World:
        world = await start(retries=0)
        world.route("new", {"new-1": await world.engine(canary)} if canary else {}, **fields)
        world.route(
            "m",
            {"m-1": await world.engine(stable)},
            canary="new",
            canary_percent=percent,
            aliases=("x",),
            adapters=("fin",),
        )
        return world

    return begin


def prompt(number: int, *more: str, model: str = "m") -> bytes:
    contents = [f"prompt {number}", *more]
    return ask(model, messages=[{"role": "user", "content": text} for text in contents])


async def served_by(world: World, request: bytes, asked: str = "m") -> str:
    """Which Model answers. The response names the one that was asked for."""
    wire = await world.client()
    await wire.send(request)
    answered = await wire.answer()
    wire.close()
    assert (answered.status, json.loads(answered.body)["model"]) in ((200, asked), (200, "form"))
    return answered.one("x-kubeai-model") or "m"


async def test_the_canary_serves_its_share_of_the_prompts(split):
    world = await split(30)
    served = Counter([await served_by(world, prompt(n)) for n in range(200)])
    assert 35 <= served["new"] <= 85
    assert served["m"] == 200 - served["new"]
    assert world.outcomes("new")["2xx"] == served["new"]


@pytest.mark.parametrize(("percent", "name"), [(0, "m"), (100, "new")])
async def test_the_share_may_be_nothing_or_all(split, percent, name):
    world = await split(percent)
    assert {await served_by(world, prompt(n)) for n in range(20)} == {name}


async def test_a_conversation_stays_with_its_model(split):
    world = await split(50)
    for n in range(20):
        first = await served_by(world, prompt(n))
        assert await served_by(world, prompt(n, "an answer", "another question")) == first
        assert await served_by(world, prompt(n, model="x"), "x") == first


async def test_a_larger_share_keeps_the_clients_that_it_had(split):
    world = await split(20)
    few = {n for n in range(60) if await served_by(world, prompt(n)) == "new"}
    world.route("m", world.routes["m"].endpoints and {
        "m-1": world.routes["m"].endpoints[0].address
    }, canary="new", canary_percent=60)  # fmt: skip
    many = {n for n in range(60) if await served_by(world, prompt(n)) == "new"}
    assert few < many


async def test_a_key_is_always_served_by_the_same_model(split, monkeypatch):
    world = await split(50)
    names = set()
    for number in range(20):
        key = Key(KeyRecord(f"key-{number}", b"", ""))
        monkeypatch.setattr(Proxy, "_key", key)
        served = {await served_by(world, prompt(n)) for n in range(3)}
        assert len(served) == 1
        assert served == {"new" if bucket_of("m", key.name.encode()) < 50 else "m"}
        names |= served
    assert names == {"m", "new"}


async def test_requests_without_a_prompt_are_split_by_address(split):
    world = await split(50)
    expected = "new" if bucket_of("m", b"127.0.0.1") < 50 else "m"
    form = post("/v1/audio/transcriptions", FORM, "Content-Type: multipart/form-data; boundary=x")
    assert await served_by(world, form) == expected
    assert await served_by(world, ask(path="/tokenize")) == expected


async def test_large_bodies_are_split_too(split):
    world = await split(100)
    assert await served_by(world, prompt(1, "x" * (2 << 20))) == "new"


async def test_the_shares_of_two_models_are_independent():
    both = sum(
        bucket_of("a", b"%d" % n) < 50 and bucket_of("b", b"%d" % n) < 50 for n in range(1000)
    )
    assert 200 < both < 300


async def test_a_canary_that_is_not_there_or_not_allowed_serves_nobody(split):
    world = await split(100, labels={"team": "a"})
    selector = "X-Label-Selector: team!=a"
    assert await served_by(world, ask("m", selector)) == "m"
    assert await served_by(world, ask()) == "new"
    world.unroute("new")
    assert await served_by(world, ask()) == "m"


async def test_an_adapter_is_only_served_by_a_canary_that_has_it(split):
    world = await split(100)
    world.route("m", {"m-1": (await world.engine(echo), ["fin"])}, adapters=("fin",),
                canary="new", canary_percent=100)  # fmt: skip
    assert await served_by(world, ask("m_fin"), "m_fin") == "m"
    world.route("new", {"n": (await world.engine(echo), ["fin"])}, adapters=("fin",))
    assert await served_by(world, ask("m_fin"), "m_fin") == "new"


async def test_a_canary_that_fails_is_replaced_by_its_model(split):
    world = await split(100, canary=failing(500))
    assert await served_by(world, ask()) == "m"
    assert dict(world.context.events._counts) == {("fallback", ("new", "m", "failing")): 1}


async def test_a_canary_that_is_not_ready_is_replaced_by_its_model_at_once(split):
    world = await split(100, canary=None)
    world.route("m", {"m-1": await world.engine(echo)}, canary="new", canary_percent=100,
                wait_before_fallback_s=60.0)  # fmt: skip
    assert await served_by(world, ask()) == "m"
    assert world.demanded == ["new"]


async def test_a_canary_that_fails_gives_an_adapter_back(split):
    world = await split(100)
    world.route("m", {"m-1": (await world.engine(echo), ["fin"])}, adapters=("fin",),
                canary="new", canary_percent=100)  # fmt: skip
    world.route("new", {"n": (await world.engine(failing(500)), ["fin"])}, adapters=("fin",))
    assert await served_by(world, ask("m_fin"), "m_fin") == "m"
    (request,) = [r for e in world.engines.values() for r in e.requests if b'"fin"' in r.body][-1:]
    assert json.loads(request.body)["model"] == "fin"


async def test_a_canary_has_no_canary_of_its_own(split):
    world = await split(100, canary_percent=100)
    address = world.routes["new"].endpoints[0].address
    world.route("newer", {"newer-1": await world.engine(echo)})
    world.route("new", {"new-1": address}, canary="newer", canary_percent=100)
    assert await served_by(world, ask()) == "new"
