"""Kubernetes Events of Models and of API keys' Secrets, as shown by ``kubectl describe``.

Owns a bounded queue and one sender. Delivery is best effort: emitting never blocks, Events are
dropped when there are too many, and a repeated Event increments the count of the existing one.
Used by the controller, the scaler and the watch of keys; may be called from any callback.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Protocol

import msgspec

from kubeai.api.objects import ObjectMeta
from kubeai.kube.client import Kube
from kubeai.kube.errors import ApiError
from kubeai.kube.resources import EVENTS
from kubeai.logs import get_logger

log = get_logger(__name__)
QUEUE_MAX_EVENTS = 1000
REMEMBERED_MAX_EVENTS = 4096
MESSAGE_MAX_CHARS = 1000  # the API's limit is 1024
DELAY_S = 5.0  # before an Event is written, so that it does not delay the writes it reports
REPEAT_INTERVAL_S = 60.0  # between two updates of an Event's count
FORGET_S = 600.0  # after which the same message is a new Event
BURST_MAX_EVENTS, REFILL_S = 25, 30.0  # per object: a burst of 25, then one every 30 s


class Subject(Protocol):
    """The object that an Event is about."""

    @property
    def api_version(self) -> str:
        """Its apiVersion."""
        ...

    @property
    def kind(self) -> str:
        """Its kind."""
        ...

    @property
    def metadata(self) -> ObjectMeta:
        """Its metadata."""
        ...


class _Emitted(msgspec.Struct):
    """One Event that has been written or queued."""

    name: str
    namespace: str
    first_s: float
    written_s: float
    count: int = 1


class _Allowance(msgspec.Struct):
    left: float
    at_s: float


class Events:
    """``emit`` queues an Event; ``run`` sends queued Events until cancelled."""

    def __init__(
        self, kube: Kube, namespace: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._kube = kube
        self._namespace = namespace
        self._clock = clock
        self._queue: asyncio.Queue[tuple[_Emitted, dict[str, Any] | None]] = asyncio.Queue(
            QUEUE_MAX_EVENTS
        )
        self._emitted: OrderedDict[tuple[str, str, str], _Emitted] = OrderedDict()
        self._allowances: OrderedDict[str, _Allowance] = OrderedDict()

    def emit(self, about: Subject, reason: str, message: str, *, warning: bool = False) -> None:
        """Emit an Event about an object. ``reason``: one word; ``message``: a sentence."""
        message, now_s = message[:MESSAGE_MAX_CHARS], self._clock()
        key = about.metadata.uid, reason, message
        emitted = self._emitted.get(key)
        if emitted is not None and now_s - emitted.first_s < FORGET_S:
            emitted.count += 1
            if now_s - emitted.written_s >= REPEAT_INTERVAL_S and self._put(emitted, None):
                emitted.written_s = now_s
            return
        if not self._allowed(about.metadata.uid, now_s):
            return
        # Named as client-go does: unique, and prefixed with the object's name.
        name = f"{about.metadata.name}.{secrets.token_hex(8)}"
        emitted = _Emitted(name, about.metadata.namespace or self._namespace, now_s, now_s)
        if self._put(emitted, _event(emitted, about, reason, message, warning)):
            self._emitted[key] = emitted
            if len(self._emitted) > REMEMBERED_MAX_EVENTS:
                self._emitted.popitem(last=False)

    def _put(self, emitted: _Emitted, event: dict[str, Any] | None) -> bool:
        try:
            self._queue.put_nowait((emitted, event))
        except asyncio.QueueFull:
            return False
        return True

    def _allowed(self, uid: str, now_s: float) -> bool:
        allowance = self._allowances.setdefault(uid, _Allowance(BURST_MAX_EVENTS, now_s))
        self._allowances.move_to_end(uid)
        if len(self._allowances) > REMEMBERED_MAX_EVENTS:
            self._allowances.popitem(last=False)
        refill = (now_s - allowance.at_s) / REFILL_S
        allowance.left = min(BURST_MAX_EVENTS, allowance.left + refill)
        allowance.at_s = now_s
        if allowance.left < 1:
            return False
        allowance.left -= 1
        return True

    async def run(self) -> None:
        """Send queued Events in order, each a while after it was emitted, until cancelled."""
        while True:
            emitted, event = await self._queue.get()
            await asyncio.sleep(emitted.written_s + DELAY_S - self._clock())
            try:
                await self._send(emitted, event)
            except ApiError as error:
                log.info("event not written", name=emitted.name, error=str(error))

    async def _send(self, emitted: _Emitted, event: dict[str, Any] | None) -> None:
        if event is not None:
            await self._kube.create(EVENTS, event, emitted.namespace)
            return
        patch = {"count": emitted.count, "lastTimestamp": _now()}
        await self._kube.patch(EVENTS, emitted.name, patch, emitted.namespace)


def _event(
    emitted: _Emitted, about: Subject, reason: str, message: str, warning: bool
) -> dict[str, Any]:
    now = _now()
    return {
        "metadata": {"name": emitted.name, "namespace": emitted.namespace},
        "involvedObject": {
            "apiVersion": about.api_version,
            "kind": about.kind,
            "namespace": emitted.namespace,
            "name": about.metadata.name,
            "uid": about.metadata.uid,
            "resourceVersion": about.metadata.resource_version,
        },
        "type": "Warning" if warning else "Normal",
        "reason": reason,
        "message": message,
        "count": 1,
        "firstTimestamp": now,
        "lastTimestamp": now,
        "source": {"component": "kubeai"},
    }


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


__all__ = ["Events"]
