"""Applies of objects by a manager, and their answers."""

from __future__ import annotations

from widgets import APPLY, Collection


def apply(of: Collection, body: object, manager: str = "a", query: str = "", sub: str = "") -> dict:
    code, answer = asked(of, body, manager, query, sub)
    assert code in (200, 201), answer
    return answer


def asked(of: Collection, body: object, manager: str = "a", query: str = "", sub: str = ""):
    name = body["metadata"]["name"]
    return of("PATCH", f"{name}{sub}?fieldManager={manager}{query}", body, APPLY)


def config(name: str = "c", **data: str) -> dict:
    body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}}
    return {**body, "data": data} if data else body
