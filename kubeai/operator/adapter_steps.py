"""What a pod's engine needs to serve its Model's adapters, and what the conditions say about it.

Pure, like `kubeai.operator.plan`. `kubeai.operator.adapters` takes the steps.
"""

from __future__ import annotations

from collections.abc import Collection

import msgspec

from kubeai.api.model import Model, ModelStatusAdapter
from kubeai.operator.pods import Pod, Trouble
from kubeai.podspec.adapters import url_hash


class Wanted(msgspec.Struct, frozen=True):
    """One adapter that a pod should serve and does not."""

    name: str
    url: str
    hash: str


class Steps(msgspec.Struct, frozen=True):
    """What one pod's engine needs. Empty if it already serves what its Model declares."""

    load: tuple[Wanted, ...] = ()
    drop: tuple[str, ...] = ()


class AdaptersView(msgspec.Struct, frozen=True):
    """Input of the Model's AdaptersLoaded condition."""

    ready: int = 0  # replicas that serve
    complete: int = 0  # those among them that have every adapter
    failed: tuple[ModelStatusAdapter, ...] = ()  # adapters that failed in at least one pod

    @property
    def trouble(self) -> Trouble | None:
        """The first failure, for the conditions."""
        return Trouble("LoadFailed", self.failed[0].message) if self.failed else None


def steps(model: Model, pod: Pod, busy: Collection[str]) -> Steps:
    """What the pod needs; ``busy``: adapters that another pod is loading. Pure."""
    labels = dict(pod.adapters)
    wanted = {adapter.name: adapter.url for adapter in model.spec.adapters}
    load = []
    for name, url in wanted.items():
        hash_ = url_hash(url)
        if labels.get(name) == hash_ and pod.adapters_current:
            continue
        if name in pod.loaded and name in busy:
            continue  # keeps serving the former URL's adapter until the other pod is done
        load.append(Wanted(name, url, hash_))
    return Steps(tuple(load), tuple(name for name in labels if name not in wanted))
