"""The Kubernetes API in memory, and a world around it: nodes, a user, a controller."""

from __future__ import annotations

import asyncio
import copy
from collections import Counter, defaultdict

import msgspec

from kubeai.api.config.system import parse_config
from kubeai.api.model import Model
from kubeai.kube.errors import ApiError
from kubeai.kube.resources import EVENTS, JOBS, MODELS, PODS
from kubeai.operator.controller import Controller
from kubeai.operator.groups import SetObject
from kubeai.operator.leader import NotLeader
from kubeai.operator.pods import DRAINING_ANNOTATION, PodObject
from kubeai.operator.scaling.scaler import Scaler
from kubeai.operator.scaling.timeline import Timeline
from kubeai.operator.store import EXPECTATION_TIMEOUT_S, Store

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


def field(obj, path):
    """The value at a dotted path of an object."""
    for key in path.split("."):
        obj = obj.get(key, {})
    return obj


class FakeLoads:
    """Requests: by Model those that are active, by pod those that it serves."""

    def __init__(self):
        self.counts = Counter()
        self.asked = 0  # how often it was
        self.whole = True  # no peer is missing
        self.served = Counter()
        self.used = set()  # pods that are still sent requests

    def active(self, model):
        self.asked += 1
        return self.counts[model]

    def ended(self, model):
        return 0

    def complete(self):
        return self.whole

    def in_flight(self, model, endpoint):
        return self.served[endpoint]

    def in_use(self, model, endpoint):
        return endpoint in self.used


class FakeKube:
    """Objects with versions and preconditions; events that may be held back; faults on order."""

    def __init__(self):
        self.objects = {}
        self.version = 0
        self.listeners = []
        self.held_events = None  # a list: events are held back in it
        self.lists = []  # resources, each time one is listed
        self.writes = []  # (seconds, verb, plural, name)
        self.before = lambda verb, plural, name: None  # may raise: the write is not done
        self.after = lambda verb, plural, name: None  # may raise: it is done, the answer is lost
        self.admit = lambda obj: obj
        self.most_pods = 0
        self.list_s = 0.0  # how long the lists of `follow` take
        self.missing = set()  # resources that the API does not serve
        self.executed = None  # (pod, command, container) → ExecResult

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

    async def list(self, r, namespace="", *, labels="", fields="", metadata_only=False, type=dict):
        await asyncio.sleep(0.001)
        self.lists.append(r.plural)
        if r.plural in self.missing:
            raise ApiError(403, "Forbidden", f"cannot list {r.plural}")
        found = [o for (p, _), o in self.objects.items() if p == r.plural]
        for wanted in filter(None, fields.split(",")):
            path, _, value = wanted.partition("=")
            found = [obj for obj in found if field(obj, path) == value]
        for wanted in filter(None, labels.split(",")):
            key, equals, value = wanted.partition("=")
            labels_of = ((o, o["metadata"].get("labels", {})) for o in found)
            found = [o for o, has in labels_of if key in has and value == (equals and has[key])]
        return [self._as(copy.deepcopy(obj), type) for obj in found], str(self.version)

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
            meta = new["metadata"]
            gone = "deletionTimestamp" in meta and not meta.get("finalizers")
            return self._keep(r, new, "DELETED" if gone and r is MODELS else "MODIFIED")

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

    async def follow(self, r, namespace="", *, type=dict, replaced, changed, failed=None, **_):
        """List, then tell what happens, until cancelled; fails while `missing` names it."""
        while r.plural in self.missing:
            failed(ApiError(404, "NotFound", "the server could not find the requested resource"))
            await asyncio.sleep(1.0)
        await asyncio.sleep(self.list_s)
        found = [copy.deepcopy(o) for (p, _), o in self.objects.items() if p == r.plural]
        replaced([self._as(obj, type) for obj in found])

        def tell(plural, kind, obj):
            if plural == r.plural:
                changed(kind, self._as(obj, type))

        self.listeners.append(tell)
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            self.listeners.remove(tell)

    async def exec(self, name, command, *, container, namespace="", timeout_s):
        return await self.executed(name, list(command), container)

    def count(self, verb, plural=None):
        return sum(v == verb and plural in (None, p) for _, v, p, _ in self.writes)


class FakeLeader:
    def __init__(self):
        self.leads = True

    def check(self):
        if not self.leads:
            raise NotLeader


class FakeEvents:
    """The recorded events, as (model, reason, message)."""

    def __init__(self):
        self.emitted = []

    def emit(self, model, reason, message, *, warning=False):
        self.emitted.append((model.metadata.name, reason, message))

    def reasons(self):
        return [reason for _, reason, _ in self.emitted]


class World:
    """The API, a user, nodes, and one controller at a time."""

    def __init__(self):
        self.kube = FakeKube()
        self.auto_ready = True
        self.kube.listeners.append(self._node)
        self.kube.listeners.append(self._job)
        self.refusal = None  # why Jobs get no pods; "": they get none, and nothing says why
        self.job_end = "Complete"  # how Jobs end, a moment after they were made; or None
        self.leader = self.store = self.controller = None
        self.scaling: asyncio.Task[None] | None = None
        self.events = FakeEvents()
        self.loads = FakeLoads()
        self.no_sets = ""  # why there are no LeaderWorkerSets

    def start(self, config=CONFIG):
        """A controller that has just listed everything."""
        self.leader = FakeLeader()
        self.store = Store(
            lambda name: self.controller.changed(name), address_override=True, clock=now_s
        )
        self.controller = Controller(
            self.kube,
            config,
            "default",
            self.store,
            self.leader,
            self.loads,
            self.events,
            clock=now_s,
            no_sets=lambda: self.no_sets,
        )
        self.relist()
        self.kube.listeners.append(self._event)
        self._claims = asyncio.gather(self.controller.claims.run(), self.controller.services.run())
        self.controller.all_changed()

    def scaler(self):
        """Of the replica that was started last."""
        return Scaler(
            *(self.kube, "default", CONFIG.model_autoscaling, self.store, self.leader, self.loads),
            self.events,
            Timeline(),
            clock=now_s,
        )

    def relist(self):
        objects = copy.deepcopy(self.kube.objects)
        models = [o for (plural, _), o in objects.items() if plural == "models"]
        pods = [o for (plural, _), o in objects.items() if plural == "pods"]
        self.store.replace_models(msgspec.convert(models, list[Model]))
        self.store.replace_pods(msgspec.convert(pods, list[PodObject]))
        sets = [o for (plural, _), o in objects.items() if plural == "leaderworkersets"]
        self.store.replace_sets(msgspec.convert(sets, list[SetObject]))

    async def stop(self):
        if self._event in self.kube.listeners:
            self.kube.listeners.remove(self._event)
        if self.controller is not None:
            self._claims.cancel()
            await asyncio.gather(self._claims, return_exceptions=True)
            await self.controller.stop()

    def _event(self, plural, kind, obj):
        if plural == "models":
            self.store.model_changed(kind, msgspec.convert(obj, Model))
        elif plural == "pods":
            self.store.pod_changed(kind, msgspec.convert(obj, PodObject))
        elif plural == "leaderworkersets":
            self.store.set_changed(kind, msgspec.convert(obj, SetObject))

    def _node(self, plural, kind, obj):
        if plural == "pods" and kind == "ADDED" and self.auto_ready:
            asyncio.get_running_loop().call_later(0.05, self.make_ready, obj["metadata"]["name"])

    def _job(self, plural, kind, obj):
        if plural == "jobs" and kind == "ADDED":
            asyncio.get_running_loop().call_later(0.05, self.start_job, obj["metadata"]["name"])

    def start_job(self, name):
        """The Job gets a pod, or none, and ends."""
        obj = self.kube.objects.get(("jobs", name))
        if obj is None:
            return
        if self.refusal is None:
            self.kube._keep(JOBS, merge(copy.deepcopy(obj), {"status": {"active": 1}}), "MODIFIED")
            self.end_job(name)
        elif self.refusal:
            about = {"kind": "Job", "name": name, "uid": obj["metadata"]["uid"]}
            refused = f'Error creating: pods "{name}-x2b4z" is forbidden: {self.refusal}'
            self.kube._keep(
                EVENTS,
                {
                    "metadata": {"name": f"{name}.1"},
                    "involvedObject": about,
                    "reason": "FailedCreate",
                    "message": refused,
                    "lastTimestamp": "2026-01-01T00:00:00Z",
                },
                "ADDED",
            )

    def end_job(self, name, end=None):
        obj, end = self.kube.objects.get(("jobs", name)), end or self.job_end
        if obj is not None and end is not None:
            condition = {"type": end, "status": "True", "message": f"{name} is {end}"}
            status = {"status": {"conditions": [condition]}}
            self.kube._keep(JOBS, merge(copy.deepcopy(obj), status), "MODIFIED")

    def jobs(self):
        return sorted(name for plural, name in self.kube.objects if plural == "jobs")

    def delete(self, name="m"):
        """Delete a Model as a user does: it is removed at once unless it has finalizers."""
        obj = copy.deepcopy(self.model(name))
        if obj["metadata"].get("finalizers"):
            stamp = {"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}}
            self.kube._keep(MODELS, merge(obj, stamp), "MODIFIED")
        else:
            self.kube._keep(MODELS, obj, "DELETED")

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
        """Create or edit a Model as a user does; not counted as a controller write."""
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
        """Wait until the status shows these counts, then check that nothing is written."""
        wanted = {"all": all_, "ready": ready}
        await self.until(lambda: self.replicas() == wanted and len(self.pods()) == all_, limit_s)
        await asyncio.sleep(2.0)
        writes = len(self.kube.writes)
        self.controller.all_changed()
        await asyncio.sleep(2 * EXPECTATION_TIMEOUT_S)
        assert len(self.kube.writes) == writes, self.kube.writes[writes:]
        assert self.replicas() == wanted


def rates(writes):
    """Return the highest number of writes to one object within any second."""
    times = defaultdict(list)
    for at_s, _, plural, name in writes:
        times[plural, name].append(at_s)
    return max(
        sum(1 for other in several if at_s <= other < at_s + 0.999)
        for several in times.values()
        for at_s in several
    )


def draining(world):
    """Return how many pods are annotated as draining."""
    pods = [world.kube.objects["pods", name] for name in world.pods()]
    annotations = [pod["metadata"].get("annotations", {}) for pod in pods]
    return [DRAINING_ANNOTATION in has for has in annotations].count(True)
