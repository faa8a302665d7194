"""A Model and its pods for the tests of the plan, and the plan for them."""

from __future__ import annotations

import functools
from datetime import UTC, datetime

from kubeai.api.config.system import parse_config
from kubeai.api.model import decode_model
from kubeai.operator.plan import (
    AdoptPod,
    CreatePod,
    DeletePod,
    Observed,
    PatchModel,
    PatchStatus,
    plan,
)
from kubeai.operator.pods import Pod

NOW = datetime(2026, 1, 1, tzinfo=UTC)
LABELS = {"features.kubeai.org/TextGeneration": "true"}


@functools.cache
def config(surge=1):
    return parse_config(
        f"resourceProfiles: {{cpu: {{requests: {{cpu: 1}}}}}}\nmodelRollouts: {{surge: {surge}}}"
    )


def make_model(meta=None, status=None, **spec):
    return decode_model(
        {
            "metadata": {
                "name": "m", "namespace": "default", "uid": "u1", "generation": 1,
                "resourceVersion": "7", "labels": LABELS, **(meta or {}),
            },
            "spec": {
                "url": "hf://org/name", "engine": "VLLM", "features": ["TextGeneration"],
                "resourceProfile": "cpu:1", "image": "vllm:1", **spec,
            },
            "status": status or {},
        }
    )  # fmt: skip


def hash_of(model):
    creates = plan_of(make_model(replicas=1, args=list(model.spec.args)))[0]
    return creates[0].hash


def plan_of(model, *pods, surge=1, **observed):
    """Return (creates, deletes, adoptions, patches, the status or None)."""
    actions = plan(model, config(surge), Observed(pods=tuple(pods), **observed), NOW)
    status = next((a.status for a in actions if isinstance(a, PatchStatus)), None)
    return (
        [a for a in actions if isinstance(a, CreatePod)],
        [a.name for a in actions if isinstance(a, DeletePod)],
        [a.name for a in actions if isinstance(a, AdoptPod)],
        [a.patch for a in actions if isinstance(a, PatchModel)],
        status,
    )


CURRENT = "current"


def make_pod(name, **facts):
    facts = {"hash": CURRENT, "ready": True, "scheduled": True, "uid": f"uid-{name}"} | facts
    if facts["hash"] == CURRENT:
        facts["hash"] = hash_of(make_model())
    return Pod(name=name, model="m", owner="u1", **facts)


def conditions(status):
    return {c.type: (c.status, c.reason) for c in status.conditions}


def old(name, **facts):
    return make_pod(name, **{"hash": "o", "ready": False, "started": True} | facts)


def with_adapters(**spec):
    adapters = [{"name": "a", "url": "hf://x/a"}, {"name": "b", "url": "hf://x/b"}]
    return make_model(adapters=adapters, **spec)
