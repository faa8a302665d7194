"""Field ownership in the embedded API: field sets, updates, applies."""

from __future__ import annotations

import copy
from typing import Any

import orjson
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kubeai.local.apiserver.apply import field_sets
from kubeai.local.apiserver.apply.managed_fields import Writer, well_formed
from kubeai.local.apiserver.apply.ownership import Conflict, Ownership
from kubeai.local.apiserver.apply.shape import SchemaMismatch
from kubeai.local.apiserver.apply.typed import compare
from kubeai.local.apiserver.kinds.resources import OBJECT_META, PODS
from kubeai.local.apiserver.schema.structural import Schema

STRING: dict[str, Any] = {"type": "string"}
ITEM = {
    "type": "object",
    "properties": {"name": STRING, "port": {"type": "integer"}, "note": STRING,
                   "protocol": {**STRING, "default": "TCP"}},
}  # fmt: skip
SPEC = {
    "type": "object",
    "properties": {
        "size": {"type": "integer"},
        "nick": STRING,
        "labels": {"type": "object", "additionalProperties": STRING},
        "tags": {"type": "array", "items": STRING, "x-kubernetes-list-type": "set"},
        "args": {"type": "array", "items": STRING},
        "free": {"type": "object", "x-kubernetes-preserve-unknown-fields": True},
        "whole": {"type": "object", "additionalProperties": STRING,
                  "x-kubernetes-map-type": "atomic"},
        "parts": {"type": "array", "items": ITEM, "x-kubernetes-list-type": "map",
                  "x-kubernetes-list-map-keys": ["name"]},
        "ports": {"type": "array", "items": ITEM, "x-kubernetes-list-type": "map",
                  "x-kubernetes-list-map-keys": ["port", "protocol"]},
        "inner": {"type": "object", "properties": {"a": STRING, "b": STRING}},
    },
}  # fmt: skip
OWNERS = Ownership(Schema({"type": "object", "properties": {"spec": SPEC}}), OBJECT_META)
PODS_OWNERS = Ownership(PODS.schema, OBJECT_META)


def writer(manager: str, time: str = "2026-01-01T00:00:00Z", subresource: str = "") -> Writer:
    return Writer(manager, "x.org/v1", time, subresource)


def obj(**spec: Any) -> dict[str, Any]:
    head = {"apiVersion": "x.org/v1", "kind": "X", "metadata": {"name": "x"}}
    return {**head, **({"spec": spec} if spec else {})}


class Thing:
    """One object and its managers, as a registry without defaults would store it."""

    def __init__(self, owners: Ownership = OWNERS) -> None:
        self.owners, self.object, self.managed = owners, {}, []

    def apply(self, manager: str, config: dict[str, Any], force: bool = False) -> dict[str, Any]:
        self.object, self.managed = self.owners.applied(
            self.managed, self.object, config, writer(manager), force
        )
        self.object["metadata"]["uid"] = "u"
        return self.object

    def update(self, manager: str, new: dict[str, Any], time: str = "2026-01-01T00:00:00Z"):
        old = self.object or None
        self.managed = self.owners.updated(self.managed, old, new, writer(manager, time))
        self.object = new

    @property
    def spec(self) -> dict[str, Any]:
        return self.object.get("spec", {})

    def owned(self, manager: str) -> list[str]:
        return [
            path
            for entry in self.managed
            if entry["manager"] == manager
            for path in field_sets.paths(entry["fieldsV1"])
        ]


# Which manager owns which fields.


def test_an_apply_owns_the_fields_that_it_sets():
    thing = Thing()
    thing.apply("a", obj(size=1, labels={"l": "1"}, tags=["t"], args=["x"], whole={"k": "v"},
                         parts=[{"name": "p", "note": "n"}], inner={"a": "1"}))  # fmt: skip
    (entry,) = thing.managed
    assert entry["fieldsV1"] == {
        "f:spec": {
            "f:size": {},
            "f:labels": {"f:l": {}},
            "f:tags": {'v:"t"': {}},
            "f:args": {},
            "f:whole": {},
            "f:parts": {'k:{"name":"p"}': {".": {}, "f:name": {}, "f:note": {}}},
            "f:inner": {"f:a": {}},
        }
    }
    assert (entry["manager"], entry["operation"], entry["apiVersion"]) == ("a", "Apply", "x.org/v1")
    assert entry["fieldsType"] == "FieldsV1"


def test_a_create_owns_all_fields_and_their_parents():
    thing = Thing()
    thing.update("c", {**obj(size=1), "metadata": {"name": "x", "labels": {"l": "1"}}})
    assert thing.managed[0]["operation"] == "Update"
    assert thing.managed[0]["fieldsV1"] == {
        "f:metadata": {"f:labels": {".": {}, "f:l": {}}},
        "f:spec": {".": {}, "f:size": {}},
    }


def test_an_update_owns_the_fields_that_it_changes():
    thing = Thing()
    thing.apply("a", obj(size=1, nick="n"))
    thing.update("u", {**thing.object, "spec": {"size": 2, "nick": "n"}}, "2026-01-02T00:00:00Z")
    assert thing.owned("a") == [".spec.nick"]
    assert thing.owned("u") == [".spec.size"]
    assert [entry["time"][:10] for entry in thing.managed] == ["2026-01-01", "2026-01-02"]
    before = thing.managed
    thing.update("v", copy.deepcopy(thing.object))
    assert thing.managed is before
    thing.update("v", obj(nick="n"))
    assert thing.owned("u") == thing.owned("v") == []


def test_fields_written_before_the_first_apply_get_their_own_manager():
    thing = Thing()
    thing.object = obj(size=1, nick="n")
    thing.update("u", obj(size=2, nick="n"))
    assert thing.managed == []
    with pytest.raises(Conflict) as caught:
        thing.apply("a", obj(size=3))
    ((entry, fields),) = caught.value.fields
    assert entry.shown() == '"before-first-apply" using x.org/v1'
    assert list(field_sets.paths(fields)) == [".spec.size"]
    thing.apply("a", obj(size=3), force=True)
    assert thing.owned("before-first-apply") == [".spec", ".spec.nick"]


def test_a_conflict_names_the_fields_of_each_manager():
    thing = Thing()
    thing.apply("a", obj(size=1, parts=[{"name": "p", "note": "n"}]))
    thing.apply("b", obj(nick="n"))
    with pytest.raises(Conflict) as caught:
        thing.apply("c", obj(size=2, nick="m", parts=[{"name": "p", "note": "o"}]))
    found = {entry.shown(): list(field_sets.paths(fields)) for entry, fields in caught.value.fields}
    assert found == {
        '"a"': [".spec.size", '.spec.parts[name="p"].note'],
        '"b"': [".spec.nick"],
    }
    thing.apply("c", obj(size=2, nick="m"), force=True)
    assert thing.owned("b") == []
    assert ".spec.size" not in thing.owned("a")


def test_a_shared_field_stays_until_both_managers_drop_it():
    thing = Thing()
    thing.apply("a", obj(size=1, labels={"x": "1", "y": "1"}))
    thing.apply("b", obj(labels={"y": "1"}))
    thing.apply("a", obj(size=1))
    assert thing.spec == {"size": 1, "labels": {"y": "1"}}
    thing.apply("b", obj())
    assert thing.spec == {"size": 1}


def test_an_item_is_removed_together_with_its_unowned_fields():
    thing = Thing()
    thing.apply("a", obj(size=1, parts=[{"name": "p"}, {"name": "q"}]))
    thing.object["spec"]["parts"][0]["note"] = "a default"
    thing.apply("a", obj(size=1, parts=[{"name": "q"}]))
    assert thing.spec["parts"] == [{"name": "q"}]


def test_items_have_the_order_of_the_applied_configuration():
    thing = Thing()
    thing.apply("a", obj(tags=["a", "b", "c", "d"]))
    thing.apply("b", obj(tags=["x", "d", "b", "y"]))
    assert thing.spec["tags"] == ["a", "c", "x", "d", "b", "y"]


def test_missing_list_keys_get_their_defaults():
    thing = Thing()
    thing.apply("a", obj(ports=[{"port": 1}, {"port": 1, "protocol": "UDP"}]))
    assert list(thing.managed[0]["fieldsV1"]["f:spec"]["f:ports"]) == [
        'k:{"port":1,"protocol":"TCP"}', 'k:{"port":1,"protocol":"UDP"}',
    ]  # fmt: skip
    thing = Thing(PODS_OWNERS)
    container = {"name": "c", "ports": [{"containerPort": 80}]}
    thing.apply("a", {"metadata": {"name": "p"}, "spec": {"containers": [container]}})
    assert '.spec.containers[name="c"].ports[containerPort=80,protocol="TCP"]' in thing.owned("a")


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ({"bogus": 1}, ".spec.bogus: field not declared in schema"),
        ({"inner": {"c": "1"}}, ".spec.inner.c: field not declared in schema"),
        ({"tags": ["t", "t"]}, '.spec.tags: duplicate entries for key [="t"]'),
        ({"parts": [{"name": "p"}] * 2}, '.spec.parts: duplicate entries for key [name="p"]'),
        ({"parts": [{"note": "n"}]}, ".spec.parts: an item omits all key fields"),
        ({"parts": ["p"]}, ".spec.parts: an item must be a map with the keys name"),
        ({"parts": {"name": "p"}}, ".spec.parts: expected list, got map"),
        ({"size": "1"}, ".spec.size: expected integer, got string"),
        ({"labels": "l"}, ".spec.labels: expected map, got string"),
    ],
)
def test_an_invalid_applied_configuration_is_rejected(spec: dict, why: str):
    with pytest.raises(SchemaMismatch) as caught:
        Thing().apply("a", obj(**spec))
    assert str(caught.value).startswith(why)


def test_a_list_with_duplicate_keys_has_one_field_per_item():
    """For example a pod's environment that was written without apply."""
    thing = Thing()
    twice = [{"name": "p", "note": "1"}, {"name": "p", "note": "2"}, {"name": "q"}]
    thing.update("c", obj(parts=twice))
    thing.update("d", obj(parts=[twice[0], {"name": "p", "note": "3"}, twice[2]]))
    assert '.spec.parts[name="p"]' in thing.owned("d")
    thing.apply("a", obj(parts=[{"name": "p", "note": "4"}]), force=True)
    assert [part for part in thing.spec["parts"] if part["name"] == "p"] == [
        {"name": "p", "note": "4"}
    ]


def test_only_the_most_recent_update_managers_are_kept_separate():
    thing = Thing()
    thing.apply("a", obj(nick="n"))
    for index in range(25):
        labels = {**thing.spec.get("labels", {}), f"l{index:02}": "1"}
        new = {**thing.object, "spec": {**thing.spec, "labels": labels}}
        thing.update(f"u{index:02}", new, f"2026-01-01T00:00:{index:02}Z")
    updaters = [entry["manager"] for entry in thing.managed if entry["operation"] == "Update"]
    assert updaters == ["ancient-changes", *(f"u{index:02}" for index in range(16, 25))]
    assert set(thing.owned("ancient-changes")) >= {f".spec.labels.l{i:02}" for i in range(16)}
    with pytest.raises(Conflict):
        thing.apply("a", obj(labels={"l00": "2"}))


def test_subresources_and_operations_have_their_own_entries():
    thing = Thing()
    thing.apply("m", obj(size=1))
    thing.update("m", {**thing.object, "spec": {"size": 1, "nick": "n"}})
    new = {**thing.object, "spec": {"size": 1, "nick": "m"}}
    thing.managed = OWNERS.updated(thing.managed, thing.object, new, writer("m", subresource="s"))
    assert [(e["operation"], e.get("subresource")) for e in thing.managed] == [
        ("Apply", None), ("Update", "s"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "entry",
    [
        {"operation": "Upsert"},
        {"apiVersion": ""},
        {"fieldsType": "FieldsV2"},
        {"manager": 1},
        {"fieldsV1": {"f:a": 1}},
        {"fieldsV1": {"x": {}}},
        {"fieldsV1": {"k:nonsense": {}}},
        {"fieldsV1": {"k:[]": {}}},
    ],
)
def test_each_kind_of_malformed_managed_fields_entry_is_reported(entry: dict):
    good = {"manager": "m", "operation": "Update", "apiVersion": "v1", "fieldsType": "FieldsV1",
            "fieldsV1": {"f:a": {'k:{"b":1}': {".": {}, "v:2": {}}, "i:0": {}}}}  # fmt: skip
    assert well_formed([good])
    assert not well_formed([{**good, **entry}])


def test_managed_fields_unknown_to_the_schema_are_tolerated():
    thing = Thing()
    thing.apply("a", obj(size=1))
    foreign = {"f:spec": {"f:gone": {"f:x": {}}, "f:size": {'k:{"n":1}': {}, "f:y": {}}}}
    thing.managed = [{**thing.managed[0], "fieldsV1": foreign}]
    assert thing.apply("a", obj(nick="n"))["spec"]["nick"] == "n"


def test_deeply_nested_field_sets_from_clients_are_rejected():
    deep: dict[str, Any] = {}
    for _ in range(field_sets.DEPTH_MAX + 1):
        deep = {"f:a": deep}
    entry = {"manager": "m", "operation": "Update", "apiVersion": "v1", "fieldsType": "FieldsV1"}
    assert not well_formed([{**entry, "fieldsV1": deep}])


# Properties.

names = st.sampled_from("pqr")
texts = st.sampled_from("12")
specs = st.fixed_dictionaries(
    {},
    optional={
        "size": st.integers(0, 2),
        "nick": texts,
        "labels": st.dictionaries(names, texts, min_size=1),
        "tags": st.lists(names, unique=True, min_size=1),
        "args": st.lists(texts),
        "whole": st.dictionaries(names, texts),
        "free": st.dictionaries(names, st.dictionaries(names, texts, min_size=1), min_size=1),
        "parts": st.dictionaries(names, texts, min_size=1).map(
            lambda notes: [{"name": name, "note": note} for name, note in notes.items()]
        ),
        "inner": st.fixed_dictionaries({"a": texts}, optional={"b": texts}),
    },
)
steps = st.sampled_from(["f:a", "f:b", 'k:{"n":1}', "v:1"])
sets = st.recursive(
    st.just({}), lambda below: st.dictionaries(st.just(".") | steps, below), max_leaves=12
).map(lambda tree: _normal(tree, root=True) or {})


def _normal(tree: dict, root: bool = False) -> dict | None:
    """A tree in the module's own form: no empty branches, no lone dot, none at the root."""
    below = {s: n for s, child in tree.items() if s != "." and (n := _normal(child)) is not None}
    if not below:
        return {}
    return {".": {}, **below} if "." in tree and not root else below


def _members(fields: dict) -> set[str]:
    return set(field_sets.paths(fields))


def _alike(value: Any) -> Any:
    """The value without the order of lists, which managers can only share."""
    if isinstance(value, dict):
        return {name: _alike(member) for name, member in value.items()}
    if isinstance(value, list):
        return sorted((_alike(item) for item in value), key=orjson.dumps)
    return value


@settings(deadline=None)
@given(sets, sets)
def test_field_sets_behave_like_sets(one: dict, other: dict):
    assert _members(field_sets.union(one, other)) == _members(one) | _members(other)
    assert _members(field_sets.difference(one, other)) == _members(one) - _members(other)
    assert _members(field_sets.intersection(one, other)) == _members(one) & _members(other)
    assert field_sets.difference(one, one) == {}
    assert field_sets.union(one, one) == field_sets.intersection(one, one) == one


@settings(deadline=None)
@given(specs, specs)
def test_apply_is_idempotent(first: dict, second: dict):
    thing = Thing()
    thing.apply("b", obj(**second))
    thing.apply("a", obj(**first), force=True)
    before = copy.deepcopy((thing.object, thing.managed))
    thing.apply("a", obj(**first))
    assert (thing.object, thing.managed) == before


@settings(deadline=None)
@given(specs, specs)
def test_an_empty_apply_removes_the_fields_that_only_its_manager_owned(mine: dict, theirs: dict):
    thing, alone = Thing(), Thing()
    alone.apply("b", obj(**theirs))
    thing.apply("a", obj(**mine))
    thing.apply("b", obj(**theirs), force=True)
    thing.apply("a", obj())
    assert _alike(thing.object) == _alike(alone.object)
    assert [entry["manager"] for entry in thing.managed] == (["b"] if theirs else [])


@settings(deadline=None)
@given(specs, st.data())
def test_managers_of_different_fields_never_conflict(spec: dict, data: st.DataObject):
    mine, theirs = {}, {}
    for name, value in spec.items():
        if name in ("labels", "free"):
            for key, member in value.items():
                side = data.draw(st.sampled_from([mine, theirs]))
                side.setdefault(name, {})[key] = member
        elif name in ("tags", "parts"):
            for item in value:
                data.draw(st.sampled_from([mine, theirs])).setdefault(name, []).append(item)
        else:
            data.draw(st.sampled_from([mine, theirs]))[name] = value
    thing = Thing()
    thing.apply("a", obj(**mine))
    thing.apply("b", obj(**theirs))
    assert _alike(thing.spec) == _alike(spec)
    assert not set(thing.owned("a")) & set(thing.owned("b"))
    thing.apply("a", obj())
    assert _alike(thing.spec) == _alike(theirs)


@settings(deadline=None)
@given(specs, specs, specs)
def test_an_update_owns_every_field_that_it_changed(applied: dict, before: dict, after: dict):
    thing = Thing()
    thing.apply("a", obj(**applied))
    thing.update("u", obj(**before))
    assume(thing.managed)  # otherwise no manager is tracked any more
    thing.update("v", obj(**after))
    view, gone = compare(obj(**before), obj(**after), OWNERS.shape)
    assert _members(view) <= set(thing.owned("v"))
    for manager in ("a", "u"):
        assert not set(thing.owned(manager)) & (_members(view) | _members(gone))


@settings(deadline=None)
@given(specs, specs)
def test_an_apply_does_not_modify_its_inputs(live: dict, config: dict):
    thing = Thing()
    thing.apply("b", obj(**live))
    old, managed, wanted = thing.object, thing.managed, obj(**config)
    before = copy.deepcopy((old, managed, wanted))
    OWNERS.applied(managed, old, wanted, writer("a"), force=True)
    assert (old, managed, wanted) == before
