"""Reconcile against an API in memory, on fake time: lost and late events, faults, restarts."""

from __future__ import annotations

import asyncio
import copy
import itertools
import random
from collections import defaultdict

import msgspec
import pytest

from kubeai.api.config import parse_config
from kubeai.api.model import Model
from kubeai.kube import CONFIGMAPS, MODELS, PODS, ApiError
from kubeai.operator.controller import CREATES_AT_FIRST_MAX, Controller
from kubeai.operator.leader import NotLeader
from kubeai.operator.pods import PodObject
from kubeai.operator.queue import REST_MAX_S, Queue
from kubeai.operator.scaling import Wakes
from kubeai.operator.store import EXPECTATION_TIMEOUT_S, Store

pytestmark = pytest.mark.looptime
CONFIG = parse_config("resourceProfiles: {cpu: {requests: {cpu: 1}}}")


def now_s():
    return asyncio.get_running_loop().time()


def merge(target, patch):
    """RFC 7386."""
    if not isinstance(patch, dict):
        return patch
    target = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            target.pop(key, None)
        else:
            target[key] = merge(target.get(key), value)
    return target


class FakeKube:
    """Objects with versions and preconditions; events that may be held back; faults on order."""

    def __init__(self):
        self.objects = {}
        self.version = 0
        self.listeners = []
        self.held_events = None  # a list: events are held back in it
        self.writes = []  # (seconds, verb, plural, name)
        self.before = lambda verb, plural, name: None  # may raise: the write is not done
        self.after = lambda verb, plural, name: None  # may raise: it is done, the answer is lost
        self.admit = lambda obj: obj
        self.most_pods = 0

    def _now(self, plural, name):
        try:
            return self.objects[plural, name]
        except KeyError:
            raise ApiError(404, "NotFound", f"{plural} {name} not found") from None

    async def _write(self, verb, r, name, change):
        await asyncio.sleep(0.002)
        self.writes.append((now_s(), verb, r.plural, name))
        self.before(verb, r.plural, name)
        obj = change()
        self.after(verb, r.plural, name)
        return obj

    def _keep(self, r, obj, kind):
        self.version += 1
        obj["metadata"]["resourceVersion"] = str(self.version)
        key = r.plural, obj["metadata"]["name"]
        if kind == "DELETED":
            self.objects.pop(key, None)
        else:
            self.objects[key] = obj
        self.most_pods = max(self.most_pods, len(self.alive()))
        self._tell(r.plural, kind, copy.deepcopy(obj))
        return copy.deepcopy(obj)

    def _tell(self, plural, kind, obj):
        if self.held_events is not None:
            self.held_events.append((plural, kind, obj))
            return
        for listener in self.listeners:
            listener(plural, kind, obj)

    def release_events(self):
        events, self.held_events = self.held_events, None
        for one in events:
            self._tell(*one)

    def alive(self):
        return [
            obj
            for (plural, _), obj in self.objects.items()
            if plural == "pods" and "deletionTimestamp" not in obj["metadata"]
        ]

    @staticmethod
    def _as(obj, type_):
        return obj if type_ is dict else msgspec.convert(obj, type_)

    async def get(self, r, name, namespace="", *, type=dict):
        await asyncio.sleep(0.001)
        return self._as(copy.deepcopy(self._now(r.plural, name)), type)

    async def create(self, r, obj, namespace="", *, type=dict):
        name = obj["metadata"]["name"]

        def change():
            if (r.plural, name) in self.objects:
                raise ApiError(409, "AlreadyExists", name)
            meta = {
                "uid": f"uid-{self.version}",
                "generation": 1,
                "creationTimestamp": f"2026-01-01T00:{self.version // 60 % 60:02}:00Z",
            }
            new = self.admit(merge(copy.deepcopy(obj), {"metadata": meta}))
            return self._keep(r, new, "ADDED")

        return self._as(await self._write("create", r, name, change), type)

    async def patch(self, r, name, patch, namespace="", *, subresource="", kind="merge", type=dict):
        def change():
            old = self._now(r.plural, name)
            for key in ("uid", "resourceVersion"):
                wanted = patch.get("metadata", {}).get(key)
                if wanted is not None and wanted != old["metadata"][key]:
                    raise ApiError(409, "Conflict", key)
            new = self.admit(merge(copy.deepcopy(old), copy.deepcopy(patch)))
            if new == old:
                return copy.deepcopy(old)
            return self._keep(r, new, "MODIFIED")

        verb = f"patch {subresource}".strip()
        return self._as(await self._write(verb, r, name, change), type)

    async def delete(self, r, name, namespace="", *, uid=None, **options):
        def change():
            old = self._now(r.plural, name)
            if uid is not None and uid != old["metadata"]["uid"]:
                raise ApiError(409, "Conflict", "uid")
            if r is PODS and old.get("spec", {}).get("nodeName"):
                stamp = {"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}}
                return self._keep(r, merge(copy.deepcopy(old), stamp), "MODIFIED")
            return self._keep(r, copy.deepcopy(old), "DELETED")

        await self._write("delete", r, name, change)

    def count(self, verb, plural=None):
        return sum(v == verb and plural in (None, p) for _, v, p, _ in self.writes)


class FakeLeader:
    def __init__(self):
        self.leads = True

    def check(self):
        if not self.leads:
            raise NotLeader


class World:
    """The API, a user, nodes, and one controller at a time."""

    def __init__(self):
        self.kube = FakeKube()
        self.auto_ready = True
        self.kube.listeners.append(self._node)
        self.leader = self.store = self.controller = None

    def start(self, config=CONFIG):
        """A controller that has just listed everything."""
        self.leader = FakeLeader()
        self.store = Store(lambda name: self.controller.changed(name), clock=now_s)
        self.controller = Controller(
            self.kube, config, "default", self.store, self.leader, lambda *_: 0, clock=now_s
        )
        self.relist()
        self.kube.listeners.append(self._event)
        self.controller.all_changed()

    def relist(self):
        objects = copy.deepcopy(self.kube.objects)
        models = [o for (plural, _), o in objects.items() if plural == "models"]
        pods = [o for (plural, _), o in objects.items() if plural == "pods"]
        self.store.replace_models(msgspec.convert(models, list[Model]))
        self.store.replace_pods(msgspec.convert(pods, list[PodObject]))

    async def stop(self):
        if self._event in self.kube.listeners:
            self.kube.listeners.remove(self._event)
        if self.controller is not None:
            await self.controller.stop()

    def _event(self, plural, kind, obj):
        if plural == "models":
            self.store.model_changed(kind, msgspec.convert(obj, Model))
        elif plural == "pods":
            self.store.pod_changed(kind, msgspec.convert(obj, PodObject))

    def _node(self, plural, kind, obj):
        if plural == "pods" and kind == "ADDED" and self.auto_ready:
            asyncio.get_running_loop().call_later(0.05, self.make_ready, obj["metadata"]["name"])

    def make_ready(self, name, **status):
        obj = self.kube.objects.get(("pods", name))
        if obj is None or obj.get("status", {}).get("phase") == "Failed":
            return
        ready = {"phase": "Running", "podIP": "10.0.0.1"} | status
        ready["conditions"] = [{"type": "Ready", "status": "True"}]
        self.kube._keep(PODS, merge(copy.deepcopy(obj), {"status": ready}), "MODIFIED")

    def set_status(self, name, status):
        obj = copy.deepcopy(self.kube.objects["pods", name])
        self.kube._keep(PODS, merge(obj, {"status": status}), "MODIFIED")

    def apply(self, name="m", meta=None, **spec):
        """What a user does: create or edit a Model; no write of the controller's."""
        old = self.kube.objects.get(("models", name))
        if old is None:
            labels = {"features.kubeai.org/TextGeneration": "true"}
            meta = {"name": name, "uid": f"m-{self.kube.version}", "generation": 1,
                    "namespace": "default", "labels": labels, **(meta or {})}  # fmt: skip
            spec = {"url": "hf://org/name", "engine": "VLLM", "features": ["TextGeneration"],
                    "resourceProfile": "cpu:1", "image": "vllm:1", **spec}  # fmt: skip
            self.kube._keep(MODELS, {"metadata": meta, "spec": spec}, "ADDED")
        else:
            new = merge(copy.deepcopy(old), {"spec": spec})
            new["metadata"]["generation"] += 1
            self.kube._keep(MODELS, new, "MODIFIED")

    def model(self, name="m"):
        return self.kube.objects["models", name]

    def replicas(self, name="m"):
        return self.model(name).get("status", {}).get("replicas")

    def condition(self, type_, name="m"):
        conditions = self.model(name).get("status", {}).get("conditions", [])
        return next(((c["status"], c["reason"]) for c in conditions if c["type"] == type_), None)

    def pods(self):
        return sorted(obj["metadata"]["name"] for obj in self.kube.alive())

    async def until(self, true, limit_s=60.0):
        began = now_s()
        while not true():
            assert now_s() - began < limit_s, "still not so"
            await asyncio.sleep(0.01)
        return now_s() - began

    async def settled(self, all_, ready, limit_s=60.0):
        """The status says so, and from then on nothing is written."""
        wanted = {"all": all_, "ready": ready}
        await self.until(lambda: self.replicas() == wanted and len(self.pods()) == all_, limit_s)
        await asyncio.sleep(2.0)
        writes = len(self.kube.writes)
        self.controller.all_changed()
        await asyncio.sleep(2 * EXPECTATION_TIMEOUT_S)
        assert len(self.kube.writes) == writes, self.kube.writes[writes:]
        assert self.replicas() == wanted


@pytest.fixture
async def world():
    world = World()
    yield world
    await world.stop()


# -- expectations --------------------------------------------------------------------------------


async def test_a_model_is_brought_to_what_it_should_be(world):
    world.start()
    world.apply(replicas=3)
    await world.settled(3, 3)
    assert world.kube.count("create", "pods") == 3
    world.apply(replicas=1)
    await world.settled(1, 1)
    assert world.kube.count("delete", "pods") == 2
    assert world.condition("Ready") == ("True", "AllReplicasReady")


async def test_creates_that_are_not_observed_are_not_repeated(world):
    world.auto_ready = False
    world.start()
    world.apply(replicas=3)
    world.kube.held_events = []
    for _ in range(20):
        world.controller.all_changed()
        await asyncio.sleep(0.5)
    assert world.kube.count("create", "pods") == 3
    # The events are lost for good. A second try finds the first one's pods, and makes no more.
    await asyncio.sleep(2 * EXPECTATION_TIMEOUT_S)
    assert len(world.pods()) == world.kube.most_pods == 3
    world.kube.held_events = None
    world.relist()
    await world.settled(3, 0)


async def test_deletes_that_are_not_observed_are_not_repeated(world):
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


async def test_a_create_whose_answer_was_lost_makes_one_pod(world):
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


async def test_a_name_that_somebody_else_has_is_passed_over(world):
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
    """The most writes to one object within any second."""
    times = defaultdict(list)
    for at_s, _, plural, name in writes:
        times[plural, name].append(at_s)
    return max(
        sum(1 for other in several if at_s <= other < at_s + 0.999)
        for several in times.values()
        for at_s in several
    )


@pytest.mark.parametrize("status", [409, 429, 500, 503, 0])
async def test_a_storm_of_errors_is_met_with_patience_and_ends_well(world, status):
    def refuse(verb, plural, name):
        if now_s() < until_s:
            raise ApiError(status, "Storm", "no")

    until_s = now_s() + 120.0
    world.kube.before = refuse
    world.start()
    world.apply(minReplicas=3)
    await asyncio.sleep(60.0)
    for _ in range(300):  # news comes all the time, and changes nothing about it
        world.controller.all_changed()
        await asyncio.sleep(0.2)
    assert rates(world.kube.writes) <= 2
    assert len(world.kube.writes) < 60
    await world.settled(3, 3, limit_s=60.0)
    assert world.kube.most_pods == 3


async def test_a_refused_pod_is_told_in_the_status_and_tried_again(world):
    def quota(verb, plural, name):
        if (verb, plural) == ("create", "pods") and full:
            raise ApiError(403, "Forbidden", "exceeded quota: gpus")

    full = True
    world.kube.before = quota
    world.start()
    world.apply(replicas=4)
    await world.until(lambda: world.condition("Ready") == ("False", "PodRefused"))
    conditions = world.model()["status"]["conditions"]
    assert [c["message"] for c in conditions] == ["exceeded quota: gpus"] * 2
    await asyncio.sleep(300.0)
    assert world.kube.count("create", "pods") < 25  # with growing rests, one pod at a time
    assert world.kube.count("patch status") == 1
    full = False
    await world.settled(4, 4)
    assert world.condition("Progressing") == ("False", "UpToDate")


async def test_a_refusal_is_forgotten_when_no_pod_is_wanted_any_more(world):
    def quota(verb, plural, name):
        if (verb, plural) == ("create", "pods"):
            raise ApiError(403, "Forbidden", "exceeded quota: gpus")

    world.kube.before = quota
    world.start()
    world.apply(replicas=1)
    await world.until(lambda: world.condition("Ready") == ("False", "PodRefused"))
    world.apply(replicas=0)
    await world.until(lambda: world.condition("Ready") == ("True", "ScaledToZero"))


async def test_pods_that_end_again_and_again_are_replaced_less_and_less_often(world):
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


async def test_a_crd_without_conditions_is_not_written_to_for_ever(world):
    def prune(obj):
        obj.get("status", {}).pop("conditions", None)
        return obj

    world.kube.admit = prune
    world.start()
    world.apply(replicas=1)
    await world.settled(1, 1)


async def test_who_undoes_our_labels_does_not_make_us_hurry(world):
    def strip(obj):
        obj["metadata"].pop("labels", None)
        return obj

    world.start()
    world.kube.admit = strip
    world.apply(replicas=0, meta={"labels": {}})
    await asyncio.sleep(60.0)
    assert rates(world.kube.writes) <= 3


async def test_no_write_after_leadership_is_lost(world):
    world.start()

    def lose(verb, plural, name):
        if (verb, plural) == ("create", "pods"):
            world.leader.leads = False

    world.kube.before = lose
    world.apply(replicas=50)
    await asyncio.sleep(60.0)
    assert 1 <= world.kube.count("create", "pods") <= CREATES_AT_FIRST_MAX  # sent together
    assert world.kube.count("patch status") == 0


# -- from zero ------------------------------------------------------------------------------------


class Held(dict):
    """Loads: how many requests are held by model."""

    def held(self, model):
        return self.get(model, 0)

    active = held

    def in_flight(self, model, endpoint):
        return 0


@pytest.fixture
async def wakes(world):
    world.start()
    world.held = Held()
    wakes = Wakes(world.kube, "default", world.store, world.held)
    yield wakes
    await wakes.stop()


async def test_demand_is_answered_with_one_write_and_a_pod_at_once(world, wakes):
    world.apply(replicas=0)
    await world.settled(0, 0)
    began = now_s()
    for _ in range(100):
        wakes.demand("m")
    await world.until(world.pods)
    assert now_s() - began < 0.05
    assert world.kube.count("patch", "models") == 1
    await world.settled(1, 1)


async def test_demand_asks_for_the_least_that_the_model_allows(world, wakes):
    world.leader.leads = False
    world.apply(minReplicas=3)
    wakes.demand("m")
    await world.until(lambda: world.model()["spec"].get("replicas") == 3)


async def test_demand_on_what_is_unknown_awake_or_the_users_writes_nothing(world, wakes):
    world.apply("awake", replicas=2)
    world.apply("theirs", replicas=0, autoscalingDisabled=True)
    await world.until(lambda: len(world.pods()) == 2)
    for name in ("awake", "theirs", "unknown"):
        wakes.demand(name)
    await asyncio.sleep(10.0)
    assert world.kube.count("patch", "models") == 0


async def test_demand_survives_a_storm_of_errors_patiently(world, wakes):
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
        wakes.demand("m")
        await asyncio.sleep(0.1)
    assert rates(world.kube.writes) <= 2
    looking = asyncio.create_task(wakes.run())  # no message comes any more; it is held still
    await world.until(lambda: world.model()["spec"]["replicas"] == 1, limit_s=60.0)
    looking.cancel()
    await asyncio.gather(looking, return_exceptions=True)


async def test_demand_that_was_behind_the_times_reads_again(world, wakes):
    world.apply(replicas=0, maxReplicas=5)
    await world.settled(0, 0)
    world.kube.held_events = []
    world.apply(replicas=5)
    wakes.demand("m")  # the store still says 0
    await world.until(lambda: len(world.pods()) == 5)
    assert world.model()["spec"]["replicas"] == 5


# -- pods without a Model ------------------------------------------------------------------------


async def test_pods_of_a_model_that_is_gone_are_deleted(world):
    world.start()
    world.apply(replicas=2)
    await world.settled(2, 2)
    world.kube._keep(MODELS, world.model(), "DELETED")
    await world.until(lambda: not world.pods())


async def test_pods_of_a_model_that_is_not_known_yet_are_left_alone(world):
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


async def test_files_of_a_former_model_of_that_name_are_not_taken_over(world):
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
    """Create, scale, roll out, scale down; the controller dies at one write and starts anew."""
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
            raise ApiError(0, "Crash", "sent, but nobody is there to hear the answer")

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
async def test_whatever_fails_and_whoever_edits_it_ends_as_it_should(world, seed):
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
    # pods that ended are replaced after a rest that has grown
    await world.until(lambda: len(living(world)) == len(world.pods()) == replicas, limit_s=400.0)
    await asyncio.sleep(REST_MAX_S)
    await world.settled(replicas, replicas)


def living(world):
    return [p for p in world.kube.alive() if p.get("status", {}).get("phase") != "Failed"]


# -- the queue -----------------------------------------------------------------------------------


async def test_one_name_is_never_worked_on_twice_at_once_but_many_names_are():
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
    assert done["a"] == 2  # once, and once more for all that came while it ran
    await queue.stop()


async def test_a_name_that_failed_rests_whatever_comes():
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


async def test_a_name_comes_again_when_its_work_asks_for_it():
    times = []

    async def work(name):
        times.append(now_s())
        return 5.0 if len(times) < 3 else None

    queue = Queue(work, parallel_max=1)
    queue.add("a")
    await asyncio.sleep(60.0)
    assert [round(b - a) for a, b in itertools.pairwise(times)] == [5, 5]
    await queue.stop()
