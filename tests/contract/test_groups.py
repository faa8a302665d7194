"""Replicas on several nodes, on both APIs: LeaderWorkerSets, their pods, the Model's status."""

from __future__ import annotations

import leaderworkersets
import pytest
from operators import until

from kubeai.kube.errors import ApiError
from kubeai.kube.resources import MODELS, PODS, SETS
from kubeai.operator import sets as followed

TWO_NODES = {"resourceProfile": "cpu:4:2", "image": "vllm:1"}


@pytest.fixture
def lws(api_server):
    with leaderworkersets.installed(api_server):
        yield


@pytest.fixture
async def controller(lws, world):
    controller = leaderworkersets.Controller(world.kube)
    yield controller
    await controller.stop()


async def sets(world):
    found, _ = await world.kube.list(SETS, world.kube.namespace)
    return [one for one in found if "deletionTimestamp" not in one["metadata"]]


async def test_a_model_on_two_nodes_is_served_by_the_leaders_of_its_sets(world, controller):
    replica = world.start()
    await world.create(minReplicas=2, **TWO_NODES)
    await world.replicas_are(2, 2)
    names = [one["metadata"]["name"] for one in await sets(world)]
    await until(lambda: replica.endpoints("m") == sorted(names), "endpoints")
    pods = {pod["metadata"]["name"]: pod for pod in await world.pods_once(4)}
    assert set(pods) == {f"{name}-0{worker}" for name in names for worker in ("", "-1")}
    for endpoint in replica.routes["m"].endpoints:
        leader = pods[f"{endpoint.name}-0"]
        assert endpoint.address == f"{leader['status']['podIP']}:8000"
        worker = pods[f"{endpoint.name}-0-1"]
        arguments = [pod["spec"]["containers"][0]["args"] for pod in (leader, worker)]
        assert "--node-rank=0" in arguments[0]
        assert {"--node-rank=$(LWS_WORKER_INDEX)", "--headless"} <= set(arguments[1])
    assert await world.condition("Ready") == ("True", "AllReplicasReady")
    await world.kube.patch(MODELS, "m", {"spec": {"minReplicas": 1, "replicas": 1}})
    await world.replicas_are(1, 1)
    await world.pods_once(2)


async def test_the_scale_selector_counts_leaders(world, controller):
    world.start()
    await world.create(minReplicas=1, **TWO_NODES)
    await world.replicas_are(1, 1)
    selector = (await world.status())["selector"]
    found, _ = await world.kube.list(PODS, world.kube.namespace, labels=selector)
    assert len(found) == 1


async def test_a_new_version_replaces_the_sets_without_losing_a_ready_replica(world, controller):
    replica = world.start()
    await world.create(minReplicas=2, **TWO_NODES)
    await world.replicas_are(2, 2)
    old = set(replica.endpoints("m"))
    replica.published.clear()
    await world.kube.patch(MODELS, "m", {"spec": {"args": ["--new"]}})
    await until(lambda: not old & set(replica.endpoints("m")), "new endpoints")
    await world.replicas_are(2, 2)
    assert min(len(endpoints) for _, endpoints in replica.published) >= 2
    await world.pods_once(4)


async def test_a_worker_that_cannot_start_is_named_in_the_conditions(world, controller):
    world.nodes.ready = lambda pod: False
    world.start()
    await world.create(minReplicas=1, **TWO_NODES)
    pods = await world.pods_once(2)
    (worker,) = (p["metadata"]["name"] for p in pods if p["metadata"]["name"].endswith("-1"))
    condition = {
        "type": "PodScheduled",
        "status": "False",
        "reason": "Unschedulable",
        "message": "Insufficient gpu",
    }
    status = {"status": {"conditions": [condition]}}
    await world.kube.patch(PODS, worker, status, subresource="status")

    async def named():
        conditions = (await world.status()).get("conditions") or []
        return any(
            c["reason"] == "Unschedulable" and c["message"] == f"{worker}: Insufficient gpu"
            for c in conditions
        )

    await until(named, "the worker's trouble is named")


async def test_a_deleted_model_takes_its_sets_and_their_pods_along(world, controller):
    world.start()
    await world.create(minReplicas=1, **TWO_NODES)
    await world.replicas_are(1, 1)
    await world.kube.delete(MODELS, "m")

    async def gone():
        return not await sets(world) and not await world.pods()

    await until(gone, "sets and pods are gone")


async def test_without_the_api_a_condition_says_so_until_it_is_installed(
    world, api_server, monkeypatch
):
    monkeypatch.setattr(followed, "PROBE_INTERVAL_S", 0.2)
    with pytest.raises(ApiError) as caught:
        await world.kube.list(SETS, world.kube.namespace)
    assert caught.value.status == 404
    world.start()
    await world.create("one", minReplicas=1)
    await world.create(minReplicas=1, **TWO_NODES)

    async def told():
        return await world.condition("Ready") == ("False", "NoLeaderWorkerSets")

    await until(told, "told")
    conditions = (await world.status())["conditions"]
    said = next(c["message"] for c in conditions if c["type"] == "Ready")
    assert said.startswith("spec.resourceProfile: ")
    assert "the LeaderWorkerSet API (leaderworkerset.x-k8s.io/v1)" in said
    assert await world.pods() == []
    await world.replicas_are(1, 1, "one")  # others do not mind
    with leaderworkersets.installed(api_server):
        controller = leaderworkersets.Controller(world.kube)
        try:
            await world.replicas_are(1, 1)
        finally:
            await controller.stop()
    if api_server.kind == "real":  # it ends the watches of what is removed
        await until(told, "told again once it is removed")
