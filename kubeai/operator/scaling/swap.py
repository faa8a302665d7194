"""Decides which idle Models make room for a Model that is demanded and does not fit. Pure.

For machines whose Models do not all fit at once (``kubeai local --swap``), as llama-swap does. A
Model is demanded if requests are held for it and it has no replica that serves. If its replica
waits for resources, the least recently used idle Models are scaled down to minReplicas, but only if
that makes enough room. Called by the scaler, about once a second.

A Model is idle if no request for it has been in flight or held for ``IDLE_S``. A Model that was
swapped in therefore serves the requests that it was swapped in for, and two busy Models are never
swapped back and forth while requests are in flight: the waiting one is swapped in at the other's
first pause.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import msgspec

from kubeai.api.model import Model
from kubeai.operator.pods import Pod

IDLE_S = 2.0

Amounts = Mapping[str, int]  # resource → billionths


class ModelLoad(msgspec.Struct, frozen=True):
    """A Model, its replicas and its load at one moment."""

    model: Model
    pods: Sequence[Pod]  # owned by this very Model
    active: int  # requests in flight or held
    ended: int  # requests that have ended so far


class Eviction(msgspec.Struct, frozen=True):
    """A Model to scale down to its minReplicas, and the Model that needs the room."""

    model: str
    room_for: str


class _Tenant(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    needs: Amounts  # of one replica
    placed: int  # replicas that have a node, including those that are going
    going: int  # replicas that are being deleted, or about to be
    spare: int  # of the others, those above minReplicas, if the Model is idle
    used_s: float
    waits_since_s: float | None  # None: it does not wait for room


class Swap:
    """Remembers when each Model was last used. Times are seconds of a monotonic clock."""

    def __init__(self, allocatable: Amounts, needs: Callable[[Model], Amounts]) -> None:
        """``allocatable``: of the machine; ``needs``: what one replica of a Model requests."""
        self._allocatable = allocatable
        self._needs = needs
        self._used_s: dict[str, float] = {}
        self._ended: dict[str, int] = {}
        self._waits_since_s: dict[str, float] = {}

    def step(self, loads: Sequence[ModelLoad], now_s: float) -> list[Eviction]:
        """Observe all Models; returns those that make room now."""
        tenants = [self._tenant(load, now_s) for load in loads]
        names = {tenant.name for tenant in tenants}
        for memory in (self._used_s, self._ended, self._waits_since_s):
            for gone in memory.keys() - names:
                del memory[gone]
        return make_room(tenants, self._allocatable)

    def _tenant(self, load: ModelLoad, now_s: float) -> _Tenant:
        model, name = load.model, load.model.metadata.name
        if load.active or load.ended != self._ended.get(name) or not model.spec.replicas:
            self._used_s[name] = now_s
        self._ended[name] = load.ended
        if _waits(load):
            self._waits_since_s.setdefault(name, now_s)
        else:
            self._waits_since_s.pop(name, None)
        placed = [pod for pod in load.pods if pod.scheduled and not pod.finished]
        staying = min(sum(pod.counts for pod in placed), model.spec.replicas or 0)
        deleting = model.metadata.deletion_timestamp is not None
        idle = now_s - self._used_s[name] >= IDLE_S
        kept = staying if model.spec.autoscaling_disabled else model.spec.min_replicas
        return _Tenant(
            name=name,
            needs=self._needs(model),
            placed=len(placed),
            going=len(placed) - (0 if deleting else staying),
            spare=max(0, staying - kept) if idle and not deleting else 0,
            used_s=self._used_s[name],
            waits_since_s=self._waits_since_s.get(name),
        )


def _waits(load: ModelLoad) -> bool:
    """Whether requests are held for a Model only because its replica does not fit."""
    return (
        load.active > 0
        and not any(pod.serves for pod in load.pods)
        and any(
            pod.counts
            and pod.trouble is not None
            and pod.trouble.reason == "Unschedulable"
            and "Insufficient" in pod.trouble.message
            for pod in load.pods
        )
    )


def make_room(tenants: Sequence[_Tenant], allocatable: Amounts) -> list[Eviction]:
    """The Models to scale down, for each Model that waits in turn, the longest-waiting first.

    Replicas that are already being deleted count as room. A Model for which there cannot be enough
    room now keeps its turn, but no other Model is scaled down for it.
    """
    room = {
        name: total - sum((t.placed - t.going) * t.needs.get(name, 0) for t in tenants)
        for name, total in allocatable.items()
    }
    evicted: dict[str, Eviction] = {}
    waiting = [tenant for tenant in tenants if tenant.waits_since_s is not None]
    for tenant in sorted(waiting, key=lambda t: (t.waits_since_s, t.name)):
        candidates = [t for t in tenants if t.spare and t.name not in evicted and t is not tenant]
        chosen = _least_recently_used(tenant.needs, candidates, room)
        if chosen is None:
            continue
        for one in chosen:
            evicted[one.name] = Eviction(one.name, tenant.name)
            _add(room, one.needs, one.spare)
        _add(room, tenant.needs, -1)
    return list(evicted.values())


def _least_recently_used(
    needs: Amounts, candidates: Sequence[_Tenant], room: Amounts
) -> list[_Tenant] | None:
    """The candidates to scale down for one replica; None if all of them are not enough."""
    missing = {name: needs[name] - room[name] for name in room if needs.get(name, 0) > room[name]}
    chosen = []
    for one in sorted(candidates, key=lambda t: (t.used_s, t.name)):
        if not missing:
            break
        freed = {name: one.spare * one.needs.get(name, 0) for name in missing}
        if any(freed.values()):
            chosen.append(one)
            missing = {name: m - freed[name] for name, m in missing.items() if m > freed[name]}
    return None if missing else chosen


def _add(room: dict[str, int], needs: Amounts, count: int) -> None:
    for name in room:
        room[name] += count * needs.get(name, 0)
