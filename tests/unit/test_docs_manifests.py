"""The manifests, values and configs that the documentation shows are accepted by what they are for.

All pages: each Model passes the API's validation and gives a pod, each block of Helm values passes
the chart's schema, and each system config loads.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import jsonschema_rs
import yaml
from doc_pages import DOCS, language_and_title, markdown_tokens, page_names
from repository import REPOSITORY

from kubeai.api.config.system import SystemConfig, parse_config
from kubeai.api.crd import model_crd
from kubeai.api.model import API_VERSION, decode_model
from kubeai.local import from_url
from kubeai.local.apiserver.apply.patch import merge
from kubeai.local.apiserver.schema.structural import Schema
from kubeai.podspec import build_pod

CHARTS = REPOSITORY / "charts"
VALUES = "kubeai", "models"  # the charts
YAML = {"yaml", "yml"}
MODEL = Schema(model_crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"])
# What a block that shows only a part of a spec is completed with.
BASE = {"url": "hf://org/name", "engine": "VLLM", "features": ["TextGeneration"]}
PROFILES = "resourceProfiles", "cacheProfiles", "modelServers"


@dataclass(frozen=True)
class Block:
    """A YAML document in a page. ``line`` is that of its fence."""

    page: str
    line: int
    title: str
    value: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@cache
def schema(chart: str) -> dict[str, Any]:
    """The schema of a chart's values."""
    return json.loads((CHARTS / chart / "values.schema.json").read_text())


@cache
def defaults(file: str) -> dict[str, Any]:
    """Values that the chart kubeai has in a file."""
    return yaml.safe_load((CHARTS / "kubeai" / file).read_text())


def blocks() -> Iterator[Block]:
    """All YAML documents that are maps, of all pages."""
    for name in page_names():
        for token in markdown_tokens((DOCS / name).read_text()):
            if token.type != "fence" or token.map is None:
                continue
            language, title = language_and_title(token)
            for value in yaml.safe_load_all(token.content) if language in YAML else ():
                if isinstance(value, dict):
                    yield Block(f"docs/{name}", token.map[0] + 1, title, value)


def kind_of(block: Block) -> str:
    """`model`, `spec`, `config`, a chart's name, or nothing if it is not KubeAI's."""
    value, name = block.value, block.title.rsplit("/", 1)[-1]
    if value.get("apiVersion") == API_VERSION:
        return "model"
    if "kind" in value:
        return ""
    if value.keys() == {"spec"}:
        return "spec"
    if "config" in name:
        return "config"
    for chart in ("models", "kubeai"):
        if value.keys() <= schema(chart)["properties"].keys() or "values" in name:
            return "models" if "catalog" in value else "kubeai"
    return ""


@cache
def blocks_of(*kinds: str) -> list[Block]:
    """The blocks of some kinds. They are read when the first test runs, by one process."""
    return [block for block in blocks() if kind_of(block) in kinds]


@cache
def config_of(page: str) -> SystemConfig:
    """The system config: profiles of the chart, its cloud files, `kubeai local` and the page.

    Helm merges values as RFC 7386 merges JSON.
    """
    merged: dict[str, Any] = {}
    files = [defaults("values.yaml"), defaults("values-eks.yaml"), defaults("values-gke.yaml")]
    shown = [block.value for block in blocks_of(*VALUES, "config") if block.page == page]
    for values in files + shown:
        merged = merge(merged, {key: values[key] for key in PROFILES if values.get(key)})
    return from_url.with_gpu_profile(parse_config(yaml.safe_dump(merged)))


def test_every_model_of_a_page_is_accepted_and_gives_a_pod(subtests):
    models = blocks_of("model", "spec")
    assert len(models) > 20
    for block in models:
        with subtests.test(str(block)):
            manifest = copy.deepcopy(block.value)
            if kind_of(block) == "spec":
                metadata = {"apiVersion": API_VERSION, "kind": "Model", "metadata": {"name": "m"}}
                manifest = metadata | {"spec": BASE | manifest["spec"]}
            assert MODEL.prune(manifest) == [], "unknown fields"
            MODEL.default(manifest)
            assert [str(cause) for cause in MODEL.validate(manifest)] == []
            assert build_pod(decode_model(manifest), config_of(block.page))


def test_all_helm_values_of_a_page_pass_the_charts_schema(subtests):
    values = blocks_of(*VALUES)
    assert len(values) > 20
    for block in values:
        with subtests.test(str(block)):
            errors = jsonschema_rs.validator_for(schema(kind_of(block))).iter_errors(block.value)
            assert [f"{error.instance_path}: {error.message}" for error in errors] == []


def test_every_system_config_of_a_page_loads(subtests):
    configs = blocks_of("config")
    assert configs
    for block in configs:
        with subtests.test(str(block)):
            assert parse_config(yaml.safe_dump(block.value))
