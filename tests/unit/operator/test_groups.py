"""Replicas on several nodes: a LeaderWorkerSet and its pods as one replica, on fake time."""

from __future__ import annotations

import asyncio
import copy

import msgspec
import pytest
from fakes.kube import World
from fakes.time import FAKE_TIME

from kubeai.api.config.system import parse_config
from kubeai.api.model import decode_model
from kubeai.kube.errors import ApiError
from kubeai.kube.exec import ExecResult
from kubeai.kube.resources import PODS, SETS
from kubeai.operator.groups import SetObject, compose, needs_set
from kubeai.operator.pods import DRAINING_ANNOTATION, Pod, PodObject, Trouble
from kubeai.operator.routes import route_of
from kubeai.operator.sets import FAILURES_MAX, PROBE_INTERVAL_S, Sets
from kubeai.operator.store import Store

pytestmark = FAKE_TIME
CONFIG = parse_config("resourceProfiles: {cpu: {requests: {cpu: 1}}}")
LWS = "leaderworkerset.sigs.k8s.io/"


# -- one replica of several pods -----------------------------------------------------------------


def a_set(size=2, **meta):
    labels = {"model": "m", "app.kubernetes.io/managed-by": "kubeai"}
    annotations = {"kubeai.org/pod-hash": "h"}
    owner = {"apiVersion": "v1", "kind": "Model", "name": "m", "uid": "u", "controller": True}
    whole: dict[str, object] = {"name": "s", "uid": "set"}
    whole |= {"labels": labels, "annotations": annotations}
    whole |= {"ownerReferences": [owner], "creationTimestamp": "2026-01-01T00:00:00Z", **meta}
    spec = {"leaderWorkerTemplate": {"size": size}}
    return msgspec.convert({"metadata": whole, "spec": spec}, SetObject)


def member(worker=0, **facts):
    name = "s-0" if worker == 0 else f"s-0-{worker}"
    facts = {"ready": True, "scheduled": True, "step": "Loading", "phase": "Running"} | facts
    address = "10.0.0.1:8000" if worker == 0 else ""
    return Pod(name=name, uid=f"uid-{name}", set="s", worker=worker, address=address, **facts)


def test_a_replica_is_named_after_its_set_and_has_its_leaders_address():
    replica = compose(a_set(), [member(1), member()])
    assert (replica.name, replica.uid, replica.model, replica.owner) == ("s", "set", "m", "u")
    assert (replica.hash, replica.address, replica.serves) == ("h", "10.0.0.1:8000", True)
    assert replica.pods == (("s-0", "uid-s-0"), ("s-0-1", "uid-s-0-1"))


def test_a_replica_is_ready_while_its_leader_is():
    assert not compose(a_set(), [member(ready=False), member(1)]).ready
    assert compose(a_set(), [member(), member(1, ready=False)]).ready


def test_a_replica_is_as_far_as_the_last_of_its_pods():
    assert compose(a_set(), [member(), member(1, step="PullingImage")]).step == "PullingImage"
    assert compose(a_set(), [member()]).step == "Pending"
    assert compose(a_set(), [member(), member(1)]).scheduled
    assert not compose(a_set(), [member(), member(1, scheduled=False)]).scheduled
    assert not compose(a_set(), [member()]).scheduled


def test_a_leader_that_is_being_replaced_gets_no_requests():
    replica = compose(a_set(), [member(terminating=True), member(1)])
    assert not replica.serves
    assert not replica.terminating  # the set is not going
    assert replica.counts


def test_trouble_of_any_pod_is_the_replicas():
    trouble = Trouble("Unschedulable", "no node has 8 GPUs")
    replica = compose(a_set(), [member(ready=False), member(1, trouble=trouble)])
    assert replica.trouble == Trouble("Unschedulable", "s-0-1: no node has 8 GPUs")


def test_a_set_without_pods_is_in_trouble_after_a_while():
    replica = compose(a_set(), [])
    assert replica.trouble_at(replica.created_s + 29) is None
    trouble = replica.trouble_at(replica.created_s + 31)
    assert trouble.reason == "NoLeaderPod"
    assert "kubectl describe lws s" in trouble.message


def test_a_draining_set_is_no_replica_but_keeps_its_requests():
    draining = a_set(annotations={DRAINING_ANNOTATION: "7", "kubeai.org/pod-hash": "h"})
    replica = compose(draining, [member(), member(1)])
    assert not replica.counts
    model = decode_model(
        {
            "metadata": {"name": "m", "uid": "u"},
            "spec": {"url": "hf://a/b", "engine": "VLLM", "features": []},
        }
    )
    route = route_of(model, [replica])
    assert (route.endpoints, route.draining) == ((), ("s",))


def a_pod_object(name, index):
    labels = {"model": "m", f"{LWS}name": "s", f"{LWS}worker-index": str(index)}
    return msgspec.convert({"metadata": {"name": name, "uid": name, "labels": labels}}, PodObject)


def test_the_pods_of_a_deleted_set_finish_as_the_replica_that_they_were():
    store = Store(lambda name: None)
    store.replace_pods([a_pod_object("s-0", 0), a_pod_object("s-0-1", 1)])
    # The name is in use until the leader is gone, and requests there are those of an endpoint.
    assert {pod.name: pod.terminating for pod in store.pods_of("m")} == {"s": True, "s-0-1": True}


def test_a_set_whose_pods_are_seen_before_it_is_still_expected():
    store = Store(lambda name: None)
    store.creating(Pod(name="s", model="m", grouped=True))
    store.replace_pods([a_pod_object("s-0", 0)])
    assert [pod.name for pod in store.pods_of("m") if not pod.terminating] == ["s"]


# -- in a world ----------------------------------------------------------------------------------


class Groups(World):
    """A world with a controller of LeaderWorkerSets."""

    def __init__(self):
        super().__init__()
        self.kube.listeners.append(self._set)
        self.makes_pods = True

    def _set(self, plural, kind, obj):
        if plural != "leaderworkersets":
            return
        loop = asyncio.get_running_loop()
        if kind == "ADDED" and self.makes_pods:
            loop.call_later(0.05, self._make_pods, obj)
        if kind == "DELETED":
            loop.call_later(0.05, self._collect, obj["metadata"]["name"])

    def _make_pods(self, one):
        name = one["metadata"]["name"]
        if ("leaderworkersets", name) not in self.kube.objects:
            return
        group = one["spec"]["leaderWorkerTemplate"]
        for index in range(group["size"]):
            template = group["workerTemplate" if index else "leaderTemplate"]
            pod = copy.deepcopy(template)
            pod["metadata"]["name"] = f"{name}-0-{index}" if index else f"{name}-0"
            pod["metadata"]["uid"] = f"uid-{pod['metadata']['name']}-{self.kube.version}"
            pod["metadata"]["labels"] |= {f"{LWS}name": name, f"{LWS}worker-index": str(index)}
            pod["spec"]["nodeName"] = "n"
            self.kube._keep(PODS, pod, "ADDED")

    def _collect(self, name):
        for (plural, _), obj in list(self.kube.objects.items()):
            if plural == "pods" and obj["metadata"]["labels"].get(f"{LWS}name") == name:
                self.kube._keep(PODS, copy.deepcopy(obj), "DELETED")

    def sets(self):
        return sorted(n for plural, n in self.kube.objects if plural == "leaderworkersets")

    async def settled(self, all_, ready, limit_s=60.0):
        wanted = {"all": all_, "ready": ready}
        await self.until(lambda: self.replicas() == wanted and len(self.sets()) == all_, limit_s)


@pytest.fixture
async def world():
    world = Groups()
    yield world
    await world.stop()


async def test_a_model_on_two_nodes_becomes_a_set_and_is_scaled_by_sets(world):
    world.start(CONFIG)
    world.apply(replicas=2, resourceProfile="cpu:4:2")
    await world.settled(2, 2)
    assert len(world.pods()) == 4
    assert world.kube.count("create", "pods") == 0
    assert world.condition("Ready") == ("True", "AllReplicasReady")
    world.apply(replicas=1)
    await world.settled(1, 1)
    await world.until(lambda: len(world.pods()) == 2)
    assert world.kube.count("delete", "leaderworkersets") == 1


async def test_nothing_is_written_once_all_is_as_wanted(world):
    world.start(CONFIG)
    world.apply(replicas=2, resourceProfile="cpu:4:2")
    await world.settled(2, 2)
    await asyncio.sleep(5)
    before = len(world.kube.writes)
    world.controller.all_changed()
    await asyncio.sleep(120)
    assert world.kube.writes[before:] == []


async def test_a_new_version_replaces_one_set_after_the_other(world):
    world.start(CONFIG)
    world.apply(replicas=2, resourceProfile="cpu:4:2")
    await world.settled(2, 2)
    old, most, least = set(world.sets()), [], []

    def look(plural, kind, obj):
        most.append(len(world.sets()))
        least.append(sum(pod.serves for pod in world.store.observed_pods("m")))

    world.kube.listeners.append(look)
    world.apply(args=["--new"])
    await world.until(lambda: not old & set(world.sets()))
    await world.settled(2, 2)
    assert max(most) == 3  # one more than replicas
    assert min(least) >= 2


async def test_a_set_is_drained_before_it_is_deleted(world):
    world.start(CONFIG)
    world.apply(replicas=1, resourceProfile="cpu:4:2")
    await world.settled(1, 1)
    (name,) = world.sets()
    world.loads.used.add(name)
    world.apply(replicas=0)

    def annotations():
        return world.kube.objects["leaderworkersets", name]["metadata"]["annotations"]

    await world.until(lambda: DRAINING_ANNOTATION in annotations())
    await asyncio.sleep(5)
    assert world.sets() == [name]
    world.loads.used.clear()
    await world.until(lambda: not world.sets())


async def test_a_model_moves_from_one_node_to_two_and_back(world):
    world.start(CONFIG)
    world.apply(replicas=1)
    await world.until(lambda: world.replicas() == {"all": 1, "ready": 1})
    world.apply(resourceProfile="cpu:4:2")
    await world.settled(1, 1)
    await world.until(lambda: len(world.pods()) == 2)
    world.apply(resourceProfile="cpu:4")
    await world.until(lambda: not world.sets())
    await world.until(lambda: world.replicas() == {"all": 1, "ready": 1})
    await world.until(lambda: len(world.pods()) == 1)


async def test_a_model_that_is_deleted_takes_its_sets_along(world):
    world.start(CONFIG)
    world.apply(replicas=1, resourceProfile="cpu:4:2")
    await world.settled(1, 1)
    world.delete()
    await world.until(lambda: not world.sets() and not world.pods())


async def test_a_lost_event_of_a_set_does_not_make_a_second_one(world):
    world.start(CONFIG)
    world.kube.held_events = []
    world.apply(replicas=1, resourceProfile="cpu:4:2")
    world.store.replace_models([decode_model(world.model())])
    await world.until(lambda: world.kube.count("create", "leaderworkersets"))
    for _ in range(20):
        world.controller.all_changed()
        await asyncio.sleep(0.5)
    assert world.kube.count("create", "leaderworkersets") == 1
    world.kube.release_events()
    await world.settled(1, 1)


async def test_without_the_api_the_conditions_say_what_is_missing(world):
    world.no_sets = "install LeaderWorkerSet"
    world.start(CONFIG)
    world.apply(replicas=1, resourceProfile="cpu:4:2")
    await world.until(lambda: world.condition("Ready") == ("False", "NoLeaderWorkerSets"))
    (message,) = {
        c["message"] for c in world.model()["status"]["conditions"] if c["type"] == "Ready"
    }
    assert message == "spec.resourceProfile: install LeaderWorkerSet"
    assert world.sets() == world.pods() == []
    world.no_sets = ""  # it has been installed
    world.controller.changed("m")
    await world.settled(1, 1)


async def test_adapters_are_fetched_into_each_pod_and_loaded_by_the_leader(world):
    fetched = []

    async def execute(pod, command, container):
        fetched.append((pod, command[0]))
        return ExecResult(0, "")

    world.kube.executed = execute
    world.start(CONFIG)
    adapters = [{"name": "a", "url": "hf://org/lora"}]
    world.apply(replicas=1, resourceProfile="cpu:4:2", adapters=adapters)
    await world.settled(1, 1)
    for name in world.pods():
        running = {"name": "loader", "state": {"running": {}}}
        world.set_status(name, {"containerStatuses": [running]})
    await world.until(lambda: len([one for one in fetched if one[1] == "load"]) >= 2)
    assert {pod for pod, command in fetched if command == "load"} == set(world.pods())


# -- the API itself ------------------------------------------------------------------------------


class Api:
    """An API whose LeaderWorkerSets come and go."""

    def __init__(self, error=None):
        self.error = error
        self.lists = 0
        self.gone = asyncio.Event()

    async def list(self, *_, **__):
        self.lists += 1
        if self.error is not None:
            raise self.error
        return [], "1"

    async def follow(self, resource, namespace, *, replaced, failed, **_):
        assert resource is SETS
        if self.error is not None:
            failed(self.error)
        else:
            replaced([])
        await self.gone.wait()
        failed(ApiError(404, "NotFound", "gone"))
        await asyncio.sleep(3600)


def followed(api, needed):
    listed, problems = [], []
    sets = Sets(
        api,
        "ns",
        "",
        replaced=listed.append,
        changed=lambda kind, one: None,
        needed=lambda: needed,
        changed_problem=lambda: problems.append(sets.problem),
    )
    return sets, listed, problems, asyncio.create_task(sets.run())


async def ended(task):
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_an_api_that_is_not_installed_is_looked_for_only_while_a_model_needs_it():
    for needed, lists in ((False, 1), (True, 11)):
        api = Api(ApiError(404, "NotFound", "no such resource"))
        sets, listed, problems, task = followed(api, needed)
        await asyncio.sleep(10 * PROBE_INTERVAL_S + 1)
        assert api.lists == lists
        assert listed[0] == []
        assert "is not installed" in sets.problem
        assert len(problems) == 1
        await ended(task)


async def test_an_api_that_is_installed_later_is_found_and_one_that_is_removed_is_noticed():
    api = Api(ApiError(404, "NotFound", "no such resource"))
    sets, _, problems, task = followed(api, needed=True)
    await asyncio.sleep(1)
    api.error = None
    await asyncio.sleep(PROBE_INTERVAL_S)
    assert sets.problem == ""
    api.error = ApiError(404, "NotFound", "no such resource")
    api.gone.set()
    await asyncio.sleep(1)
    assert "is not installed" in sets.problem
    assert len(problems) == 3
    await ended(task)


async def test_a_missing_permission_does_not_keep_kubeai_from_starting():
    api = Api(ApiError(403, "Forbidden", "may not list leaderworkersets"))
    sets, listed, _, task = followed(api, needed=False)
    await asyncio.sleep(1)
    assert listed == [[]]
    assert "may not list leaderworkersets" in sets.problem
    await ended(task)


async def test_an_api_that_is_overloaded_at_first_is_waited_for_but_not_forever():
    api = Api(ApiError(503, "ServiceUnavailable", "try again"))
    sets, listed, _, task = followed(api, needed=False)
    await asyncio.sleep(1)
    assert listed == []  # pods of sets must not be taken for pods of no set
    for _ in range(FAILURES_MAX - 1):
        sets._failed(api.error)
    assert listed == [[]]
    assert "try again" in sets.problem
    await ended(task)


@pytest.mark.parametrize(
    ("profile", "needs"),
    [("", False), ("cpu:1", False), ("cpu:1:1", False), ("cpu:1:2", True), ("a:b:c", False)],
)
def test_only_models_on_several_nodes_need_the_api(profile, needs):
    spec = {"url": "hf://a/b", "engine": "VLLM", "features": [], "resourceProfile": profile}
    assert needs_set(decode_model({"metadata": {"name": "m"}, "spec": spec})) is needs
