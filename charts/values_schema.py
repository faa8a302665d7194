"""Prints values.schema.json of the chart kubeai: what the system config's types do not say is here.

python charts/values_schema.py > charts/kubeai/values.schema.json
"""

from __future__ import annotations

import json
from typing import Any

from kubeai.api.config import SystemConfig
from kubeai.api.schema import config_schema

SECTIONS = (
    "resourceProfiles",
    "cacheProfiles",
    "modelServers",
    "modelLoading",
    "modelServerPods",
    "modelRollouts",
    "modelAutoscaling",
    "messaging",
    "leaderElection",
    "gateway",
)
Schema = dict[str, Any]
STRING: Schema = {"type": "string"}
FLAG: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 1}
ANY_MAP: Schema = {"type": "object"}  # an object of Kubernetes', which its API knows better
ANY_LIST: Schema = {"type": "array", "items": {"type": "object"}}
STRINGS: Schema = {"type": "array", "items": {"type": "string"}}
STRING_MAP: Schema = {"type": "object", "additionalProperties": {"type": "string"}}
NAME: Schema = {"type": "string", "pattern": "^([a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?)?$"}
PORT: Schema = {"type": "integer", "minimum": 1, "maximum": 65535}


def section(**properties: Schema) -> Schema:
    return {"type": "object", "additionalProperties": False, "properties": properties}


def secret(*keys: str) -> Schema:
    return section(create=FLAG, name=STRING, **dict.fromkeys(keys, STRING))


def account() -> Schema:
    return section(create=FLAG, automount=FLAG, annotations=STRING_MAP, name=STRING)


def monitor() -> Schema:
    return section(enabled=FLAG, apiVersion=STRING, labels=STRING_MAP)


def service() -> Schema:
    return section(
        type={"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
        port=PORT,
        nodePort={"anyOf": [PORT, {"const": ""}]},
        annotations=STRING_MAP,
    )


def image() -> Schema:
    return section(
        repository={"type": "string", "minLength": 1},
        pullPolicy={"enum": ["Always", "IfNotPresent", "Never"]},
        tag=STRING,
    )


def open_webui() -> Schema:
    absent = section(enabled={"const": False})
    return section(
        enabled=FLAG,
        **{"global": ANY_MAP},
        image=image(),
        openaiBaseApiUrl={"type": "string", "minLength": 1},
        extraEnvVars=ANY_LIST,
        persistence=section(enabled=FLAG, size=STRING, storageClass=STRING),
        service=service(),
        podAnnotations=STRING_MAP,
        podSecurityContext=ANY_MAP,
        containerSecurityContext=ANY_MAP,
        resources=ANY_MAP,
        nodeSelector=STRING_MAP,
        tolerations=ANY_LIST,
        affinity=ANY_MAP,
        ollama=absent,
        pipelines=absent,
    )


def values_schema() -> Schema:
    config = config_schema(SystemConfig)["properties"]
    own = {
        "global": ANY_MAP,
        "crds": section(enabled=FLAG, keep=FLAG),
        "secrets": section(
            alibaba=secret("accessKeyID", "accessKeySecret"),
            aws=secret("accessKeyID", "secretAccessKey"),
            gcp=secret("jsonKeyfile"),
            huggingface=secret("token"),
        ),
        "replicaCount": COUNT,
        "workers": {"type": "integer", "minimum": 1, "maximum": 63},
        "image": image(),
        "imagePullSecrets": {
            "type": "array",
            "items": {**section(name=STRING), "required": ["name"]},
        },
        "nameOverride": NAME,
        "fullnameOverride": NAME,
        "command": STRINGS,
        "args": STRINGS,
        "env": ANY_LIST,
        "volumes": ANY_LIST,
        "volumeMounts": ANY_LIST,
        "serviceAccount": account(),
        "modelServiceAccount": account(),
        "podAnnotations": STRING_MAP,
        "podLabels": STRING_MAP,
        "podSecurityContext": ANY_MAP,
        "securityContext": ANY_MAP,
        "terminationGracePeriodSeconds": {"type": "integer", "minimum": 0},
        "startupProbe": ANY_MAP,
        "livenessProbe": ANY_MAP,
        "readinessProbe": ANY_MAP,
        "resources": ANY_MAP,
        "nodeSelector": STRING_MAP,
        "tolerations": ANY_LIST,
        "affinity": ANY_MAP,
        "topologySpreadConstraints": ANY_LIST,
        "podDisruptionBudget": section(
            enabled=FLAG,
            maxUnavailable={
                "anyOf": [
                    {"type": "integer", "minimum": 0},
                    {"type": "string", "pattern": "^[0-9]+%$"},
                ]
            },
        ),
        "autoscaling": section(
            enabled=FLAG,
            minReplicas=COUNT,
            maxReplicas=COUNT,
            targetCPUUtilizationPercentage=COUNT,
        ),
        "service": service(),
        "ingress": section(
            enabled=FLAG,
            className=STRING,
            annotations=STRING_MAP,
            rules=ANY_LIST,
            tls=ANY_LIST,
        ),
        "networkPolicy": section(enabled=FLAG, clients=ANY_LIST, monitoring=ANY_LIST),
        "metrics": section(
            prometheusOperator=section(vLLMPodMonitor=monitor(), podMonitor=monitor()),
            grafanaDashboard=section(enabled=FLAG, labels=STRING_MAP, annotations=STRING_MAP),
        ),
        "open-webui": open_webui(),
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "The values of KubeAI's chart",
        "type": "object",
        "additionalProperties": False,
        "properties": own | {name: config[name] for name in SECTIONS},
    }


if __name__ == "__main__":
    print(json.dumps(values_schema(), indent=2, ensure_ascii=False))
