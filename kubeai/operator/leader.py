"""Leader election between replicas of KubeAI, by client-go's rules.

:class:`Leadership` is what the operator uses: a KubeAI replica leads while it holds two Leases, and
:class:`Leader` is a candidate for one of them.

Owns the lease and the answer to "may this KubeAI replica write now?". A candidate takes the
lease when it has not changed for its duration by the candidate's own clock (clocks of different
machines are never compared). The holder renews it every ``retry_period_s`` and stops leading when
no renewal has succeeded for ``renew_deadline_s``. :meth:`Leader.check` guards each write by a
leader. It measures the lease's age with a clock that keeps running while the machine is suspended,
so a process that was frozen detects this before it writes. It is called twice: by :class:`Writes`
before a write starts, and by the fenced Kube (see :meth:`kubeai.kube.client.Kube.fenced`) once the
connection is established and the bytes are about to be sent, however long the write
has waited until then.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from functools import partial
from typing import Any, Protocol

from kubeai.api.config.system import LeaderElection
from kubeai.kube.errors import ApiError
from kubeai.kube.resources import LEASES, Resource
from kubeai.logs import get_logger

log = get_logger(__name__)
LEASE_NAME = "kubeai.org"
# KubeAI in Go elects two leaders: with `kubeai.org` that of its autoscaler, with this one that of
# its controller. While someone moves from one KubeAI to the other, pods of both run.
GO_CONTROLLER_LEASE_NAME = "cc6bca10.substratus.ai"
RELEASE_TIMEOUT_S = 3.0


class NotLeader(Exception):
    """This KubeAI replica is not the leader and must not write."""


class Writes:
    """Guards each write of a leader: ``async with writes:``.

    Waits until fewer than ``parallel_max`` other writes are in flight, then raises NotLeader unless
    this KubeAI replica is still the leader.
    """

    def __init__(self, leader: Leadership, parallel_max: int) -> None:
        self._leader = leader
        self._free = asyncio.Semaphore(parallel_max)

    def check(self) -> None:
        """Raise NotLeader unless this KubeAI replica is the leader at this moment."""
        self._leader.check()

    async def __aenter__(self) -> None:
        await self._free.acquire()
        try:
            self.check()
        except NotLeader:
            self._free.release()
            raise

    async def __aexit__(self, *_: object) -> None:
        self._free.release()


class LeaseApi(Protocol):
    """The part of :class:`kubeai.kube.client.Kube` that leader election uses."""

    async def get(self, r: Resource, name: str, namespace: str = "") -> dict[str, Any]:
        """Read the Lease; ApiError 404 if there is none."""
        ...

    async def create(self, r: Resource, obj: dict[str, Any], namespace: str = "") -> dict[str, Any]:
        """Create the Lease; ApiError 409 if a peer was faster."""
        ...

    async def update(self, r: Resource, obj: dict[str, Any], namespace: str = "") -> dict[str, Any]:
        """Replace the Lease; ApiError 409 if its resourceVersion has changed."""
        ...


def boot_time_s() -> float:
    """Seconds since boot, including suspended time."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Leader:
    """A candidate for one Lease. Call ``step`` again and again, and ``release`` in the end."""

    def __init__(
        self,
        kube: LeaseApi,
        namespace: str,
        identity: str,
        *,
        lease_duration_s: float,
        renew_deadline_s: float,
        retry_period_s: float,
        name: str = LEASE_NAME,
        wanted: Callable[[], bool] = lambda: True,
        changed: Callable[[bool], None] = lambda leads: None,
        clock: Callable[[], float] = boot_time_s,
        rand: Callable[[], float] = random.random,
    ) -> None:
        """``wanted``: whether the lease may be acquired; without, it is only observed."""
        self._kube = kube
        self._name = name
        self._wanted = wanted
        self._namespace = namespace
        self._identity = identity
        # The Lease holds whole seconds. Rounding up keeps others from taking over too early.
        self._lease_duration_s = math.ceil(lease_duration_s)
        self._renew_deadline_s = renew_deadline_s
        self._retry_period_s = retry_period_s
        self._changed = changed
        self._clock = clock
        self._random = rand
        self._lease: dict[str, Any] | None = None  # as last seen
        self._seen_s = -math.inf  # when we last saw it change, by our clock
        self._renewed_s = -math.inf  # when our last successful renewal was *sent*
        self._leads = False

    @property
    def leads(self) -> bool:
        """Whether this KubeAI replica may write at this moment."""
        return self._leads and self._clock() - self._renewed_s < self._renew_deadline_s

    def check(self) -> None:
        """Raise NotLeader unless this KubeAI replica may write at this moment."""
        if not self.leads:
            raise NotLeader

    async def step(self) -> None:
        """Acquire or renew the lease, or observe it. Calls ``changed`` at each transition."""
        renewed_s = self._renewed_s
        try:
            held = await self._try_once()
        except ApiError as error:
            held = self.leads
            log.info(
                "lease not renewed",
                lease=self._name,
                leads=held,
                status=error.status,
                error=str(error),
            )
        if self._clock() - renewed_s >= self._renew_deadline_s:
            self._turn(False)  # it briefly did not lead, and events were skipped meanwhile
        self._turn(held)

    async def release(self) -> None:
        """Release the lease so that a successor need not wait. Not during ``step``."""
        if not self._leads or self._lease is None:
            return
        self._turn(False)
        with contextlib.suppress(ApiError, TimeoutError):  # the lease then expires by itself
            async with asyncio.timeout(RELEASE_TIMEOUT_S):
                try:
                    await self._give_up(self._lease)
                except ApiError as error:
                    if error.status != 409:
                        raise
                    # A cancelled renewal did succeed: the lease is newer than our copy.
                    lease = await self._kube.get(LEASES, self._name, self._namespace)
                    if _holder(lease) == self._identity:
                        await self._give_up(lease)

    async def _give_up(self, lease: dict[str, Any]) -> None:
        spec = lease["spec"] | {
            "holderIdentity": "",
            "leaseDurationSeconds": 1,
            "renewTime": _now(),
        }
        await self._kube.update(LEASES, lease | {"spec": spec}, self._namespace)

    def _turn(self, leads: bool) -> None:
        if leads == self._leads:
            return
        self._leads = leads
        self._changed(leads)

    def wait_s(self) -> float:
        """How long to wait until the next ``step``."""
        if self._leads:
            return self._retry_period_s
        # Spread candidates out, and let none sleep past the end of the lease.
        wait_s = self._retry_period_s * (0.8 + 0.2 * self._random())
        left_s = self._seen_s + self._duration_s() - self._clock()
        return min(wait_s, left_s + 0.01) if left_s > 0 else wait_s

    def _duration_s(self) -> float:
        spec = (self._lease or {}).get("spec") or {}
        return float(spec.get("leaseDurationSeconds") or self._lease_duration_s)

    async def _try_once(self) -> bool:
        """Try once to renew or acquire the lease. Returns whether it is ours afterwards."""
        sent_s = self._clock()
        limit_s = self._renew_deadline_s
        if self._leads:
            limit_s = max(0.05, self._renewed_s + self._renew_deadline_s - sent_s)
        try:
            async with asyncio.timeout(limit_s):
                if not self._wanted():
                    await (self.release() if self._leads else self._look())
                    return False
                if not self._leads or self._lease is None:
                    await self._look()
                    if self._taken():
                        return False
                    sent_s = self._clock()
                try:
                    await self._write()
                except ApiError as error:
                    if error.status not in (404, 409):
                        raise
                    # Changed or deleted since we read it. A peer holds it now, unless it
                    # was edited otherwise, or our own write succeeded and its response was lost.
                    await self._look()
                    return self.leads and _holder(self._lease) == self._identity
        except TimeoutError:
            raise ApiError(0, "Timeout", "the API did not answer in time") from None
        self._renewed_s = sent_s
        return True

    async def _look(self) -> None:
        try:
            lease = await self._kube.get(LEASES, self._name, self._namespace)
        except ApiError as error:
            if error.status != 404:
                raise
            if not self._taken():  # else it was deleted, and its holder may not know yet
                self._lease = None
            return
        self._see(lease)

    def _see(self, lease: dict[str, Any]) -> None:
        known = ((self._lease or {}).get("metadata") or {}).get("resourceVersion")
        if self._lease is None or lease["metadata"]["resourceVersion"] != known:
            self._seen_s = self._clock()
        self._lease = lease

    def _taken(self) -> bool:
        """Whether a peer holds the lease and it has not expired."""
        holder = _holder(self._lease)
        if not holder or holder == self._identity:
            return False
        return self._clock() < self._seen_s + self._duration_s()

    async def _write(self) -> None:
        now = _now()
        old = (self._lease or {}).get("spec") or {}
        again = old.get("holderIdentity") == self._identity
        spec = old | {
            "holderIdentity": self._identity,
            "leaseDurationSeconds": self._lease_duration_s,
            "acquireTime": old.get("acquireTime", now) if again else now,
            "renewTime": now,
            "leaseTransitions": old.get("leaseTransitions", 0) + (0 if again or not old else 1),
        }
        if self._lease is None:
            meta = {"name": self._name, "namespace": self._namespace}
            lease = {"metadata": meta, "spec": spec}
            self._see(await self._kube.create(LEASES, lease, self._namespace))
        else:  # with the resourceVersion that we read, so only one of two candidates succeeds
            lease = self._lease | {"spec": spec}
            self._see(await self._kube.update(LEASES, lease, self._namespace))


class Leadership:
    """Holds both Leases of KubeAI in Go, so that it never writes while this KubeAI replica leads.

    The second one is acquired only by the holder of the first. Call ``run``, cancel it, then call
    ``release``.
    """

    def __init__(
        self,
        kube: LeaseApi,
        namespace: str,
        identity: str,
        config: LeaderElection,
        changed: Callable[[bool], None] = lambda leads: None,
        clock: Callable[[], float] = boot_time_s,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._changed = changed
        self._identity = identity
        self._sleep = sleep
        self._led = False
        candidate = partial(
            Leader,
            kube,
            namespace,
            identity,
            lease_duration_s=config.lease_duration_s,
            renew_deadline_s=config.renew_deadline_s,
            retry_period_s=config.retry_period_s,
            changed=self._turn,
            clock=clock,
        )
        self._first = candidate(name=LEASE_NAME)
        self._second = candidate(name=GO_CONTROLLER_LEASE_NAME, wanted=lambda: self._first.leads)

    @property
    def leads(self) -> bool:
        """Whether this KubeAI replica may write at this moment."""
        return self._first.leads and self._second.leads

    def check(self) -> None:
        """Raise NotLeader unless this KubeAI replica may write at this moment."""
        self._first.check()
        self._second.check()

    async def run(self) -> None:
        """Acquire and renew the leases until cancelled. Calls ``changed`` at each transition."""
        while True:
            await asyncio.gather(self._first.step(), self._second.step())
            if self._first.leads and not self._second.leads:
                await self._second.step()  # the first one has been acquired since
            await self._sleep(min(self._first.wait_s(), self._second.wait_s()))

    async def release(self) -> None:
        """Release the leases so that a successor need not wait. Call after ``run`` has ended."""
        await self._second.release()
        await self._first.release()

    def _turn(self, _: bool) -> None:
        if self.leads == self._led:
            return
        self._led = self.leads
        log.info("leading" if self._led else "stopped leading", identity=self._identity)
        self._changed(self._led)


def _holder(lease: dict[str, Any] | None) -> str:
    return str(((lease or {}).get("spec") or {}).get("holderIdentity") or "")


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")  # Kubernetes' MicroTime
