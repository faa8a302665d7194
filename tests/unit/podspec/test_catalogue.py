"""The chart of Models: each entry is a valid Model that KubeAI can create pods for.

Rendering with Helm is tested elsewhere; `manifest` does what the chart's template does.
tests/vllm_arguments.py generated the list of vLLM's arguments.
"""

from __future__ import annotations

import copy
import json
import re
from functools import cache
from pathlib import Path

import jsonschema_rs
import msgspec
import pytest
import yaml
from repository import REPOSITORY

from kubeai.api.config.system import parse_config
from kubeai.api.crd import model_crd
from kubeai.api.model import NAME_MAX_CHARS, decode_model
from kubeai.local.apiserver.schema.structural import Schema
from kubeai.podspec import build_pod

CHARTS = REPOSITORY / "charts"
VALUES = yaml.safe_load((CHARTS / "models/values.yaml").read_text())
CATALOG = VALUES["catalog"]
VLLM = json.loads((Path(__file__).parent / "vllm_arguments.json").read_text())
API = Schema(model_crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"])
# The names in the catalogue of KubeAI in Go (chart 0.21.0).
UPSTREAM = """
bge-embed-text-cpu bge-rerank-base-cpu deepseek-r1-1.5b-cpu deepseek-r1-70b-gh200
deepseek-r1-70b-gh200-fp8 deepseek-r1-distill-llama-8b-l4 deepseek-r1-distill-qwen-1.5b-rtx4070
deepseek-r1-mi300x e5-mistral-7b-instruct-cpu faster-whisper-medium-en-cpu gemma-2-9b-it-fp8-l4
gemma-27b-ollama-l4 gemma-2b-it-tpu gemma-3-12b-ollama-l4 gemma-3-27b-ollama-l4
gemma-9b-ollama-l4 gemma2-2b-cpu granite-3.1-dense-ollama-l4 llama-3.1-405b-instruct-fp8-a100-80b
llama-3.1-405b-instruct-fp8-h100 llama-3.1-405b-instruct-fp8-mi300x
llama-3.1-70b-instruct-awq-int4-gh200 llama-3.1-70b-instruct-fp8-1-h100
llama-3.1-70b-instruct-fp8-gh200 llama-3.1-70b-instruct-fp8-h100 llama-3.1-70b-instruct-fp8-l4
llama-3.1-70b-instruct-fp8-mi300x llama-3.1-8b-instruct-cpu llama-3.1-8b-instruct-fp8-l4
llama-3.1-8b-instruct-tpu llama-3.1-supernova-lite-l4 llama-3.1-tulu-3-8b-l4
llama-3.2-11b-vision-instruct-l4 llama-3.3-70b-instruct-bf16-gh200 llama-3.3-70b-ollama-l4
llama-4-maverick-430k-h100 mistral-small-24b-instruct-h100 mistral-small-3.1-24b-instruct-h100
nomic-embed-text-cpu opt-125m-cpu opt-125m-l4 phi-4-bnb-4bit-l4 phi-4-ollama-l4 qwen2-500m-cpu
qwen2.5-7b-cpu qwen2.5-7b-instruct-l4 qwen2.5-coder-1.5b-cpu qwen2.5-coder-1.5b-rtx4070-8gb
"""
each = pytest.mark.parametrize("name", CATALOG)
each_on_vllm = pytest.mark.parametrize(
    "name", [name for name, entry in CATALOG.items() if entry["engine"] == "VLLM"]
)


def manifest(name, entry):
    spec = {"minReplicas": 0} | {key: value for key, value in entry.items() if value is not None}
    metadata = {"name": name, "namespace": "ns", "uid": "u-1"}
    metadata |= {key: spec.pop(key) for key in ("labels", "annotations") if key in spec}
    spec.pop("enabled", None)
    model = {"apiVersion": "kubeai.org/v1", "kind": "Model", "metadata": metadata, "spec": spec}
    return copy.deepcopy(model)


@cache
def system_config():
    """KubeAI's config as its chart renders it, with the profiles of all its values files."""
    files = [CHARTS / "kubeai/values.yaml", *sorted((CHARTS / "kubeai").glob("values-*.yaml"))]
    main, *others = (yaml.safe_load(file.read_text()) for file in files)
    profiles = main["resourceProfiles"]
    for values in others:
        profiles = values.get("resourceProfiles", {}) | profiles
    config = {"resourceProfiles": profiles, "modelServers": main["modelServers"]}
    return parse_config(msgspec.json.encode(config).decode())


def arguments(entry):
    """Parse an entry's arguments into {flag: value}, with None for flags without a value."""
    pairs = (argument.partition("=") for argument in entry.get("args", ()))
    return {flag: value if equals else None for flag, equals, value in pairs}


def test_every_entry_of_the_catalogue_of_kubeai_in_go_exists():
    assert set(UPSTREAM.split()) - set(CATALOG) == set()


def test_no_entry_is_enabled_by_default():
    assert VALUES["all"] == {"enabled": False}
    assert [name for name, entry in CATALOG.items() if entry["enabled"] is not False] == []


@each
def test_the_api_accepts_each_entry_unchanged(name):
    model = manifest(name, CATALOG[name])
    assert API.prune(model) == []
    API.default(model)
    assert API.validate(model) == []
    assert len(name) <= NAME_MAX_CHARS


@each
def test_a_pod_can_be_built_from_each_entry(name):
    entry = CATALOG[name]
    pod = build_pod(decode_model(manifest(name, entry)), system_config())
    (container,) = pod["spec"]["containers"]
    assert container["resources"]
    assert set(entry.get("args", ())) <= set(container.get("args", ()))


@each_on_vllm
def test_vllm_accepts_each_entrys_arguments(name):
    entry = CATALOG[name]
    old = entry.get("image", "").endswith(":v0.10.2")  # accepts choices that newer versions reject
    for flag, value in arguments(entry).items():
        assert flag in VLLM["arguments"], flag
        known = VLLM["arguments"][flag]
        assert (value is not None) == (known["value"] == "yes"), flag
        assert old or value in known.get("choices", [value]), flag
        if value and value.startswith("{"):
            json.loads(value)
    variables = {variable for variable in entry.get("env", {}) if variable.startswith("VLLM_")}
    assert variables - set(VLLM["variables"]) == set()


@each_on_vllm
def test_vllm_uses_all_accelerators_of_its_profile(name):
    profile, _, count = CATALOG[name]["resourceProfile"].partition(":")
    given = arguments(CATALOG[name])
    used = int(given.get("--tensor-parallel-size", 1)) * int(
        given.get("--pipeline-parallel-size", 1)
    )
    assert used == (1 if profile == "cpu" else int(count))


@each
def test_only_chat_models_are_routed_by_prefix(name):
    entry = CATALOG[name]
    if entry.get("loadBalancing") == {"strategy": "PrefixHash"}:
        assert entry["features"] == ["TextGeneration"]
        assert entry["engine"] in ("VLLM", "SGLang")


def test_the_schema_accepts_all_fields_and_rejects_unknown_ones():
    schema = json.loads((CHARTS / "models/values.schema.json").read_text())
    validator = jsonschema_rs.Draft202012Validator(schema)
    assert [error.message for error in validator.iter_errors(VALUES)] == []
    entry = schema["properties"]["catalog"]["additionalProperties"]["then"]["properties"]
    assert set(entry) == {
        "enabled",
        "labels",
        "annotations",
        *API.root["properties"]["spec"]["properties"],
    }
    good = {"url": "hf://a/b", "engine": "VLLM", "features": ["TextGeneration"]}
    for key, value in {
        "minReplica": 1,
        "maxReplicas": 0,
        "env": {"A": 1},
        "engine": "vLLM",
    }.items():
        assert not validator.is_valid({"catalog": {"mine": good | {key: value}}}), key
    for key, value in {"minReplicas": 0, "args": None, "autoscalingDisabled": False}.items():
        assert validator.is_valid({"catalog": {"mine": good | {key: value}}}), key


def test_the_docs_list_every_entry():
    text = (REPOSITORY / "docs/reference/models-catalogue.md").read_text()
    rows = [
        f"| `{name}` | {entry['engine']} | {', '.join(entry['features'])} "
        f"| `{entry['resourceProfile']}` | `{entry['url']}` |"
        for name, entry in CATALOG.items()
    ]
    assert re.findall(r"^\| `.*$", text, re.MULTILINE) == rows, "\n".join(["the rows:", *rows])
