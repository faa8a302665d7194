"""Writes on both APIs: versions, patches, subresources, dry runs and deletions."""

from __future__ import annotations

import pytest
from servers import ApiServer
from widgets import JSON_PATCH, MERGE, STRATEGIC, Collection, pod, widget

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


def test_a_collection_is_deleted_by_selector(configs: Collection):
    for name in ("a", "b", "c"):
        configs.make({"metadata": {"name": name, "labels": {"keep": str(name == "b")}}})
    assert configs("DELETE", "?labelSelector=keep=False")[0] == 200
    assert configs.names() == ["b"]
