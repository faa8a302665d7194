"""The operator's cache of the cluster: all Models and their pods, as reported by the watches.

Owns the collections (LeaderWorkerSets too, where there are any), an index of pods by model name,
and the expectations: writes that were sent and not yet observed. Promises: ``changed(name)`` is
called synchronously for each model that an event affects; :meth:`Store.pods_of` includes a pod from
the moment its create is sent and shows a deleted one as terminating, so that no plan repeats a
write; an expectation that is never observed expires after ``EXPECTATION_TIMEOUT_S``, and the next
plan sees the observed state.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

import msgspec

from kubeai.api.model import Model
from kubeai.operator.groups import SetObject, compose
from kubeai.operator.pods import Pod, PodObject, observe

EXPECTATION_TIMEOUT_S = 30.0


class _Expected(msgspec.Struct):
    pod: Pod
    until_s: float


class Store:
    """Fed by :meth:`Kube.follow`; read by the controller, the routes and the autoscaler."""

    def __init__(
        self,
        changed: Callable[[str], None],
        *,
        address_override: bool = False,
        follows_sets: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._changed = changed
        self._address_override = address_override
        self._clock = clock
        self.models: dict[str, Model] = {}
        self.models_listed = False
        self.pods_listed = False
        self._pods: dict[str, dict[str, Pod]] = {}  # model → pod name → pod
        self._model_of: dict[str, str] = {}  # pod name → model
        # LeaderWorkerSets: model → name → set, with those of no Model of ours.
        self._sets: dict[str, dict[str, SetObject]] = {}
        self.sets_listed = not follows_sets
        self._have_sets = False  # whether a set or a pod of one has been seen
        self._creating: dict[str, dict[str, _Expected]] = {}  # model → pod name → expected pod
        self._deleting: dict[str, float] = {}  # pod uid → expires at

    # -- Models ----------------------------------------------------------------------------------

    def replace_models(self, models: list[Model]) -> None:
        """Replace the collection with a complete list."""
        names = {model.metadata.name for model in models}
        gone = [name for name in self.models if name not in names]
        for name in gone:
            del self.models[name]
        self.models_listed = True
        for model in models:  # accepted even if the API has gone back in time
            self.models[model.metadata.name] = model
        for name in [*gone, *names]:
            self._changed(name)

    def model_changed(self, kind: str, model: Model) -> None:
        """Apply one watch event."""
        name = model.metadata.name
        if kind != "DELETED":
            if not self._put_model(model):
                return
        elif (old := self.models.get(name)) is not None:
            if old.metadata.uid != model.metadata.uid:
                return  # a new Model of the same name is already known
            del self.models[name]
        self._changed(name)

    def model_written(self, model: Model) -> None:
        """Apply the API's response to our own write, which may be ahead of or behind the watch."""
        known = self.models.get(model.metadata.name)
        if known is not None and known.metadata.uid == model.metadata.uid:  # else it is gone
            self.model_changed("MODIFIED", model)

    def _put_model(self, model: Model) -> bool:
        old = self.models.get(model.metadata.name)
        if old is not None and _older(model, old):
            return False
        self.models[model.metadata.name] = model
        return True

    # -- pods ------------------------------------------------------------------------------------

    def replace_pods(self, objects: list[PodObject]) -> None:
        """Replace the collection with a complete list."""
        touched = set(self._pods)
        self._pods.clear()
        self._model_of.clear()
        self.pods_listed = True
        for obj in objects:
            touched.add(self._put_pod(obj))
        self._deleting = {u: t for u, t in self._deleting.items() if u in self._uids()}
        for name in touched:
            self._changed(name)

    def pod_written(self, obj: PodObject) -> None:
        """Apply the API's response to our own write, which may be ahead of or behind the watch."""
        known = self._pods.get(self._model_of.get(obj.metadata.name, ""), {})
        if obj.metadata.name in known:  # else it is gone
            self.pod_changed("MODIFIED", obj)

    def pod_changed(self, kind: str, obj: PodObject) -> None:
        """Apply one watch event."""
        before = self._model_of.get(obj.metadata.name)
        if before is not None and kind != "DELETED":
            old = self._pods[before][obj.metadata.name]
            if old.uid == obj.metadata.uid and 0 < obj.metadata.version < old.version:
                return  # older than the response to our own write
        name = self._drop_pod(obj) if kind == "DELETED" else self._put_pod(obj)
        if before is not None and before != name:
            self._changed(before)
        self._changed(name)

    def _put_pod(self, obj: PodObject) -> str:
        pod = observe(obj, address_override=self._address_override)
        self._have_sets = self._have_sets or bool(pod.set)
        before = self._model_of.get(pod.name)
        if before is not None and before != pod.model:
            self._pods[before].pop(pod.name, None)
        self._pods.setdefault(pod.model, {})[pod.name] = pod
        self._model_of[pod.name] = pod.model
        self._observed(pod)
        return pod.model

    def _drop_pod(self, obj: PodObject) -> str:
        pod = observe(obj)
        name = self._model_of.pop(pod.name, pod.model)
        pods = self._pods.get(name, {})
        pods.pop(pod.name, None)
        if not pods:
            self._pods.pop(name, None)
        self._observed(msgspec.structs.replace(pod, terminating=True))
        return name

    def _observed(self, pod: Pod) -> None:
        if pod.terminating:
            self._deleting.pop(pod.uid, None)
        creating = self._creating.get(pod.model, {})
        expected = creating.get(pod.name)
        if expected is not None:
            del creating[pod.name]
            if not creating:
                del self._creating[pod.model]

    def _uids(self) -> set[str]:
        sets = {one.metadata.uid for sets in self._sets.values() for one in sets.values()}
        return sets | {pod.uid for pods in self._pods.values() for pod in pods.values()}

    # -- LeaderWorkerSets ------------------------------------------------------------------------

    def replace_sets(self, sets: list[SetObject]) -> None:
        """Replace the collection with a complete list; an empty one if there is no such API."""
        touched = set(self._sets)
        self._sets.clear()
        self.sets_listed = True
        for one in sets:
            self._put_set(one)
            touched.add(one.model)
        for name in touched:
            self._changed(name)

    def set_changed(self, kind: str, one: SetObject) -> None:
        """Apply one watch event, or the API's response to our own write."""
        known = self._sets.get(one.model, {}).get(one.metadata.name)
        if known is not None and 0 < one.metadata.version < known.metadata.version:
            return
        if kind == "DELETED":
            self._sets.get(one.model, {}).pop(one.metadata.name, None)
            if not self._sets.get(one.model):
                self._sets.pop(one.model, None)
            self._deleting.pop(one.metadata.uid, None)
        else:
            self._put_set(one)
        self._changed(one.model)

    def _put_set(self, one: SetObject) -> None:
        self._have_sets = True
        self._sets.setdefault(one.model, {})[one.metadata.name] = one
        self._observed(compose(one, ()))

    # -- reading ---------------------------------------------------------------------------------

    @property
    def listed(self) -> bool:
        """Whether all collections have been listed."""
        return self.models_listed and self.pods_listed and self.sets_listed

    def observed_pods(self, model: str) -> Iterable[Pod]:
        """Pods with the model's label, as last observed; those of a LeaderWorkerSet as one."""
        pods = self._pods.get(model, {}).values()
        sets = self._sets.get(model, {})
        if not self._have_sets or (not sets and not any(pod.set for pod in pods)):
            return pods
        return _with_sets(pods, sets, self._creating.get(model, {}))

    def pods_of(self, model: str) -> Iterator[Pod]:
        """The same with unobserved writes applied: created pods included, deleted terminating."""
        now_s = self._clock()
        observed = set()
        for pod in self.observed_pods(model):
            observed.add(pod.name)
            if not pod.terminating and self._deleting.get(pod.uid, now_s) > now_s:
                yield msgspec.structs.replace(pod, terminating=True)
            else:
                yield pod
        for name, expected in self._creating.get(model, {}).items():
            if expected.until_s > now_s and name not in observed:
                yield expected.pod

    def names(self) -> set[str]:
        """All names that have a Model or a pod."""
        return self.models.keys() | self._pods.keys() | self._sets.keys()

    # -- expectations ----------------------------------------------------------------------------

    def creating(self, pod: Pod) -> None:
        """Expect a create that is about to be sent. The pod has no uid until it is observed."""
        self._expire(pod.model)
        until_s = self._clock() + EXPECTATION_TIMEOUT_S
        self._creating.setdefault(pod.model, {})[pod.name] = _Expected(pod, until_s)

    def not_created(self, pod: Pod) -> None:
        """The create failed or its outcome is unknown. Retrying with the same name is safe."""
        creating = self._creating.get(pod.model, {})
        creating.pop(pod.name, None)
        if not creating:
            self._creating.pop(pod.model, None)

    def deleting(self, uid: str) -> None:
        """Expect a delete that is about to be sent."""
        self._deleting[uid] = self._clock() + EXPECTATION_TIMEOUT_S

    def not_deleted(self, uid: str) -> None:
        """The delete failed."""
        self._deleting.pop(uid, None)

    def oldest_expectation_s(self, model: str) -> float | None:
        """Seconds until the model's oldest expectation expires; None if it has none."""
        self._expire(model)
        untils = [expected.until_s for expected in self._creating.get(model, {}).values()]
        untils += [self._deleting[uid] for uid in self._uids_of(model) if uid in self._deleting]
        return max(0.0, min(untils) - self._clock()) if untils else None

    def _expire(self, model: str) -> None:
        now_s = self._clock()
        creating = self._creating.get(model, {})
        for name in [name for name, expected in creating.items() if expected.until_s <= now_s]:
            del creating[name]
        for uid in self._uids_of(model):
            if self._deleting.get(uid, math.inf) <= now_s:
                del self._deleting[uid]

    def _uids_of(self, model: str) -> list[str]:
        uids = [pod.uid for pod in self._pods.get(model, {}).values()]
        return uids + [one.metadata.uid for one in self._sets.get(model, {}).values()]


def _with_sets(
    pods: Iterable[Pod], sets: Mapping[str, SetObject], expected: Collection[str]
) -> list[Pod]:
    """The pods, with those of a LeaderWorkerSet as one replica.

    The pods of a set that is gone are on their way out, whether they are being deleted yet or not.
    Its leader has the name of the set, which is still in use, by requests too. ``expected``: names
    of sets that have been created and are not seen yet, unlike their pods perhaps.
    """
    members: dict[str, list[Pod]] = {name: [] for name in sets}
    replicas: list[Pod] = []
    for pod in pods:
        if pod.set in members:
            members[pod.set].append(pod)
        elif pod.set:
            leads = pod.worker == 0 and pod.set not in expected
            name = pod.set if leads else pod.name
            replicas.append(msgspec.structs.replace(pod, name=name, terminating=True))
        else:
            replicas.append(pod)
    return replicas + [compose(one, members[name]) for name, one in sets.items()]


def _older(new: Model, old: Model) -> bool:
    """Whether ``new`` is older than what our own write returned. False if unknown."""
    if new.metadata.uid != old.metadata.uid:
        created, known = new.metadata.creation_timestamp, old.metadata.creation_timestamp
        return created is not None and known is not None and created < known
    return 0 < new.metadata.version < old.metadata.version
