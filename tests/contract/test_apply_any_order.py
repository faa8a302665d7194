"""Random writes of several managers match the model: the embedded API's rules, in this process."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import pytest
from applies import apply, asked, config
from widgets import MERGE, STRATEGIC, WIDGETS, Collection, widget

from kubeai.local.apiserver.errors import StatusError
from kubeai.local.apiserver.kinds.resources import CRDS, NAMESPACES, Catalog
from kubeai.local.apiserver.storage.options import WriteOptions
from kubeai.local.apiserver.storage.registry import Registry
from kubeai.local.apiserver.storage.store import Store, Stored

STEPS = 80


class Oracle:
    """A registry with the widgets' definition and one namespace; one object of one kind."""

    def __init__(self, group: str, version: str, plural: str) -> None:
        self.registry = Registry(Store(":memory:"), Catalog())
        self.registry.create(CRDS, "", copy.deepcopy(WIDGETS), WriteOptions())
        self.registry.create(NAMESPACES, "", {"metadata": {"name": "n"}}, WriteOptions())
        resource = self.registry.catalog.find(group, version, plural)
        assert resource is not None
        self.place = resource, "n", "x"

    def apply(self, body: dict, manager: str, force: bool):
        options = WriteOptions(manager=manager, force=force)
        return told_of(lambda: self.registry.apply(*self.place, copy.deepcopy(body), options)[0])

    def patch(self, body: object, manager: str, kind: str):
        options = WriteOptions(manager=manager)
        return told_of(lambda: self.registry.patch(*self.place, kind, copy.deepcopy(body), options))

    def put(self, body: dict, manager: str):
        options = WriteOptions(manager=manager)
        return told_of(lambda: self.registry.update(*self.place, copy.deepcopy(body), options))


def told_of(write: Callable[[], Stored]) -> object:
    try:
        return told(200, write().object)
    except StatusError as error:
        return told(error.code, error.body())


def told(code: int, answer: dict) -> object:
    """What both must agree on."""
    if code >= 400:
        causes = answer.get("details", {}).get("causes", [])
        return code, sorted((c.get("field"), c["message"]) for c in causes)
    metadata = answer["metadata"]
    fields = {
        (e["manager"], e["operation"]): e["fieldsV1"] for e in metadata.get("managedFields", [])
    }
    shown = ("labels", "annotations", "finalizers")
    return answer.get("spec", answer.get("data")), [metadata.get(name) for name in shown], fields


def some(chance: random.Random, values: list, least: int = 1) -> list:
    return chance.sample(values, chance.randint(least, len(values)))


def some_spec(chance: random.Random) -> dict:
    spec = {
        "nick": chance.choice("ab"),
        "limit": chance.choice([1, "2"]),
        "tags": some(chance, ["t1", "t2", "t3"]),
        "labels": {name: chance.choice("xy") for name in some(chance, ["k1", "k2", "k3"])},
        "parts": [
            {"name": name, **({"weight": 7} if chance.random() < 0.5 else {})}
            for name in some(chance, ["p", "q", "r"])
        ],
        "free": {name: {"m": chance.choice([1, [2]])} for name in some(chance, ["f", "g"])},
        "note": None,
    }
    chosen = some(chance, list(spec)) if chance.random() < 0.9 else []
    return {"size": 3, **{name: spec[name] for name in chosen}}


def some_config(chance: random.Random) -> dict:
    body = config("x")
    if chance.random() < 0.7:
        body["data"] = {name: chance.choice("12") for name in some(chance, ["a", "b", "c"], 0)}
    for member, names in (("labels", ["x", "y", "z"]), ("annotations", ["k.org/x", "y"])):
        if chance.random() < 0.4:
            body["metadata"][member] = {name: chance.choice("12") for name in some(chance, names)}
    if chance.random() < 0.4:
        body["metadata"]["finalizers"] = some(chance, ["x.org/a", "x.org/b", "x.org/c"], 0)
    return body


@pytest.mark.parametrize("seed", range(4))
def test_random_writes_to_a_custom_object_match_the_model(widgets: Collection, seed: int):
    chance, oracle = random.Random(seed), Oracle("test.kubeai.org", "v1", "widgets")
    body = widget("x")
    assert told(200, apply(widgets, body, "m0")) == oracle.apply(body, "m0", False)
    for step in range(STEPS):
        manager, force = f"m{chance.randint(0, 3)}", chance.random() < 0.5
        labels = {"labels": {"l": chance.choice("12")}} if chance.random() < 0.2 else {}
        body = widget("x", metadata=labels, **some_spec(chance))
        if chance.random() < 0.7:
            got = asked(widgets, body, manager, "&force=true" if force else "")
            wanted = oracle.apply(body, manager, force)
        else:
            patch = {"spec": body["spec"], "metadata": labels}
            for name in ("parts", "tags", "labels", "free"):
                if chance.random() < 0.2:
                    patch["spec"][name] = None
            got = widgets("PATCH", f"x?fieldManager={manager}", patch)
            wanted = oracle.patch(patch, manager, MERGE)
        if got[0] == 422 and '"null"' in got[1]["message"]:
            break  # a real API server makes null of what loses its last item, and refuses it
        assert told(*got) == wanted, (step, manager, force, body)


@pytest.mark.parametrize("seed", range(4))
def test_random_writes_to_a_built_in_object_match_the_model(configs: Collection, seed: int):
    chance, oracle = random.Random(seed), Oracle("", "v1", "configmaps")
    body = config("x")
    assert told(200, apply(configs, body, "m0")) == oracle.apply(body, "m0", False)
    for step in range(STEPS):
        manager, force, kind = f"m{chance.randint(0, 3)}", chance.random() < 0.5, chance.random()
        body = some_config(chance)
        if kind < 0.6:
            got = asked(configs, body, manager, "&force=true" if force else "")
            wanted = oracle.apply(body, manager, force)
        elif kind < 0.75:
            form = chance.choice([MERGE, STRATEGIC])
            for name in body.get("data", {}):
                if chance.random() < 0.3:
                    body["data"][name] = None
            got = configs("PATCH", f"x?fieldManager={manager}", body, form)
            wanted = oracle.patch(body, manager, form)
        elif kind < 0.95:
            got = configs("PUT", f"x?fieldManager={manager}", body)
            wanted = oracle.put(body, manager)
        else:
            nobody = {"metadata": {"managedFields": chance.choice([[{}], [], None])}}
            got = configs("PATCH", "x", nobody)
            wanted = oracle.patch(nobody, "unknown", MERGE)
        assert told(*got) == wanted, (step, manager, force, body)
    configs.patch("x", {"metadata": {"finalizers": None}})
