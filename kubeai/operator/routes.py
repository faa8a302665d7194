"""Builds the data plane's Route from a Model and its pods. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from kubeai.api.config.system import GatewayConfig
from kubeai.api.model import Model
from kubeai.api.names import wait_before_fallback_s
from kubeai.operator.blocks import NO_BLOCKS, Blocks
from kubeai.operator.names import NO_NAMES, ResolvedNames
from kubeai.operator.pods import Pod
from kubeai.operator.starting import NO_START, Start
from kubeai.routing.routes import Endpoint, Route


def route_of(
    model: Model,
    pods: Iterable[Pod],
    blocks: Blocks = NO_BLOCKS,
    start: Start = NO_START,
    form_model: str = "",
    gateway: GatewayConfig | None = None,
    names: ResolvedNames = NO_NAMES,
) -> Route | None:
    """The Model's route, with endpoints sorted by name; None while the Model is being deleted.

    Endpoints are the pods of this very Model (by uid) that are ready, not terminating and not
    draining. Only adapters that the Model still declares are offered. Draining and terminating pods
    are listed separately, and may finish their in-flight requests. ``blocks``: why the Model has
    no endpoint. ``start``: what its starting replicas do, and how long that takes.
    ``form_model``: as in the Route. ``gateway``: the config's section; None: its defaults.
    ``names``: the aliases and references that count.
    """
    meta, spec = model.metadata, model.spec
    if meta.deletion_timestamp is not None:
        return None
    declared = tuple(adapter.name for adapter in spec.adapters)
    own = [pod for pod in pods if pod.owner == meta.uid]
    balancing = spec.load_balancing
    created = meta.creation_timestamp
    return Route(
        model=meta.name,
        engine=spec.engine,
        features=spec.features,
        labels=meta.labels,
        owner=spec.owner,
        created_s=int(created.timestamp()) if created is not None else 0,
        adapters=declared,
        strategy=balancing.strategy,
        mean_load_factor=balancing.prefix_hash.mean_load_factor,
        replication=balancing.prefix_hash.replication,
        prefix_char_length=balancing.prefix_hash.prefix_char_length,
        cache_load_factor=(balancing.prefix_cache and balancing.prefix_cache.mean_load_factor) or 0,
        endpoints=_endpoints(own, declared),
        draining=_draining(own),
        block=blocks.model,
        adapter_blocks=blocks.adapters,
        progress=start.progress,
        start_s=start.start_s,
        form_model=form_model,
        capacity=(gateway or GatewayConfig()).capacity(
            spec.target_requests, balancing.max_requests_per_replica
        ),
        aliases=names.aliases,
        fallbacks=names.fallbacks,
        wait_before_fallback_s=wait_before_fallback_s(spec.wait_before_fallback),
        canary=names.canary,
        canary_percent=spec.canary.percent if spec.canary is not None and names.canary else 0,
    )


def _endpoints(own: Iterable[Pod], declared: tuple[str, ...]) -> tuple[Endpoint, ...]:
    endpoints = [
        Endpoint(pod.name, pod.address, tuple(a for a in pod.loaded if a in declared))
        for pod in own
        if pod.serves
    ]
    return tuple(sorted(endpoints, key=lambda endpoint: endpoint.name))


def _draining(own: Iterable[Pod]) -> tuple[str, ...]:
    """The names of pods that serve no new request but may have some in flight."""
    return tuple(
        sorted(
            pod.name
            for pod in own
            if (pod.terminating or pod.draining_since_s) and not pod.finished and pod.address
        )
    )
