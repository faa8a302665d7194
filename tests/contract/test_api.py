"""API behaviour that clients rely on, tested on the embedded API and a real kube-apiserver."""

from __future__ import annotations

import threading
import time

import orjson
import pytest
from servers import ApiServer
from widgets import (
    JSON_PATCH,
    MERGE,
    STRATEGIC,
    TIMEOUT_S,
    WIDGETS,
    Collection,
    job,
    pod,
    until,
    widget,
)  # fmt: skip

TABLE = "application/json;as=Table;v=v1;g=meta.k8s.io,application/json"
PARTIAL = "application/json;as=PartialObjectMetadata;v=v1;g=meta.k8s.io"


# Objects.


def test_a_created_object_has_its_metadata(widgets: Collection, namespace: str):
    made = widgets.make(widget(metadata={"labels": {"a": "b"}}))
    metadata = made["metadata"]
    assert metadata["namespace"] == namespace
    assert metadata["generation"] == 1
    assert {"uid", "creationTimestamp", "resourceVersion"} <= set(metadata)
    assert "deletionTimestamp" not in metadata
    assert widgets("GET", "w")[1]["spec"] == made["spec"]


def test_creating_an_existing_name_conflicts(widgets: Collection):
    widgets.make(widget())
    answer = widgets.refused(409, "POST", "", widget())
    assert answer["reason"] == "AlreadyExists"
    assert answer["message"] == 'widgets.test.kubeai.org "w" already exists'


def test_a_generated_name_begins_with_its_prefix(configs: Collection):
    names = {configs.make({"metadata": {"generateName": "c-"}})["metadata"]["name"] for _ in "abc"}
    assert len(names) == 3
    assert all(name.startswith("c-") and len(name) == 7 for name in names)


@pytest.mark.parametrize("name", ["Up", "a_b", "-a", "a" * 254, ""])
def test_bad_names_are_refused(configs: Collection, name: str):
    answer = configs.refused(422, "POST", "", {"metadata": {"name": name}})
    assert answer["details"]["causes"][0]["field"] == "metadata.name"


def test_missing_objects_are_not_found(widgets: Collection, api_server: ApiServer):
    for method, body in (("GET", None), ("DELETE", None), ("PATCH", {}), ("PUT", widget("none"))):
        answer = widgets.refused(404, method, "none", body)
        assert answer["reason"] == "NotFound"
        assert answer["message"] == 'widgets.test.kubeai.org "none" not found'
    path = "/api/v1/namespaces/nowhere/configmaps"
    code, answer = api_server.request("POST", path, {"metadata": {"name": "c"}})
    assert (code, answer["message"]) == (404, 'namespaces "nowhere" not found')


@pytest.mark.parametrize(
    ("method", "path", "code"),
    [
        ("GET", "/api/v1/foos", 404),
        ("GET", "/api/v1/namespaces/default/foos/x", 404),
        ("PATCH", "/api/v1/namespaces/default/pods/x/foo", 404),
        ("PUT", "/api/v1/configmaps", 405),
        ("POST", "/api/v1/namespaces/default/configmaps/x", 405),
    ],
)
def test_unserved_path_returns_status_with_details(
    api_server: ApiServer, method: str, path: str, code: int
):
    got, answer = api_server.request(method, path, {}, "application/merge-patch+json")
    assert (got, answer["kind"], answer["code"]) == (code, "Status", code)
    assert answer["details"] == {}  # kubectl dereferences it


@pytest.mark.parametrize(
    "accept", ["application/xml", "application/json;as=Foo;v=v1;g=meta.k8s.io", "text/html"]
)
def test_unsupported_media_type_is_not_acceptable(
    configs: Collection, api_server: ApiServer, accept: str
):
    for method, body in (("GET", None), ("POST", {"metadata": {"name": "c"}})):
        code, answer = api_server.request(method, configs.path, body, accept=accept)
        assert (code, answer["kind"], answer["reason"]) == (406, "Status", "NotAcceptable")
    assert configs("GET", "")[1]["items"] == []
    for path in ("/version", "/api/v1", "/apis"):
        code, answer = api_server.request("GET", path, accept="application/xml")
        assert (code, answer["reason"]) == (406, "NotAcceptable")


def test_requests_without_the_token_are_unauthorized(api_server: ApiServer):
    code, answer = api_server._replace(token="wrong").request("GET", "/api/v1/namespaces")
    assert (code, answer["reason"]) == (401, "Unauthorized")


def test_bad_bodies_are_refused(configs: Collection, api_server: ApiServer, namespace: str):
    configs.refused(400, "POST", "", [1])
    configs.refused(400, "POST", "", {"metadata": {"name": "c"}, "data": {"a": 1}})
    configs.refused(400, "POST", "", {"metadata": {"name": "c", "namespace": "other"}})
    configs.refused(400, "POST", "", {"kind": "Pod", "apiVersion": "v1", "metadata": {"name": "c"}})
    code, answer = api_server.request("POST", configs.path, {}, "text/plain")
    assert (code, answer["reason"]) == (415, "UnsupportedMediaType")


# Writes.


def test_a_stale_write_conflicts(widgets: Collection):
    made = widgets.make(widget())
    widgets.patch("w", {"spec": {"size": 4}})
    made["spec"]["size"] = 5
    answer = widgets.refused(409, "PUT", "w", made)
    assert answer["reason"] == "Conflict"
    assert "the object has been modified" in answer["message"]
    stale = {"metadata": {"resourceVersion": made["metadata"]["resourceVersion"]}}
    widgets.refused(409, "PATCH", "w", stale)


def test_a_custom_object_is_replaced_only_with_its_version(widgets: Collection):
    widgets.make(widget())
    answer = widgets.refused(422, "PUT", "w", widget(size=4))
    assert answer["details"]["causes"][0]["field"] == "metadata.resourceVersion"


def test_a_built_in_object_may_be_replaced_without_one(configs: Collection):
    configs.make({"metadata": {"name": "c"}, "data": {"a": "1"}})
    code, answer = configs("PUT", "c", {"metadata": {"name": "c"}, "data": {"b": "2"}})
    assert (code, answer["data"]) == (200, {"b": "2"})


def test_concurrent_lease_claims_have_one_winner(api_server: ApiServer, namespace: str):
    path = f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases"
    leases = Collection(api_server, path)
    spec = {"holderIdentity": "a", "renewTime": "2026-01-01T00:00:00.000001Z"}
    made = leases.make({"metadata": {"name": "l"}, "spec": spec})
    assert made["spec"] == spec
    leases.refused(422, "PUT", "l", {"metadata": {"name": "l"}, "spec": spec})
    won = {**made, "spec": {**spec, "holderIdentity": "b"}}
    assert leases("PUT", "l", won)[0] == 200
    lost = {**made, "spec": {**spec, "holderIdentity": "c"}}
    assert leases.refused(409, "PUT", "l", lost)["reason"] == "Conflict"
    assert leases("GET", "l")[1]["spec"]["holderIdentity"] == "b"


@pytest.mark.parametrize("kind", [MERGE, JSON_PATCH])
def test_patch_results_are_validated(widgets: Collection, kind: str):
    widgets.make(widget())
    patch: object = {"spec": {"odd": 1}}
    if kind == JSON_PATCH:
        patch = [{"op": "add", "path": "/spec/odd", "value": 1}]
    code, answer = widgets("PATCH", "w?fieldValidation=Strict", patch, kind)
    assert code in (400, 422)  # a real API server has a code of its own for patches
    assert 'unknown field "spec.odd"' in answer["message"]
    for validation in ("Warn", "Ignore"):
        assert "odd" not in widgets.patch(f"w?fieldValidation={validation}", patch, kind)["spec"]
    answer = widgets.refused(422, "PATCH", "w?fieldValidation=Other", patch, kind)
    said = 'PatchOptions.meta.k8s.io "" is invalid: fieldValidation: Unsupported value: "Other"'
    assert said in answer["message"]


def test_no_op_write_keeps_resource_version(widgets: Collection):
    made = widgets.make(widget())
    assert widgets.patch("w", {"spec": {"size": 3}}) == made


def test_server_owned_metadata_cannot_be_changed(widgets: Collection):
    made = widgets.make(widget())["metadata"]
    long_ago = "2000-01-01T00:00:00Z"
    answer = widgets.patch("w", {"metadata": {"generation": 9, "creationTimestamp": long_ago}})
    assert answer["metadata"]["creationTimestamp"] == made["creationTimestamp"]
    assert answer["metadata"]["generation"] == 1
    given = {"metadata": {"deletionTimestamp": long_ago}}
    answer = widgets.refused(422, "PATCH", "w", given)
    assert answer["details"]["causes"][0]["field"] == "metadata.deletionTimestamp"
    widgets.refused(422, "PATCH", "w", {"metadata": {"uid": "other"}})


def test_status_and_spec_are_written_separately(widgets: Collection):
    made = widgets.make({**widget(), "status": {"replicas": 7}})
    assert "status" not in made
    assert "status" not in widgets.patch("w", {"status": {"replicas": 7}})
    changed = widgets.patch(
        "w/status",
        {"status": {"replicas": 2}, "spec": {"size": 9}, "metadata": {"labels": {"a": "b"}}},
    )
    assert changed["status"] == {"replicas": 2}
    assert changed["spec"]["size"] == 3
    assert "labels" not in changed["metadata"]
    assert widgets.patch("w", {"spec": {"size": 4}})["status"] == {"replicas": 2}


def test_generation_counts_changes_of_the_spec(widgets: Collection):
    widgets.make(widget())
    labelled = widgets.patch("w", {"metadata": {"labels": {"a": "b"}}})
    assert labelled["metadata"]["generation"] == 1
    assert widgets.patch("w/status", {"status": {"replicas": 1}})["metadata"]["generation"] == 1
    assert widgets.patch("w", {"spec": {"size": 5}})["metadata"]["generation"] == 2


def test_scale_reads_and_writes_the_replicas(widgets: Collection):
    widgets.make(widget(replicas=1))
    widgets.patch("w/status", {"status": {"replicas": 1, "selector": "app=w"}})
    code, scale = widgets("GET", "w/scale")
    assert code == 200
    assert (scale["kind"], scale["apiVersion"]) == ("Scale", "autoscaling/v1")
    assert scale["spec"] == {"replicas": 1}
    assert scale["status"] == {"replicas": 1, "selector": "app=w"}
    assert widgets.patch("w/scale", {"spec": {"replicas": 3}})["spec"] == {"replicas": 3}
    scale["spec"]["replicas"] = 2
    assert widgets.refused(409, "PUT", "w/scale", scale)["reason"] == "Conflict"
    del scale["metadata"]["resourceVersion"]
    assert widgets("PUT", "w/scale", scale)[0] == 200
    changed = widgets("GET", "w")[1]
    assert (changed["spec"]["replicas"], changed["metadata"]["generation"]) == (2, 3)
    widgets.refused(422, "PATCH", "w/scale", {"spec": {"replicas": -1}})
    answer = widgets.refused(422, "PATCH", "w/scale", {"spec": {"replicas": 8}})
    assert "at most 3 replicas" in answer["message"]


def test_merge_and_json_patches_apply_or_are_rejected_as_a_whole(widgets: Collection):
    widgets.make(widget(labels={"a": "b", "c": "d"}))
    merged = widgets.patch("w", {"spec": {"labels": {"a": None, "e": "f"}}})
    assert merged["spec"]["labels"] == {"c": "d", "e": "f"}
    operations = [
        {"op": "test", "path": "/spec/size", "value": 3},
        {"op": "replace", "path": "/spec/size", "value": 4},
        {"op": "add", "path": "/metadata/labels", "value": {"x~y/z".replace("~", ""): "1"}},
    ]
    patched = widgets.patch("w", operations, JSON_PATCH)
    assert patched["spec"]["size"] == 4
    assert patched["metadata"]["labels"] == {"xy/z": "1"}
    for operation in (
        {"op": "test", "path": "/spec/size", "value": 3},
        {"op": "remove", "path": "/spec/none"},
        {"op": "turn", "path": "/spec/size"},
    ):
        widgets.refused(422, "PATCH", "w", [operation], JSON_PATCH)
    widgets.refused(400, "PATCH", "w", {"op": "test"}, JSON_PATCH)
    widgets.refused(400, "PATCH", "w", [1])
    widgets.refused(415, "PATCH", "w", {}, STRATEGIC)
    widgets.refused(400, "PATCH", "w", {"metadata": {"name": "v"}})


def test_strategic_merge_follows_the_keys_of_lists(pods: Collection):
    containers = [{"name": "a", "image": "i"}, {"name": "b", "image": "i"}]
    pods.make(pod(containers=containers, metadata={"finalizers": ["x.org/a"]}))
    patch = {
        "metadata": {"finalizers": ["x.org/b"], "labels": {"l": "1"}},
        "spec": {"containers": [{"name": "b", "image": "j"}]},
    }
    patched = pods.patch("p", patch, STRATEGIC)
    assert [c["image"] for c in patched["spec"]["containers"]] == ["i", "j"]
    assert patched["metadata"]["finalizers"] == ["x.org/b", "x.org/a"]
    patch = {"metadata": {"$deleteFromPrimitiveList/finalizers": ["x.org/a"]}}
    assert pods.patch("p", patch, STRATEGIC)["metadata"]["finalizers"] == ["x.org/b"]
    conditions = [{"type": "A", "status": "True"}, {"type": "B", "status": "True"}]
    pods.patch("p/status", {"status": {"conditions": conditions}}, STRATEGIC)
    less = {"status": {"conditions": [{"type": "A", "$patch": "delete"}]}}
    left = pods.patch("p/status", less, STRATEGIC)["status"]["conditions"]
    assert [condition["type"] for condition in left] == ["B"]
    pods.patch("p", {"metadata": {"finalizers": None}})


def test_a_dry_run_writes_nothing(widgets: Collection):
    code, answer = widgets("POST", "?dryRun=All", widget())
    assert (code, answer["spec"]["color"]) == (201, "red")
    assert widgets("GET", "w")[0] == 404
    widgets.make(widget())
    code, answer = widgets("PATCH", "w?dryRun=All", {"spec": {"size": 9}})
    assert (code, answer["spec"]["size"]) == (200, 9)
    assert widgets("DELETE", "w?dryRun=All")[0] == 200
    assert widgets("GET", "w")[1]["spec"]["size"] == 3
    widgets.refused(422, "POST", "?dryRun=All", widget("v", size=99))


# Schemas.


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


# Lists.


def test_paginated_lists_show_one_snapshot(widgets: Collection):
    for index in range(5):
        widgets.make(widget(f"w{index}"))
    code, first = widgets("GET", "?limit=2")
    assert [item["metadata"]["name"] for item in first["items"]] == ["w0", "w1"]
    assert first["metadata"]["remainingItemCount"] == 3
    widgets("DELETE", "w2")
    widgets.make(widget("w22"))
    token = first["metadata"]["continue"]
    code, second = widgets("GET", f"?limit=10&continue={token}")
    assert code == 200
    assert [item["metadata"]["name"] for item in second["items"]] == ["w2", "w3", "w4"]
    assert second["metadata"]["resourceVersion"] == first["metadata"]["resourceVersion"]
    assert not second["metadata"].get("continue")
    widgets.refused(400, "GET", "?continue=nonsense")


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ("a=1", ["w1"]),
        ("a==1,b", ["w1"]),
        ("a!=1", ["w2", "w3"]),
        ("a+in+(1,2)", ["w1", "w2"]),
        ("a+notin+(1)", ["w2", "w3"]),
        ("!a", ["w3"]),
        ("b", ["w1", "w3"]),
        ("a,b=x", ["w1"]),
        ("", ["w1", "w2", "w3"]),
    ],
)
def test_list_returns_the_objects_that_match_a_label_selector(
    widgets: Collection, selector: str, expected: list[str]
):
    for name, labels in (("w1", {"a": "1", "b": "x"}), ("w2", {"a": "2"}), ("w3", {"b": "y"})):
        widgets.make(widget(name, {"labels": labels}))
    assert widgets.names(f"?labelSelector={selector}") == expected


def test_list_returns_the_objects_that_match_a_field_selector(
    widgets: Collection, pods: Collection, namespace: str
):
    widgets.make(widget("w1"))
    widgets.make(widget("w2", color="blue"))
    assert widgets.names("?fieldSelector=metadata.name=w2") == ["w2"]
    assert widgets.names("?fieldSelector=metadata.name!=w2") == ["w1"]
    assert widgets.names("?fieldSelector=spec.color=blue,metadata.name=w2") == ["w2"]
    assert widgets.names(f"?fieldSelector=metadata.namespace={namespace}") == ["w1", "w2"]
    pods.make(pod("p1", nodeName="n1"))
    pods.make(pod("p2"))
    assert pods.names("?fieldSelector=spec.nodeName=n1") == ["p1"]
    assert pods.names("?fieldSelector=spec.nodeName=") == ["p2"]
    assert pods.names("?fieldSelector=status.phase!=Pending") == []
    for collection, bad in ((widgets, "spec.size=1"), (pods, "spec.bad=1"), (pods, "x")):
        collection.refused(400, "GET", f"?fieldSelector={bad}")
    widgets.refused(400, "GET", "?labelSelector=a+in+b")


def test_list_at_a_future_resource_version_is_rejected(widgets: Collection):
    answer = widgets.refused(504, "GET", "?resourceVersion=99999999&resourceVersionMatch=Exact")
    assert answer["details"]["causes"][0]["reason"] == "ResourceVersionTooLarge"


# Watches.


def _types(events, count: int) -> list[tuple[str, str]]:
    found = []
    for event in events:
        found.append((event["type"], event["object"]["metadata"]["name"]))
        if len(found) == count:
            break
    return found


def test_watch_returns_events_since_a_resource_version(widgets: Collection):
    start = widgets("GET")[1]["metadata"]["resourceVersion"]
    widgets.make(widget())
    with widgets.server.watch(f"{widgets.path}?watch=1&resourceVersion={start}") as events:
        assert next(events)["type"] == "ADDED"
        widgets.patch("w", {"spec": {"size": 4}})
        event = next(events)
        assert (event["type"], event["object"]["spec"]["size"]) == ("MODIFIED", 4)
        widgets("DELETE", "w")
        last = next(events)
        assert last["type"] == "DELETED"
    versions = [int(e["object"]["metadata"]["resourceVersion"]) for e in (event, last)]
    assert versions == sorted(set(versions))


def test_watch_without_resource_version_starts_with_existing_objects(widgets: Collection):
    widgets.make(widget())
    for query in ("?watch=1", "?watch=1&resourceVersion=0"):
        with widgets.server.watch(widgets.path + query) as events:
            assert _types(events, 1) == [("ADDED", "w")]


def test_a_watch_may_ask_for_the_initial_events(widgets: Collection):
    widgets.make(widget())
    query = (
        "?watch=1&sendInitialEvents=true&allowWatchBookmarks=true&resourceVersionMatch=NotOlderThan"
    )
    with widgets.server.watch(widgets.path + query) as events:
        assert next(events)["type"] == "ADDED"
        bookmark = next(events)
    assert bookmark["type"] == "BOOKMARK"
    assert bookmark["object"]["metadata"]["annotations"] == {"k8s.io/initial-events-end": "true"}


def test_watch_with_selector_reports_objects_entering_and_leaving(widgets: Collection):
    start = widgets("GET")[1]["metadata"]["resourceVersion"]
    query = f"?watch=1&resourceVersion={start}&labelSelector=in=1"
    with widgets.server.watch(widgets.path + query) as events:
        widgets.make(widget("other"))
        widgets.make(widget("w"))
        widgets.patch("w", {"metadata": {"labels": {"in": "1"}}})
        widgets.patch("w", {"spec": {"size": 4}})
        widgets.patch("w", {"metadata": {"labels": {"in": "2"}}})
        widgets.make(widget("end", {"labels": {"in": "1"}}))
        assert _types(events, 4) == [
            ("ADDED", "w"), ("MODIFIED", "w"), ("DELETED", "w"), ("ADDED", "end"),
        ]  # fmt: skip


def test_watch_ends_after_its_timeout(widgets: Collection):
    started = time.monotonic()
    with widgets.server.watch(f"{widgets.path}?watch=1&timeoutSeconds=1") as events:
        assert list(events) == []
    assert 0.9 < time.monotonic() - started < TIMEOUT_S


def test_many_watches_see_the_same_order(widgets: Collection):
    start = widgets("GET")[1]["metadata"]["resourceVersion"]
    seen: list[list[str]] = []

    def look() -> None:
        with widgets.server.watch(f"{widgets.path}?watch=1&resourceVersion={start}") as events:
            seen.append([name for _, name in _types(events, 10)])

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for index in range(10):
        widgets.make(widget(f"w{index}"))
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert seen == [[f"w{index}" for index in range(10)]] * 4


# Deletion.


def test_a_deleted_object_is_gone(widgets: Collection):
    uid = widgets.make(widget())["metadata"]["uid"]
    code, answer = widgets("DELETE", "w")
    assert (code, answer["status"], answer["details"]["uid"]) == (200, "Success", uid)
    assert widgets("GET", "w")[0] == 404


def test_finalizers_hold_an_object_until_they_are_removed(widgets: Collection):
    widgets.make(widget(metadata={"finalizers": ["x.org/a", "x.org/b"]}))
    code, answer = widgets("DELETE", "w")
    assert (code, answer["kind"]) == (200, "Widget")
    assert answer["metadata"]["deletionTimestamp"]
    added = {"metadata": {"finalizers": ["x.org/a", "x.org/b", "x.org/c"]}}
    answer = widgets.refused(422, "PATCH", "w", added)
    assert "no new finalizers can be added" in answer["message"]
    widgets.patch("w", {"metadata": {"finalizers": ["x.org/b"]}})
    assert widgets("GET", "w")[0] == 200
    widgets.patch("w", {"metadata": {"finalizers": []}})
    assert widgets("GET", "w")[0] == 404


def test_preconditions_of_a_deletion(widgets: Collection):
    made = widgets.make(widget())["metadata"]
    for name, wrong in (("uid", "other"), ("resourceVersion", "1")):
        answer = widgets.refused(409, "DELETE", "w", {"preconditions": {name: wrong}})
        assert answer["reason"] == "Conflict"
    right = {name: made[name] for name in ("uid", "resourceVersion")}
    assert widgets("DELETE", "w", {"preconditions": right})[0] == 200


def test_unscheduled_pod_is_deleted_immediately(pods: Collection):
    pods.make(pod())
    assert pods("DELETE", "p")[0] == 200
    assert pods("GET", "p")[0] == 404


def test_a_pod_on_a_node_stays_until_its_kubelet_ends_it(pods: Collection):
    pods.make(pod(terminationGracePeriodSeconds=20))
    binding = {"metadata": {"name": "p"}, "target": {"kind": "Node", "name": "n1"}}
    assert pods("POST", "p/binding", binding)[0] == 201
    assert pods.refused(409, "POST", "p/binding", binding)["reason"] == "Conflict"
    assert pods("GET", "p")[1]["spec"]["nodeName"] == "n1"
    code, answer = pods("DELETE", "p")
    assert code == 200
    assert answer["metadata"]["deletionGracePeriodSeconds"] == 20
    code, answer = pods("DELETE", "p", {"gracePeriodSeconds": 5})
    assert answer["metadata"]["deletionGracePeriodSeconds"] == 5
    code, answer = pods("DELETE", "p", {"gracePeriodSeconds": 60})
    assert answer["metadata"]["deletionGracePeriodSeconds"] == 5
    assert pods("GET", "p")[0] == 200
    assert pods("DELETE", "p", {"gracePeriodSeconds": 0})[0] == 200
    assert pods("GET", "p")[0] == 404


def test_finished_pod_is_deleted_immediately(pods: Collection):
    pods.make(pod(nodeName="n1"))
    pods.patch("p/status", {"status": {"phase": "Succeeded"}})
    assert pods("DELETE", "p")[0] == 200
    assert pods("GET", "p")[0] == 404


def test_a_collection_is_deleted_by_selector(configs: Collection):
    for name in ("a", "b", "c"):
        configs.make({"metadata": {"name": name, "labels": {"keep": str(name == "b")}}})
    assert configs("DELETE", "?labelSelector=keep=False")[0] == 200
    assert configs.names() == ["b"]


# Pods.


def test_pod_defaults_are_set(pods: Collection):
    container = {
        "name": "c", "image": "registry:5000/x/i", "ports": [{"containerPort": 80}],
        "resources": {"limits": {"cpu": 1, "memory": "1024Mi"}},
        "readinessProbe": {"httpGet": {"port": 80}},
    }  # fmt: skip
    made = pods.make(pod(containers=[container], volumes=[{"name": "v"}]))
    spec, filled = made["spec"], made["spec"]["containers"][0]
    assert spec["restartPolicy"] == "Always"
    assert spec["terminationGracePeriodSeconds"] == 30
    assert spec["volumes"] == [{"name": "v", "emptyDir": {}}]
    assert filled["imagePullPolicy"] == "Always"
    assert filled["ports"] == [{"containerPort": 80, "protocol": "TCP"}]
    assert filled["resources"]["requests"] == {"cpu": "1", "memory": "1Gi"}
    assert filled["readinessProbe"] == {
        "httpGet": {"path": "/", "port": 80, "scheme": "HTTP"},
        "timeoutSeconds": 1, "periodSeconds": 10, "successThreshold": 1, "failureThreshold": 3,
    }  # fmt: skip
    assert made["status"] == {"phase": "Pending", "qosClass": "Guaranteed"}


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"containers": []}, "spec.containers"),
        ({"containers": [{"name": "c"}]}, "spec.containers[0].image"),
        ({"containers": [{"image": "i"}]}, "spec.containers[0].name"),
        ({"containers": [{"name": "C_", "image": "i"}]}, "spec.containers[0].name"),
        ({"containers": [{"name": "c", "image": "i"}] * 2}, "spec.containers[1].name"),
        (
            {"containers": [{"name": "c", "image": "i",
                             "volumeMounts": [{"name": "v", "mountPath": "/v"}]}]},
            "spec.containers[0].volumeMounts[0].name",
        ),
        ({"restartPolicy": "Sometimes"}, "spec.restartPolicy"),
        (
            {"containers": [{"name": "c", "image": "i", "ports": [{"containerPort": 70000}]}]},
            "spec.containers[0].ports[0].containerPort",
        ),
    ],
)  # fmt: skip
def test_bad_pods_are_refused(pods: Collection, spec: dict, field: str):
    answer = pods.refused(422, "POST", "", pod(**spec))
    assert field in [cause["field"] for cause in answer["details"]["causes"]]


def test_only_the_image_of_a_pod_can_be_changed(pods: Collection):
    pods.make(pod())
    image = {"spec": {"containers": [{"name": "c", "image": "j"}]}}
    assert pods.patch("p", image, STRATEGIC)["spec"]["containers"][0]["image"] == "j"
    command = {"spec": {"containers": [{"name": "c", "command": ["x"]}]}}
    answer = pods.refused(422, "PATCH", "p", command, STRATEGIC)
    assert "pod updates may not change fields other than" in answer["message"]
    pods.refused(422, "PUT", "p", {"metadata": {"name": "p"}})


# Jobs.


def test_job_defaults_are_set_and_select_its_own_pods(jobs: Collection):
    made = jobs.make(job(labels={"app": "x"}))
    spec, uid = made["spec"], made["metadata"]["uid"]
    ours = {
        "batch.kubernetes.io/controller-uid": uid, "batch.kubernetes.io/job-name": "j",
        "controller-uid": uid, "job-name": "j",
    }  # fmt: skip
    assert spec["selector"] == {"matchLabels": {"batch.kubernetes.io/controller-uid": uid}}
    assert spec["template"]["metadata"]["labels"] == {"app": "x", **ours}
    assert spec["template"]["spec"]["terminationGracePeriodSeconds"] == 30
    del spec["selector"], spec["template"]
    assert spec == {
        "parallelism": 1, "completions": 1, "backoffLimit": 6, "suspend": False,
        "completionMode": "NonIndexed", "manualSelector": False,
        "podReplacementPolicy": "TerminatingOrFailed",
    }  # fmt: skip
    assert made["status"] == {}


def test_a_job_has_its_pods_labels_unless_it_has_its_own(jobs: Collection):
    assert jobs.make(job())["metadata"]["labels"]["job-name"] == "j"
    labelled = job("k")
    labelled["metadata"]["labels"] = {"a": "b"}
    assert jobs.make(labelled)["metadata"]["labels"] == {"a": "b"}


def test_a_job_with_parallelism_alone_has_no_completions(jobs: Collection):
    assert "completions" not in jobs.make(job(parallelism=2))["spec"]
    _, table = jobs.server.request("GET", f"{jobs.path}/j", accept=TABLE)
    assert table["rows"][0]["cells"][2] == "0/1 of 2"


def test_manual_job_selector_is_kept(jobs: Collection):
    labels = {"app": "x"}
    own = job(labels=labels, manualSelector=True, selector={"matchLabels": labels})
    spec = jobs.make(own)["spec"]
    assert spec["selector"] == {"matchLabels": labels}
    assert spec["template"]["metadata"]["labels"] == labels


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        (job(restart="Always"), "spec.template.spec.restartPolicy"),
        (job(parallelism=-1), "spec.parallelism"),
        (job(backoffLimit=-1), "spec.backoffLimit"),
        (job(ttlSecondsAfterFinished=-1), "spec.ttlSecondsAfterFinished"),
        (job(selector={"matchLabels": {"a": "b"}}), "spec.selector"),
        (job(manualSelector=True), "spec.selector"),
        (
            job(manualSelector=True, selector={"matchLabels": {"a": "b"}}),
            "spec.template.metadata.labels",
        ),
    ],
)
def test_bad_jobs_are_refused(jobs: Collection, wrong: dict, field: str):
    answer = jobs.refused(422, "POST", "", wrong)
    assert field in [cause["field"] for cause in answer["details"]["causes"]]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"completions": 2}, "spec.completions"),
        ({"selector": {"matchLabels": {"a": "b"}}}, "spec.selector"),
        ({"template": {"spec": {"terminationGracePeriodSeconds": 3}}}, "spec.template"),
    ],
)
def test_completions_selector_and_template_of_a_job_are_immutable(
    jobs: Collection, change: dict, field: str
):
    jobs.make(job())
    answer = jobs.refused(422, "PATCH", "j", {"spec": change})
    assert field in [cause["field"] for cause in answer["details"]["causes"]]
    patched = jobs.patch("j", {"spec": {"parallelism": 3, "suspend": True}})
    assert patched["spec"]["parallelism"] == 3
    assert patched["metadata"]["generation"] == 2


# Forms.


def test_lists_and_objects_as_tables(widgets: Collection):
    widgets.make(widget(size=7))
    widgets.patch("w/status", {"status": {"conditions": [{"type": "Ready", "status": "True"}]}})
    for path in (widgets.path, f"{widgets.path}/w"):
        code, table = widgets.server.request("GET", path, accept=TABLE)
        assert (code, table["kind"]) == (200, "Table")
        columns = [(c["name"], c["type"], c["priority"]) for c in table["columnDefinitions"]]
        assert columns == [
            ("Name", "string", 0), ("Size", "integer", 0), ("Ready", "string", 0),
            ("Color", "string", 1), ("Age", "date", 0),
        ]  # fmt: skip
        (row,) = table["rows"]
        assert row["cells"][:4] == ["w", 7, "True", "red"]
        assert row["object"]["kind"] == "PartialObjectMetadata"
        assert row["object"]["metadata"]["name"] == "w"
    code, table = widgets.server.request(
        "GET", f"{widgets.path}?includeObject=Object", accept=TABLE
    )
    assert table["rows"][0]["object"]["spec"]["size"] == 7


def test_a_watch_as_tables_has_columns_once(widgets: Collection):
    widgets.make(widget("a"))
    with widgets.server.watch(f"{widgets.path}?watch=1", TABLE) as events:
        first = next(events)["object"]
        widgets.make(widget("b"))
        second = next(events)["object"]
    assert (first["kind"], second["kind"]) == ("Table", "Table")
    assert first["columnDefinitions"]
    assert not second["columnDefinitions"]
    assert second["rows"][0]["cells"][0] == "b"


def test_partial_object_metadata(widgets: Collection):
    widgets.make(widget())
    code, answer = widgets.server.request("GET", f"{widgets.path}/w", accept=PARTIAL)
    assert (code, answer["kind"]) == (200, "PartialObjectMetadata")
    assert "spec" not in answer


def test_the_columns_of_pods(pods: Collection):
    pods.make(pod())
    _, table = pods.server.request("GET", pods.path, accept=TABLE)
    names = [column["name"] for column in table["columnDefinitions"]]
    assert names == [
        "Name", "Ready", "Status", "Restarts", "Age", "IP", "Node", "Nominated Node",
        "Readiness Gates",
    ]  # fmt: skip
    cells = table["rows"][0]["cells"]
    assert cells[:3] == ["p", "0/1", "Pending"]
    assert str(cells[3]) == "0"
    assert cells[5:] == ["<none>", "<none>", "<none>", "<none>"]


# Discovery.


def test_discovery_lists_resources(definition, api_server: ApiServer):
    listed = api_server.request("GET", "/apis/test.kubeai.org/v1")[1]["resources"]
    assert [entry["name"] for entry in listed] == ["widgets", "widgets/status", "widgets/scale"]
    assert listed[0]["shortNames"] == ["wd"]
    assert listed[2]["kind"] == "Scale"
    core = {entry["name"]: entry for entry in api_server.request("GET", "/api/v1")[1]["resources"]}
    assert {"pods", "pods/log", "pods/status", "configmaps", "secrets", "nodes"} <= set(core)
    assert core["pods"]["shortNames"] == ["po"]
    exec_ = {key: core["pods/exec"][key] for key in ("kind", "namespaced", "singularName")}
    assert exec_ == {"kind": "PodExecOptions", "namespaced": True, "singularName": ""}
    assert {"create", "get"} <= set(core["pods/exec"]["verbs"])
    groups = api_server.request("GET", "/apis")[1]["groups"]
    assert "test.kubeai.org" in [group["name"] for group in groups]


def test_aggregated_discovery_lists_a_resource_with_its_subresources(
    definition, api_server: ApiServer
):
    accept = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList"
    code, answer = api_server.request("GET", "/apis", accept=accept)
    assert (code, answer["kind"]) == (200, "APIGroupDiscoveryList")
    groups = {item["metadata"]["name"]: item for item in answer["items"]}
    (resource,) = groups["test.kubeai.org"]["versions"][0]["resources"]
    assert resource["resource"] == "widgets"
    assert resource["scope"] == "Namespaced"
    assert resource["responseKind"]["kind"] == "Widget"
    assert [sub["subresource"] for sub in resource["subresources"]] == ["status", "scale"]


def test_openapi_describes_schema_and_patch_types(definition, api_server: ApiServer):
    index = until(
        lambda: api_server.request("GET", "/openapi/v3")[1]["paths"].get("apis/test.kubeai.org/v1")
    )
    code, document = api_server.request("GET", index["serverRelativeURL"])
    assert code == 200
    path = "/apis/test.kubeai.org/v1/namespaces/{namespace}/widgets/{name}"
    patch = document["paths"][path]["patch"]
    assert "fieldValidation" in [parameter["name"] for parameter in patch["parameters"]]
    assert patch["x-kubernetes-group-version-kind"]["kind"] == "Widget"
    schemas = document["components"]["schemas"]
    (schema,) = [value for name, value in schemas.items() if name.endswith(".Widget")]
    assert schema["properties"]["spec"]["properties"]["size"]["maximum"] == 9
