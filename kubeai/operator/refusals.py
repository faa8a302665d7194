"""Finds out why a cache Job has no pod.

If the API rejects a Job's pods (a ResourceQuota, Pod Security, a webhook), only Events report it:
the Job's status has no condition for that. Events are listed, for all Jobs at once, every
READ_INTERVAL_S while any Job has had no pod for READ_AFTER_S. If they cannot be read or none gives
a reason, a generic message names the Job after NO_POD_AFTER_S. Used by
`kubeai.operator.cache.claims`.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from datetime import datetime

import msgspec

from kubeai.kube.client import Kube
from kubeai.kube.errors import ApiError
from kubeai.kube.resources import EVENTS, JOBS
from kubeai.logs import get_logger
from kubeai.operator.cache.plan import Job
from kubeai.operator.pod_trouble import MESSAGE_MAX_CHARS, Trouble

log = get_logger(__name__)
READ_AFTER_S = 5.0
READ_INTERVAL_S = 30.0
NO_POD_AFTER_S = 60.0
_FIELDS = f"involvedObject.kind={JOBS.kind},reason=FailedCreate"


class _Object(msgspec.Struct):
    uid: str = ""


class _Event(msgspec.Struct, rename="camel"):
    """The part of an Event that is decoded."""

    involved_object: _Object = msgspec.field(default_factory=_Object)
    message: str = ""
    last_timestamp: datetime | None = None

    @property
    def at_s(self) -> float:
        return self.last_timestamp.timestamp() if self.last_timestamp is not None else 0.0


class _Podless(msgspec.Struct):
    """A Job without a pod."""

    job: Job
    since_s: float
    message: str = ""


class Refusals:
    """``changed(job)`` is called with a Job's name when the reason it has no pod changes."""

    def __init__(
        self,
        kube: Kube,
        namespace: str,
        changed: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._kube = kube
        self._namespace = namespace
        self._changed = changed
        self._clock = clock
        self._podless: dict[str, _Podless] = {}  # by the Job's uid
        self._has_podless = asyncio.Event()

    def trouble(self, job: Job) -> tuple[Trouble | None, float | None]:
        """Why the Job has no pod, if it has none, and seconds until the result may change."""
        if not job.podless:
            self._podless.pop(job.uid, None)
            return None, None
        podless = self._podless.setdefault(job.uid, _Podless(job, self._clock()))
        self._has_podless.set()
        if podless.message:
            return Trouble("PodRefused", podless.message), None
        wait_s = podless.since_s + NO_POD_AFTER_S - self._clock()
        if wait_s > 0:
            return None, wait_s
        hint = f"see `kubectl describe job {job.name}`"
        return Trouble("NoPod", f"the Job {job.name} has no pod; {hint}"), None

    def forget(self, uid: str) -> None:
        """The Job is gone."""
        self._podless.pop(uid, None)

    def stopped_leading(self) -> None:
        """This KubeAI replica is no longer the leader."""
        self._podless.clear()

    async def run(self) -> None:
        """List Events every READ_INTERVAL_S while any Job has had no pod for READ_AFTER_S, until
        cancelled."""
        while True:
            await self._has_podless.wait()
            await asyncio.sleep(READ_AFTER_S)
            latest_s = self._clock() - READ_AFTER_S
            if any(one.since_s <= latest_s for one in self._podless.values()):
                await self._read()
                await asyncio.sleep(READ_INTERVAL_S - READ_AFTER_S)
            if not self._podless:
                self._has_podless.clear()

    async def _read(self) -> None:
        try:
            events, _ = await self._kube.list(EVENTS, self._namespace, fields=_FIELDS, type=_Event)
        except ApiError as error:
            log.info("cannot list Events of Jobs", error=str(error))
            return
        for event in sorted(events, key=lambda event: event.at_s):
            podless = self._podless.get(event.involved_object.uid)
            if podless is not None:
                message = _message(podless.job.name, event.message)
                if message != podless.message:
                    podless.message = message
                    self._changed(podless.job.name)


def _message(job: str, text: str) -> str:
    """The Event's message without the pod name's random suffix, which differs each time."""
    text = re.sub(rf"\b{re.escape(job)}-[a-z0-9]{{5}}\b", job, text)
    return text.removeprefix("Error creating: ")[:MESSAGE_MAX_CHARS]
