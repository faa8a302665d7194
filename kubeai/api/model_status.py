"""The status of a Model: what KubeAI has observed. See `kubeai.api.model`."""

from __future__ import annotations

from typing import Annotated

from kubeai.api.objects import ApiValue, Condition, doc


class ModelStatusReplicas(ApiValue, frozen=True, kw_only=True):
    """The number of the Model's pods."""

    all: Annotated[int, doc("Pods that exist and are not being deleted.", format="int32")]
    ready: Annotated[int, doc("Pods that are ready to serve requests.", format="int32")]


class ModelStatusCache(ApiValue, frozen=True, kw_only=True):
    """The state of the Model's files in its cache."""

    loaded: Annotated[bool, doc("Whether all files are in the cache.")]


class ModelStatusAdapter(ApiValue, frozen=True, kw_only=True):
    """An adapter that could not be loaded or unloaded."""

    name: Annotated[str, doc("The adapter's name.")]
    message: Annotated[str, doc("The error on one of the pods. KubeAI retries.")] = ""


class ModelStatus(ApiValue, frozen=True, kw_only=True):
    """The observed state of the Model."""

    replicas: Annotated[ModelStatusReplicas | None, doc("Numbers of pods.")] = None
    selector: Annotated[
        str, doc("Label selector of the Model's pods, for the scale subresource.")
    ] = ""
    cache: Annotated[
        ModelStatusCache | None, doc("State of the cache; absent without a cacheProfile.")
    ] = None
    failed_adapters: Annotated[
        tuple[ModelStatusAdapter, ...],
        doc(
            "Adapters that at least one pod could not load or unload.",
            **{"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
        ),
    ] = ()
    conditions: Annotated[
        tuple[Condition, ...],
        doc(
            "The Model's current state, including why it does not serve.",
            **{"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
        ),
    ] = ()
