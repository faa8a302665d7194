"""Requests with keys, through real workers, to metrics and ConfigMaps."""

import asyncio
import hashlib
import json
import re

import aiohttp
import pytest
from fakes.fleet import Fleet
from fakes.kube import FakeKube
from fakes.wire import CHUNKED, Engine, answer, chunk, until

from kubeai.api.api_key import ApiKey
from kubeai.api.usage import UsageCounts, decode_usage
from kubeai.routing.routes import Endpoint, Route

USAGE = b'{"prompt_tokens":12,"completion_tokens":7,"prompt_tokens_details":{"cached_tokens":8}}'
TOKEN = b'data: {"choices":[{"delta":{"content":"hi"}}]}\n\n'
REPORT = b'data: {"choices":[],"usage":%b}\n\n' % USAGE
DONE = b"data: [DONE]\n\n"


async def script(wire, request):
    asked = b"include_usage" in request.body
    await wire.send(CHUNKED, chunk(TOKEN), chunk(REPORT) if asked else b"", chunk(DONE))
    await wire.send(chunk(b""))


@pytest.fixture
async def served():
    engine = await Engine(script).start()
    route = Route("m", "VLLM", endpoints=(Endpoint("pod", engine.address),))
    digest = hashlib.sha256(b"sk-alice").digest()
    fleet = await Fleet.start([route], workers=2, keys=[ApiKey("alice", digest, "acme")])
    fleet.supervisor._usage._store._kube = kube = FakeKube()
    async with aiohttp.ClientSession() as session:

        async def ask(count):
            url = f"http://127.0.0.1:{fleet.port}/openai/v1/chat/completions"
            headers = {"Authorization": "Bearer sk-alice"}
            body = json.dumps({"model": "m", "stream": True, "messages": []})
            for _ in range(count):
                async with session.post(url, data=body, headers=headers) as response:
                    assert await response.read() == TOKEN + DONE

        yield fleet, kube, ask
    await fleet.close()
    await engine.stop()


def stored(kube):
    (found,) = (o for (plural, _), o in kube.objects.items() if plural == "configmaps")
    return decode_usage(found["data"]["alice"])


async def test_each_request_is_counted_once_and_kept_when_the_replica_stops(served):
    fleet, kube, ask = served
    await asyncio.gather(*(ask(10) for _ in range(4)))
    totals = fleet.supervisor._usage.ledger.totals
    await until(lambda: totals and totals["alice"].models["m"].requests == 40, "all are reported")
    async with aiohttp.ClientSession() as session:
        url = f"http://{fleet.supervisor.metrics_address}/metrics"
        async with session.get(url) as response:
            text = await response.text()
    found = dict(re.findall(r'^kubeai_key_(\w+)_total\{key="alice",.*\} ([\d.]+)$', text, re.M))
    assert {name: float(value) for name, value in found.items()} == {
        "requests": 40,
        "requests_estimated": 0,
        "prompt_tokens": 480,
        "prompt_tokens_cached": 320,
        "completion_tokens": 280,
    }
    await ask(3)  # reported when the workers end
    await fleet.close()
    usage = stored(kube)
    day = usage.models["m"].last_day
    assert (usage.tenant, usage.models) == (
        "acme",
        {"m": UsageCounts(43, 0, 43 * 12, 43 * 8, 43 * 7, day)},
    )


async def test_a_background_response_is_counted_by_the_worker_that_sent_it(served_background):
    fleet, states, post = served_background
    ids = [await post() for _ in range(8)]  # over two workers
    states |= {each: {"status": "completed", "usage": BACKGROUND_USAGE} for each in ids}
    await until(lambda: counts_of(fleet).requests == 8, "all are reported")
    lost = await post()  # not done when the workers end
    states[lost] = {"status": "in_progress"}
    await fleet.close()
    counts = counts_of(fleet)
    assert (counts.requests, counts.estimated_requests) == (9, 1)
    assert counts.completion_tokens == 8 * 300 + MAX_OUTPUT


MAX_OUTPUT = 400
BACKGROUND_USAGE = {"input_tokens": 5, "output_tokens": 300}


def counts_of(fleet):
    totals = fleet.supervisor._usage.ledger.totals
    return totals["alice"].models["m"] if totals else UsageCounts()


@pytest.fixture
async def served_background():
    """Workers, the states of the engine's responses by ID, and a function that starts another."""
    states = {}

    async def script(wire, request):
        if request.method == "POST":
            made = json.loads(request.body)["request_id"]
            await wire.send(answer(200, json.dumps({"id": made, "status": "queued"}).encode()))
            return
        state = states.get(request.target.split("/")[3], {"status": "queued"})
        await wire.send(answer(200, json.dumps(state).encode()))

    engine = await Engine(script).start()
    route = Route("m", "VLLM", endpoints=(Endpoint("pod", engine.address),))
    digest = hashlib.sha256(b"sk-alice").digest()
    fleet = await Fleet.start([route], workers=2, keys=[ApiKey("alice", digest, "acme")])

    async def post():
        body = {"model": "m", "input": "hi", "background": True, "max_output_tokens": MAX_OUTPUT}
        async with (
            aiohttp.ClientSession(headers={"Authorization": "Bearer sk-alice"}) as session,
            session.post(f"http://127.0.0.1:{fleet.port}/v1/responses", json=body) as response,
        ):
            return json.loads(await response.read())["id"]

    yield fleet, states, post
    await fleet.close()
    await engine.stop()
