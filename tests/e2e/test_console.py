"""The console of a running `kubeai local`: what it shows of a cold start, and what it changes."""

import json
import os
import signal

import aiohttp
import pytest
from harness import chat, model, running, until

from kubeai.kube.resources import MODELS

CHANGE = {"X-KubeAI-UI": "1"}
ARGS = ("--startup-delay=1s", "--decode-tokens-per-second=500")


@pytest.fixture
async def local(tmp_path):
    m = model(
        "m",
        args=ARGS,
        maxReplicas=2,
        scaleDownDelaySeconds=600,
        loadBalancing={"strategy": "PrefixCache"},
    )
    async with running(tmp_path, m, workers=2) as local:
        yield local


class Events:
    """Follows the event stream, and keeps the last state and all requests."""

    def __init__(self, response):
        self._response = response
        self.state = {}
        self.requests = []

    async def next(self):
        name = (await self._response.content.readline()).decode().strip()
        if not name.startswith("event: "):
            return
        data = json.loads((await self._response.content.readline()).removeprefix(b"data: "))
        if name == "event: state":
            self.state = data
        else:
            self.requests = data + self.requests

    async def until(self, what, holds):
        async def check():
            await self.next()
            return holds()

        await until(what, check)


def check_requests(first, last, answers):
    """As the console shows the request that started a replica, and the last one."""
    assert first["waited_s"] > 0.5
    assert "had waited" in first["why"]
    for request, answer in ((first, answers[0]), (last, answers[2])):
        assert (request["status"], request["end"]) == (200, "whole")
        assert request["prompt_tokens"] == answer.prompt_tokens
        assert request["output_tokens"] == 16
        assert 0 < request["ttft_s"] <= request["duration_s"]
    assert last["cached_tokens"] == answers[2].cached_tokens > 0
    assert (first["pick"], last["pick"]) == ("new", "cached")


async def check_apply(client, kube, shown):
    """A changed manifest is applied, one with an unknown field is not. ``shown``: the Model's."""
    manifest = shown.replace("maxReplicas: 2", "maxReplicas: 3")
    yaml = {**CHANGE, "Content-Type": "application/yaml"}
    async with client.post("/ui/api/apply", data=manifest, headers=yaml) as response:
        assert (response.status, await response.json()) == (200, {"applied": ["m"]})
    assert (await kube.get(MODELS, "m"))["spec"]["maxReplicas"] == 3
    unknown = manifest.replace("engine:", "engin:")
    async with client.post("/ui/api/apply", data=unknown, headers=yaml) as response:
        assert response.status == 422
        assert "engin" in (await response.json())["error"]["message"]


async def watch_a_cold_start(client, local):
    """The last of three requests, the first of which starts a replica. Ends a worker."""
    async with client.get("/ui/api/events") as response:
        events = Events(response)
        await events.until(
            "the Model is shown",
            lambda: (
                events.state.get("models")
                and events.state["models"][0]["state"] == "Scaled to zero"
            ),
        )
        answers = [await chat(client, local.endpoint, "m", "hello " * 200) for _ in range(3)]
        assert all(answer.whole for answer in answers)
        await events.until("the requests are shown", lambda: len(events.requests) == 3)
        last, _, first = events.requests
        check_requests(first, last, answers)
        assert "hello" not in json.dumps(events.requests), "contents are never kept"
        await events.until("it is ready", lambda: events.state["models"][0]["state"] == "Ready")
        assert events.state["models"][0]["rates"]["requests_per_s"] > 0

        os.kill(local.workers()[0], signal.SIGKILL)
        return last


async def test_a_cold_start_is_shown_and_models_are_changed(local):
    origin = local.endpoint.removesuffix("/openai/v1")
    async with aiohttp.ClientSession(origin) as client, local.kube() as kube:

        async def details():
            async with client.get("/ui/api/models/m") as response:
                assert response.status == 200
                return await response.json()

        async with client.get("/") as response:
            assert (response.status, response.url.path) == (200, "/ui/")
            assert "script-src 'self'" in response.headers["Content-Security-Policy"]

        last = await watch_a_cold_start(client, local)
        shown = await details()
        (step,) = shown["timeline"]
        assert (step["from"], step["to"], step["reason"]) == (0, 1, "a request is waiting")
        (pod,) = shown["pods"]
        assert (pod["name"], pod["ring_share"]) == (last["endpoint"], 1)
        assert pod["cached_share"] > 0
        async with client.get("/ui/api/models/m/log") as response:
            assert b"mock engine listens" in await response.content.readline()

        async def restarted():
            async with client.get("/ui/api/state") as response:
                workers = (await response.json())["workers"]
                return sum(worker["restarts"] for worker in workers) == 1

        await until("the dead worker was restarted", restarted)

        async with client.post(
            "/ui/api/models/m/scale", json={"replicas": 2}, headers=CHANGE
        ) as response:
            assert response.status == 200, await response.text()

        async def scaled():
            return [(s["from"], s["to"]) for s in (await details())["timeline"]] == [(1, 2), (0, 1)]

        await until("the change is in the timeline", scaled)
        await check_apply(client, kube, (await details())["yaml"])
        async with client.delete("/ui/api/models/m", headers=CHANGE) as response:
            assert response.status == 200

        async def gone():
            async with client.get("/ui/api/state") as response:
                return not (await response.json())["models"]

        await until("the Model is gone", gone)

        async with client.get("/ui/api/events") as response:
            await Events(response).next()
            assert await local.stop() == 0
            assert not any("drain timed out" in line for line in local.log), "it waits for nobody"
