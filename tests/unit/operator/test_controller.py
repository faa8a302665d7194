"""Reconciliation against an API in memory, on fake time: lost and late events, faults, restarts."""

from __future__ import annotations

import asyncio
import copy
import itertools
import random
import time
from collections import defaultdict
from datetime import UTC, datetime

import msgspec
import pytest
from fakes.kube import World, now_s
from fakes.time import FAKE_TIME

from kubeai.api.model import Model
from kubeai.kube.errors import ApiError
from kubeai.kube.resources import CONFIGMAPS, MODELS, PODS
from kubeai.kube.workqueue import ERROR_BACKOFF_MAX_S, Queue
from kubeai.operator.apply import CREATES_AT_FIRST_MAX
from kubeai.operator.pods import DRAINING_ANNOTATION, PodObject
from kubeai.operator.scaling.scaler import Activator
from kubeai.operator.scaling.timeline import Timeline
from kubeai.operator.store import EXPECTATION_TIMEOUT_S

pytestmark = FAKE_TIME


@pytest.fixture
async def world():
    world = World()
    yield world
    await world.stop()


# -- expectations --------------------------------------------------------------------------------


async def test_a_model_is_reconciled_to_its_spec(world):
    world.start()
    world.apply(replicas=3)
    await world.settled(3, 3)
    assert world.kube.count("create", "pods") == 3
    world.apply(replicas=1)
    await world.settled(1, 1)
    assert world.kube.count("delete", "pods") == 2
    assert world.condition("Ready") == ("True", "AllReplicasReady")


async def test_unobserved_creates_are_not_repeated(world):
    world.auto_ready = False
    world.start()
    world.apply(replicas=3)
    world.kube.held_events = []
    for _ in range(20):
        world.controller.all_changed()
        await asyncio.sleep(0.5)
    assert world.kube.count("create", "pods") == 3
    # The events are lost for good. A second attempt finds the first one's pods and creates no more.
    await asyncio.sleep(2 * EXPECTATION_TIMEOUT_S)
    assert len(world.pods()) == world.kube.most_pods == 3
    world.kube.held_events = None
    world.relist()
    await world.settled(3, 0)


async def test_unobserved_deletes_are_not_repeated(world):
    world.start()
    world.apply(replicas=3)
    await world.settled(3, 3)
    world.kube.held_events = []
    world.apply(replicas=1)
    world.store.model_changed("MODIFIED", msgspec.convert(world.model(), Model))
    for _ in range(20):
        world.controller.all_changed()
        await asyncio.sleep(0.5)
    assert world.kube.count("delete", "pods") == 2
    world.kube.release_events()
    await world.settled(1, 1)


async def test_a_create_whose_response_was_lost_creates_one_pod(world):
    world.start()
    lost = []

    def lose(verb, plural, name):
        if (verb, plural) == ("create", "pods") and len(lost) < 3:
            lost.append(name)
            raise ApiError(0, "Timeout", "no answer")

    world.kube.after = lose
    world.kube.held_events = []
    world.apply(replicas=2)
    world.store.model_changed("ADDED", msgspec.convert(world.model(), Model))
    await world.until(lambda: len(world.pods()) == 2)
    await asyncio.sleep(5.0)
    world.kube.release_events()
    for name in world.pods():
        world.make_ready(name)
    await world.settled(2, 2)
    assert world.kube.most_pods == 2


async def test_a_pod_name_taken_by_another_owner_is_skipped(world):
    world.start()
    world.apply(replicas=1)
    await world.settled(1, 1)
    (name,) = world.pods()
    world.apply(replicas=0)
    await world.settled(0, 0)
    await world.kube.create(PODS, {"metadata": {"name": name}, "spec": {}})
    world.apply(replicas=1)
    await world.until(lambda: world.replicas() == {"all": 1, "ready": 1})
    assert len(world.pods()) == 2


# -- faults --------------------------------------------------------------------------------------


def rates(writes):
    """The highest number of writes to one object within any second."""
    times = defaultdict(list)
    for at_s, _, plural, name in writes:
        times[plural, name].append(at_s)
    return max(
        sum(1 for other in several if at_s <= other < at_s + 0.999)
        for several in times.values()
        for at_s in several
    )


@pytest.mark.parametrize("status", [409, 429, 500, 503, 0])
async def test_it_backs_off_during_an_error_storm_and_recovers(world, status):
    def refuse(verb, plural, name):
        if now_s() < until_s:
            raise ApiError(status, "Storm", "no")

    until_s = now_s() + 120.0
    world.kube.before = refuse
    world.start()
    world.apply(minReplicas=3)
    await asyncio.sleep(60.0)
    for _ in range(300):  # events arrive all the time, but change nothing
        world.controller.all_changed()
        await asyncio.sleep(0.2)
    assert rates(world.kube.writes) <= 2
    assert len(world.kube.writes) < 60
    await world.settled(3, 3, limit_s=60.0)
    assert world.kube.most_pods == 3


async def test_the_final_status_is_written_without_delay(world):
    world.auto_ready = False
    world.start()
    world.apply(minReplicas=30)
    await world.until(lambda: len(world.pods()) == 30)
    for name in world.pods():
        world.make_ready(name)
        await asyncio.sleep(0.09)  # shorter than the time for which a status is debounced
    began_s = now_s()
    await world.until(lambda: world.replicas() == {"all": 30, "ready": 30})
    assert now_s() - began_s < 0.15
    assert world.kube.count("patch status") >= 2, "intermediate statuses were written too"
    assert rates(world.kube.writes) <= 2


async def test_replicas_that_become_ready_together_cause_one_status_write(world):
    world.auto_ready = False
    world.start()
    world.apply(minReplicas=5)
    await world.until(lambda: len(world.pods()) == 5)
    await asyncio.sleep(5)
    written = world.kube.count("patch status")
    for name in world.pods():
        world.make_ready(name)
        await asyncio.sleep(0.08)
    await world.until(lambda: world.replicas() == {"all": 5, "ready": 5})
    assert world.kube.count("patch status") == written + 1


async def test_a_rejected_pod_is_reported_in_the_status_and_retried(world):
    def quota(verb, plural, name):
        if (verb, plural) == ("create", "pods") and full:
            raise ApiError(403, "Forbidden", "exceeded quota: gpus")

    full = True
    world.kube.before = quota
    world.start()
    world.apply(replicas=4)
    await world.until(lambda: world.condition("Ready") == ("False", "PodRefused"))
    conditions = world.model()["status"]["conditions"]
    assert [c["message"] for c in conditions] == ["exceeded quota: gpus"] * 3
    assert "PodRefused" in world.events.reasons()
    await asyncio.sleep(300.0)
    assert world.kube.count("create", "pods") < 25  # one pod at a time, with growing back-off
    assert world.kube.count("patch status") == 1
    full = False
    await world.settled(4, 4)
    assert world.condition("Progressing") == ("False", "UpToDate")


async def test_a_rejection_is_cleared_once_no_pod_is_wanted(world):
    def quota(verb, plural, name):
        if (verb, plural) == ("create", "pods"):
            raise ApiError(403, "Forbidden", "exceeded quota: gpus")

    world.kube.before = quota
    world.start()
    world.apply(replicas=1)
    await world.until(lambda: world.condition("Ready") == ("False", "PodRefused"))
    world.apply(replicas=0)
    await world.until(lambda: world.condition("Ready") == ("True", "ScaledToZero"))


async def test_pods_that_keep_failing_are_replaced_with_back_off(world):
    world.auto_ready = False
    world.start()

    def evict(plural, kind, obj):
        if (plural, kind) == ("pods", "ADDED"):
            failed = {"phase": "Failed", "reason": "Evicted"}
            asyncio.get_running_loop().call_later(
                0.1, world.set_status, obj["metadata"]["name"], failed
            )

    world.kube.listeners.append(evict)
    world.apply(replicas=1)
    await asyncio.sleep(600.0)
    made = world.kube.count("create", "pods")
    assert 5 < made < 15
    assert world.condition("Ready") == ("False", "Evicted")
    world.kube.listeners.remove(evict)
    world.auto_ready = True
    await world.settled(1, 1, limit_s=400.0)


async def test_status_writes_stop_if_the_crd_prunes_conditions(world):
    def prune(obj):
        obj.get("status", {}).pop("conditions", None)
        return obj

    world.kube.admit = prune
    world.start()
    world.apply(replicas=1)
    await world.settled(1, 1)


async def test_label_writes_stay_rate_limited_if_something_removes_the_labels(world):
    def strip(obj):
        obj["metadata"].pop("labels", None)
        return obj

    world.start()
    world.kube.admit = strip
    world.apply(replicas=0, meta={"labels": {}})
    await asyncio.sleep(60.0)
    assert rates(world.kube.writes) <= 2


async def test_nothing_is_written_after_leadership_is_lost(world):
    world.start()

    def lose(verb, plural, name):
        if (verb, plural) == ("create", "pods"):
            world.leader.leads = False

    world.kube.before = lose
    world.apply(replicas=50)
    await asyncio.sleep(60.0)
    assert 1 <= world.kube.count("create", "pods") <= CREATES_AT_FIRST_MAX  # sent together
    assert world.kube.count("patch status") == 0


async def test_the_autoscalers_state_is_saved_with_back_off_and_only_when_it_changes(world):
    def refuse(verb, plural, name):
        if plural == "configmaps" and now_s() < until_s:
            raise ApiError(500, "Storm", "no")

    key = "configmaps", "kubeai-autoscaler-state"
    until_s = now_s() + 10.0
    world.kube.before = refuse
    world.start()
    world.apply(replicas=0)
    scaling = asyncio.create_task(world.scaler().run())
    try:
        await world.until(lambda: key in world.kube.objects)
        assert '"m"' in world.kube.objects[key]["data"]["models"]
        await asyncio.sleep(5.0)
        assert world.kube.count("patch", "configmaps") == 0, (
            "it is created with its complete content"
        )
        assert rates(world.kube.writes) <= 2
        writes = len(world.kube.writes)
        await asyncio.sleep(60.0)
        assert len(world.kube.writes) == writes
        del world.kube.objects[key]
        world.apply("other", replicas=0)
        await world.until(lambda: '"other"' in str(world.kube.objects.get(key)))
    finally:
        scaling.cancel()
        await asyncio.gather(scaling, return_exceptions=True)


# -- drains ----------------------------------------------------------------------------------------


def draining(world):
    pods = [world.kube.objects["pods", name] for name in world.pods()]
    annotations = [pod["metadata"].get("annotations", {}) for pod in pods]
    return [DRAINING_ANNOTATION in has for has in annotations].count(True)


async def test_a_drained_pod_is_deleted_once_it_receives_no_more_requests(world):
    world.start()
    world.apply(replicas=3)
    await world.settled(3, 3)
    _, *busy = world.pods()
    world.loads.used |= set(busy)
    world.loads.served |= dict.fromkeys(busy, 4)
    world.apply(replicas=1)
    await world.until(lambda: draining(world) == 1)
    await world.until(lambda: world.replicas() == {"all": 1, "ready": 1})
    await asyncio.sleep(60.0)
    assert sorted(world.pods()) == sorted(busy), "the idle pod was deleted, no busy one was"
    writes = len(world.kube.writes)
    await asyncio.sleep(60.0)
    assert len(world.kube.writes) == writes, "waiting writes nothing"
    world.loads.used.clear()
    await world.settled(1, 1)
    assert world.kube.count("delete", "pods") == 2


async def test_a_draining_pod_returns_to_service_when_it_is_needed_again(world):
    world.start()
    world.apply(replicas=2)
    await world.settled(2, 2)
    pods = world.pods()
    world.loads.used |= set(pods)
    world.apply(replicas=0)
    await world.until(lambda: draining(world) == 2)
    world.apply(replicas=2)
    await world.settled(2, 2)
    assert (draining(world), world.pods()) == (0, pods)
    assert world.kube.count("create", "pods") == 2


async def test_a_rollout_drains_each_old_pod_before_deleting_it(world):
    world.start()
    world.apply(replicas=2)
    await world.settled(2, 2)
    old = world.pods()
    world.loads.used |= set(old)
    world.apply(args=["--new"])
    await world.until(lambda: draining(world) == 1)
    await asyncio.sleep(60.0)
    assert set(old) < set(world.pods())
    assert world.kube.most_pods == 3, "a draining pod still occupies its node"
    world.loads.used.clear()
    await world.settled(2, 2)
    assert not set(old) & set(world.pods())


async def test_a_new_leader_continues_the_drains_of_its_predecessor(world):
    world.start()
    world.apply(replicas=1)
    await world.settled(1, 1)
    used = set(world.pods())
    world.loads.used |= used
    world.apply(replicas=0)
    await world.until(lambda: draining(world) == 1)
    await world.stop()
    world.start()
    world.loads.used |= used
    await asyncio.sleep(30.0)
    assert len(world.pods()) == 1
    world.loads.used.clear()
    await world.settled(0, 0)


async def test_an_event_older_than_our_own_write_is_ignored(world):
    world.start()
    world.apply(replicas=1)
    await world.settled(1, 1)
    (name,) = world.pods()
    before = msgspec.convert(world.kube.objects["pods", name], PodObject)
    world.loads.used.add(name)
    world.apply(replicas=0)
    await world.until(lambda: draining(world) == 1)
    world.store.pod_changed("MODIFIED", before)
    (pod,) = world.store.observed_pods("m")
    assert pod.draining_since_s


async def test_autoscaler_state_written_by_another_replica_is_read_before_it_is_overwritten(world):
    key = "configmaps", "kubeai-autoscaler-state"
    refused = []

    def meddle(verb, plural, name):
        """A write that a frozen former leader sent arrives just before ours."""
        if (verb, plural) == ("patch", "configmaps") and not refused:
            refused.append(verb)
            late = copy.deepcopy(world.kube.objects[key]) | {"data": {"models": "late"}}
            world.kube._keep(CONFIGMAPS, late, "MODIFIED")

    world.start()
    world.apply(replicas=0)
    scaling = asyncio.create_task(world.scaler().run())
    try:
        await world.until(lambda: key in world.kube.objects)
        world.kube.before = meddle
        world.apply("other", replicas=0)
        await world.until(lambda: refused)
        await asyncio.sleep(0.5)
        assert world.kube.objects[key]["data"]["models"] == "late"
        await world.until(lambda: '"other"' in world.kube.objects[key]["data"]["models"])
    finally:
        scaling.cancel()
        await asyncio.gather(scaling, return_exceptions=True)


# -- from zero ------------------------------------------------------------------------------------


class Held(dict):
    """Loads: the number of held requests per model."""

    def held(self, model):
        return self.get(model, 0)

    active = held

    def in_flight(self, model, endpoint):
        return 0

    def in_use(self, model, endpoint):
        return False

    def ended(self, model):
        return 0

    def complete(self):
        return True


@pytest.fixture
async def activator(world):
    world.start()
    world.held = Held()
    activator = Activator(world.kube, "default", world.store, world.held, world.events, Timeline())
    yield activator
    await activator.stop()


async def test_demand_causes_one_write_and_a_pod_at_once(world, activator):
    world.apply(replicas=0)
    await world.settled(0, 0)
    began = now_s()
    for _ in range(100):
        activator.demand("m")
    await world.until(world.pods)
    assert now_s() - began < 0.05
    assert world.kube.count("patch", "models") == 1
    await world.settled(1, 1)


async def test_demand_scales_to_the_models_min_replicas(world, activator):
    world.leader.leads = False
    world.apply(minReplicas=3)
    activator.demand("m")
    await world.until(lambda: world.model()["spec"].get("replicas") == 3)


async def test_demand_for_an_unknown_or_active_or_manual_model_writes_nothing(world, activator):
    world.apply("awake", replicas=2)
    world.apply("theirs", replicas=0, autoscalingDisabled=True)
    await world.until(lambda: len(world.pods()) == 2)
    for name in ("awake", "theirs", "unknown"):
        activator.demand(name)
    await asyncio.sleep(10.0)
    assert world.kube.count("patch", "models") == 0


async def test_demand_backs_off_during_an_error_storm(world, activator):
    def refuse(verb, plural, name):
        if now_s() < until_s:
            raise ApiError(503, "Storm", "no")

    world.apply(replicas=0)
    await world.settled(0, 0)
    world.kube.writes.clear()
    until_s = now_s() + 60.0
    world.kube.before = refuse
    world.held["m"] = 7
    for _ in range(500):
        activator.demand("m")
        await asyncio.sleep(0.1)
    assert rates(world.kube.writes) <= 2
    looking = asyncio.create_task(activator.run())  # no more messages, but the request is held
    await world.until(lambda: world.model()["spec"]["replicas"] == 1, limit_s=60.0)
    looking.cancel()
    await asyncio.gather(looking, return_exceptions=True)


async def test_demand_with_a_stale_view_reads_the_model_again(world, activator):
    world.apply(replicas=0, maxReplicas=5)
    await world.settled(0, 0)
    world.kube.held_events = []
    world.apply(replicas=5)
    activator.demand("m")  # the store still says 0
    await world.until(lambda: len(world.pods()) == 5)
    assert world.model()["spec"]["replicas"] == 5


# -- pods without a Model ------------------------------------------------------------------------


async def test_pods_of_a_deleted_model_are_deleted(world):
    world.start()
    world.apply(replicas=2)
    await world.settled(2, 2)
    world.kube._keep(MODELS, world.model(), "DELETED")
    await world.until(lambda: not world.pods())


async def test_pods_of_a_model_not_yet_known_are_kept(world):
    world.start()
    world.apply(replicas=2)
    await world.settled(2, 2)
    world.store.model_changed("DELETED", msgspec.convert(world.model(), Model))
    await asyncio.sleep(2 * EXPECTATION_TIMEOUT_S)
    assert len(world.pods()) == 2


# -- files ---------------------------------------------------------------------------------------


async def test_files_are_kept_in_a_config_map(world):
    world.start()
    world.apply(replicas=1, files=[{"path": "/a/b", "content": "one"}])
    await world.settled(1, 1)
    found = world.kube.objects["configmaps", "model-m-files"]
    assert found["data"] == {"_a_b": "one"}
    assert found["metadata"]["ownerReferences"][0]["uid"] == world.model()["metadata"]["uid"]
    world.apply(files=[{"path": "/c", "content": "two"}])
    await world.settled(1, 1)
    assert world.kube.objects["configmaps", "model-m-files"]["data"] == {"_c": "two"}


FILES = "configmaps", "model-m-files"


async def test_a_config_map_is_deleted_with_the_last_pod_that_mounts_it(world):
    world.start()
    world.apply(replicas=2, files=[{"path": "/a", "content": "one"}])
    await world.settled(2, 2)
    world.auto_ready = False  # the rollout stalls and the old pods go on serving
    world.apply(files=None)
    await world.until(lambda: len(world.pods()) == 3)
    await asyncio.sleep(60.0)
    assert FILES in world.kube.objects
    world.auto_ready = True
    world.make_ready(next(name for name in world.pods() if not is_ready(world, name)))
    await world.settled(2, 2)
    assert FILES not in world.kube.objects
    world.apply(files=[{"path": "/a", "content": "one"}])
    await world.settled(2, 2)
    assert world.kube.objects[FILES]["data"] == {"_a": "one"}


def is_ready(world, name):
    status = world.kube.objects["pods", name].get("status", {})
    return status.get("conditions") == [{"type": "Ready", "status": "True"}]


@pytest.mark.parametrize("may_list", [True, False])
async def test_a_new_leader_deletes_leftover_config_maps(world, may_list):
    """It lists them once, regardless of the number of Models."""
    world.start()
    names = [f"m{n}" for n in range(10)]
    for name in names:
        world.apply(name, replicas=0, files=[{"path": "/a", "content": "one"}])
    maps = [("configmaps", f"model-{name}-files") for name in names]
    await world.until(lambda: all(key in world.kube.objects for key in maps))
    await world.kube.create(CONFIGMAPS, {"metadata": {"name": "model-x-files"}, "data": {}})
    await world.stop()
    for name in names:
        world.apply(name, files=None)
    if not may_list:
        world.kube.missing.add("configmaps")
    world.kube.lists.clear()
    world.start()
    await asyncio.sleep(10.0)
    assert [key for key in maps if key in world.kube.objects] == ([] if may_list else maps)
    assert ("configmaps", "model-x-files") in world.kube.objects  # belongs to no Model
    assert sorted(world.kube.lists) == ["configmaps", "services"]


async def test_the_files_of_a_deleted_model_of_the_same_name_are_not_reused(world):
    stale = {"metadata": {"name": "model-m-files", "ownerReferences": [{"uid": "former"}]}}
    await world.kube.create(CONFIGMAPS, stale | {"data": {"_a": "old"}})
    world.start()
    world.apply(replicas=1, files=[{"path": "/a", "content": "new"}])
    await world.settled(1, 1)
    found = world.kube.objects["configmaps", "model-m-files"]
    assert found["data"] == {"_a": "new"}
    assert found["metadata"]["ownerReferences"][0]["uid"] == world.model()["metadata"]["uid"]


# -- restarts ------------------------------------------------------------------------------------


class Crash(Exception):
    pass


async def life(world, crash_at, committed):
    """Create, scale, roll out, scale down; the controller dies at one write and restarts."""
    seen = 0

    def before(verb, plural, name):
        nonlocal seen
        seen += 1
        if seen == crash_at and not committed:
            crashed.set()
            raise ApiError(0, "Crash", "never sent")

    def after(verb, plural, name):
        if seen == crash_at and committed:
            crashed.set()
            raise ApiError(0, "Crash", "sent, but the response was lost")

    async def phoenix():
        await crashed.wait()
        await world.stop()
        world.start()

    crashed = asyncio.Event()
    rising = asyncio.create_task(phoenix())
    world.kube.before, world.kube.after = before, after
    world.start()
    limits = []
    for spec, wanted in (
        ({"replicas": 1}, 1),
        ({"replicas": 3}, 3),
        ({"args": ["--new"]}, 3),
        ({"replicas": 2, "files": [{"path": "/a", "content": "x"}]}, 2),
    ):
        world.apply(**spec)
        limits.append(wanted)
        goal = {"all": wanted, "ready": wanted}
        await world.until(
            lambda goal=goal: (
                world.replicas() == goal
                and world.condition("Progressing") == ("False", "UpToDate")
                and world.model()["status"]["conditions"][0]["observedGeneration"]
                == world.model()["metadata"]["generation"]
            ),
            limit_s=200.0,
        )
        assert len(world.pods()) == wanted
    rising.cancel()
    await asyncio.gather(rising, return_exceptions=True)
    return seen, world.pods()


async def test_a_crash_at_any_write_ends_in_the_same_state():
    world = World()
    writes, pods = await life(world, 0, False)
    await world.stop()
    assert 15 < writes < 60
    for crash_at in range(1, writes + 1):
        for committed in (False, True):
            world = World()
            _, got = await life(world, crash_at, committed)
            await world.stop()
            assert len(got) == len(pods) == 2
            assert world.kube.most_pods <= 4  # 3 replicas and a surge of 1
            assert {n.rsplit("-", 1)[0] for n in got} == {n.rsplit("-", 1)[0] for n in pods}


@pytest.mark.parametrize("seed", range(20))
async def test_it_converges_after_random_failures_and_edits(world, seed):
    rng = random.Random(seed)

    def maybe_fail(verb, plural, name):
        if now_s() < 60.0 and rng.random() < 0.25:
            raise ApiError(rng.choice([0, 409, 429, 500]), "Chance", "no luck")

    world.kube.before = world.kube.after = maybe_fail
    world.start()
    world.apply(replicas=2)
    most = 2
    while now_s() < 60.0:
        await asyncio.sleep(rng.random() * 4)
        match rng.randrange(6):
            case 0:
                replicas = rng.randrange(5)
                most = max(most, replicas)
                world.apply(replicas=replicas)
            case 1:
                world.apply(args=[f"--version={rng.randrange(3)}"])
            case 2 if world.pods():
                failed = {"phase": "Failed", "conditions": None}
                world.set_status(rng.choice(world.pods()), failed)
            case 3 if world.pods():
                gone = world.kube.objects["pods", rng.choice(world.pods())]
                world.kube._keep(PODS, copy.deepcopy(gone), "DELETED")
            case 4:
                await world.stop()
                world.start()
            case 5:
                world.relist()
        assert len(living(world)) <= most + 1
    replicas = rng.randrange(5)
    world.apply(replicas=replicas)
    # failed pods are replaced after a back-off that has grown
    await world.until(lambda: len(living(world)) == len(world.pods()) == replicas, limit_s=400.0)
    await asyncio.sleep(ERROR_BACKOFF_MAX_S)
    await world.settled(replicas, replicas)


def living(world):
    return [p for p in world.kube.alive() if p.get("status", {}).get("phase") != "Failed"]


# -- the queue -----------------------------------------------------------------------------------


async def test_a_key_is_processed_by_one_worker_at_a_time_and_different_keys_in_parallel():
    running, most, done = defaultdict(int), 0, defaultdict(int)

    async def work(name):
        nonlocal most
        running[name] += 1
        assert running[name] == 1
        most = max(most, sum(running.values()))
        await asyncio.sleep(1.0)
        running[name] -= 1
        done[name] += 1

    queue = Queue(work, parallel_max=3)
    for _ in range(10):
        for name in "abcde":
            queue.add(name)
        await asyncio.sleep(0.1)
    await asyncio.sleep(20.0)
    assert most == 3
    assert set(done) == set("abcde")
    assert done["a"] == 2  # once, and once more for all that was added while it ran
    await queue.stop()


async def test_a_failed_key_backs_off_even_if_it_is_added_again():
    times = []

    async def work(name):
        times.append(now_s())
        raise ValueError("a fault")

    queue = Queue(work, parallel_max=1)
    for _ in range(1000):
        queue.add("a")
        await asyncio.sleep(0.1)
    rests = [b - a for a, b in itertools.pairwise(times)]
    assert min(rests) >= 0.5
    assert max(rests) <= 30.0
    assert len(times) < 12
    await queue.stop()


async def test_a_key_is_requeued_on_request():
    times = []

    async def work(name):
        times.append(now_s())
        return 5.0 if len(times) < 3 else None

    queue = Queue(work, parallel_max=1)
    queue.add("a")
    await asyncio.sleep(60.0)
    assert [round(b - a) for a, b in itertools.pairwise(times)] == [5, 5]
    await queue.stop()


async def test_degraded_clears_without_an_event_after_a_long_enough_run(world, monkeypatch):
    start_s = datetime(2026, 1, 1, tzinfo=UTC).timestamp()
    monkeypatch.setattr(time, "time", lambda: start_s + now_s())
    world.auto_ready = False
    world.start()
    world.apply(replicas=1)
    await world.until(world.pods)
    times = {"startedAt": "2026-01-01T00:00:00Z", "finishedAt": "2026-01-01T00:01:00Z"}
    server = {
        "name": "server",
        "restartCount": 2,
        "state": {"running": {"startedAt": "2026-01-01T00:02:00Z"}},
        "lastState": {"terminated": {"exitCode": 1, "message": "no GPU", **times}},
    }
    world.set_status(world.pods()[0], {"phase": "Running", "containerStatuses": [server]})
    await world.until(lambda: world.condition("Degraded") == ("True", "CrashLoopBackOff"))
    await asyncio.sleep(600.0)
    assert world.condition("Degraded") == ("True", "CrashLoopBackOff")
    await world.until(lambda: world.condition("Degraded") == ("False", "AsExpected"), 300.0)
    assert now_s() >= 120 + 600 + 60
