"""Generate what Helm needs besides the values files of the charts kubeai and open-webui.

    python charts/values_schema.py > charts/kubeai/values.schema.json
    python charts/values_schema.py fields > charts/kubeai/files/fields.json

    cd charts/kubeai/charts/open-webui
    python ../../../values_schema.py fields open-webui > files/fields.json

The schema is what Helm validates values against. Types of the system config come from
`kubeai.api.config.system`; the others are defined here. Numbers and booleans may be given as
strings, as `--set-string` and many values files do.

The fields are for the template `kubeai.prepare`: each value's type, to convert such strings, and
its default, for values that have no such key (`helm upgrade --reuse-values`).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

from kubeai.api.config.schema import config_schema
from kubeai.api.config.system import SystemConfig

CHART = Path(__file__).parent / "kubeai"
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
    "proxy",
)
Schema = dict[str, Any]
STRING: Schema = {"type": "string"}
FLAG: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 1}
ANY_MAP: Schema = {"type": "object"}  # a Kubernetes object, which the API server validates
ANY_LIST: Schema = {"type": "array", "items": {"type": "object"}}
STRINGS: Schema = {"type": "array", "items": {"type": "string"}}
STRING_MAP: Schema = {"type": "object", "additionalProperties": {"type": "string"}}
NAME: Schema = {"type": "string", "pattern": "^([a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?)?$"}
PORT: Schema = {"type": "integer", "minimum": 1, "maximum": 65535}
# `--set image.tag=20250101` makes a number of a tag.
TAG: Schema = {"type": ["string", "integer"]}


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


def image(**more: Schema) -> Schema:
    return section(
        repository=STRING,
        pullPolicy={"enum": ["Always", "IfNotPresent", "Never"]},
        tag=TAG,
        **more,
    )


def open_webui() -> Schema:
    """Of Open WebUI's own chart, whose other values `--reuse-values` brings along."""
    absent = section(enabled={"const": False})
    return _open(
        section(
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
    )


def _open(schema: Schema) -> Schema:
    """The same with unknown keys allowed, in all sections."""
    opened = schema | {
        "properties": {
            name: _open(child) if "properties" in child else child
            for name, child in schema["properties"].items()
        }
    }
    del opened["additionalProperties"]
    return opened


def secrets() -> Schema:
    return section(
        alibaba=secret("accessKeyID", "accessKeySecret"),
        aws=secret("accessKeyID", "secretAccessKey"),
        gcp=secret("jsonKeyfile"),
        huggingface=secret("token"),
        oci=section(name=STRING),
    )


def deployment() -> dict[str, Schema]:
    """The sections about KubeAI's Deployment and what belongs to its pods."""
    return {
        "replicaCount": COUNT,
        "workers": {"type": "integer", "minimum": 1, "maximum": 63},
        "image": image(digest={"type": "string", "pattern": "^(sha256:[0-9a-f]{64})?$"}),
        "imagePullSecrets": {
            "type": "array",
            "items": {**section(name=STRING), "required": ["name"]},
        },
        "nameOverride": NAME,
        "fullnameOverride": NAME,
        "command": STRINGS,
        "args": STRINGS,
        "env": ANY_LIST,
        "envFrom": ANY_LIST,
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
            maxUnavailable={"type": ["integer", "string"], "minimum": 0, "pattern": "^[0-9]+%?$"},
        ),
        "autoscaling": section(
            enabled=FLAG,
            minReplicas=COUNT,
            maxReplicas=COUNT,
            targetCPUUtilizationPercentage=COUNT,
        ),
    }


def network() -> dict[str, Schema]:
    """The sections about how requests reach KubeAI's pods."""
    return {
        "service": service(),
        "ingress": section(
            enabled=FLAG,
            className=STRING,
            annotations=STRING_MAP,
            rules=ANY_LIST,
            tls=ANY_LIST,
        ),
        "networkPolicy": section(
            enabled=FLAG, clients=ANY_LIST, gateways=ANY_LIST, monitoring=ANY_LIST
        ),
    }


def metrics() -> Schema:
    return section(
        prometheusOperator=section(
            vLLMPodMonitor=monitor(),
            sGLangPodMonitor=monitor(),
            llamaCppPodMonitor=monitor(),
            podMonitor=monitor(),
            prometheusRule=monitor(),
        ),
        grafanaDashboard=section(enabled=FLAG, labels=STRING_MAP, annotations=STRING_MAP),
    )


def own() -> dict[str, Schema]:
    """The sections that are not the system config's."""
    return {
        "global": ANY_MAP,
        "enabled": FLAG,  # of a dependency with `condition: kubeai.enabled`
        "crds": section(enabled=FLAG, keep=FLAG),
        "uninstall": section(deleteModels=FLAG, timeoutSeconds=COUNT),
        "secrets": secrets(),
        **deployment(),
        **network(),
        "metrics": metrics(),
        "open-webui": open_webui(),
    }


def config() -> dict[str, Schema]:
    """The sections of the system config.

    An incomplete cache profile is accepted: it is an error only of a Model that uses it.
    """
    sections = config_schema(SystemConfig)["properties"]
    sections["cacheProfiles"]["additionalProperties"].pop("required", None)
    for server in sections["modelServers"]["properties"].values():
        server.pop("required", None)  # without images it has the default ones
    return {name: sections[name] for name in SECTIONS}


def with_strings(schema: Schema) -> Schema:
    """The same schema, in which numbers and booleans may be strings."""
    if "const" in schema and isinstance(schema["const"], bool):
        return {"enum": [schema["const"], json.dumps(schema["const"])]}
    types = schema.get("type", [])
    types = [types] if isinstance(types, str) else types
    nullable = [None] if "null" in types else []
    if "boolean" in types:
        return {"enum": [True, False, "true", "false", *nullable]}
    if "string" not in types and {"integer", "number"} & set(types):
        pattern = "^-?[0-9]+$" if "integer" in types else r"^-?[0-9]+(\.[0-9]+)?$"
        return schema | {"type": [*types, "string"], "pattern": pattern}
    changed = dict(schema)
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            changed[key] = with_strings(schema[key])
    if "properties" in schema:
        changed["properties"] = {k: with_strings(v) for k, v in schema["properties"].items()}
    if "anyOf" in schema:
        changed["anyOf"] = [with_strings(one) for one in schema["anyOf"]]
    return changed


def values_schema() -> Schema:
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "The values of KubeAI's chart",
        "type": "object",
        "additionalProperties": False,
        "properties": {k: with_strings(v) for k, v in (own() | config()).items()},
    }


def fields(schemas: dict[str, Schema], values: dict[str, Any]) -> Schema:
    """By key: how a value is converted, and its default where ``values`` has one.

    A whole section that is missing is replaced by its default. In a section that is there, only
    scalars are: in a map or a list of Kubernetes', a key that a user removed stays removed.
    """
    found = {}
    for key, schema in schemas.items():
        field = _field(schema, values.get(key) if isinstance(values, dict) else None)
        if field:
            found[key] = field
    return found


def _field(schema: Schema, default: Any) -> Schema:
    if "anyOf" in schema:
        schema = schema["anyOf"][0]
    types = schema.get("type", "string")
    types = [types] if isinstance(types, str) else types
    if "properties" in schema:
        inner = fields(schema["properties"], default)
        field = {"fields": inner} if inner else {}
        return field | ({"default": default} if default else {})
    for key, name in (("items", "items"), ("additionalProperties", "values")):
        if isinstance(schema.get(key), dict):
            item = _field(schema[key], None)
            return {name: item} if item else {}
    scalar = next((t for t in ("boolean", "integer", "number") if t in types), None)
    if scalar == "integer" and "string" in types and "pattern" not in schema:
        scalar = "string"  # a tag
    default_only = (
        {} if default is None or isinstance(default, dict | list) else {"default": default}
    )
    if scalar is None or ("string" in types and scalar == "number"):  # a quantity
        return default_only
    limits = {k: schema[k] for k in ("minimum", "maximum") if k in schema}
    return {"type": scalar} | limits | default_only


def chart_fields(chart: str) -> Schema:
    if chart == "open-webui":
        values = yaml.safe_load((CHART / "charts/open-webui/values.yaml").read_text())
        return fields(open_webui()["properties"], values)
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    sections = own()
    del sections["open-webui"]
    # KubeAI itself has the defaults of the system config.
    return fields(sections, values) | fields(config(), {})


if __name__ == "__main__":
    printed = chart_fields(sys.argv[-1]) if sys.argv[1:2] == ["fields"] else values_schema()
    print(json.dumps(printed, indent=2, ensure_ascii=False))
