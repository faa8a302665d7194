"""Which fields of a Model replace its pods when they change, as docs/reference/model.md says."""

from __future__ import annotations

import re
from typing import Any

import pytest
from fakes.engine_pods import CONFIG, ENGINES, hash_label, pod
from msgspec.structs import replace
from repository import REPOSITORY

from kubeai.api.config.system import CacheProfile, ModelLoading, ResourceProfile
from kubeai.api.config.system import SharedFilesystem as Shared

ADAPTER = {"name": "a", "url": "hf://o/a"}
PATCH = {"op": "add", "path": "/spec/hostname", "value": "x"}
FILE = {"path": "/a", "content": "a"}
CANARY = {"model": "n", "percent": 10}
HASHED = {"loadBalancing": {"strategy": "PrefixHash"}}


def balancing(**fields: Any) -> dict[str, Any]:
    return {"loadBalancing": {"strategy": "PrefixHash", "prefixHash": fields}}


# Before and after a change of one field: what the spec has besides URL, engine and features.
CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "url": ({}, {"url": "hf://org/other"}),
    "engine": ({}, {"engine": "SGLang"}),
    "features": ({}, {"features": ["TextEmbedding"]}),
    "adapters[].name": ({"adapters": [ADAPTER]}, {"adapters": [ADAPTER | {"name": "b"}]}),
    "adapters[].url": ({"adapters": [ADAPTER]}, {"adapters": [ADAPTER | {"url": "hf://o/b"}]}),
    "aliases": ({}, {"aliases": ["x"]}),
    "fallbacks": ({}, {"fallbacks": ["n"]}),
    "waitBeforeFallback": ({"fallbacks": ["n"]}, {"fallbacks": ["n"], "waitBeforeFallback": "1s"}),
    "canary.model": ({"canary": CANARY}, {"canary": CANARY | {"model": "o"}}),
    "canary.percent": ({"canary": CANARY}, {"canary": CANARY | {"percent": 20}}),
    "resourceProfile": ({}, {"resourceProfile": "p:2"}),
    "cacheProfile": ({}, {"cacheProfile": "c"}),
    "image": ({}, {"image": "vllm:x"}),
    "args": ({}, {"args": ["--x"]}),
    "env": ({}, {"env": {"A": "1"}}),
    "envFrom[].prefix": (
        {"envFrom": [{"secretRef": {"name": "s"}}]},
        {"envFrom": [{"secretRef": {"name": "s"}, "prefix": "P_"}]},
    ),
    "envFrom[].configMapRef": ({}, {"envFrom": [{"configMapRef": {"name": "s"}}]}),
    "envFrom[].secretRef": ({}, {"envFrom": [{"secretRef": {"name": "s"}}]}),
    "replicas": ({}, {"replicas": 2}),
    "minReplicas": ({}, {"minReplicas": 1}),
    "maxReplicas": ({}, {"maxReplicas": 3}),
    "autoscalingDisabled": ({}, {"autoscalingDisabled": True}),
    "targetRequests": ({}, {"targetRequests": 7}),
    "scaleDownDelaySeconds": ({}, {"scaleDownDelaySeconds": 7}),
    "owner": ({}, {"owner": "me"}),
    "loadBalancing.strategy": ({}, HASHED),
    "loadBalancing.prefixCache.meanLoadFactor": (
        {"loadBalancing": {"strategy": "PrefixCache"}},
        {"loadBalancing": {"strategy": "PrefixCache", "prefixCache": {"meanLoadFactor": 150}}},
    ),
    "loadBalancing.prefixHash.meanLoadFactor": (HASHED, balancing(meanLoadFactor=150)),
    "loadBalancing.prefixHash.replication": (HASHED, balancing(replication=50)),
    "loadBalancing.prefixHash.prefixCharLength": (HASHED, balancing(prefixCharLength=50)),
    "loadBalancing.maxRequestsPerReplica": ({}, {"loadBalancing": {"maxRequestsPerReplica": 5}}),
    "files[].path": ({"files": [FILE]}, {"files": [FILE | {"path": "/b"}]}),
    "files[].content": ({"files": [FILE]}, {"files": [FILE | {"content": "b"}]}),
    "priorityClassName": ({}, {"priorityClassName": "high"}),
    "jsonPatches[].op": (
        {"jsonPatches": [PATCH | {"path": "/spec/containers/0/args/0"}]},
        {"jsonPatches": [PATCH | {"path": "/spec/containers/0/args/0", "op": "replace"}]},
    ),
    "jsonPatches[].path": (
        {"jsonPatches": [PATCH]},
        {"jsonPatches": [PATCH | {"path": "/spec/subdomain"}]},
    ),
    "jsonPatches[].value": ({"jsonPatches": [PATCH]}, {"jsonPatches": [PATCH | {"value": "y"}]}),
    "jsonPatches[].from": (
        {"jsonPatches": [{"op": "copy", "path": "/spec/x", "from": "/spec/containers/0/name"}]},
        {"jsonPatches": [{"op": "copy", "path": "/spec/x", "from": "/spec/containers/0/image"}]},
    ),
}
PROFILES = replace(
    CONFIG,
    resource_profiles={"p": ResourceProfile(limits={"cpu": "1"})},
    cache_profiles={"c": CacheProfile(shared_filesystem=Shared(storage_class_name="s"))},
)


def documented() -> dict[str, str]:
    """Field → what its column "change" says."""
    text = (REPOSITORY / "docs/reference/model.md").read_text().partition("## Rules")[0]
    rows = re.findall(r"^\| `([^`]+)` \|[^|]*\|[^|]*\| ([^|]+) \|", text, re.MULTILINE)
    return dict(rows)


def test_every_field_has_a_change():
    assert documented().keys() == CHANGES.keys()


@pytest.mark.parametrize("field", CHANGES)
def test_a_change_replaces_pods_if_the_docs_say_so(field):
    engine = "VLLM"
    before, after = ({"engine": engine} | spec for spec in CHANGES[field])
    built = [hash_label(pod(config=PROFILES, **spec)) for spec in (before, after)]
    assert documented()[field] == ("in place" if built[0] == built[1] else "new pods")


@pytest.mark.parametrize("field", ["features", "targetRequests"])
def test_the_docs_name_the_other_engines_whose_pods_a_change_replaces(field):
    urls = {"OLlama": "ollama://a", "LlamaCpp": "hf://o/n:Q4"}
    engines = set()
    for engine in ENGINES:
        url = {"url": urls.get(engine, "hf://org/name")}
        built = [hash_label(pod(engine, **url, **spec)) for spec in CHANGES[field]]
        if built[0] != built[1]:
            engines.add(engine)
    text = (REPOSITORY / "docs/reference/model.md").read_text()
    (named,) = re.findall(rf"`{field}` (?:also replaces the pods of|those\s+of) ([^.`]*)", text)
    assert {each for each in ENGINES if re.search(rf"\b{each}\b", named)} == engines


@pytest.mark.parametrize("spec", [{}, {"adapters": [ADAPTER]}, {"cacheProfile": "c"}])
def test_a_new_loader_as_of_an_upgrade_replaces_only_pods_with_adapters(spec):
    """docs/how-to/upgrade.md says so."""
    built = [
        hash_label(pod(config=replace(PROFILES, model_loading=ModelLoading(image=image)), **spec))
        for image in ("kubeai:1", "kubeai:2")
    ]
    assert (built[0] != built[1]) is ("adapters" in spec)
