"""The operator against a Kubernetes API, embedded and real: the state of the world, no calls.

There is no kubelet and no controller-manager here: `Nodes` says that pods are ready, and pods of
a deleted Model go because the operator deletes them.
"""

from __future__ import annotations

import math
import time

import msgspec
from operators import CONFIG, is_ready, until

from kubeai.kube.errors import ApiError
from kubeai.kube.resources import CONFIGMAPS, LEASES, MODELS, PODS
from kubeai.operator.pods import HASH_ANNOTATION


async def test_a_model_becomes_pods_a_status_and_a_route(world):
    replica = world.start()
    made = await world.create(minReplicas=2)
    await world.replicas_are(2, 2)
    pods = await world.pods()
    for pod in pods:
        meta = pod["metadata"]
        assert meta["name"].startswith(f"model-m-{meta['labels']['pod-hash']}-")
        assert [o["uid"] for o in meta["ownerReferences"]] == [made["metadata"]["uid"]]
    assert replica.endpoints("m") == sorted(pod["metadata"]["name"] for pod in pods)
    model = await world.model()
    assert model["spec"]["replicas"] == 2
    assert model["metadata"]["labels"] == {"features.kubeai.org/TextGeneration": "true"}
    assert model["status"]["selector"] == "app=model,model=m"
    await until(lambda: has(world, "Ready", "True", "AllReplicasReady"), "Ready")
    assert await world.condition("Progressing") == ("False", "UpToDate")


async def has(world, type_, status, reason):
    return await world.condition(type_) == (status, reason)


async def blocked(world, reason):
    """Wait until every replica of KubeAI says in its route why the model has no endpoint."""

    def known():
        blocks = [getattr(one.routes.get("m"), "block", None) for one in world.replicas]
        return all(block is not None and block.reason == reason for block in blocks)

    await until(known, f"all routes say {reason}")
    return [one.routes["m"].block for one in world.replicas]


async def test_every_replica_of_kubeai_knows_why_a_model_cannot_start(world):
    leader = world.start("leader")
    await until(lambda: leader.operator.leads, "leading")
    follower = world.start("follower")
    world.nodes.ready = lambda pod: False
    await world.create(resourceProfile="nowhere:1", minReplicas=1)
    for block in await blocked(world, "InvalidProfile"):
        assert "'nowhere'" in block.message
        assert (block.fails_at_s, block.retry) == (0.0, False)
    await world.kube.patch(MODELS, "m", {"spec": {"resourceProfile": "cpu:1"}})
    for block in await blocked(world, "ReplicasStarting"):
        assert block.fails_at_s == math.inf
    (pod,) = await world.pods_once(1)
    waiting = {"waiting": {"reason": "ImagePullBackOff", "message": "Back-off pulling image"}}
    image = {"image": "x", "imageID": "", "ready": False, "restartCount": 0}
    statuses = [{"name": "server", "state": waiting} | image]
    patch = {"status": {"phase": "Pending", "containerStatuses": statuses}}
    await world.kube.patch(PODS, pod["metadata"]["name"], patch, subresource="status")
    for block in await blocked(world, "ImagePullBackOff"):
        assert 0 < block.fails_at_s - time.monotonic() <= 30
    await world.nodes.set_ready(pod["metadata"]["name"])
    for replica in (leader, follower):
        await until(lambda replica=replica: replica.endpoints("m"), "served")
        assert replica.routes["m"].block is None
    assert not follower.operator.leads


async def test_replicas_go_up_and_down_with_the_spec(world):
    replica = world.start()
    await world.create(autoscalingDisabled=True, replicas=1)
    await world.replicas_are(1, 1)
    first = replica.endpoints("m")
    await world.kube.patch(MODELS, "m", {"spec": {"replicas": 3}}, subresource="scale")
    await world.replicas_are(3, 3)
    assert set(first) < set(replica.endpoints("m"))
    await world.kube.patch(MODELS, "m", {"spec": {"replicas": 0}}, subresource="scale")
    await world.replicas_are(0, 0)
    assert await world.pods() == []
    assert replica.endpoints("m") == []
    assert await world.condition("Ready") == ("False", "ScaledToZero")


async def test_nothing_is_written_while_nothing_changes(world):
    replica = world.start()
    await world.create(minReplicas=2)
    await world.create("cold")
    await world.create("broken", resourceProfile="nowhere:1", minReplicas=1)
    await world.replicas_are(2, 2)
    await until(lambda: has(world, "Progressing", "False", "UpToDate"), "settled")
    await world.replicas_are(0, 0, "cold")
    await world.replicas_are(0, 0, "broken")
    before = await world.versions()
    lease = (await world.kube.get(LEASES, "kubeai.org"))["spec"]["renewTime"]
    for _ in range(3):  # and were it asked again and again
        replica.operator.controller.all_changed()
        renewed = await next_renewal(world, lease)
        lease = renewed
    assert await world.versions() == before


async def next_renewal(world, before):
    async def renewed():
        return (await world.kube.get(LEASES, "kubeai.org"))["spec"]["renewTime"] != before

    await until(renewed, "the lease is renewed")
    return (await world.kube.get(LEASES, "kubeai.org"))["spec"]["renewTime"]


async def test_many_held_requests_scale_up_a_model_with_one_write(world):
    leader, follower = world.start("leader"), None
    await until(lambda: leader.operator.leads, "leading")
    follower = world.start("follower")
    await world.create()
    await world.replicas_are(0, 0)
    await until(lambda: "m" in follower.routes, "the follower knows the model")
    generation = (await world.model())["metadata"]["generation"]
    for replica in (follower, leader):  # none of them scales it down again meanwhile
        replica.loads.held_by_model["m"] = 100
    began = time.monotonic()
    for _ in range(100):
        follower.operator.demand("m")
        leader.operator.demand("m")
    await until(lambda: len(world.nodes.pods) == 1, "a pod")
    print(f"demand to pod seen: {(time.monotonic() - began) * 1000:.1f} ms")
    await world.replicas_are(1, 1)
    model = await world.model()
    assert model["spec"]["replicas"] == 1
    assert model["metadata"]["generation"] == generation + 1
    assert world.nodes.most == 1
    assert not follower.operator.leads


async def test_held_requests_scale_up_a_model_without_a_demand_message(world):
    replica = world.start()
    await world.create()
    await world.replicas_are(0, 0)
    replica.loads.held_by_model["m"] = 1
    await world.replicas_are(1, 1)


async def test_a_stale_store_does_not_set_a_running_model_to_one(world):
    replica = world.start()
    await world.create(maxReplicas=4)
    await world.replicas_are(0, 0)
    stale = replica.operator.store.models["m"]
    replica.loads.active_by_model["m"] = 400
    await world.kube.patch(MODELS, "m", {"spec": {"replicas": 4}})
    await until(lambda: replica.operator.store.models["m"].spec.replicas == 4, "seen")
    replica.operator.store.models["m"] = stale
    replica.operator.demand("m")
    await until(lambda: replica.operator.store.models["m"].spec.replicas == 4, "re-read")
    await world.replicas_are(4, 4)


async def test_demand_does_not_scale_a_model_with_autoscaling_disabled(world):
    replica = world.start()
    await world.create(autoscalingDisabled=True, replicas=0)
    await world.create("other")
    await world.replicas_are(0, 0)
    replica.operator.demand("m")
    replica.operator.demand("other")
    replica.loads.held_by_model["other"] = 1
    await world.replicas_are(1, 1, "other")
    assert (await world.model())["spec"]["replicas"] == 0


async def test_a_changed_model_is_rolled_out_without_losing_a_ready_replica(world):
    replica = world.start()
    await world.create(minReplicas=3)
    await world.replicas_are(3, 3)
    old = set(replica.endpoints("m"))
    await until(lambda: sum(map(is_ready, world.nodes.pods.values())) == 3, "it is seen")
    world.nodes.least_ready = 3
    await world.kube.patch(MODELS, "m", {"spec": {"args": ["--new"]}})
    await until(lambda: len(set(replica.endpoints("m")) - old) == 3, "three new endpoints")
    # A status is told some tenths of a second late: that of before the change says the same.
    await until(world.is_up_to_date, "rolled out")
    await world.replicas_are(3, 3)
    await until(lambda: not old & set(replica.endpoints("m")), "old pods are off the route")
    assert world.nodes.most <= 4
    assert world.nodes.least_ready >= 3


async def test_a_broken_version_stops_after_the_surge_and_the_old_one_serves(world):
    replica = world.start()
    await world.create(minReplicas=3)
    await world.replicas_are(3, 3)
    old = replica.endpoints("m")
    world.nodes.ready = lambda pod: "--broken" not in pod["spec"]["containers"][0]["args"]
    await world.kube.patch(MODELS, "m", {"spec": {"args": ["--broken"]}})
    await world.replicas_are(4, 3)
    assert replica.endpoints("m") == old
    assert await world.condition("Progressing") == ("True", "RollingOut")
    await world.kube.patch(MODELS, "m", {"spec": {"args": ["--repaired"]}})
    await until(lambda: has(world, "Progressing", "False", "UpToDate"), "repaired")
    assert world.nodes.most <= 4


async def test_an_overloaded_replica_is_kept_until_the_new_version_is_ready(world):
    replica = world.start()
    await world.create(minReplicas=1)
    await world.replicas_are(1, 1)
    (old,) = replica.endpoints("m")
    world.nodes.ready = lambda pod: False
    await world.nodes.set_ready(old, ready=False)
    await until(lambda: replica.endpoints("m") == [], "unready")
    await world.kube.patch(MODELS, "m", {"spec": {"args": ["--new"]}})
    await world.replicas_are(2, 0)
    assert old in world.nodes.pods
    await world.nodes.set_ready(old)
    await until(lambda: replica.endpoints("m") == [old], "the old version serves again")
    await world.nodes.set_ready(old, ready=False)
    world.nodes.ready = lambda pod: "--new" in pod["spec"]["containers"][0]["args"]
    world.nodes.look_again()
    await until(lambda: old not in world.nodes.pods, "the old pod is gone")
    await world.replicas_are(1, 1)
    assert world.nodes.most == 2


async def test_a_version_that_was_never_ready_is_replaced_at_once(world):
    world.start()
    world.nodes.ready = lambda pod: False
    await world.create(minReplicas=1)
    (broken,) = await world.pods_once(1)
    await world.kube.patch(MODELS, "m", {"spec": {"args": ["--repaired"]}})
    await until(lambda: broken["metadata"]["name"] not in world.nodes.pods, "it is gone")
    await world.replicas_are(1, 0)


async def test_a_deleted_model_takes_its_pods_with_it_though_its_profile_is_gone(world):
    replica = world.start()
    await world.create(minReplicas=2)
    await world.replicas_are(2, 2)
    await replica.stop()
    world.replicas.clear()
    second = world.start(config=CONFIG.replace("cpu: {", "other: {"))
    await until(lambda: has(world, "Ready", "False", "InvalidProfile"), "profile missed")
    assert len(await world.pods()) == 2  # what runs goes on running
    assert len(second.endpoints("m")) == 2
    await world.kube.delete(MODELS, "m")
    await until(lambda: not world.nodes.pods, "no pods")
    await until(lambda: "m" not in second.routes, "no route")


async def test_a_model_with_a_finalizer_loses_pods_and_route_at_once(world):
    replica = world.start()
    await world.create(minReplicas=1)
    await world.kube.patch(MODELS, "m", {"metadata": {"finalizers": ["example.com/wait"]}})
    await until(lambda: replica.endpoints("m"), "an endpoint")
    await world.kube.delete(MODELS, "m")
    await until(lambda: not world.nodes.pods, "no pods")
    await until(lambda: "m" not in replica.routes, "no route")
    await world.kube.patch(MODELS, "m", {"metadata": {"finalizers": None}})


async def test_recreated_model_gets_its_own_pods(world):
    replica = world.start()
    first = await world.create(minReplicas=1)
    await until(lambda: replica.endpoints("m"), "an endpoint")
    (old,) = replica.endpoints("m")
    await world.kube.delete(MODELS, "m")
    second = await world.create(minReplicas=1)
    assert first["metadata"]["uid"] != second["metadata"]["uid"]
    await until(lambda: replica.endpoints("m") not in (None, [], [old]), "its own endpoint")
    assert len(replica.endpoints("m")) == 1
    await until(lambda: old not in world.nodes.pods, "the old pod is gone")


async def test_a_pod_that_goes_away_or_loses_readiness_leaves_the_route(world):
    replica = world.start()
    await world.create(minReplicas=2)
    await until(lambda: len(replica.endpoints("m") or []) == 2, "two endpoints")
    first, second = replica.endpoints("m")
    await world.nodes.set_ready(first, ready=False)
    await until(lambda: replica.endpoints("m") == [second], "unready")
    uid = world.nodes.pods[second]["metadata"]["uid"]
    await world.kube.delete(PODS, second)
    # Its successor may have its name, so look at what was published on the way.
    await until(lambda: ("m", []) in replica.published[-10:], "deleted")
    await world.nodes.set_ready(first)
    await world.replicas_are(2, 2)
    assert uid not in [pod["metadata"]["uid"] for pod in await world.pods()]


async def test_a_pod_that_failed_is_replaced(world):
    replica = world.start()
    await world.create(minReplicas=1)
    await until(lambda: replica.endpoints("m"), "an endpoint")
    (name,) = replica.endpoints("m")
    failed = {"status": {"phase": "Failed", "reason": "Evicted", "message": "disk pressure"}}
    await world.kube.patch(PODS, name, failed, subresource="status")
    await until(lambda: replica.endpoints("m") not in ([], [name]), "another endpoint")
    await until(lambda: name not in world.nodes.pods, "the failed pod is gone")


async def test_a_second_operator_takes_over_and_makes_no_pod_twice(world):
    one = world.start("one")
    await world.create(minReplicas=3)
    await world.replicas_are(3, 3)
    two = world.start("two")
    await until(lambda: len(two.endpoints("m") or []) == 3, "followers publish routes too")
    assert one.operator.leads
    assert not two.operator.leads
    before = await world.versions()
    await one.stop()
    lease = await world.kube.get(LEASES, "kubeai.org")
    assert lease["spec"]["holderIdentity"] != "one", "handed over, not left to expire"
    await until(lambda: two.operator.leads, "handed over")
    await world.kube.patch(MODELS, "m", {"spec": {"minReplicas": 4}})
    await world.replicas_are(4, 4)
    after = await world.versions()
    assert before.keys() < after.keys()
    assert world.nodes.most == 4


async def test_former_leader_still_routes_and_scales_up_models(world):
    one = world.start("one")
    await world.create()
    await until(lambda: one.operator.leads and "m" in one.routes, "leading")
    two = world.start("two")
    await until(two.operator.synced.is_set, "synced")
    await one.operator.resign()
    assert not one.operator.leads
    await until(lambda: two.operator.leads, "handed over")
    one.loads.held_by_model["m"] = 1
    one.operator.demand("m")
    await until(lambda: one.endpoints("m"), "the one that resigned has an endpoint")


async def test_a_killed_leader_is_followed_within_the_lease(world):
    one = world.start("one")
    await until(lambda: one.operator.leads, "leading")
    two = world.start("two")
    await until(lambda: two.operator.synced.is_set(), "synced")
    await one.kill()
    world.replicas.remove(one)
    # In virtual time it is tested that this takes a lease and a retry.
    await until(lambda: two.operator.leads, "taken over")


async def test_a_restarted_operator_finds_everything_as_it_should_be(world):
    first = world.start("one")
    await world.create(minReplicas=2)
    await world.replicas_are(2, 2)
    await until(lambda: has(world, "Progressing", "False", "UpToDate"), "settled")
    before = await world.versions()
    await first.kill()
    world.replicas.clear()
    again = world.start("one")
    await until(lambda: again.operator.leads and again.operator.synced.is_set(), "leading")
    again.operator.controller.all_changed()
    lease = (await world.kube.get(LEASES, "kubeai.org"))["spec"]["renewTime"]
    await next_renewal(world, lease)
    assert await world.versions() == before


async def test_load_scales_a_model_up_within_its_bounds_and_back_to_zero(world):
    replica = world.start()
    await world.create(maxReplicas=3, targetRequests=10, scaleDownDelaySeconds=1)
    await world.replicas_are(0, 0)
    replica.loads.active_by_model["m"] = 25
    await world.replicas_are(3, 3)
    replica.loads.active_by_model["m"] = 200
    await until(lambda: kept_average(world, 200.0), "the average is kept")
    assert (await world.model())["spec"]["replicas"] == 3
    replica.loads.active_by_model["m"] = 0
    await world.replicas_are(0, 0)
    await until(lambda: kept_average(world, 0.0), "the average is kept")


async def test_demand_between_two_ticks_restarts_the_scale_down_delay(world):
    """Another replica of KubeAI holds a request, the moment after the leader scaled it to zero."""
    world.start(config=CONFIG.replace("interval: 100ms", "interval: 1s"))
    await world.create(replicas=1, scaleDownDelaySeconds=2)
    await until(lambda: wants(world, 0), "scaled to zero")
    woken_s = time.monotonic()
    await world.kube.patch(MODELS, "m", {"spec": {"replicas": 1}}, subresource="scale")
    await until(lambda: wants(world, 0), "scaled to zero again")
    assert time.monotonic() - woken_s >= 2.0


async def wants(world, replicas):
    return (await world.model())["spec"].get("replicas") == replicas


async def kept_average(world, value):
    try:
        found = await world.kube.get(CONFIGMAPS, "kubeai-autoscaler-state")
    except ApiError:
        return False
    state = msgspec.json.decode(found["data"]["models"])
    assert state["lastCalculationTime"]
    return state["models"].get("m", {}).get("averageActiveRequests") == value


async def test_averages_of_the_former_leader_are_restored(world):
    state = '{"models":{"m":{"averageActiveRequests":30}},"lastCalculationTime":null}'
    meta = {"name": "kubeai-autoscaler-state"}
    await world.kube.create(CONFIGMAPS, {"metadata": meta, "data": {"models": state}})
    await world.create(maxReplicas=3, targetRequests=10)
    slow = CONFIG.replace("timeWindow: 400ms", "timeWindow: 1h")
    world.start(config=slow)
    await world.replicas_are(3, 3)


async def test_pods_made_by_another_kubeai_are_adopted_until_their_model_changes(world):
    made = await world.create(minReplicas=1)
    owner = {
        "apiVersion": "kubeai.org/v1",
        "kind": "Model",
        "name": "m",
        "uid": made["metadata"]["uid"],
        "controller": True,
    }
    labels = {"app": "model", "model": "m", "app.kubernetes.io/managed-by": "kubeai"}
    pod = {
        "metadata": {
            "name": "model-m-5d4f-abcde",
            "labels": labels | {"pod-hash": "5d4f"},
            "ownerReferences": [owner],
        },
        "spec": {"containers": [{"name": "server", "image": "vllm"}]},
    }
    await world.kube.create(PODS, pod)
    replica = world.start()
    await until(lambda: replica.endpoints("m") == ["model-m-5d4f-abcde"], "adopted")
    await until(lambda: has(world, "Progressing", "False", "UpToDate"), "settled")
    (kept,) = await world.pods()
    assert kept["metadata"]["annotations"][HASH_ANNOTATION]
    await world.kube.patch(MODELS, "m", {"spec": {"args": ["--new"]}})
    await until(lambda: "model-m-5d4f-abcde" not in world.nodes.pods, "replaced")
    await world.replicas_are(1, 1)


async def test_the_config_map_of_files_goes_with_the_last_pod_that_mounts_it(world):
    replica = world.start()
    await world.create(minReplicas=1, files=[{"path": "/a", "content": "x"}])
    await world.replicas_are(1, 1)
    (old,) = replica.endpoints("m")
    assert await has_files(world)
    world.nodes.ready = lambda pod: False
    await world.kube.patch(MODELS, "m", {"spec": {"files": None}})
    await world.replicas_are(2, 1)
    assert await has_files(world)  # the old pod mounts it
    world.nodes.ready = lambda pod: True
    world.nodes.look_again()
    await until(lambda: replica.endpoints("m") not in ([], [old]), "replaced")
    await until(lambda: lacks_files(world), "the ConfigMap is gone")


async def test_a_new_leader_deletes_the_config_map_that_its_predecessor_left(world):
    first = world.start("one")
    await world.create(files=[{"path": "/a", "content": "x"}])
    await until(lambda: has_files(world), "the ConfigMap")
    await first.stop()
    world.replicas.clear()
    await world.kube.patch(MODELS, "m", {"spec": {"files": None}})
    world.start("two")
    await until(lambda: lacks_files(world), "the ConfigMap is gone")


async def lacks_files(world):
    return not await has_files(world)


async def has_files(world):
    try:
        await world.kube.get(CONFIGMAPS, "model-m-files")
    except ApiError as error:
        if error.status != 404:
            raise
        return False
    return True
