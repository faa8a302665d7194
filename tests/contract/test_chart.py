"""The Helm charts: what they render and refuse."""

from __future__ import annotations

import inspect
import json
import re
from typing import Any

import pytest
from helms import (
    ALL_ON,
    CHART,
    CHARTS,
    IMAGE,
    MODELS_CHART,
    REPOSITORY,
    config_of,
    one,
)
from operators import chart_role, documented_role

from kubeai.api.config.system import parse_config
from kubeai.api.crd import model_crd
from kubeai.operator.adapters import Adapters
from kubeai.operator.apply import Applier
from kubeai.operator.cache.claims import Claims
from kubeai.operator.events import Events
from kubeai.operator.files import Files
from kubeai.operator.keys import KeyWatch
from kubeai.operator.leader import Leader
from kubeai.operator.operator import Operator
from kubeai.operator.refusals import Refusals
from kubeai.operator.scaling.scaler import Scaler
from kubeai.operator.services import Services
from kubeai.operator.sets import Sets
from kubeai.podspec import files
from kubeai.supervisor.console.actions import Actions
from kubeai.supervisor.console.app import Console
from kubeai.supervisor.pod_condition import PodCondition

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


def rights_of(role: dict[str, Any]) -> set[str]:
    """What a Role allows, such as "secrets list"."""
    return {
        f"{resource} {verb}"
        for rule in role["rules"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


# -- what it renders -------------------------------------------------------------------------------


@pytest.mark.parametrize("values", ["", *(f.name for f in sorted(CHART.glob("values-*.yaml")))])
def test_charts_lint_and_render_one_config(helm, values):
    options = ["--values", str(CHART / values)] if values else []
    helm("lint", str(CHART), "--strict", *IMAGE, *options)
    config = parse_config(config_of(helm.render("kubeai", *options)))
    assert config.model_loading.image.startswith(f"{REPOSITORY}:")
    assert {"cpu", "nvidia-gpu-l4", "amd-gpu-mi300x"} <= config.resource_profiles.keys()
    assert all(profile.image_name for profile in config.resource_profiles.values())


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"replicaCount": 0}, "/replicaCount"),
        ({"resourceProfilez": {}}, "resourceProfilez"),
        ({"modelAutoscaling": {"interval": 10}}, "/modelAutoscaling/interval"),
        ({"modelRollouts": {"surgee": 1}}, "surgee"),
        ({"gateway": {"bodyMaxBytes": "much"}}, "/gateway/bodyMaxBytes"),
        ({"service": {"type": "Elsewhere"}}, "/service/type"),
        ({"image": {"pullPolicy": "Sometimes"}}, "/image/pullPolicy"),
        ({"secrets": {"aws": {"create": False}}}, "secrets.aws.name must be set"),
        ({"resourceProfiles": {"cpu": {"requests": {"cpu": "one"}}}}, "/resourceProfiles/cpu/"),
    ],
)
def test_invalid_values_are_rejected_with_their_path(helm, values, words):
    assert words in helm("template", "kubeai", str(CHART), *IMAGE, values=values, code=1)


def test_names_follow_the_release_where_they_are_not_given(helm):
    values = {"fullnameOverride": ""}
    rendered = helm.render("prod", values=values)
    assert one(rendered, "Deployment")["metadata"]["name"] == "prod-kubeai"
    assert "stateConfigMapName: prod-kubeai-autoscaler-state" in config_of(rendered)
    assert (
        one(helm.render("my-kubeai", values=values), "Service")["metadata"]["name"] == "my-kubeai"
    )
    rendered = helm.render("prod", values=values | {"nameOverride": "llm"})
    assert one(rendered, "Deployment")["metadata"]["name"] == "prod-llm"
    assert one(helm.render("prod"), "Deployment")["metadata"]["name"] == "kubeai"


def test_secrets_are_rendered_only_with_values(helm):
    assert [obj for obj in helm.render("kubeai") if obj["kind"] == "Secret"] == []
    given = {"aws": {"accessKeyID": "id", "secretAccessKey": "key"}, "gcp": {"name": "mine"}}
    rendered = helm.render("kubeai", values={"secrets": given})
    secret = one(rendered, "Secret")
    assert secret["metadata"]["name"] == "kubeai-aws"
    assert secret["data"].keys() == {"accessKeyID", "secretAccessKey"}
    names = parse_config(config_of(rendered)).secret_names
    assert (names.aws, names.gcp, names.huggingface) == ("kubeai-aws", "mine", "kubeai-huggingface")


def test_the_operator_may_do_nothing_by_a_wildcard_and_nothing_outside_its_namespace(helm):
    rendered = helm.render("kubeai", values=ALL_ON)
    kinds = {obj["kind"] for obj in rendered}
    assert not {"ClusterRole", "ClusterRoleBinding"} & kinds
    rules = [rule for obj in rendered if obj["kind"] == "Role" for rule in obj["rules"]]
    assert not any("*" in words for rule in rules for words in rule.values())


# What each of the operator's rights is for: a function, and the call in it.
NEEDS = {
    "models get": (Applier._patch_model, "get(MODELS"),
    "models list": (Operator._follow_models, "follow(MODELS"),
    "models watch": (Operator._follow_models, "follow(MODELS"),
    "models patch": (Scaler._scale, "patch(MODELS"),
    "models/status patch": (Applier.patch_status, "patch(MODELS"),
    # For `blockOwnerDeletion`, where OwnerReferencesPermissionEnforcement runs.
    "models/finalizers update": (files.owner_reference, "blockOwnerDeletion"),
    "pods get": (Applier._is_ours, "get(kind"),
    "pods list": (Operator._follow_pods, "follow(PODS"),
    "pods watch": (Operator._follow_pods, "follow(PODS"),
    "pods create": (Applier._create, "create(kind"),
    "pods patch": (Applier._patch_pod, "patch(PODS"),
    "pods delete": (Applier.delete, "delete(kind"),
    "pods/exec get": (Adapters._exec_in, "exec("),
    "pods/exec create": (Adapters._exec_in, "exec("),
    "leaderworkersets get": (Applier._is_ours, "get(kind"),
    "leaderworkersets list": (Sets._follow, "follow(SETS"),
    "leaderworkersets watch": (Sets._follow, "follow(SETS"),
    "leaderworkersets create": (Applier._create, "create(kind"),
    "leaderworkersets patch": (Applier._patch_set, "patch(SETS"),
    "leaderworkersets delete": (Applier.delete, "delete(kind"),
    "services list": (Services.run, "follow(SERVICES"),
    "services watch": (Services.run, "follow(SERVICES"),
    "services create": (Services._write, "create(SERVICES"),
    "services patch": (Services._write, "patch(SERVICES"),
    "services delete": (Services._delete, "delete_unchanged(self._kube,SERVICES"),
    "configmaps get": (Files._find, "get(CONFIGMAPS"),
    "configmaps list": (Files._list, "list_permitted(self._kube,CONFIGMAPS"),
    "configmaps create": (Files._write, "create(CONFIGMAPS"),
    "configmaps patch": (Files._write, "patch(CONFIGMAPS"),
    "configmaps delete": (Files.remove, "delete_unchanged(self._kube,CONFIGMAPS"),
    "persistentvolumeclaims get": (Claims._create_claim, "get(PVCS"),
    "persistentvolumeclaims list": (Claims.run, "follow(PVCS"),
    "persistentvolumeclaims watch": (Claims.run, "follow(PVCS"),
    "persistentvolumeclaims create": (Claims._create_claim, "create(PVCS"),
    "persistentvolumeclaims patch": (Claims._annotate, "patch(PVCS"),
    "jobs get": (Claims._create_job, "get(JOBS"),
    "jobs list": (Claims.run, "follow(JOBS"),
    "jobs watch": (Claims.run, "follow(JOBS"),
    "jobs create": (Claims._create_job, "create(JOBS"),
    "jobs delete": (Claims._delete_job, "delete_unchanged(self._kube,JOBS"),
    "leases get": (Leader._look, "get(LEASES"),
    "leases create": (Leader._write, "create(LEASES"),
    "leases update": (Leader._write, "update(LEASES"),
    "events list": (Refusals._read, "list(EVENTS"),
    "events create": (Events._send, "create(EVENTS"),
    "events patch": (Events._send, "patch(EVENTS"),
}


def test_each_operator_permission_is_used_and_documented():
    """That they are enough the other contract tests show: on the real API they run with them."""
    rights = {
        f"{resource} {verb}"
        for rule in chart_role()
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    assert rights == NEEDS.keys()
    for right, (function, call) in NEEDS.items():
        source = re.sub(r"\s", "", inspect.getsource(function))
        assert call in source, right
    by_resource = lambda rules: sorted(rules, key=lambda rule: rule["resources"])  # noqa: E731
    assert by_resource(chart_role()) == by_resource(documented_role())


# What the console's rights are for.
CONSOLE_NEEDS = {
    "models create": (Actions.apply, "apply(MODELS"),
    "models delete": (Actions.delete, "delete(MODELS"),
    "models/scale patch": (Actions.scale, 'subresource="scale"'),
    "pods/log get": (Console._copy_log, "log("),
}


def test_the_console_is_off_by_default_and_gets_only_the_rights_that_it_uses(helm):
    def of_console(rendered):
        return [obj for obj in rendered if obj["metadata"]["name"] == "kubeai-console"]

    assert not of_console(helm.render("kubeai"))
    assert not parse_config(config_of(helm.render("kubeai"))).gateway.ui.enabled
    rendered = helm.render("kubeai", values={"gateway": {"ui": {"enabled": True}}})
    assert parse_config(config_of(rendered)).gateway.ui.enabled
    role, binding = of_console(rendered)
    assert (role["kind"], binding["kind"]) == ("Role", "RoleBinding")
    rights = rights_of(role)
    assert rights == CONSOLE_NEEDS.keys()
    for right, (function, call) in CONSOLE_NEEDS.items():
        source = re.sub(r"\s", "", inspect.getsource(function))
        assert call in source, right
    documented = (CHARTS.parent / "docs/explain/console.md").read_text()
    for resource in ("models", "models/scale", "pods/log"):
        assert f"| `{resource}`" in documented


# What the right to read Secrets is for. `Kube.follow` lists and watches.
KEYS_NEED = {
    "secrets list": (KeyWatch.run, "follow(SECRETS"),
    "secrets watch": (KeyWatch.run, "follow(SECRETS"),
}


@pytest.mark.parametrize("value", [True, "true"])
def test_secrets_may_be_read_only_if_keys_are_required(helm, value):
    def of_keys(rendered):
        return [obj for obj in rendered if obj["metadata"]["name"] == "kubeai-keys"]

    for values in ({}, {"gateway": {"keys": {"required": "false"}}}):
        rendered = helm.render("kubeai", values=values)
        assert not of_keys(rendered)
        assert not parse_config(config_of(rendered)).gateway.keys.required
    rendered = helm.render("kubeai", values={"gateway": {"keys": {"required": value}}})
    assert parse_config(config_of(rendered)).gateway.keys.required
    role, binding = of_keys(rendered)
    assert (role["kind"], binding["kind"]) == ("Role", "RoleBinding")
    rights = rights_of(role)
    assert rights == KEYS_NEED.keys()
    for right, (function, call) in KEYS_NEED.items():
        assert call in re.sub(r"\s", "", inspect.getsource(function)), right


def test_message_streams_and_the_credentials_of_their_brokers_reach_kubeai(helm):
    streams = [{"requestsURL": "kafka://group?topic=a", "responsesURL": "kafka://b"}]
    secret = [{"secretRef": {"name": "message-broker"}}]
    values = {"messaging": {"errorMaxBackoff": "1m", "streams": streams}, "envFrom": secret}
    rendered = helm.render("kubeai", values=values)
    messaging = parse_config(config_of(rendered)).messaging
    assert messaging.error_max_backoff_s == 60
    assert [each.requests_url for each in messaging.streams] == ["kafka://group?topic=a"]
    (container,) = one(rendered, "Deployment")["spec"]["template"]["spec"]["containers"]
    assert container["envFrom"] == secret


def test_the_pods_condition_may_be_written_only_if_there_are_message_streams(helm):
    def of_messaging(rendered):
        return [obj for obj in rendered if obj["metadata"]["name"] == "kubeai-messaging"]

    assert not of_messaging(helm.render("kubeai"))
    streams = [{"requestsURL": "nats://a", "responsesURL": "nats://b"}]
    role, binding = of_messaging(helm.render("kubeai", values={"messaging": {"streams": streams}}))
    assert (role["kind"], binding["kind"]) == ("Role", "RoleBinding")
    assert role["rules"] == [{"apiGroups": [""], "resources": ["pods/status"], "verbs": ["patch"]}]
    source = re.sub(r"\s", "", inspect.getsource(PodCondition._write))
    assert "patch(PODS" in source
    assert 'subresource="status"' in source


def test_dashboard_and_alerts_use_existing_metrics(helm):
    """KubeAI's by its docs; vLLM's are its own."""
    metrics = {
        "grafanaDashboard": {"enabled": True},
        "prometheusOperator": {"prometheusRule": {"enabled": True}},
    }
    rendered = helm.render("kubeai", values={"metrics": metrics})
    (found,) = [obj for obj in rendered if "kubeai.json" in obj.get("data", {})]
    assert found["metadata"]["labels"]["grafana_dashboard"] == "1"
    panels = json.loads(found["data"]["kubeai.json"])["panels"]
    shown = {
        name
        for panel in panels
        for target in panel.get("targets", ())
        for name in re.findall(r"kubeai_\w+", target["expr"])
    }
    (group,) = one(rendered, "PrometheusRule")["spec"]["groups"]
    for rule in group["rules"]:
        assert "{{" not in rule["expr"]
        shown |= set(re.findall(r"kubeai_\w+", rule["expr"]))
    assert "{{ $labels.stream }}" in group["rules"][0]["annotations"]["summary"]
    told = re.findall(r"`(kubeai_\w+)`", (CHARTS.parent / "docs/reference/metrics.md").read_text())
    of_histograms = {f"{name}_{part}" for name in told for part in ("bucket", "sum", "count")}
    assert shown
    assert shown <= {*told, *of_histograms}


def test_open_webui_is_optional_and_accepts_upstream_values(helm):
    assert not [obj for obj in helm.render("k") if obj["metadata"]["name"] == "open-webui"]
    values = {
        "enabled": True,
        "ollama": {"enabled": False},
        "pipelines": {"enabled": False},
        "openaiBaseApiUrl": "http://kubeai/openai/v1",
        "extraEnvVars": [{"name": "WEBUI_AUTH", "value": "False"}],
        "containerSecurityContext": {"capabilities": {"drop": ["ALL"]}},
        "persistence": {"enabled": True, "size": "1Gi"},
    }
    rendered = helm.render("k", values={"open-webui": values})
    found = {o["kind"]: o for o in rendered if o["metadata"]["name"] == "open-webui"}
    assert found.keys() == {"Service", "Deployment", "PersistentVolumeClaim"}
    (container,) = found["Deployment"]["spec"]["template"]["spec"]["containers"]
    env = {variable["name"]: variable["value"] for variable in container["env"]}
    assert env["OPENAI_API_BASE_URL"] == "http://kubeai/openai/v1"
    assert env["WEBUI_AUTH"] == "False"


# -- the catalogue ---------------------------------------------------------------------------------


def test_catalogue_lints_and_is_disabled_by_default(helm):
    helm("lint", str(MODELS_CHART), "--strict")
    assert helm.render("models", chart=MODELS_CHART) == []


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"qwen3-4b-cpu": {"minReplica": 1}}, "/catalog/qwen3-4b-cpu"),
        ({"n" * 41: {"url": "hf://a/b", "engine": "VLLM", "features": []}}, "at most 40 charac"),
        ({"mine": {"url": "hf://a/b", "engine": "vllm", "features": []}}, "/catalog/mine/engine"),
    ],
)
def test_invalid_catalogue_entry_is_rejected_with_its_path(helm, entry, words):
    assert words in helm("template", "m", str(MODELS_CHART), values={"catalog": entry}, code=1)


def test_an_entry_may_have_every_field_of_a_model(helm):
    """0 and false are values; null takes away what the catalogue has."""
    spec = {
        "url": "s3://b/m",
        "engine": "VLLM",
        "features": ["TextGeneration"],
        "adapters": [{"name": "a", "url": "hf://o/a"}],
        "owner": "o",
        "image": "i:1",
        "resourceProfile": "cpu:1",
        "cacheProfile": "c",
        "args": ["--a"],
        "env": {"A": "b"},
        "envFrom": [{"secretRef": {"name": "s"}}],
        "replicas": 0,
        "minReplicas": 0,
        "maxReplicas": 2,
        "autoscalingDisabled": False,
        "targetRequests": 5,
        "scaleDownDelaySeconds": 0,
        "priorityClassName": "p",
        "loadBalancing": {"strategy": "PrefixHash", "prefixHash": {"replication": 256}},
        "files": [{"path": "/a", "content": "b"}],
        "jsonPatches": [{"op": "add", "path": "/spec/hostIPC", "value": False}],
        "aliases": ["meta-llama/Llama-3.1-8B", "qwen2.5:7b"],
        "fallbacks": ["small"],
        "waitBeforeFallback": "0s",
        "canary": {"model": "o", "percent": 0},
    }
    assert spec.keys() == set(model_crd_spec())
    mine = {"enabled": True, "labels": {"l": "1"}, "annotations": {"a": "1"}, **spec}
    values = {"catalog": {"mine": mine, "opt-125m-l4": {"enabled": True, "args": None}}}
    mine, known = helm.render("m", values=values, chart=MODELS_CHART)
    assert mine["spec"] == spec
    assert mine["metadata"] == {"name": "mine", "labels": {"l": "1"}, "annotations": {"a": "1"}}
    assert known["spec"]["minReplicas"] == 0
    assert "args" not in known["spec"]


def model_crd_spec() -> dict:
    (version,) = model_crd()["spec"]["versions"]
    return version["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]
