"""The last steps of each Model's spec.replicas, with the reason for each.

Kept in memory, for people: a restart forgets it. :class:`Timeline` sees every observed Model. A
writer of spec.replicas says why before it writes; a change that no writer has announced was made by
someone else: a user, another controller, or another replica of KubeAI. The operator owns one
Timeline.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

import msgspec

from kubeai.api.model import Model
from kubeai.operator.plan import bounded

STEPS_MAX = 100  # per Model
ANNOUNCED_S = 60.0  # a write that has not been observed by then has failed
INITIAL = "replicas when the Model was created"
BOUNDS = "minReplicas and maxReplicas"
BY_OTHERS = "changed by a user or another controller"


class Step(msgspec.Struct, frozen=True, rename={"from_": "from"}):
    """One change of a Model's spec.replicas."""

    time_s: float  # Unix time
    from_: int
    to: int
    reason: str


class _Track(msgspec.Struct):
    """One Model's history."""

    uid: str
    replicas: int | None
    steps: deque[Step] = msgspec.field(default_factory=lambda: deque(maxlen=STEPS_MAX))
    announced: tuple[int, str, float] | None = None  # (replicas, reason, until: Unix time)


class Timeline:
    """See the module. ``clock``: Unix time."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._tracks: dict[str, _Track] = {}

    def announce(self, model: str, replicas: int, reason: str) -> None:
        """Spec.replicas of a Model is about to be written."""
        track = self._tracks.get(model)
        if track is not None:
            track.announced = replicas, reason, self._clock() + ANNOUNCED_S

    def observed(self, model: Model) -> None:
        """A Model was read from the API."""
        name, uid, replicas = model.metadata.name, model.metadata.uid, model.spec.replicas
        track = self._tracks.get(name)
        if track is None or track.uid != uid:
            self._tracks[name] = _Track(uid, replicas)
        elif replicas is not None and replicas != track.replicas:
            now_s = self._clock()
            if replicas != (track.replicas or 0):
                reason = _reason(track, model, replicas, now_s)
                track.steps.appendleft(Step(now_s, track.replicas or 0, replicas, reason))
            track.replicas = replicas

    def forget(self, model: str) -> None:
        """The Model was deleted."""
        self._tracks.pop(model, None)

    def steps(self, model: str) -> Sequence[Step]:
        """A Model's steps, the newest first."""
        track = self._tracks.get(model)
        return () if track is None else tuple(track.steps)


def _reason(track: _Track, model: Model, replicas: int, now_s: float) -> str:
    if track.announced is not None:
        announced, reason, until_s = track.announced
        if announced == replicas and now_s < until_s:
            track.announced = None
            return reason
    if track.replicas is None:
        return INITIAL
    # The controller's own write.
    return BOUNDS if replicas == bounded(model, track.replicas) else BY_OTHERS
