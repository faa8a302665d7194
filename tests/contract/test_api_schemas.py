"""Schemas and rules of custom resources on both APIs: what they fill in, drop and reject."""

from __future__ import annotations

import orjson
import pytest
from servers import ApiServer
from widgets import JSON_PATCH, WIDGETS, Collection, until, widget


def test_defaults_are_filled_in_and_unknown_fields_dropped(widgets: Collection):
    given = widget(unknown=1, free={"any": {"thing": [1]}}, parts=[{"name": "a", "odd": 1}])
    given["odd"] = 1
    made = widgets.make(given)
    assert made["spec"] == {
        "size": 3,
        "color": "red",
        "free": {"any": {"thing": [1]}},
        "parts": [{"name": "a", "weight": 1}],
    }
    assert "odd" not in made


def test_nulls_mean_absent_where_null_is_no_value(widgets: Collection):
    spec = widgets.make(widget(color=None, nick=None, note=None))["spec"]
    assert spec == {"size": 3, "color": "red", "note": None}


def test_unknown_fields_are_errors_when_validation_is_strict(widgets: Collection):
    given = widget(unknown=1, parts=[{"name": "a", "odd": 1}])
    given["metadata"]["odd"] = 1
    answer = widgets.refused(400, "POST", "?fieldValidation=Strict", given)
    assert "strict decoding error: unknown field" in answer["message"]
    assert 'unknown field "spec.parts[0].odd"' in answer["message"]
    assert 'unknown field "spec.unknown"' in answer["message"]
    assert 'unknown field "metadata.odd"' in answer["message"]
    assert widgets("POST", "?fieldValidation=Ignore", given)[0] == 201


BLOCKED = (
    "<nil>: Invalid value: null: some validation rules were not checked because the object was "
    "invalid; correct the existing errors to complete validation"
)


@pytest.mark.parametrize(
    ("spec", "reason", "line"),
    [
        (
            {"size": "3"},
            "FieldValueTypeInvalid",
            'spec.size: Invalid value: "string": spec.size in body must be of type integer: '
            '"string"',
        ),
        ({"size": None}, "FieldValueRequired", "spec.size: Required value"),
        (
            {"size": 10},
            "FieldValueInvalid",
            "spec.size: Invalid value: 10: spec.size in body should be less than or equal to 9",
        ),
        (
            {"size": 0},
            "FieldValueInvalid",
            "spec.size: Invalid value: 0: spec.size in body should be greater than or equal to 1",
        ),
        (
            {"color": "green"},
            "FieldValueNotSupported",
            'spec.color: Unsupported value: "green": supported values: "red", "blue"',
        ),
        (
            {"nick": "toolong"},
            "FieldValueTooLong",
            "spec.nick: Too long: may not be more than 5 bytes",
        ),
        (
            {"nick": "A"},
            "FieldValueInvalid",
            "spec.nick: Invalid value: \"A\": spec.nick in body should match '^[a-z]*$'",
        ),
        (
            {"tags": ["ta", "tb", "tc", "td"]},
            "FieldValueTooMany",
            "spec.tags: Too many: 4: must have at most 3 items",
        ),
        (
            {"tags": ["ta", "ta"]},
            "FieldValueDuplicate",
            'spec.tags[1]: Duplicate value: "ta"',
        ),
        (
            {"parts": [{"name": "a"}, {"name": "a"}]},
            "FieldValueDuplicate",
            'spec.parts[1]: Duplicate value: {"name":"a"}',
        ),
        ({"parts": [{"weight": 1}]}, "FieldValueRequired", "spec.parts[0].name: Required value"),
        (
            {"parts": [1]},
            "FieldValueTypeInvalid",
            'spec.parts[0]: Invalid value: "integer": spec.parts[0] in body must be of type '
            'object: "integer"',
        ),
        (
            {"limit": []},
            "FieldValueTypeInvalid",
            'spec.limit: Invalid value: "array": spec.limit in body must be of type integer,string:'
            ' "array"',
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_objects_that_violate_the_schema_are_rejected(widgets: Collection, spec, reason, line):
    answer = widgets.refused(422, "POST", "", widget(**spec))
    assert answer["reason"] == "Invalid"
    causes = [f"{cause['field']}: {cause['message']}" for cause in answer["details"]["causes"]]
    assert line in causes
    assert answer["details"]["causes"][causes.index(line)]["reason"] == reason
    assert answer["message"].startswith('Widget.test.kubeai.org "w" is invalid: ')
    blocking = ("TypeInvalid", "Required", "NotSupported", "TooLong", "TooMany")
    assert (BLOCKED in causes) is reason.endswith(blocking)


def test_rules_hold_at_every_level(widgets: Collection):
    answer = widgets.refused(422, "POST", "", widget(replicas=5))
    assert answer["message"] == (
        'Widget.test.kubeai.org "w" is invalid: spec.replicas: Invalid value: at most 3 replicas'
    )
    answer = widgets.refused(422, "POST", "", widget(tags=["x"]))
    assert answer["details"]["causes"] == [
        {"reason": "FieldValueForbidden", "message": "Forbidden: tags begin with t",
         "field": "spec"},
    ]  # fmt: skip
    answer = widgets.refused(422, "POST", "", widget(labels={"k": "a:b"}))
    assert 'spec.labels[k]: Invalid value: "a:b": no colon' in answer["message"]


def test_transition_rules_compare_with_the_old_object(widgets: Collection):
    widgets.make(widget(frozen="a", parts=[{"name": "a", "weight": 3}, {"name": "b"}]))
    answer = widgets.refused(422, "PATCH", "w", {"spec": {"frozen": "b"}})
    assert 'spec.frozen: Invalid value: "b": frozen is immutable' in answer["message"]
    parts = [{"name": "new"}, {"name": "a", "weight": 2}]
    answer = widgets.refused(422, "PATCH", "w", {"spec": {"parts": parts}})
    assert "spec.parts[1]: Invalid value: a part cannot shrink" in answer["message"]
    parts[1]["weight"] = 4
    assert widgets.patch("w", {"spec": {"parts": parts, "frozen": None}})


def test_existing_violations_do_not_block_unrelated_changes(api_server: ApiServer, namespace: str):
    crds = Collection(api_server, "/apis/apiextensions.k8s.io/v1/customresourcedefinitions")
    name = f"gadgets.{namespace}.org"
    crd = orjson.loads(orjson.dumps(WIDGETS))
    crd["metadata"]["name"] = name
    crd["spec"] |= {"group": f"{namespace}.org", "names": {"plural": "gadgets", "kind": "Gadget"}}
    crds.make(crd)
    path = f"/apis/{namespace}.org/v1/namespaces/{namespace}/gadgets"
    gadgets = Collection(api_server, path)
    until(lambda: gadgets("GET")[0] == 200)
    given = {**widget(size=9), "apiVersion": f"{namespace}.org/v1", "kind": "Gadget"}
    gadgets.make(given)
    version = "/spec/versions/0/schema/openAPIV3Schema/properties/spec/properties/size/maximum"
    crds.patch(name, [{"op": "replace", "path": version, "value": 5}], JSON_PATCH)
    until(lambda: gadgets("POST", "?dryRun=All", {**given, "metadata": {"name": "x"}})[0] == 422)
    assert gadgets.patch("w", {"spec": {"color": "blue"}})["spec"]["size"] == 9
    gadgets.refused(422, "PATCH", "w", {"spec": {"size": 8}})
    assert crds("DELETE", name)[0] == 200
    until(lambda: crds("GET", name)[0] == 404)
    until(lambda: gadgets("GET")[0] == 404)


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        ("/metadata/name", "other.test.kubeai.org", "metadata.name"),
        ("/spec/versions/0/storage", False, "spec.versions"),
        (
            "/spec/versions/0/schema/openAPIV3Schema/properties/spec/x-kubernetes-validations/0",
            {"rule": "self.size >"},
            "spec.versions[0].schema.openAPIV3Schema",
        ),
        ("/spec/scope", "World", "spec.scope"),
    ],
)
def test_bad_definitions_are_refused(api_server: ApiServer, path: str, value, field: str):
    crds = Collection(api_server, "/apis/apiextensions.k8s.io/v1/customresourcedefinitions")
    bad = orjson.loads(orjson.dumps(WIDGETS).replace(b"widgets", b"gizmos"))
    *parents, last = path.strip("/").split("/")
    place = bad
    for part in parents:
        place = place[int(part)] if part.isdecimal() else place[part]
    place[int(last) if isinstance(place, list) else last] = value
    answer = crds.refused(422, "POST", "", bad)
    fields = [cause["field"] for cause in answer["details"]["causes"]]
    if field.startswith("spec.versions[0]"):  # a real API may say spec.validation for one version
        assert any("openAPIV3Schema" in found for found in fields)
    else:
        assert field in fields


def test_a_definition_is_established(definition, api_server: ApiServer):
    path = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/widgets.test.kubeai.org"
    status = api_server.request("GET", path)[1]["status"]
    conditions = {condition["type"]: condition["status"] for condition in status["conditions"]}
    assert conditions["Established"] == conditions["NamesAccepted"] == "True"
    assert status["acceptedNames"]["listKind"] == "WidgetList"
    assert status["storedVersions"] == ["v1"]
