"""Each inference request is in the journal when it has ended, with the reported tokens."""

import asyncio
import json

import pytest
from fakes.wire import CHUNKED, answer, chunk, post, says, until

from kubeai._readings import picks

USAGE = {
    "prompt_tokens": 12,
    "completion_tokens": 7,
    "prompt_tokens_details": {"cached_tokens": 8},
}
CHAT = json.dumps({"choices": [{"message": {"content": "hi"}}], "usage": USAGE}).encode()
PROMPT = b'{"model":"m","messages":[{"role":"user","content":"%b"}]}' % (b"x" * 400)
STREAM = PROMPT[:-1] + b',"stream":true}'


async def entries(world, n=1):
    await until(lambda: len(world.journal.read(0)[0]) >= n, "the journal has the request")
    found, written, missed = world.journal.read(0)
    assert (written, missed) == (n, 0)
    return found


def reported(world):
    counts = picks(world.supervisors, world.publisher.row("m"))
    return tuple(counts[f"reported_{what}_tokens"] for what in ("prompt", "cached", "output"))


async def test_a_chat(start):
    world = await start()
    world.route("m", {"pod": await world.engine(says(CHAT))})
    client = await world.client()
    await client.send(post("/openai/v1/chat/completions", PROMPT, "X-Request-Id: mine"))
    assert (await client.answer()).status == 200
    (entry,) = await entries(world)
    route = world.publisher.route("m")
    (endpoint,) = route.endpoints
    assert (entry.model_row, entry.model_generation) == (route.row, route.generation)
    assert (entry.row, entry.generation) == (endpoint.row, endpoint.generation)
    assert (entry.status, entry.end, entry.pick, entry.retries) == (200, "whole", "least", 0)
    assert (entry.id, entry.streamed) == ("mine", False)
    assert (entry.prompt_tokens, entry.cached_tokens, entry.output_tokens) == (12, 8, 7)
    assert 90 < entry.estimated_tokens < 120
    assert 0 < entry.first_s <= entry.duration_s < 5
    assert entry.waited_s == 0
    assert reported(world) == (12, 8, 7)


async def test_why_the_hash_ring_led_to_an_endpoint(start):
    world = await start()
    arrived, go = [], asyncio.Event()

    async def script(wire, request):
        arrived.append(request)
        await go.wait()
        await wire.send(answer(200, CHAT))

    engines = {name: await world.engine(script) for name in ("a", "b")}
    world.route("m", engines, strategy="PrefixHash")
    clients = [await world.client() for _ in range(4)]
    for client in clients:
        await client.send(post("/openai/v1/chat/completions", PROMPT))
    await until(lambda: len(arrived) == 4, "the engines have them")
    go.set()
    found = await entries(world, 4)
    # The first ones fill their key's endpoint up to the bound.
    first = {entry.row for entry in found if entry.pick == "hashed"}
    other = {entry.row for entry in found if entry.pick == "bounded"}
    assert len(first) == len(other) == 1
    assert first != other


async def test_a_stream_whose_end_comes_in_pieces(start):
    async def script(wire, request):
        await wire.send(CHUNKED + chunk(b'data: {"choices":[]}\n\n'))
        await wire.send(
            chunk(b"data: " + json.dumps({"usage": USAGE, "choices": []}).encode() + b"\n\n")
        )
        await until(lambda: came, "the client has the tokens")
        await wire.send(chunk(b"data: [DONE]\n\n"))
        await until(lambda: len(came) > 1, "the client has the end")
        await wire.send(b"0\r\n\r\n")

    came = []
    world = await start()
    world.route("m", {"pod": await world.engine(script)}, strategy="PrefixCache")
    client = await world.client()
    await client.send(post(body=STREAM))
    for part in (b"cached_tokens", b"[DONE]", b"0\r\n\r\n"):
        await client.reader.readuntil(part)
        came.append(part)
    (entry,) = await entries(world)
    assert (entry.streamed, entry.pick) == (True, "new")
    assert (entry.prompt_tokens, entry.cached_tokens, entry.output_tokens) == (12, 8, 7)


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (answer(200, CHAT, "Content-Encoding: gzip"), 200),
        (answer(400, CHAT), 400),
        (answer(200, b"{}"), 200),
        (answer(200, CHAT + b"x" * 3000), 200),
    ],
)
async def test_tokens_that_are_not_reported_are_unknown(start, sent, status):
    async def script(wire, request):
        await wire.send(sent)

    world = await start()
    world.route("m", {"pod": await world.engine(script)})
    client = await world.client()
    await client.send(post(body=PROMPT))
    assert (await client.answer()).status == status
    (entry,) = await entries(world)
    assert entry.status == status
    assert (entry.prompt_tokens, entry.cached_tokens, entry.output_tokens) == (None, None, None)
    assert reported(world) == (0, 0, 0)


async def test_tokens_of_a_response_with_the_coding_identity_are_known(start):
    async def script(wire, request):
        await wire.send(answer(200, CHAT, "Content-Encoding: Identity"))

    world = await start()
    world.route("m", {"pod": await world.engine(script)})
    client = await world.client()
    await client.send(post(body=PROMPT))
    await client.answer()
    (entry,) = await entries(world)
    assert entry.prompt_tokens is not None


async def test_a_response_that_breaks_off_reports_nothing(start):
    async def script(wire, request):
        await wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n" + CHAT)
        wire.close()

    world = await start()
    world.route("m", {"pod": await world.engine(script)})
    client = await world.client()
    await client.send(post(body=PROMPT))
    await client.head()
    (entry,) = await entries(world)
    assert (entry.status, entry.end, entry.prompt_tokens) == (200, "broken", None)


async def test_a_client_that_leaves_while_it_waits(start):
    world = await start()
    world.route("m", {})
    client = await world.client()
    await client.send(post(body=PROMPT))
    await until(lambda: world.held("m") == 1)
    client.close()
    (entry,) = await entries(world)
    assert (entry.status, entry.end, entry.row, entry.pick) == (0, "left", -1, None)
    assert entry.first_s is None


async def test_the_wait_for_a_replica_and_retries_are_noted(start):
    async def dies(wire, request):
        wire.close()

    world = await start()
    world.route("m", {})
    client = await world.client()
    await client.send(post(body=PROMPT))
    await until(lambda: world.held("m") == 1)
    good = await world.engine(says(CHAT))
    world.route("m", {"good": good})
    assert (await client.answer()).status == 200
    world.route("m", {"a-dying": await world.engine(dies), "good": good})
    statuses = []
    for _ in range(2):  # one of them begins at the other one
        await client.send(post(body=PROMPT))
        statuses.append((await client.answer()).status)
    assert statuses == [200, 200]
    first, *others = await entries(world, 3)
    assert 0 < first.waited_s <= first.duration_s
    assert sorted(entry.retries for entry in others) == [0, 1]


async def test_requests_for_unknown_models_and_other_routes_are_not_entered(start):
    world = await start()
    world.route("m", {"pod": await world.engine(says(CHAT))})
    client = await world.client()
    await client.send(post(body=b'{"model":"other","messages":[]}'))
    assert (await client.answer()).status == 404
    await client.send(b"GET /openai/v1/models HTTP/1.1\r\nHost: x\r\n\r\n")
    await client.answer()
    assert world.journal.read(0) == ([], 0, 0)


async def test_without_a_journal_requests_are_served(start):
    world = await start()
    world.context.journal = None
    world.route("m", {"pod": await world.engine(says(CHAT))})
    client = await world.client()
    await client.send(post(body=PROMPT))
    assert (await client.answer()).status == 200
    assert reported(world) == (12, 8, 7)


def conversation(size, **more):
    content = [{"type": "text", "text": "x" * size}, *more.get("parts", ())]
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": content}]}).encode()


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 2000}}


@pytest.mark.parametrize(
    ("body", "tokens", "per_byte"),
    [
        (conversation(4000), 2000, 0.5),
        (conversation(4000), 10**8, 1.0),  # an engine that lies
        (conversation(4000), 1, 1 / 16),
        (conversation(100), 1000, 0.25),  # the chat template's tokens would count
        (conversation(4000, parts=[IMAGE]), 4000, 0.25),
    ],
)
async def test_estimates_follow_the_tokens_that_engines_report(start, body, tokens, per_byte):
    usage = {"prompt_tokens": tokens, "completion_tokens": 1}
    world = await start()
    world.route("m", {"pod": await world.engine(says(json.dumps({"usage": usage}).encode()))})
    picker = world.table.find("m").picker
    assert picker.tokens_per_byte == 0.25
    client = await world.client()
    for _ in range(150):
        await client.send(post("/openai/v1/chat/completions", body))
        assert (await client.answer()).status == 200
    assert picker.tokens_per_byte == pytest.approx(per_byte, rel=0.03)
    if IMAGE not in json.loads(body)["messages"][0]["content"]:
        last = (await entries(world, 150))[-1]
        assert last.estimated_tokens == pytest.approx(per_byte * len(body), rel=0.1, abs=15)
