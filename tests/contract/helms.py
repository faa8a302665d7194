"""Helm as a process, and the charts that it renders."""

from __future__ import annotations

import secrets
import subprocess
from pathlib import Path

import pytest
import yaml
from repository import REPOSITORY
from servers import ApiServer, assets, wait_until

CHARTS = REPOSITORY / "charts"
CHART = CHARTS / "kubeai"
MODELS_CHART = CHARTS / "models"
HELM_TIMEOUT_S = 150
REPOSITORY = "registry.example.com/kubeai"
IMAGE = ("--set", f"image.repository={REPOSITORY}")  # has no default
# Values of the chart kubeai that render all that it has.
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


class Helm:
    """The program, with one API and namespace if it needs them."""

    def __init__(self, folder: Path, kubeconfig: str = "", namespace: str = "kubeai") -> None:
        binaries = assets("helm")
        if binaries is None:
            pytest.skip("KUBEBUILDER_ASSETS holds no helm")
        self._program, self._folder = str(binaries / "helm"), folder
        self._environment = {"HOME": str(folder), "KUBECONFIG": kubeconfig, "PATH": "/usr/bin:/bin"}
        self.namespace = namespace

    def __call__(self, *arguments: str, values: dict | None = None, code: int = 0) -> str:
        options = ["--namespace", self.namespace]
        if values is not None:
            file = self._folder / f"{secrets.token_hex(4)}.yaml"
            file.write_text(yaml.safe_dump(values))
            options += ["--values", str(file)]
        done = subprocess.run(
            [self._program, *arguments, *options],
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=HELM_TIMEOUT_S,
        )
        print(done.stderr)
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr if code else done.stdout

    def render(
        self, release: str, *arguments: str, values: dict | None = None, chart: Path = CHART
    ) -> list[dict]:
        if chart == CHART:
            arguments = (*IMAGE, *arguments)
        text = self("template", release, str(chart), *arguments, values=values)
        return [one for one in yaml.safe_load_all(text) if one]


def one(rendered: list[dict], kind: str) -> dict:
    (found,) = [obj for obj in rendered if obj["kind"] == kind]
    return found


def config_of(rendered: list[dict]) -> str:
    found = [obj for obj in rendered if obj["kind"] == "ConfigMap" and "data" in obj]
    return found[0]["data"]["system.yaml"]


def delete_models_type(api: ApiServer) -> None:
    path = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/models.kubeai.org"
    api.request("DELETE", path)
    wait_until(lambda: api.request("GET", path)[0] == 404, "the definition is gone")
