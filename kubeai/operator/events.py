"""Kubernetes Events of Models: what ``kubectl describe model`` shows below the conditions.

Owns a bounded queue and one sender. Events are told, not promised: they wait for nobody, are
dropped when too many come, and an Event that comes again is counted up instead of written anew.
Used by the controller and the scaling; may be called from any callback.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import msgspec

from kubeai.api.model import Model
from kubeai.kube import EVENTS, ApiError, Kube
from kubeai.logs import get_logger

log = get_logger(__name__)
QUEUE_MAX_EVENTS = 1000
REMEMBERED_MAX_EVENTS = 4096
MESSAGE_MAX_CHARS = 1000  # the API's limit is 1024
DELAY_S = 5.0  # before one is written: what it tells of has the API to itself until then
REPEAT_INTERVAL_S = 60.0  # between two counts of the same Event
FORGET_S = 600.0  # after that the same words are a new Event
BURST_MAX_EVENTS, REFILL_S = 25, 30.0  # of one Model: so many at once, then one each 30 s


class _Told(msgspec.Struct):
    """One Event that was written, or is about to be."""

    name: str
    namespace: str
    first_s: float
    written_s: float
    count: int = 1


class _Allowance(msgspec.Struct):
    left: float
    at_s: float


class Events:
    """``run`` sends what ``tell`` is told, until it is cancelled."""

    def __init__(
        self, kube: Kube, namespace: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._kube = kube
        self._namespace = namespace
        self._clock = clock
        self._queue: asyncio.Queue[tuple[_Told, dict[str, Any] | None]] = asyncio.Queue(
            QUEUE_MAX_EVENTS
        )
        self._told: OrderedDict[tuple[str, str, str], _Told] = OrderedDict()
        self._allowances: OrderedDict[str, _Allowance] = OrderedDict()

    def tell(self, model: Model, reason: str, message: str, *, warning: bool = False) -> None:
        """Something happened to the Model. ``reason``: one word; ``message``: a sentence."""
        message, now_s = message[:MESSAGE_MAX_CHARS], self._clock()
        key = model.metadata.uid, reason, message
        told = self._told.get(key)
        if told is not None and now_s - told.first_s < FORGET_S:
            told.count += 1
            if now_s - told.written_s >= REPEAT_INTERVAL_S and self._put(told, None):
                told.written_s = now_s
            return
        if not self._allowed(model.metadata.uid, now_s):
            return
        # As client-go names them: unique, and with the object's name in front for who lists them.
        name = f"{model.metadata.name}.{secrets.token_hex(8)}"
        told = _Told(name, model.metadata.namespace or self._namespace, now_s, now_s)
        if self._put(told, _event(told, model, reason, message, warning)):
            self._told[key] = told
            if len(self._told) > REMEMBERED_MAX_EVENTS:
                self._told.popitem(last=False)

    def _put(self, told: _Told, event: dict[str, Any] | None) -> bool:
        try:
            self._queue.put_nowait((told, event))
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
        while True:
            told, event = await self._queue.get()
            await asyncio.sleep(told.written_s + DELAY_S - self._clock())
            try:
                await self._send(told, event)
            except ApiError as error:
                log.info("event not written", name=told.name, error=str(error))

    async def _send(self, told: _Told, event: dict[str, Any] | None) -> None:
        if event is not None:
            await self._kube.create(EVENTS, event, told.namespace)
            return
        patch = {"count": told.count, "lastTimestamp": _now()}
        await self._kube.patch(EVENTS, told.name, patch, told.namespace)


def _event(told: _Told, model: Model, reason: str, message: str, warning: bool) -> dict[str, Any]:
    now = _now()
    return {
        "metadata": {"name": told.name, "namespace": told.namespace},
        "involvedObject": {
            "apiVersion": model.api_version,
            "kind": model.kind,
            "namespace": told.namespace,
            "name": model.metadata.name,
            "uid": model.metadata.uid,
            "resourceVersion": model.metadata.resource_version,
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
