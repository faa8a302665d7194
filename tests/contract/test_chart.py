"""The Helm chart: what it renders, what it refuses, and a release from installation to its end."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import re
import secrets
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import yaml
from fakes.hub import Hub
from harness import model, until
from helms import (
    CHART,
    CHARTS,
    IMAGE,
    MODELS_CHART,
    REPOSITORY,
    Helm,
    config_of,
    delete_models_type,
    one,
)
from operators import chart_role, documented_role
from servers import ApiServer, install_models
from sites import DEPLOYMENTS, RELEASE, Site, hub_with_weights, release_cluster

from kubeai.api.config.system import SystemConfig, parse_config
from kubeai.api.crd import model_crd
from kubeai.api.model import decode_model
from kubeai.kube.resources import MODELS, PODS
from kubeai.operator.adapters import Adapters
from kubeai.operator.apply import Applier
from kubeai.operator.cache.claims import Claims
from kubeai.operator.events import Events
from kubeai.operator.files import Files
from kubeai.operator.keys import Keys
from kubeai.operator.leader import Leader
from kubeai.operator.operator import Operator
from kubeai.operator.refusals import Refusals
from kubeai.operator.scaling.scaler import Scaler
from kubeai.operator.services import Services
from kubeai.operator.sets import Sets
from kubeai.podspec import build_pod, files
from kubeai.podspec.cache import evict_job, load_job
from kubeai.supervisor.console.actions import Actions
from kubeai.supervisor.console.app import Console
from kubeai.supervisor.pod_condition import PodCondition

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]
CACHED = {"cacheProfiles": {"c": {"sharedFilesystem": {"storageClassName": "nfs"}}}}
# Kinds of others, which a bare API does not have.
FOREIGN = ("PodMonitor", "PrometheusRule")
ALL_ON = {
    "replicaCount": 3,
    "secrets": {
        "huggingface": {"token": "t"},
        "aws": {"create": False, "name": "mine"},
        "oci": {"name": "weights"},
    },
    "proxy": {"mode": "external"},
    "cacheProfiles": {"fast": {"sharedFilesystem": {"storageClassName": "nfs"}}},
    "podDisruptionBudget": {"maxUnavailable": "50%"},
    "autoscaling": {"enabled": True},
    "resources": {"requests": {"cpu": 1}},
    "ingress": {"enabled": True, "className": "nginx", "tls": [{"hosts": ["a.example"]}]},
    "networkPolicy": {
        "enabled": True,
        "clients": [{"namespaceSelector": {}}],
        "gateways": [{"podSelector": {"matchLabels": {"app": "envoy"}}}],
        "monitoring": [{"namespaceSelector": {"matchLabels": {"name": "monitoring"}}}],
    },
    "metrics": {
        "prometheusOperator": {
            "vLLMPodMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
            "sGLangPodMonitor": {"enabled": True},
            "llamaCppPodMonitor": {"enabled": True},
            "podMonitor": {"enabled": True},
            "prometheusRule": {"enabled": True, "labels": {"release": "prometheus"}},
        },
        "grafanaDashboard": {"enabled": True, "annotations": {"grafana_folder": "LLM"}},
    },
    "imagePullSecrets": [{"name": "pull"}],
    "podAnnotations": {"a": "b"},
    "podLabels": {"team": "inference"},
    "serviceAccount": {"annotations": {"eks.amazonaws.com/role-arn": "arn:aws:iam::1:role/r"}},
    "service": {"type": "NodePort", "nodePort": 30080, "annotations": {"a": "b"}},
    "nodeSelector": {"kubernetes.io/arch": "amd64"},
    "tolerations": [{"operator": "Exists"}],
    "affinity": {"nodeAffinity": {}},
    "env": [{"name": "A", "value": "b"}],
    "envFrom": [{"secretRef": {"name": "message-broker"}}],
    "volumes": [{"name": "v", "emptyDir": {}}],
    "volumeMounts": [{"name": "v", "mountPath": "/v"}],
    "gateway": {"holdTimeout": "5m", "bodyMaxBytes": "128Mi"},
    "leaderElection": {"leaseDuration": "20s"},
    "messaging": {"streams": [{"requestsURL": "nats://a?queue=k", "responsesURL": "nats://b"}]},
    "uninstall": {"deleteModels": True},
    "modelServerPods": {"jsonPatches": [{"op": "add", "path": "/spec/hostNetwork", "value": True}]},
}


def rights_of(role: dict[str, Any]) -> set[str]:
    """What a Role allows, such as "secrets list"."""
    return {
        f"{resource} {verb}"
        for rule in role["rules"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


@pytest.fixture
def helm(tmp_path) -> Helm:
    return Helm(tmp_path)


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
    documented = (CHARTS.parent / "docs/how-to/console.md").read_text()
    for resource in ("models", "models/scale", "pods/log"):
        assert f"| `{resource}`" in documented


# What the right to read Secrets is for. `Kube.follow` lists and watches.
KEYS_NEED = {
    "secrets list": (Keys.run, "follow(SECRETS"),
    "secrets watch": (Keys.run, "follow(SECRETS"),
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


# -- the API takes it ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def api(tmp_path_factory) -> Iterator[ApiServer]:
    accounts = ("kubeai", "kubeai-uninstall")
    with release_cluster(tmp_path_factory.mktemp("cluster"), accounts=accounts) as server:
        yield server


@pytest.fixture
def namespace(api) -> str:
    """One in which pods that are not "restricted" are refused."""
    name = f"test-{secrets.token_hex(4)}"
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    meta = {"name": name, "labels": labels}
    code, answer = api.request("POST", "/api/v1/namespaces", {"metadata": meta})
    assert code == 201, answer
    return name


@pytest.mark.parametrize("values", [{}, ALL_ON], ids=["default", "all-on"])
def test_the_api_accepts_every_manifest_and_its_pods_are_restricted(helm, api, namespace, values):
    rendered = helm.render("kubeai", "--namespace", namespace, values=values)
    for obj in rendered:
        if obj["kind"] in FOREIGN:
            continue
        code, answer = _try(api, namespace, obj)
        assert code == 201, (obj["kind"], answer)
        template = obj.get("spec", {}).get("template")
        if template and obj["kind"] in ("Deployment", "Job"):
            pod = {"apiVersion": "v1", "kind": "Pod", **template}
            pod["metadata"] = pod["metadata"] | {"name": "p"}
            code, answer = _try(api, namespace, pod)
            assert code == 201, answer
    assert set(FOREIGN) <= {obj["kind"] for obj in rendered} or not values


def test_the_api_accepts_every_model_of_the_catalogue(helm, api, namespace):
    rendered = helm.render("m", "--set", "all.enabled=true", chart=MODELS_CHART)
    assert len(rendered) >= 48
    with models_installed(api):
        for obj in rendered:
            code, answer = _try(api, namespace, obj)
            assert code == 201, answer


@contextlib.contextmanager
def models_installed(api: ApiServer):
    install_models(api)
    try:
        yield
    finally:
        delete_models_type(api)


WARNED = {
    "VLLM": ("hf://o/m", {}),
    "VLLM with adapters": ("hf://o/m", {"adapters": [{"name": "a", "url": "hf://o/a"}]}),
    "OLlama": ("ollama://m", {}),
    "FasterWhisper": ("hf://o/m", {}),
    "Infinity": ("hf://o/m", {}),
    "SGLang": ("hf://o/m", {}),
    "LlamaCpp": ("hf://o/m", {}),
}


def test_docs_list_pod_security_violations_of_engines(helm, api, namespace):
    """By the chart's default values; `modelServerPods` is there to change it."""
    config = parse_config(config_of(helm.render("kubeai", values=CACHED)))
    rows = [
        f"| {name} | {', '.join(_violations(api, namespace, pod))} |"
        for name, pod in _pods_of(config).items()
    ]
    text = (CHARTS.parent / "docs/reference/helm.md").read_text()
    assert [line for line in text.splitlines() if line in rows] == rows, "\n".join(rows)
    section = text[text.index("\n## Pod Security\n") :]
    restricted = yaml.safe_load(section.split("```yaml\n")[1].split("```")[0])
    config = parse_config(config_of(helm.render("kubeai", values=CACHED | restricted)))
    for pod in _pods_of(config).values():
        assert _violations(api, namespace, pod) == []


def _pods_of(config: SystemConfig) -> dict[str, dict]:
    pods = {
        name: build_pod(_decoded(name.partition(" ")[0], url, **spec), config)
        for name, (url, spec) in WARNED.items()
    }
    for name, job in (("a cache's load", load_job), ("a cache's eviction", evict_job)):
        cached = _decoded("VLLM", "hf://o/m", cacheProfile="c")
        pods[name] = job(cached, config)["spec"]["template"]
    return pods


def _decoded(engine: str, url: str, **spec: Any):
    spec = {"url": url, "engine": engine, "features": [], **spec}
    return decode_model({"metadata": {"name": "m", "namespace": "n", "uid": "u"}, "spec": spec})


def _violations(api: ApiServer, namespace: str, pod: dict) -> list[str]:
    """Of "restricted", in the API's words, less the containers' names."""
    meta = {"generateName": "p-", "labels": pod["metadata"].get("labels", {})}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": pod["spec"]}
    code, answer = api.request("POST", f"/api/v1/namespaces/{namespace}/pods?dryRun=All", pod)
    if code == 201:
        return []
    _, _, words = answer["message"].partition('restricted:latest": ')
    return [part.partition(" (")[0] for part in re.split(r"(?<=\)), ", words)]


def _try(api: ApiServer, namespace: str, obj: dict) -> tuple[int, dict]:
    """What the API would say to it, unknown fields and fields given twice being errors."""
    version, kind = obj["apiVersion"], obj["kind"]
    plural = {"Ingress": "ingresses", "NetworkPolicy": "networkpolicies"}.get(
        kind, f"{kind.lower()}s"
    )
    base = f"/apis/{version}" if "/" in version else f"/api/{version}"
    inside = "" if kind == "CustomResourceDefinition" else f"/namespaces/{namespace}"
    path = f"{base}{inside}/{plural}?dryRun=All&fieldValidation=Strict"
    return api.request("POST", path, obj)


# -- a release -------------------------------------------------------------------------------------


@pytest.fixture
async def site(api, tmp_path) -> AsyncIterator[Site]:
    """Of one test after the other: the accounts' tokens are for this namespace."""
    code, answer = api.request("POST", "/api/v1/namespaces", {"metadata": {"name": RELEASE}})
    assert code in (201, 409), answer
    site = Site(api, RELEASE, tmp_path)
    await site.start()
    yield site
    delete_models_type(api)
    await site.close()


@pytest.fixture
async def hub() -> AsyncIterator[Hub]:
    async with hub_with_weights() as hub:
        yield hub


async def test_release_installs_serves_upgrades_and_uninstalls_cleanly(site, hub):
    """With Models that run, one of them from a cache that the chart's own loader has filled.

    By `uninstall.deleteModels`; only the Model type stays.
    """
    before = site.objects()
    site.make_volume()
    await site.install("--set", "uninstall.deleteModels=true")
    await site.kube.create(MODELS, model("m", scaleDownDelaySeconds=300))
    from_hub = {"cacheProfile": "shared", "env": {"HF_ENDPOINT": hub.url}}
    await site.kube.create(MODELS, model("cached", scaleDownDelaySeconds=300, **from_hub))
    for name in ("m", "cached"):
        assert await site.ask(name)
        await until(f"{name}'s status says so", lambda name=name: _is_settled(site, name))
    (loaded,) = site.folder.rglob("model.bin")  # a kubelet of processes has claims of its own
    assert loaded.read_bytes() == b"w" * 9
    engines = await _engines(site)
    second = {"podAnnotations": {"release": "second"}, "replicaCount": 2}
    await site.install("--set", "uninstall.deleteModels=true", values=second)
    deployment = await site.kube.get(DEPLOYMENTS, "kubeai")
    assert deployment["status"]["readyReplicas"] == 2
    assert await site.ask("m")
    assert await _engines(site) == engines, "an upgrade of KubeAI touches no engine"
    await asyncio.to_thread(site.helm, "uninstall", "kubeai", "--wait")
    gone = lambda: site.objects() == before  # noqa: E731
    await until("nothing is left", gone, 60)
    code, _ = site.api.request("GET", "/apis/kubeai.org/v1/models")
    assert code == 200, "other namespaces may have Models"
    assert not loaded.exists()


async def test_installing_both_charts_serves_a_model(site):
    """As docs/reference/helm.md says; the mock engine answers, the GPU is kwok's."""
    with site.gpu_node():
        before = site.objects()
        await site.install("--values", str(CHART / "values-nvidia-k8s-device-plugin.yaml"))
        on_gpu, on_cpu = "qwen3-8b-fp8-l4", "opt-125m-cpu"
        await asyncio.to_thread(
            site.helm,
            *("install", "models", str(MODELS_CHART)),
            *("--set", f"catalog.{on_gpu}.enabled=true"),
            *("--set", f"catalog.{on_gpu}.minReplicas=1"),
            *("--set", f"catalog.{on_cpu}.enabled=true"),
            *("--set", f"catalog.{on_cpu}.image=kubeai/mock-engine"),
        )
        assert await site.ask(on_cpu)
        await until("the GPU's Model is ready", lambda: _is_settled(site, on_gpu), 60)
        (pod,), _ = await site.kube.list(PODS, site.namespace, labels=f"model={on_gpu}")
        assert pod["spec"]["nodeName"] == "gpu"
        await asyncio.to_thread(site.helm, "uninstall", "models", "--wait")
        await asyncio.to_thread(site.helm, "uninstall", "kubeai", "--wait")
        await until("nothing is left", lambda: site.objects() == before, 60)


async def _is_settled(site: Site, name: str) -> bool:
    found = await site.kube.get(MODELS, name)
    return found.get("status", {}).get("replicas") == {"all": 1, "ready": 1}


async def _engines(site: Site) -> list[str]:
    found, _ = await site.kube.list(PODS, site.namespace, labels="model=m")
    return sorted(pod["metadata"]["uid"] for pod in found)
