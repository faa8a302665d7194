"""Server-side apply and managedFields: the same on the embedded API and a real kube-apiserver."""

from __future__ import annotations

from urllib.parse import quote

import pytest
from applies import apply, asked, config
from servers import ApiServer
from widgets import APPLY, JSON_PATCH, MERGE, Collection, pod, widget


def conflict(of: Collection, body: object, manager: str = "a", sub: str = "") -> dict:
    code, answer = asked(of, body, manager, sub=sub)
    assert (code, answer["reason"]) == (409, "Conflict"), answer
    return answer


def entries(obj: dict) -> dict[tuple[str, str], dict]:
    """The fields by manager and operation."""
    found = obj["metadata"].get("managedFields", [])
    return {(entry["manager"], entry["operation"]): entry["fieldsV1"] for entry in found}


# Applies.


def test_apply_creates_changes_and_skips_unchanged_objects(widgets: Collection):
    code, made = asked(widgets, widget(size=3, labels={"x": "1"}))
    assert (code, made["spec"]["color"], made["metadata"]["generation"]) == (201, "red", 1)
    assert apply(widgets, widget(size=3, labels={"x": "1"})) == made
    changed = apply(widgets, widget(size=4))
    assert changed["spec"] == {"size": 4, "color": "red"}
    assert changed["metadata"]["generation"] == 2
    (entry,) = changed["metadata"]["managedFields"]
    assert entry.pop("time")
    assert entry == {
        "manager": "a", "operation": "Apply", "apiVersion": "test.kubeai.org/v1",
        "fieldsType": "FieldsV1", "fieldsV1": {"f:spec": {"f:size": {}}},
    }  # fmt: skip


def test_an_apply_may_be_yaml(configs: Collection):
    text = b"# a comment\napiVersion: v1\nkind: ConfigMap\nmetadata: {name: c}\ndata:\n  day: '1'\n"
    code, made = configs("PATCH", "c?fieldManager=a", text, APPLY)
    assert (code, made["data"]) == (201, {"day": "1"})
    dated = text + b"  at: 2026-01-01\n"
    assert configs("PATCH", "c?fieldManager=a", dated, APPLY)[1]["data"]["at"] == "2026-01-01"
    configs.refused(400, "PATCH", "c?fieldManager=a", text + b"x: [\n", APPLY)
    configs.refused(400, "PATCH", "c?fieldManager=a", [1], APPLY)


def test_apply_to_fields_of_another_manager_conflicts(widgets: Collection):
    parts = [{"name": "p", "weight": 2}]
    apply(widgets, widget(size=3, labels={"x": "1"}, parts=parts))
    answer = conflict(widgets, widget(size=4), "b")
    assert answer["message"] == 'Apply failed with 1 conflict: conflict with "a": .spec.size'
    assert answer["details"]["causes"] == [
        {"reason": "FieldManagerConflict", "message": 'conflict with "a"', "field": ".spec.size"}
    ]
    parts = [{"name": "p", "weight": 5}]
    answer = conflict(widgets, widget(size=4, labels={"x": "2"}, parts=parts), "b")
    assert answer["message"] == (
        'Apply failed with 3 conflicts: conflicts with "a":\n'
        '- .spec.size\n- .spec.labels.x\n- .spec.parts[name="p"].weight'
    )
    forced = apply(widgets, widget(size=4), "b", "&force=true")
    assert forced["spec"]["size"] == 4
    assert "f:size" not in entries(forced)["a", "Apply"]["f:spec"]
    assert entries(forced)["b", "Apply"] == {"f:spec": {"f:size": {}}}
    assert conflict(widgets, widget(size=3))["details"]["causes"][0]["field"] == ".spec.size"


def test_equal_values_are_co_owned_until_both_managers_drop_them(configs: Collection):
    apply(configs, config(a="1", b="2"))
    shared = apply(configs, config(a="1", c="3"), "b")
    assert entries(shared) == {
        ("a", "Apply"): {"f:data": {"f:a": {}, "f:b": {}}},
        ("b", "Apply"): {"f:data": {"f:a": {}, "f:c": {}}},
    }
    assert apply(configs, config())["data"] == {"a": "1", "c": "3"}
    left = apply(configs, config(), "b")
    assert "data" not in left
    assert "managedFields" not in left["metadata"]


def test_list_ownership_follows_the_schema(widgets: Collection):
    apply(widgets, widget(tags=["ta", "tb"], parts=[{"name": "p", "weight": 1}, {"name": "q"}]))
    both = apply(widgets, widget(tags=["tc", "tb"], parts=[{"name": "n"}, {"name": "p"}]), "b")
    assert both["spec"]["tags"] == ["ta", "tc", "tb"]
    assert [part["name"] for part in both["spec"]["parts"]] == ["n", "p", "q"]
    assert entries(both)["b", "Apply"]["f:spec"]["f:tags"] == {'v:"tb"': {}, 'v:"tc"': {}}
    assert entries(both)["a", "Apply"]["f:spec"]["f:parts"] == {
        'k:{"name":"p"}': {".": {}, "f:name": {}, "f:weight": {}},
        'k:{"name":"q"}': {".": {}, "f:name": {}},
    }
    left = apply(widgets, widget())["spec"]
    assert left["tags"] == ["tc", "tb"]
    assert left["parts"] == [{"name": "n", "weight": 1}, {"name": "p", "weight": 1}]


def test_pod_list_items_are_owned_by_key(pods: Collection):
    container = {
        "name": "c", "image": "i", "command": ["x"], "ports": [{"containerPort": 80}],
        "env": [{"name": "A", "value": "1"}],
    }  # fmt: skip
    body = {
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": "p", "labels": {"a": "1"}, "finalizers": ["x.org/a"]},
        "spec": {"containers": [container], "nodeSelector": {"n": "1"}},
    }  # fmt: skip
    made = apply(pods, body)
    assert entries(made)["a", "Apply"] == {
        "f:metadata": {"f:labels": {"f:a": {}}, "f:finalizers": {'v:"x.org/a"': {}}},
        "f:spec": {
            "f:containers": {
                'k:{"name":"c"}': {
                    ".": {}, "f:name": {}, "f:image": {}, "f:command": {},
                    "f:env": {'k:{"name":"A"}': {".": {}, "f:name": {}, "f:value": {}}},
                    "f:ports": {
                        'k:{"containerPort":80,"protocol":"TCP"}': {".": {}, "f:containerPort": {}}
                    },
                }
            },
            "f:nodeSelector": {},
        },
    }  # fmt: skip
    body["metadata"] = {"name": "p", "labels": {"b": "1"}}
    labelled = {key: body[key] for key in ("apiVersion", "kind", "metadata")}
    assert apply(pods, labelled, "b")["metadata"]["labels"] == {"a": "1", "b": "1"}
    pods.patch("p", {"metadata": {"finalizers": None}})


def test_invalid_apply_requests_are_rejected(widgets: Collection, api_server: ApiServer):
    made = apply(widgets, widget())
    for query, body, kind, said in (
        ("", widget(), APPLY, "fieldManager: Required value: is required for apply patch"),
        ("?fieldManager=" + "x" * 129, widget(), APPLY, "Too long: may not be more than 128"),
        ("?fieldManager=" + quote("\n"), {}, MERGE, "invalid character U+000A (at position 0)"),
        ("?force=true", {}, MERGE, "force: Forbidden: may not be specified for non-apply patch"),
    ):
        answer = widgets.refused(422, "PATCH", "w" + query, body, kind)
        assert answer["message"].startswith('PatchOptions.meta.k8s.io "" is invalid: ')
        assert said in answer["message"]
    for body, code, said in (
        ({**widget(), "apiVersion": "test.kubeai.org/v2"}, 400, "invalid object type"),
        ({**widget(), "kind": "Gadget"}, 400, "invalid object type"),
        ({"metadata": {"name": "w"}}, 400, "invalid object type"),
        (widget("v"), 400, "does not match the name on the URL"),
        (widget(metadata={"namespace": "other"}), 400, "namespace of the provided object"),
        (widget(metadata={"managedFields": []}), 400, "metadata.managedFields must be nil"),
        (widget(metadata={"resourceVersion": "1"}), 409, "the object has been modified"),
        (widget(metadata={"uid": "1"}), 422, "metadata.uid"),
        (widget(color="green"), 422, "spec.color: Unsupported value"),
    ):
        answer = widgets.refused(code, "PATCH", "w?fieldManager=a", body, APPLY)
        assert said in answer["message"]
    widgets.refused(404, "PATCH", "none/status?fieldManager=a", widget("none"), APPLY)
    assert widgets("GET", "w")[1] == made
    path = "/api/v1/namespaces/nowhere/configmaps/c?fieldManager=a"
    code, answer = api_server.request("PATCH", path, config(), APPLY)
    assert (code, answer["message"]) == (404, 'namespaces "nowhere" not found')


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"odd": 1}, ".spec.odd: field not declared in schema"),
        ({"tags": ["t1", "t1"]}, '.spec.tags: duplicate entries for key [="t1"]'),
        ({"parts": [{"name": "p"}] * 2}, '.spec.parts: duplicate entries for key [name="p"]'),
        ({"parts": [{"weight": 1}]}, "omits all key fields"),
        ({"size": "3"}, ".spec.size: expected "),
        ({"labels": "x"}, ".spec.labels: expected map, got "),
    ],
)
def test_apply_that_violates_the_schema_names_the_field(widgets: Collection, spec: dict, said: str):
    code, answer = asked(widgets, widget(**spec))
    # A real API server calls this an error of its own.
    assert code == (400 if widgets.server.kind == "embedded" else 500)
    assert answer["message"].startswith("failed to create typed patch object (")
    assert said in answer["message"]


def test_a_dry_run_of_an_apply_writes_nothing(configs: Collection):
    code, answer = asked(configs, config(a="1"), "a", "&dryRun=All")
    assert (code, answer["data"]) == (201, {"a": "1"})
    assert configs("GET", "c")[0] == 404
    made = apply(configs, config(a="1"))
    answer = apply(configs, config(a="2"), "a", "&dryRun=All")
    assert answer["data"] == {"a": "2"}
    assert configs("GET", "c")[1] == made
    conflicting = configs("PATCH", "c?fieldManager=b&dryRun=All", config(a="3"), APPLY)
    assert conflicting[0] == 409


# Other writes.


def test_writes_are_attributed_to_their_managers(widgets: Collection):
    headers = {"User-Agent": "browser/5.0 (on something)"}
    code, made = widgets.server.request("POST", widgets.path, widget(size=3), headers=headers)
    assert code == 201
    assert entries(made) == {
        ("browser", "Update"): {"f:spec": {".": {}, "f:size": {}, "f:color": {}}}
    }
    patched = widgets.patch("w?fieldManager=b", {"spec": {"size": 4, "nick": "n"}})
    assert entries(patched) == {
        ("browser", "Update"): {"f:spec": {".": {}, "f:color": {}}},
        ("b", "Update"): {"f:spec": {"f:size": {}, "f:nick": {}}},
    }
    patched["spec"] = {"size": 4}
    code, put = widgets("PUT", "w?fieldManager=c", patched)
    assert entries(put)["b", "Update"] == {"f:spec": {"f:size": {}}}
    assert ("c", "Update") not in entries(put)
    assert widgets.patch("w?fieldManager=d", {"spec": {"size": 4}}) == put
    answer = conflict(widgets, widget(size=5))
    assert answer["message"] == (
        'Apply failed with 1 conflict: conflict with "b" using test.kubeai.org/v1: .spec.size'
    )


def test_an_update_takes_fields_from_an_applier(widgets: Collection):
    apply(widgets, widget(size=3, nick="n"))
    changed = widgets.patch("w?fieldManager=b", {"spec": {"size": 4}})
    assert entries(changed) == {
        ("a", "Apply"): {"f:spec": {"f:nick": {}}},
        ("b", "Update"): {"f:spec": {"f:size": {}}},
    }
    gone = widgets.patch("w?fieldManager=b", {"spec": {"nick": None}})
    assert ("a", "Apply") not in entries(gone)


def test_invalid_update_is_rejected_as_without_managed_fields(
    widgets: Collection, pods: Collection
):
    made = widgets.make(widget(parts=[{"name": "p"}]))
    made["spec"]["parts"] = [{"weight": 1}]
    answer = widgets.refused(422, "PUT", "w", made)
    assert "spec.parts[0].name: Required value" in answer["message"]
    made = pods.make(pod())
    made["spec"]["containers"] = [{"image": "i"}]
    pods.refused(422, "PUT", "p", made)


def test_status_fields_are_owned_separately(widgets: Collection):
    apply(widgets, widget(size=3))
    status = {"replicas": 1, "conditions": [{"type": "A"}]}
    body = {**widget(size=9, metadata={"labels": {"x": "1"}}), "status": status}
    observed = apply(widgets, body, "s", sub="/status")
    assert observed["status"] == status
    assert observed["spec"]["size"] == 3
    assert "labels" not in observed["metadata"]
    found = {entry["manager"]: entry for entry in observed["metadata"]["managedFields"]}
    assert found["s"]["subresource"] == "status"
    assert found["s"]["fieldsV1"] == {"f:status": {"f:replicas": {}, "f:conditions": {}}}
    again = apply(widgets, {**widget(size=4), "status": {"replicas": 7}})
    assert again["status"] == status
    body = {**widget(), "status": {"replicas": 2}}
    answer = conflict(widgets, body, "t", "/status")
    assert answer["details"]["causes"][0] == {
        "reason": "FieldManagerConflict", "field": ".status.replicas",
        "message": 'conflict with "s" with subresource "status"',
    }  # fmt: skip
    updated = widgets.patch("w/status?fieldManager=u", {"status": {"replicas": 3}})
    (entry,) = [e for e in updated["metadata"]["managedFields"] if e["manager"] == "u"]
    assert (entry["operation"], entry["subresource"]) == ("Update", "status")


def test_a_scale_takes_the_replicas_from_an_applier(widgets: Collection):
    apply(widgets, widget(size=5, replicas=1))
    widgets.patch("w/scale?fieldManager=s", {"spec": {"replicas": 2}})
    found = {e["manager"]: e for e in widgets("GET", "w")[1]["metadata"]["managedFields"]}
    assert (found["s"]["operation"], found["s"]["subresource"]) == ("Update", "scale")
    assert found["s"]["fieldsV1"] == {"f:spec": {"f:replicas": {}}}
    assert found["a"]["fieldsV1"] == {"f:spec": {"f:size": {}}}
    answer = conflict(widgets, widget(size=5, replicas=1))
    assert answer["details"]["causes"][0]["field"] == ".spec.replicas"
    assert apply(widgets, widget(size=5))["spec"]["replicas"] == 2


def test_managed_fields_can_be_cleared_and_begin_again_with_an_apply(widgets: Collection):
    applied = apply(widgets, widget(size=3, nick="n"))
    assert widgets.patch("w", {"metadata": {"managedFields": []}}) == applied
    cleared = widgets.patch("w", {"metadata": {"managedFields": [{}]}})
    assert "managedFields" not in cleared["metadata"]
    untracked = widgets.patch("w", {"spec": {"size": 4}})
    assert "managedFields" not in untracked["metadata"]
    answer = conflict(widgets, widget(size=5))
    assert 'conflict with "before-first-apply" using test.kubeai.org/v1' in answer["message"]
    applied = apply(widgets, widget(size=4))
    assert entries(applied) == {
        ("a", "Apply"): {"f:spec": {"f:size": {}}},
        ("before-first-apply", "Update"): {
            "f:spec": {".": {}, "f:size": {}, "f:nick": {}, "f:color": {}}
        },
    }


def test_managed_fields_can_be_replaced_but_not_corrupted(configs: Collection):
    apply(configs, config(a="1"))
    entry = {"manager": "x", "operation": "Update", "apiVersion": "v1", "fieldsType": "FieldsV1",
             "fieldsV1": {"f:data": {"f:q": {}}}}  # fmt: skip
    operation = {"op": "replace", "path": "/metadata/managedFields", "value": [entry]}
    patched = configs.patch("c", [operation], JSON_PATCH)
    assert entries(patched) == {("x", "Update"): {"f:data": {"f:q": {}}}}
    for wrong in (None, [{**entry, "operation": "Other"}], [{**entry, "fieldsType": ""}]):
        kept = configs.patch("c", {"metadata": {"managedFields": wrong}})
        assert entries(kept) == entries(patched)
    patched["metadata"]["managedFields"] = "none"
    configs.refused(400, "PUT", "c", patched)


def test_oldest_update_managers_are_merged(widgets: Collection):
    widgets.make(widget())
    for index in range(14):
        label = {"metadata": {"labels": {f"l{index}": "1"}}}
        last = widgets.patch(f"w?fieldManager=m{index:02}", label)
    found = [entry["manager"] for entry in last["metadata"]["managedFields"]]
    assert len(found) == 10
    assert "ancient-changes" in found


def test_kubectl_migrates_client_side_apply_to_server_side(configs: Collection):
    recorded = '{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"c"},"data":{"a":"1"}}'
    annotation = "kubectl.kubernetes.io/last-applied-configuration"
    made = config(a="1", b="1")
    made["metadata"]["annotations"] = {annotation: recorded}
    assert configs("POST", "?fieldManager=kubectl-client-side-apply", made)[0] == 201
    answer = conflict(configs, config(a="2"), "somebody")
    assert answer["details"]["causes"][0]["field"] == ".data.a"
    answer = conflict(configs, config(a="2", b="2"), "kubectl")
    assert [cause["field"] for cause in answer["details"]["causes"]] == [".data.b"]
    taken = apply(configs, config(a="2"), "kubectl")
    assert taken["data"] == {"a": "2", "b": "1"}
    assert '"a":"2"' in taken["metadata"]["annotations"][annotation]


# Mistakes.


@pytest.mark.parametrize("kind", ["application/json", "application/yaml"])
def test_duplicate_keys_are_reported(configs: Collection, kind: str):
    if kind == "application/json":
        text = b'{"metadata":{"name":"c","name":"c"},"data":{"a":"1","a":"2"}}'
    else:
        text = b"apiVersion: v1\nkind: ConfigMap\nmetadata: {name: c}\ndata: {a: '1', a: '2'}\n"
    server, path = configs.server, configs.path + "?fieldValidation="
    code, answer = server.request("POST", path + "Strict", text, kind)
    assert code == 400
    assert "strict decoding error: " in answer["message"]
    assert 'duplicate field "data.a"' in answer["message"] or 'key "a" already' in answer["message"]
    assert server.request("POST", path + "Ignore&dryRun=All", text, kind)[0] == 201
    code, answer = server.request("POST", path + "Warn", text, kind)
    assert (code, answer["data"]) == (201, {"a": "2"})


def test_duplicate_keys_in_a_custom_object_are_named_by_their_path(widgets: Collection):
    text = (
        b'{"apiVersion":"test.kubeai.org/v1","kind":"Widget","metadata":{"name":"w"},'
        b'"spec":{"size":1,"size":2,"parts":[{"name":"a","name":"b"}]}}'
    )
    answer = widgets.refused(400, "POST", "?fieldValidation=Strict", text)
    for path in ("spec.size", "spec.parts[0].name"):
        assert f'duplicate field "{path}"' in answer["message"]
