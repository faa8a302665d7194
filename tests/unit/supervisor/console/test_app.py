"""The console's application: its values, its changes, and who may make them."""

import asyncio
import gzip
import json
import stat
from pathlib import Path
from types import SimpleNamespace

import aiohttp
import pytest
import yaml
from fakes.console import READY, World, running
from fakes.wire import until

from kubeai.errors import KubeAIError
from kubeai.kube.errors import ApiError
from kubeai.operator.view import Step
from kubeai.supervisor.console import app, events
from kubeai.supervisor.console.app import HEADERS

CHANGE = {"X-KubeAI-UI": "1"}
YAML = {**CHANGE, "Content-Type": "application/yaml"}
MANIFEST = """
apiVersion: kubeai.org/v1
kind: Model
metadata: {name: m}
spec: {url: hf://a/b, engine: VLLM, features: [TextGeneration]}
"""


async def get(world, path, status=200):
    async with world.client.get(path) as response:
        body = await response.read()
        assert response.status == status, body
        return json.loads(body)


async def error_of(response, status):
    value = await response.json()
    assert response.status == status, value
    return value["error"]["message"]


# -- the page --------------------------------------------------------------------------------------


async def test_the_page_and_its_files_have_a_strict_policy(world):
    async with world.client.get("/ui/") as response:
        assert response.status == 200
        assert response.content_type == "text/html"
        assert "KubeAI" in await response.text()
        assert response.headers["Cache-Control"] == "no-cache"
        tag = response.headers["ETag"]
        for name, value in HEADERS.items():
            assert response.headers[name] == value
        assert "unsafe" not in response.headers["Content-Security-Policy"]
        assert "Server" not in response.headers
    async with world.client.get("/ui/", headers={"If-None-Match": tag}) as response:
        assert response.status == 304
    async with world.client.get("/ui/static/index.html") as response:
        assert response.status == 200
    async with world.client.get("/ui", allow_redirects=False) as response:
        assert (response.status, response.headers["Location"]) == (307, "/ui/")


@pytest.mark.parametrize("path", ["/ui/static/../app.py", "/ui/static/nothing.js", "/ui/nothing"])
async def test_nothing_else_is_served(world, path):
    url = aiohttp.client.URL(f"http://localhost{path}", encoded=True)
    async with (
        aiohttp.ClientSession(connector=aiohttp.UnixConnector(world.console.path)) as client,
        client.get(url) as response,
    ):
        assert response.status == 404
        assert response.headers["X-Content-Type-Options"] == "nosniff"


def test_only_this_user_can_reach_the_socket():
    world = World()
    path = Path(world.console.path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    asyncio.run(world.console.close())


async def test_the_socket_goes_away(world):
    directory = Path(world.console.path).parent
    await world.console.close()
    assert not directory.exists()


# -- values ----------------------------------------------------------------------------------------


async def test_the_state(world):
    world.model("b", "b-1", replicas=1, minReplicas=0, maxReplicas=3, owner="me")
    world.model(
        "a", desired=0, conditions=[("Ready", "True", "ScaledToZero", "the next request …")]
    )
    world.request("b", "b-1")
    state = await get(world, "/ui/api/state")
    assert state["version"]
    assert state["time_s"] > 1e9
    assert (state["local"], state["namespace"], state["synced"]) == (True, "default", True)
    assert state["can"] == {"scale": True, "apply": True, "delete": True}
    assert state["workers"] == [{"worker": 0, "ready": True, "restarts": 0}]
    assert state["stream_problems"] == ["nats://jobs: requests: refused"]
    first, second = state["models"]
    assert (first["name"], first["state"], first["reason"]) == (
        "a",
        "Scaled to zero",
        "ScaledToZero",
    )
    assert second == {
        "name": "b",
        "state": "Ready",
        "reason": "AllReplicasReady",
        "message": "1 of 1 replica is ready",
        "engine": "VLLM",
        "url": "hf://a/b",
        "features": ["TextGeneration"],
        "owner": "me",
        "strategy": "LeastLoad",
        "adapters": [],
        "replicas": {"ready": 1, "desired": 1, "min": 0, "max": 3},
        "in_flight": 0,
        "held": 0,
        "rates": {
            "window_s": 60,
            "requests_per_s": 1 / 60,
            "prompt_tokens_per_s": 2.0,
            "output_tokens_per_s": 0.5,
        },
        "ttft_s": {"window_s": 300, "count": 1, "p50": 0.25, "p99": 0.25},
    }


DEGRADED = ("Degraded", "True", "CrashLoopBackOff", "it keeps exiting")


@pytest.mark.parametrize(
    ("conditions", "state", "reason"),
    [
        ((), "Starting", ""),
        ([("Ready", "True", "SomeReplicasReady", "")], "Ready", "SomeReplicasReady"),
        ([("Ready", "False", "ReplicasStarting", "")], "Starting", "ReplicasStarting"),
        ([("Ready", "False", "ScaledToZero", "")], "Scaled to zero", "ScaledToZero"),
        ([("Ready", "True", "AllReplicasReady", ""), DEGRADED], "Degraded", "CrashLoopBackOff"),
        ([("Ready", "False", "CrashLoopBackOff", ""), DEGRADED], "Failed", "CrashLoopBackOff"),
    ],
)
async def test_a_models_state_in_a_word(world, conditions, state, reason):
    world.model(conditions=conditions)
    (model,) = (await get(world, "/ui/api/state"))["models"]
    assert (model["state"], model["reason"]) == (state, reason)


STARTING = ("Ready", "False", "ReplicasStarting", "0 of 3 replicas are ready")
LOADING = ("Ready", "False", "CacheNotLoaded", "downloading hf://a/b, attempt 2")


@pytest.mark.parametrize(
    ("conditions", "progress", "message"),
    [
        ([STARTING], "pulling image, 1 of 3", "pulling image, 1 of 3"),
        ([STARTING], "", "0 of 3 replicas are ready"),
        ([LOADING], "downloading to the cache", "downloading hf://a/b, attempt 2"),
        ([READY], "pulling image", "1 of 1 replica is ready"),
    ],
)
async def test_a_model_that_starts_says_what_it_does(world, conditions, progress, message):
    world.model(conditions=conditions, progress=progress)
    (model,) = (await get(world, "/ui/api/state"))["models"]
    assert model["message"] == message


async def test_a_model_by_itself(world):
    world.model("m", "pod-a", "pod-b", strategy="PrefixCache", replicas=2)
    world.operator.steps["m"] = (Step(5.0, 1, 2, "because"),)
    world.request("m", "pod-a")
    details = await get(world, "/ui/api/models/m")
    assert details["name"] == "m"
    assert details["conditions"][0]["type"] == "Ready"
    assert details["timeline"] == [{"time_s": 5.0, "from": 1, "to": 2, "reason": "because"}]
    first, second = details["pods"]
    assert set(first) == {
        *("name", "address", "phase", "ready", "reason", "message", "in_flight", "pending_tokens"),
        *("ring_share", "cached_share", "restarts", "ejected", "created_s"),
    }
    assert (first["name"], first["cached_share"], second["cached_share"]) == ("pod-a", 0.5, None)
    assert first["ring_share"] + second["ring_share"] == pytest.approx(1)
    assert 0.2 < first["ring_share"] < 0.8
    shown = yaml.safe_load(details["yaml"])
    assert shown["metadata"] == {"name": "m", "annotations": {"a": "b"}}
    assert shown["spec"]["replicas"] == 2
    assert "status" not in shown


async def test_an_unknown_model_is_a_404(world):
    for path in ("", "/log"):
        assert (
            "does not exist"
            in (await get(world, f"/ui/api/models/x{path}", 404))["error"]["message"]
        )


async def test_on_a_cluster_the_api_says_what_is_allowed():
    async with running(local=False) as world:
        world.kube.allowed = {"patch/scale", "patch"}
        state = await get(world, "/ui/api/state")
        assert state["local"] is False
        assert state["can"] == {"scale": True, "apply": False, "delete": False}


# -- events ----------------------------------------------------------------------------------------


async def read_event(response, name):
    while True:
        line = await response.content.readline()
        assert line, "the stream has ended"
        if line == f"event: {name}\n".encode():
            data = await response.content.readline()
            return json.loads(data.removeprefix(b"data: "))


async def next_tick(world):
    ticked = world.console._hub._ticked
    await until(lambda: world.console._hub._ticked is not ticked, "a tick")


async def test_events_begin_with_all_and_continue_with_what_is_new(world, monkeypatch):
    monkeypatch.setattr(world.console._hub, "_tick_s", 0.005)
    world.model("m", "pod")
    world.request("m", "pod", id="1")
    world.request("m", "pod", id="2")
    async with world.client.get("/ui/api/events") as response:
        assert response.content_type == "text/event-stream"
        assert len((await read_event(response, "state"))["models"]) == 1
        assert [r["id"] for r in await read_event(response, "requests")] == ["2", "1"]
        world.request("m", "pod", id="3")
        (request,) = await read_event(response, "requests")
        assert request["id"] == "3"
        world.model("n")
        while len((await read_event(response, "state"))["models"]) == 1:
            pass
    await until(lambda: world.console._hub._ticker is None, "nobody looks")


async def test_a_stream_begins_with_the_present_time_even_if_nothing_has_changed(
    world, monkeypatch
):
    monkeypatch.setattr(world.console._hub, "_tick_s", 0.005)
    now_s = 1000.0
    monkeypatch.setattr(app, "time", SimpleNamespace(time=lambda: now_s))
    world.model("m")
    async with world.client.get("/ui/api/events") as first:
        assert (await read_event(first, "state"))["time_s"] == 1000.0
        now_s = 2000.0
        await next_tick(world)
        await next_tick(world)
        async with world.client.get("/ui/api/events") as second:
            assert (await read_event(second, "state"))["time_s"] == 2000.0


async def test_there_is_a_comment_when_nothing_changes(world, monkeypatch):
    monkeypatch.setattr(world.console._hub, "_tick_s", 0.005)
    monkeypatch.setattr(events, "HEARTBEAT_S", 0.01)
    async with world.client.get("/ui/api/events") as response:
        await response.content.readuntil(b": heartbeat\n\n")


async def test_streams_are_limited_and_end_when_kubeai_stops(world, monkeypatch):
    monkeypatch.setattr(events, "STREAMS_MAX", 1)
    async with world.client.get("/ui/api/events") as response:
        await read_event(response, "state")
        async with world.client.get("/ui/api/events") as other:
            assert "More than 1" in await error_of(other, 503)
        await world.console.stop()
        await response.content.read()
    async with world.client.get("/ui/api/events") as response:
        assert response.status == 503


# -- logs ------------------------------------------------------------------------------------------


async def test_a_log_is_streamed_until_the_client_leaves(world):
    left = asyncio.Event()

    async def wait():
        try:
            await asyncio.Event().wait()
        finally:
            left.set()

    world.kube.lines = [b"one\n", wait]
    world.model("m", "old", "new")
    async with world.client.get("/ui/api/models/m/log?tail=5") as response:
        assert (response.status, response.content_type) == (200, "text/plain")
        assert await response.content.readline() == b"one\n"
        response.close()
    async with asyncio.timeout(5):
        await left.wait()
    assert world.kube.calls == [("log", "new", "server", "default", 5)]


@pytest.mark.parametrize(
    ("pods", "query", "fault", "status", "message"),
    [
        ((), "", None, 409, "has no replica"),
        (("pod",), "?pod=etcd-0", None, 409, "has no replica 'etcd-0'"),
        (("pod",), "", ApiError(400, "BadRequest", "container is waiting"), 409, "is waiting"),
        (("pod",), "", ApiError(403, "Forbidden", "may not"), 403, "may not"),
        (("pod",), "", ApiError(0, "Unreachable", "refused"), 502, "refused"),
        (("pod",), "?tail=x", None, 422, "tail"),
    ],
)
async def test_a_log_that_cannot_be_read(world, pods, query, fault, status, message):
    world.model("m", *pods)
    world.kube.fault = fault
    async with world.client.get(f"/ui/api/models/m/log{query}") as response:
        assert message in await error_of(response, status)


# -- changes ---------------------------------------------------------------------------------------


async def test_a_model_is_scaled(world):
    world.model(maxReplicas=3)
    async with world.client.post(
        "/ui/api/models/m/scale", json={"replicas": 2}, headers=CHANGE
    ) as response:
        assert (response.status, await response.json()) == (200, {"replicas": 2})
    assert world.kube.calls == [
        ("patch", "models", "m", {"spec": {"replicas": 2}}, "default", "scale")
    ]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"replicas": 4}, "maxReplicas (3)"),
        ({"replicas": 0}, "minReplicas (1)"),
        ({"replicas": -1}, "negative"),
        ({"replicas": "2"}, "$.replicas"),
        ({"replica": 2}, "replica"),
        ([], "Invalid body"),
    ],
)
async def test_bounds_are_respected(world, body, message):
    world.model(minReplicas=1, maxReplicas=3)
    async with world.client.post("/ui/api/models/m/scale", json=body, headers=CHANGE) as response:
        assert message in await error_of(response, 422)
    assert world.kube.calls == []


async def test_without_autoscaling_there_are_no_bounds(world):
    world.model(minReplicas=1, maxReplicas=3, autoscalingDisabled=True)
    (model,) = (await get(world, "/ui/api/state"))["models"]
    assert (model["replicas"]["min"], model["replicas"]["max"]) == (0, None)
    async with world.client.post(
        "/ui/api/models/m/scale", json={"replicas": 0}, headers=CHANGE
    ) as response:
        assert response.status == 200


async def test_manifests_are_applied(world):
    text = f"{MANIFEST}---\n{MANIFEST.replace('name: m', 'name: n')}---\n"
    async with world.client.post("/ui/api/apply", data=text, headers=YAML) as response:
        assert (response.status, await response.json()) == (200, {"applied": ["m", "n"]})
    assert [call[:3] for call in world.kube.calls] == [("apply", "models", n) for n in "mn"]
    assert world.kube.calls[0][4:] == ("default", "kubeai-console")


async def test_compressed_manifests_are_refused_unread(world):
    text, headers = gzip.compress(MANIFEST.encode()), YAML | {"Content-Encoding": "gzip"}
    async with world.client.post("/ui/api/apply", data=text, headers=headers) as response:
        assert "uncompressed" in await error_of(response, 415)
    assert world.kube.calls == []


async def test_what_looks_like_a_date_is_text_as_in_kubernetes(world):
    text = MANIFEST.replace("name: m", "name: m, labels: {day: 2026-01-02}")
    async with world.client.post("/ui/api/apply", data=text, headers=YAML) as response:
        assert response.status == 200
    assert world.kube.calls[0][3]["metadata"]["labels"] == {"day": "2026-01-02"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no manifest"),
        ("a: b: c", "line 1"),
        ("[]", "document 1: must be a mapping"),
        (MANIFEST.replace("Model", "Secret"), "must be of kind Model"),
        (MANIFEST.replace("name: m", "name: 3"), "metadata.name"),
        (MANIFEST.replace("name: m", "name: m, namespace: kube-system"), "metadata.namespace"),
        (MANIFEST + "kind: Model\n", "duplicate key"),
        ("a: &a [1]\nb: *a\n", "aliases"),
        ("- " * 100_000, "nested"),  # the C library would overflow the stack
        ("a: !!python/object/apply:os.system [ls]", "invalid YAML"),
        ("\0", "invalid YAML"),
    ],
)
async def test_other_manifests_are_refused(world, text, message):
    async with world.client.post("/ui/api/apply", data=text, headers=YAML) as response:
        assert message in await error_of(response, 422)
    assert world.kube.calls == []


async def test_the_apis_message_is_passed_on(world):
    world.kube.fault = ApiError(422, "Invalid", "spec.url: must start with hf://")
    async with world.client.post("/ui/api/apply", data=MANIFEST, headers=YAML) as response:
        assert "must start with hf://" in await error_of(response, 422)


async def test_a_model_is_deleted(world):
    world.model()
    async with world.client.delete("/ui/api/models/m", headers=CHANGE) as response:
        assert response.status == 200
    assert world.kube.calls == [("delete", "models", "m", "default")]


async def test_changes_that_another_site_could_send_are_refused(world):
    world.model()
    text = {"Content-Type": "text/plain"}
    for method, path, headers, status in (
        ("POST", "/ui/api/models/m/scale", {"Content-Type": "application/json"}, 403),
        ("POST", "/ui/api/models/m/scale", {**CHANGE, **text}, 415),
        ("POST", "/ui/api/apply", {"Content-Type": "application/yaml"}, 403),
        ("POST", "/ui/api/apply", {**CHANGE, **text}, 415),
        ("DELETE", "/ui/api/models/m", {}, 403),
        ("OPTIONS", "/ui/api/apply", {}, 405),
        ("PUT", "/ui/api/models/m", CHANGE, 405),
    ):
        async with world.client.request(
            method, path, data=b'{"replicas":1}', headers=headers
        ) as response:
            assert await error_of(response, status)
    assert world.kube.calls == []


async def test_a_body_that_is_too_large_is_refused(world):
    text = "#" * (3 << 20)
    async with world.client.post("/ui/api/apply", data=text, headers=YAML) as response:
        assert await error_of(response, 413)


def test_a_socket_that_cannot_be_created_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / ("x" * 100)))
    with pytest.raises(KubeAIError, match=r"gateway\.ui.*TMPDIR"):
        World()
