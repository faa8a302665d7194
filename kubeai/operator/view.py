"""What the operator shows of its Models, for people. The supervisor's console reads nothing else.

Values are copies of what the operator knows at that moment. :class:`ModelView` is made by the
operator.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import msgspec

from kubeai.api.model import Model
from kubeai.operator.plan import wanted_replicas
from kubeai.operator.pods import Pod
from kubeai.operator.scaling.timeline import Step as Step


class PodView(msgspec.Struct, frozen=True):
    """One replica."""

    name: str
    address: str  # "ip:port", or empty
    phase: str
    ready: bool
    reason: str  # of its trouble; empty: it has none
    message: str
    restarts: int  # of the engine's container
    created_s: float  # Unix time


class ModelView(msgspec.Struct, frozen=True):
    """One Model and its replicas."""

    model: Model
    desired: int  # replicas
    pods: tuple[PodView, ...]

    @property
    def name(self) -> str:
        """The Model's name."""
        return self.model.metadata.name

    @property
    def ready(self) -> int:
        """The number of replicas that are ready."""
        return sum(pod.ready for pod in self.pods)


class OperatorView(Protocol):
    """Implemented by the operator."""

    def models(self) -> Iterable[ModelView]:
        """All Models."""

    def model(self, name: str) -> ModelView | None:
        """One Model, if it exists."""

    def timeline(self, name: str) -> Sequence[Step]:
        """The last changes of a Model's spec.replicas, the newest first."""


def view_of(model: Model, pods: Iterable[Pod], now_s: float) -> ModelView:
    """The Model with those pods that are its replicas. ``now_s``: Unix time."""
    uid = model.metadata.uid
    replicas = (pod for pod in pods if pod.owner == uid and not pod.job)
    return ModelView(
        model,
        0 if model.metadata.deletion_timestamp is not None else wanted_replicas(model),
        tuple(sorted((_pod_view(pod, now_s) for pod in replicas), key=lambda pod: pod.name)),
    )


def _pod_view(pod: Pod, now_s: float) -> PodView:
    trouble = pod.trouble_at(now_s)
    phase = "Terminating" if pod.terminating else "Draining" if pod.draining_since_s else pod.phase
    return PodView(
        pod.name,
        pod.address,
        phase,
        pod.serves,
        "" if trouble is None else trouble.reason,
        "" if trouble is None else trouble.text,
        pod.restarts,
        pod.created_s,
    )
