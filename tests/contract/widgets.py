"""Widgets, a definition to test with, and collections, which tests reach objects through."""

from __future__ import annotations

import time
from typing import Any

from servers import ApiServer

MERGE = "application/merge-patch+json"
JSON_PATCH = "application/json-patch+json"
STRATEGIC = "application/strategic-merge-patch+json"
APPLY = "application/apply-patch+yaml"
TABLE = "application/json;as=Table;v=v1;g=meta.k8s.io,application/json"
TIMEOUT_S = 20.0

WIDGET_SPEC = {
    "type": "object",
    "required": ["size"],
    "properties": {
        "size": {"type": "integer", "minimum": 1, "maximum": 9},
        "color": {"type": "string", "enum": ["red", "blue"], "default": "red"},
        "nick": {"type": "string", "maxLength": 5, "pattern": "^[a-z]*$"},
        "replicas": {"type": "integer"},
        "limit": {"x-kubernetes-int-or-string": True},
        "note": {"type": "string", "nullable": True},
        "free": {"type": "object", "x-kubernetes-preserve-unknown-fields": True},
        "tags": {
            "type": "array",
            "maxItems": 3,
            "items": {"type": "string", "maxLength": 9},
            "x-kubernetes-list-type": "set",
        },
        "frozen": {
            "type": "string",
            "maxLength": 20,
            "x-kubernetes-validations": [
                {"rule": "self == oldSelf", "message": "frozen is immutable"}
            ],
        },
        "parts": {
            "type": "array",
            "maxItems": 5,
            "x-kubernetes-list-type": "map",
            "x-kubernetes-list-map-keys": ["name"],
            "items": {
                "type": "object",
                "required": ["name"],
                "properties": {
                    "name": {"type": "string", "maxLength": 9},
                    "weight": {"type": "integer", "default": 1},
                },
                "x-kubernetes-validations": [
                    {"rule": "self.weight >= oldSelf.weight", "message": "a part cannot shrink"}
                ],
            },
        },
        "labels": {
            "type": "object",
            "maxProperties": 5,
            "additionalProperties": {
                "type": "string",
                "maxLength": 9,
                "x-kubernetes-validations": [
                    {"rule": "!self.contains(':')", "message": "no colon"},
                ],
            },
        },
    },
    "x-kubernetes-validations": [
        {
            "rule": "!has(self.replicas) || self.replicas <= self.size",
            "messageExpression": "self.size == 3 ? 'at most 3 replicas' : 'too many'",
            "fieldPath": ".replicas",
        },
        {
            "rule": "!has(self.tags) || self.tags.all(t, t.startsWith('t') && t.size() > 1)",
            "message": "tags begin with t",
            "reason": "FieldValueForbidden",
        },
    ],
}
WIDGETS = {
    "apiVersion": "apiextensions.k8s.io/v1",
    "kind": "CustomResourceDefinition",
    "metadata": {"name": "widgets.test.kubeai.org"},
    "spec": {
        "group": "test.kubeai.org",
        "scope": "Namespaced",
        "names": {"plural": "widgets", "kind": "Widget", "shortNames": ["wd"]},
        "versions": [
            {
                "name": "v1",
                "served": True,
                "storage": True,
                "schema": {
                    "openAPIV3Schema": {
                        "type": "object",
                        "required": ["spec"],
                        "properties": {
                            "spec": WIDGET_SPEC,
                            "status": {
                                "type": "object",
                                "properties": {
                                    "replicas": {"type": "integer"},
                                    "selector": {"type": "string"},
                                    "conditions": {
                                        "type": "array",
                                        "items": {
                                            "type": "object",
                                            "properties": {
                                                "type": {"type": "string"},
                                                "status": {"type": "string"},
                                            },
                                        },
                                    },
                                },
                            },
                        },
                    }
                },
                "subresources": {
                    "status": {},
                    "scale": {
                        "specReplicasPath": ".spec.replicas",
                        "statusReplicasPath": ".status.replicas",
                        "labelSelectorPath": ".status.selector",
                    },
                },
                "additionalPrinterColumns": [
                    {"name": "Size", "type": "integer", "jsonPath": ".spec.size"},
                    {
                        "name": "Ready",
                        "type": "string",
                        "jsonPath": '.status.conditions[?(@.type=="Ready")].status',
                    },
                    {
                        "name": "Color",
                        "type": "string",
                        "jsonPath": ".spec.color",
                        "priority": 1,
                    },
                    {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"},
                ],
                "selectableFields": [{"jsonPath": ".spec.color"}],
            }
        ],
    },
}


def widget(name: str = "w", metadata: dict | None = None, **spec: Any) -> dict:
    return {
        "apiVersion": "test.kubeai.org/v1",
        "kind": "Widget",
        "metadata": {"name": name, **(metadata or {})},
        "spec": {"size": 3, **spec},
    }


def pod(name: str = "p", metadata: dict | None = None, **spec: Any) -> dict:
    containers = [{"name": "c", "image": "i"}]
    return {
        "metadata": {"name": name, **(metadata or {})},
        "spec": {"containers": containers, **spec},
    }


def job(name: str = "j", labels: dict | None = None, restart: str = "Never", **spec: Any) -> dict:
    template = {"spec": {"restartPolicy": restart, "containers": [{"name": "c", "image": "i"}]}}
    template |= {"metadata": {"labels": labels}} if labels else {}
    return {"metadata": {"name": name}, "spec": {"template": template, **spec}}


class Collection:
    """One collection of one namespace."""

    def __init__(self, server: ApiServer, path: str) -> None:
        self.server, self.path = server, path

    def __call__(self, method: str, name: str = "", body: object = None, kind: str = MERGE):
        kind = kind if method == "PATCH" else "application/json"
        path = f"{self.path}/{name}" if name and not name.startswith("?") else self.path + name
        return self.server.request(method, path, body, kind)

    def make(self, body: dict) -> dict:
        code, answer = self("POST", "", body)
        assert code == 201, answer
        return answer

    def patch(self, name: str, body: object, kind: str = MERGE) -> dict:
        code, answer = self("PATCH", name, body, kind)
        assert code == 200, answer
        return answer

    def refused(self, code: int, method: str, name: str = "", body: object = None, kind=MERGE):
        got, answer = self(method, name, body, kind)
        assert got == code, answer
        assert (answer["kind"], answer["status"]) == ("Status", "Failure")
        return answer

    def names(self, query: str = "") -> list[str]:
        code, answer = self("GET", query)
        assert code == 200, answer
        return [item["metadata"]["name"] for item in answer["items"]]


def until(condition):
    deadline = time.monotonic() + TIMEOUT_S
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found
