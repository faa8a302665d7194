"""Values that the charts accept: of another chart, incomplete, as strings, of a parent chart."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from helms import CHART, CHARTS, IMAGE, MODELS_CHART, REPOSITORY, config_of, one

from kubeai.api.config.system import parse_config
from kubeai.api.crd import model_crd

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]
DEFAULTS = yaml.safe_load((CHART / "values.yaml").read_text())
FIELDS = json.loads((CHART / "files/fields.json").read_text())
# Everything that is off by default, so that each template is rendered.
ALL_ON = {
    "uninstall": {"deleteModels": True},
    "autoscaling": {"enabled": True},
    "ingress": {"enabled": True},
    "networkPolicy": {"enabled": True},
    "metrics": {
        "prometheusOperator": {
            "vLLMPodMonitor": {"enabled": True},
            "podMonitor": {"enabled": True},
        },
        "grafanaDashboard": {"enabled": True},
    },
    "open-webui": {"enabled": True},
}


# -- keys that are not given -----------------------------------------------------------------------


def with_default(fields: dict, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The paths of the values in sections that have a default."""
    for key, field in fields.items():
        if path and "default" in field and "fields" not in field:
            yield (*path, key)
        yield from with_default(field.get("fields", {}), (*path, key))


def nested(values: dict, fields: dict, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The paths of all keys in sections, also of lists and of Kubernetes' own objects."""
    for key, value in values.items():
        inner = fields.get(key, {}).get("fields")
        if inner and isinstance(value, dict):
            yield from nested(value, inner, (*path, key))
        elif path:
            yield (*path, key)


def is_set(path: tuple[str, ...]) -> bool:
    """Whether the test itself needs the value."""
    return path[-1] in ("enabled", "deleteModels", "repository")


def overlay(paths: list[tuple[str, ...]], value: Any) -> dict:
    values: dict = {}
    for path in paths:
        inner = values
        for key in path[:-1]:
            inner = inner.setdefault(key, {})
        inner[path[-1]] = value
    return values


def merged(first: dict, second: dict) -> dict:
    both = first | second
    for key in first.keys() & second.keys():
        if isinstance(first[key], dict) and isinstance(second[key], dict):
            both[key] = merged(first[key], second[key])
    return both


def test_a_key_that_is_missing_in_a_section_has_its_default(helm):
    paths = [path for path in with_default(FIELDS) if not is_set(path)]
    assert len(paths) > 30
    rendered = helm.render("k", values=merged(ALL_ON, overlay(paths, None)))
    assert rendered == helm.render("k", values=ALL_ON)


def test_the_chart_renders_without_any_key_of_its_sections(helm):
    paths = [path for path in nested(DEFAULTS, FIELDS) if not is_set(path)]
    rendered = helm.render("k", values=merged(ALL_ON, overlay(paths, None)))
    assert {o["kind"] for o in rendered} == {o["kind"] for o in helm.render("k", values=ALL_ON)}


def test_each_template_prepares_the_values():
    """They are rendered in an order that Helm does not define."""
    for template in (CHART / "templates").iterdir():
        first, *_ = template.read_text().splitlines()
        assert "kubeai.prepare" in first or template.name == "_helpers.tpl", template.name


def test_a_missing_section_has_its_defaults(helm):
    sections = [key for key in DEFAULTS if "default" in FIELDS.get(key, {}) and key != "image"]
    assert len(sections) > 10
    assert helm.render("k", values=dict.fromkeys(sections)) == helm.render("k")


def test_the_chart_renders_without_any_section(helm):
    rendered = helm.render("k", values=dict.fromkeys(key for key in DEFAULTS if key != "image"))
    assert {o["kind"] for o in rendered} == {o["kind"] for o in helm.render("k")}


def chart_with_values(folder: Path, values: dict) -> Path:
    """The chart as `helm upgrade --reuse-values` uses it: with another chart's values.yaml."""
    chart = folder / "kubeai"
    shutil.copytree(CHART, chart)
    (chart / "values.yaml").write_text(yaml.safe_dump(values))
    return chart


def test_a_values_file_with_none_of_the_charts_keys_is_enough(helm, tmp_path):
    chart = chart_with_values(tmp_path, {})
    rendered = helm.render("k", *IMAGE, chart=chart)
    kinds = {obj["kind"] for obj in rendered}
    assert kinds == {obj["kind"] for obj in helm.render("k")}
    assert one(rendered, "Deployment")["metadata"]["name"] == "kubeai"


def test_the_values_of_kubeai_in_go_can_be_reused(helm, tmp_path):
    """They have another command and other images, and all values of Open WebUI's chart."""
    values = {
        "crds": {"enabled": True},
        "image": {"repository": "ghcr.io/kubeai-project/kubeai", "tag": ""},
        "command": ["/app/manager"],
        "modelLoading": {"image": "example.com/loader:1"},
        "podSecurityContext": {"runAsNonRoot": True},
        "metrics": {"prometheusOperator": {"vLLMPodMonitor": {"enabled": False, "labels": {}}}},
        "open-webui": {
            "enabled": True,
            "global": {},
            "websocket": {"enabled": False, "redis": {"image": {"tag": "7"}}},
            "ollama": {"enabled": False, "image": {"repository": "ollama/ollama"}},
            "image": {"repository": "ghcr.io/open-webui/open-webui", "useSlim": False},
            "persistence": {"enabled": True, "accessModes": ["ReadWriteOnce"]},
            "service": {"type": "ClusterIP", "containerPort": 8080},
        },
    }
    chart = chart_with_values(tmp_path, values)
    refused = helm("template", "k", str(chart), code=1)
    assert "set image.repository" in refused
    assert "KubeAI in Go" in refused
    rendered = helm.render("k", *IMAGE, chart=chart)
    (deployment,) = (
        o for o in rendered if o["kind"] == "Deployment" and o["metadata"]["name"] == "kubeai"
    )
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert container["image"].startswith(f"{REPOSITORY}:")
    assert "command" not in container, "the former image's program is not in this one"
    assert "loader:1" in config_of(rendered)


def test_an_image_has_to_be_named(helm):
    """The one that is published under upstream's name is another program."""
    words = helm("template", "k", str(CHART), code=1)
    assert "set image.repository" in words
    assert "docs/reference/image.md" in words


# -- strings ---------------------------------------------------------------------------------------


def scalars(fields: dict, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    for key, field in fields.items():
        if field.get("type") in ("boolean", "integer", "number"):
            yield (*path, key), field["type"]
        yield from scalars(field.get("fields", {}), (*path, key))


SAMPLES = {"boolean": (True, "true"), "integer": (7, "7"), "number": (0.5, "0.5")}


def test_numbers_and_booleans_may_be_strings(helm):
    real: dict = {"open-webui": {"enabled": True}}
    strings: dict = {"open-webui": {"enabled": "true", "persistence": {"enabled": "false"}}}
    count = 0
    for path, kind in scalars(FIELDS):
        count += 1
        value, text = SAMPLES[kind]
        real = merged(real, overlay([path], value))
        strings = merged(strings, overlay([path], text))
    assert count > 40
    lists = {
        "messaging": {
            "streams": [{"requestsURL": "nats://a", "responsesURL": "nats://b", "maxHandlers": 3}]
        },
        "resourceProfiles": {"mine": {"tolerations": [{"tolerationSeconds": 3}]}},
    }
    as_text = json.loads(json.dumps(lists).replace(": 3", ': "3"'))
    rendered = helm.render("k", values=merged(strings, as_text))
    assert rendered == helm.render("k", values=merged(real, lists))
    assert one(rendered, "HorizontalPodAutoscaler")["spec"]["minReplicas"] == 7


def test_false_may_be_a_string(helm):
    switches = [path for path, kind in scalars(FIELDS) if kind == "boolean"]
    switches.append(("open-webui", "enabled"))
    switches = [path for path in switches if path[0] != "secrets"]  # these need a name then
    rendered = helm.render("k", values=overlay(switches, "false"))
    assert rendered == helm.render("k", values=overlay(switches, False))


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("replicaCount=0", "replicaCount: 0 is less than 1"),
        ("service.port=70000", "service.port: 70000 is more than 65535"),
        ("replicaCount=two", "/replicaCount"),
        ("crds.keep=perhaps", "/crds/keep"),
    ],
)
def test_strings_of_no_such_value_are_refused_by_their_path(helm, option, words):
    assert words in helm("template", "k", str(CHART), *IMAGE, "--set-string", option, code=1)


def test_a_tag_may_look_like_a_number(helm):
    rendered = helm.render("k", "--set", "image.tag=20250101")
    (container,) = one(rendered, "Deployment")["spec"]["template"]["spec"]["containers"]
    assert container["image"] == f"{REPOSITORY}:20250101"


def test_a_models_numbers_and_booleans_may_be_strings(helm):
    (version,) = model_crd()["spec"]["versions"]
    fields = version["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]
    prefix = fields["loadBalancing"]["properties"]["prefixHash"]["properties"]
    scalar = lambda schema: schema["type"] in ("integer", "boolean")  # noqa: E731
    samples = {"integer": 200, "boolean": False}
    spec = {name: samples[s["type"]] for name, s in fields.items() if scalar(s)}
    hashed = {name: samples[s["type"]] for name, s in prefix.items() if scalar(s)}
    spec["loadBalancing"] = {"strategy": "PrefixHash", "prefixHash": hashed}
    assert "minReplicas" in spec
    given = json.loads(json.dumps(spec).replace("200", '"200"').replace("false", '"false"'))
    entry = {"opt-125m-cpu": {"enabled": "true"} | given}
    (found,) = helm.render("m", values={"catalog": entry}, chart=MODELS_CHART)
    assert {key: found["spec"][key] for key in spec} == spec
    for values in (
        {"all": {"enabled": "false"}},
        {"catalog": {"opt-125m-cpu": {"enabled": "false"}}},
    ):
        assert helm.render("m", values=values, chart=MODELS_CHART) == []


# -- a parent chart --------------------------------------------------------------------------------


def test_both_charts_can_be_conditional_dependencies(helm, tmp_path):
    parent = tmp_path / "parent"
    for name in ("kubeai", "models"):
        shutil.copytree(CHARTS / name, parent / "charts" / name)
    metadata = {"apiVersion": "v2", "name": "parent", "version": "1.0.0"}
    dependencies = [
        {"name": name, "version": ">=0", "condition": f"{name}.enabled"}
        for name in ("kubeai", "models")
    ]
    (parent / "Chart.yaml").write_text(yaml.safe_dump(metadata | {"dependencies": dependencies}))
    values = {
        "global": {"imageRegistry": "registry.example.com"},
        "kubeai": {"enabled": True, "image": {"repository": REPOSITORY}},
        "models": {"enabled": True, "catalog": {"opt-125m-cpu": {"enabled": True}}},
    }
    (parent / "values.yaml").write_text(yaml.safe_dump(values))
    kinds = {obj["kind"] for obj in helm.render("p", chart=parent)}
    assert {"Deployment", "Model"} <= kinds
    off = {"kubeai": {"enabled": False}, "models": {"enabled": False}}
    assert helm.render("p", values=off, chart=parent) == []


# -- the system config -----------------------------------------------------------------------------


def test_a_cache_profile_that_is_incomplete_does_not_keep_the_chart_from_rendering(helm):
    profiles = {
        "none": {},
        "default": {"sharedFilesystem": {"storageClassName": ""}},
        "empty": {"sharedFilesystem": {}},
    }
    rendered = helm.render("k", values={"cacheProfiles": profiles})
    assert yaml.safe_load(config_of(rendered))["cacheProfiles"] == profiles
    misspelt = {"cacheProfiles": {"c": {"sharedFilesystem": {"storageClas": "a"}}}}
    assert "/cacheProfiles/c" in helm("template", "k", str(CHART), *IMAGE, values=misspelt, code=1)


def test_an_engine_without_images_has_the_default_ones(helm):
    """`null` removes the chart's images."""
    rendered = helm.render("k", values={"modelServers": {"VLLM": {"images": None}}})
    assert parse_config(config_of(rendered)).model_servers.images("VLLM")["default"]


# -- the catalogue ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("qwen3-4b-cup.enabled=true", "qwen3-4b-cup; did you mean qwen3-4b-cpu?"),
        ("gemma-2-9b-it-l4.minReplicas=1", "gemma-2-9b-it-l4; did you mean gemma-2-9b-it-fp8-l4?"),
        ("qwen2.5-7b-cpu.enabled=true", "escape the dots of a name: 'catalog.qwen2\\.5-7b-cpu"),
        ("support.enabled=true", "an entry of your own needs url, engine and features"),
        ("support.url=hf://a/b", "catalog.support: missing engine, features"),
    ],
)
def test_an_entry_that_the_catalogue_lacks_is_reported_as_such(helm, option, words):
    said = helm("template", "m", str(MODELS_CHART), "--set", f"catalog.{option}", code=1)
    assert words in said
    assert "url=" in option or "unknown model in catalog: " in said


def test_an_unknown_entry_that_is_not_enabled_is_ignored(helm):
    values = {"catalog": {"of-another-catalogue": {"enabled": False}}}
    assert helm.render("m", values=values, chart=MODELS_CHART) == []
