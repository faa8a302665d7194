"""Candidates for leadership, and an API of leases whose requests may fail."""

from __future__ import annotations

import asyncio
import copy

from kubeai.api.config.system import LeaderElection
from kubeai.kube.errors import ApiError
from kubeai.operator.leader import LEASE_NAME, Leadership

LEASE_S, RENEW_S, RETRY_S = 15.0, 10.0, 2.0


class Leases:
    """Leases with optimistic concurrency; can be unavailable."""

    def __init__(self):
        self.kept = {}
        self.version = 0
        self.writes = []
        self.away = False
        self.lose_answers = False
        self.answer_s = 0.0  # how long a response is delayed after the write

    async def _answer(self):
        await asyncio.sleep(0.005)
        if self.away:
            raise ApiError(0, "Unreachable", "away")

    async def get(self, r, name, namespace=""):
        await self._answer()
        if name not in self.kept:
            raise ApiError(404, "NotFound", name)
        return copy.deepcopy(self.kept[name])

    async def create(self, r, obj, namespace=""):
        await self._answer()
        if obj["metadata"]["name"] in self.kept:
            raise ApiError(409, "AlreadyExists", "taken")
        return self._keep(obj)

    async def update(self, r, obj, namespace=""):
        await self._answer()
        kept = self.kept.get(obj["metadata"]["name"])
        if kept is None:
            raise ApiError(404, "NotFound", "gone")
        if obj["metadata"]["resourceVersion"] != kept["metadata"]["resourceVersion"]:
            raise ApiError(409, "Conflict", "changed")
        kept = self._keep(obj)
        await asyncio.sleep(self.answer_s)
        return kept

    def _keep(self, obj):
        self.version += 1
        kept = copy.deepcopy(obj)
        kept["metadata"]["resourceVersion"] = str(self.version)
        name = obj["metadata"]["name"]
        self.kept[name] = kept
        if name == LEASE_NAME:
            self.writes.append(self.holder)
        if self.lose_answers:
            raise ApiError(0, "Unreachable", "the answer is lost")
        return copy.deepcopy(kept)

    @property
    def lease(self):
        return self.kept.get(LEASE_NAME)

    @lease.setter
    def lease(self, lease):
        if lease is None:
            del self.kept[LEASE_NAME]
        else:
            self.kept[LEASE_NAME] = lease

    @property
    def holder(self):
        return self.lease["spec"]["holderIdentity"]

    def held_by_go(self, *names):
        """What a leader of KubeAI in Go has left, as of now."""
        for name in names:
            self.version += 1
            spec = {"holderIdentity": "kubeai-in-go", "leaseDurationSeconds": LEASE_S}
            meta = {"name": name, "resourceVersion": str(self.version)}
            self.kept[name] = {"metadata": meta, "spec": spec}


class Candidate:
    """A Leader with its task, and its callbacks' history."""

    def __init__(self, leases, identity, turns):
        self.identity = identity
        self.turns = turns
        config = LeaderElection(
            lease_duration_s=LEASE_S, renew_deadline_s=RENEW_S, retry_period_s=RETRY_S
        )
        self.leader = Leadership(
            *(leases, "default", identity, config),
            changed=lambda leads: turns.append((identity, leads)),
            clock=asyncio.get_running_loop().time,
        )
        self.task = None

    @property
    def leads(self):
        return self.leader.leads

    async def release(self):
        await self.leader.release()

    def thaw(self):
        self.task = asyncio.create_task(self.leader.run())

    async def freeze(self):
        """Stop in the middle of whatever it does, without a word."""
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


class World:
    def __init__(self):
        self.leases = Leases()
        self.turns = []
        self.candidates = []

    def join(self, identity):
        candidate = Candidate(self.leases, identity, self.turns)
        self.candidates.append(candidate)
        candidate.thaw()
        return candidate

    async def until(self, true, limit_s):
        """Wait until ``true`` returns true; returns the seconds that it took."""
        clock = asyncio.get_running_loop().time
        began = clock()
        while not true():
            assert clock() - began <= limit_s, "too late"
            await asyncio.sleep(0.01)
        return clock() - began
