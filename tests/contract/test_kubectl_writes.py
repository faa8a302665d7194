"""Stock kubectl that writes: server-side apply, edit, dry runs, patches; and explain."""

from __future__ import annotations

import orjson
import pytest
import yaml
from kubectls import MODEL, POD, Kubectl

pytestmark = pytest.mark.kubectl
RECORD = "kubectl.kubernetes.io/last-applied-configuration"


def managers(kubectl: Kubectl, kind: str = "model", name: str = "tiny") -> dict:
    """Fields by manager and operation."""
    found = kubectl("get", kind, name, "-o", "json", "--show-managed-fields")
    return {
        (entry["manager"], entry["operation"]): entry["fieldsV1"]
        for entry in orjson.loads(found)["metadata"]["managedFields"]
    }


def spec(kubectl: Kubectl) -> dict:
    return orjson.loads(kubectl("get", "model", "tiny", "-o", "json"))["spec"]


# Server-side apply.


def test_apply_from_the_server_side(kubectl: Kubectl):
    applied = "model.kubeai.org/tiny serverside-applied\n"
    assert kubectl("apply", "--server-side", "-f", "-", given=MODEL) == applied
    assert kubectl("apply", "--server-side", "-f", "-", given=MODEL) == applied
    assert managers(kubectl) == {
        ("kubectl", "Apply"): {
            "f:spec": {"f:engine": {}, "f:features": {}, "f:resourceProfile": {}, "f:url": {}}
        }
    }
    assert "managedFields" not in kubectl("get", "model", "tiny", "-o", "yaml")
    removed = MODEL.replace("  resourceProfile: cpu:1\n", "")
    assert kubectl("apply", "--server-side", "-f", "-", given=removed) == applied
    assert "resourceProfile" not in spec(kubectl)


def test_apply_conflict_is_reported_and_can_be_forced(kubectl: Kubectl):
    kubectl("apply", "--server-side", "-f", "-", given=MODEL)
    other = ("apply", "--server-side", "--field-manager=other", "-f", "-")
    changed = MODEL.replace("cpu:1", "cpu:2")
    said = kubectl(*other, given=changed, code=1)
    assert 'Apply failed with 1 conflict: conflict with "kubectl": .spec.resourceProfile' in said
    assert spec(kubectl)["resourceProfile"] == "cpu:1"
    kubectl(*other, "--force-conflicts", given=changed)
    assert spec(kubectl)["resourceProfile"] == "cpu:2"
    assert "f:resourceProfile" in managers(kubectl)["other", "Apply"]["f:spec"]
    assert "f:resourceProfile" not in managers(kubectl)["kubectl", "Apply"]["f:spec"]


def test_client_side_apply_moves_to_the_server_side(kubectl: Kubectl):
    labelled = MODEL.replace("  name: tiny\n", "  name: tiny\n  labels: {team: a}\n")
    kubectl("apply", "-f", "-", given=labelled)
    assert set(managers(kubectl)) == {("kubectl-client-side-apply", "Update")}
    changed = MODEL.replace("cpu:1", "cpu:3")
    kubectl("apply", "--server-side", "-f", "-", given=changed)
    model = orjson.loads(kubectl("get", "model", "tiny", "-o", "json"))
    assert "labels" not in model["metadata"]
    assert model["spec"]["resourceProfile"] == "cpu:3"
    assert '"resourceProfile":"cpu:3"' in model["metadata"]["annotations"][RECORD]
    assert ("kubectl", "Apply") in managers(kubectl)
    assert ("kubectl-client-side-apply", "Update") not in managers(kubectl)
    back = MODEL.replace("cpu:1", "cpu:4")
    assert kubectl("apply", "-f", "-", given=back) == "model.kubeai.org/tiny configured\n"
    assert spec(kubectl)["resourceProfile"] == "cpu:4"


def test_status_and_pods_from_the_server_side(kubectl: Kubectl):
    kubectl("apply", "--server-side", "-f", "-", given=MODEL)
    status = {
        "apiVersion": "kubeai.org/v1", "kind": "Model", "metadata": {"name": "tiny"},
        "status": {"replicas": {"all": 2, "ready": 1}},
    }  # fmt: skip
    apply = ("apply", "--server-side", "-f", "-")
    kubectl(*apply, "--subresource=status", "--field-manager=s", given=yaml.safe_dump(status))
    assert kubectl("get", "model", "tiny", "-o", "jsonpath={.status.replicas.all}") == "2"
    assert managers(kubectl)["s", "Apply"] == {
        "f:status": {"f:replicas": {"f:all": {}, "f:ready": {}}}
    }
    kubectl(*apply, given=yaml.safe_dump(POD))
    labels = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod", "labels": {"x": "1"}}}
    kubectl(*apply, "--field-manager=other", given=yaml.safe_dump(labels))
    found = kubectl("get", "pod", "pod", "-o", "jsonpath={.metadata.labels}")
    assert orjson.loads(found) == {"app": "model", "x": "1"}


def test_a_diff_from_the_server_side(kubectl: Kubectl):
    kubectl("apply", "--server-side", "-f", "-", given=MODEL)
    assert kubectl("diff", "--server-side", "-f", "-", given=MODEL) == ""
    kubectl("diff", "--server-side", "-f", "-", given=MODEL.replace("cpu:1", "cpu:2"), code=1)
    assert spec(kubectl)["resourceProfile"] == "cpu:1"


# Dry runs.


def test_dry_runs_write_nothing(kubectl: Kubectl):
    assert kubectl("apply", "--dry-run=client", "-f", "-", given=MODEL) == (
        "model.kubeai.org/tiny created (dry run)\n"
    )
    assert kubectl("apply", "--dry-run=server", "-f", "-", given=MODEL) == (
        "model.kubeai.org/tiny created (server dry run)\n"
    )
    assert kubectl("apply", "--server-side", "--dry-run=server", "-f", "-", given=MODEL) == (
        "model.kubeai.org/tiny serverside-applied (server dry run)\n"
    )
    assert "NotFound" in kubectl("get", "model", "tiny", code=1)
    config = ("create", "configmap", "c", "--from-literal=a=b", "-o", "yaml")
    assert "uid" not in kubectl(*config, "--dry-run=client")
    assert yaml.safe_load(kubectl(*config, "--dry-run=server"))["metadata"]["uid"]
    assert kubectl("get", "configmap", "c", "--ignore-not-found") == ""
    kubectl("apply", "-f", "-", given=MODEL)
    kubectl("scale", "model", "tiny", "--replicas=3", "--dry-run=server")
    kubectl("label", "model", "tiny", "a=b", "--dry-run=server")
    kubectl("delete", "model", "tiny", "--dry-run=server")
    wrong = MODEL.replace("VLLM", "Torch")
    said = kubectl("apply", "--dry-run=server", "-f", "-", given=wrong, code=1)
    assert "spec.engine: Unsupported value" in said
    model = orjson.loads(kubectl("get", "model", "tiny", "-o", "json"))
    assert "labels" not in model["metadata"]
    assert model["spec"].get("replicas") != 3


# Field validation.


@pytest.mark.parametrize("side", [(), ("--server-side",)], ids=["client", "server"])
def test_unknown_fields_by_validation(kubectl: Kubectl, side: tuple[str, ...]):
    odd = MODEL + "  replicaz: 2\n"
    said = kubectl("apply", *side, "-f", "-", given=odd, code=1)
    assert "replicaz" in said
    if side:
        return  # there the schema is the law, whatever the validation
    for level, warned in (("warn", True), ("ignore", False)):
        said = kubectl("apply", f"--validate={level}", "-f", "-", given=odd, errors=True)
        assert ('unknown field "spec.replicaz"' in said) is warned
    assert "replicaz" not in spec(kubectl)


# Edits.


def test_edit_changes_a_model_and_reports_what_the_schema_rejects(kubectl: Kubectl):
    kubectl("apply", "-f", "-", given=MODEL)
    kubectl.set_editor("sed -i s/cpu:1/cpu:5/")
    assert kubectl("edit", "model", "tiny") == "model.kubeai.org/tiny edited\n"
    assert spec(kubectl)["resourceProfile"] == "cpu:5"
    assert ("kubectl-edit", "Update") in managers(kubectl)
    kubectl.set_editor("true")
    said = kubectl("edit", "model", "tiny", errors=True)
    assert "Edit cancelled, no changes made." in said
    kubectl.set_editor("sed -i s/VLLM/Torch/")
    said = kubectl("edit", "model", "tiny", code=1)
    assert 'models.kubeai.org "tiny" is invalid' in said
    assert spec(kubectl)["engine"] == "VLLM"


def test_edit_of_a_built_in_object(kubectl: Kubectl):
    kubectl("create", "configmap", "c", "--from-literal=a=one")
    kubectl.set_editor("sed -i s/one/two/")
    assert kubectl("edit", "configmap", "c") == "configmap/c edited\n"
    assert kubectl("get", "configmap", "c", "-o", "jsonpath={.data.a}") == "two"


# Patches.


def test_strategic_merge_is_for_built_in_objects(kubectl: Kubectl):
    kubectl("create", "-f", "-", given=yaml.safe_dump(POD))
    patch = {"spec": {"containers": [{"name": "server", "image": "mock:2"}]}}
    kubectl("patch", "pod", "pod", "-p", orjson.dumps(patch).decode())
    containers = orjson.loads(kubectl("get", "pod", "pod", "-o", "json"))["spec"]["containers"]
    assert [(c["name"], c["image"]) for c in containers] == [("server", "mock:2")]
    kubectl("set", "image", "pod/pod", "server=mock:3")
    image = kubectl("get", "pod", "pod", "-o", "jsonpath={.spec.containers[0].image}")
    assert image == "mock:3"
    kubectl("apply", "-f", "-", given=MODEL)
    said = kubectl("patch", "model", "tiny", "-p", '{"spec":{"minReplicas":1}}', code=1)
    assert "UnsupportedMediaType" in said or "application/strategic-merge-patch+json" in said


# Explanations.


def test_explain_shows_the_fields_of_models(kubectl: Kubectl):
    said = kubectl("explain", "model.spec")
    assert "KIND:       Model" in said
    assert "FIELD: spec <Object>" in said
    for line in ("resourceProfile\t<string>", "features\t<[]string>", "replicas\t<integer>"):
        assert line in said
    replicas = kubectl("explain", "model.spec.replicas")
    description = replicas.partition("DESCRIPTION:")[2].strip()
    assert "FIELD: replicas <integer>" in replicas
    assert description
    assert "<empty>" not in description
    assert "cacheProfile\t<string>" in kubectl("explain", "model", "--recursive")
    assert 'field "bogus" does not exist' in kubectl("explain", "model.spec.bogus", code=1)


def test_explain_shows_the_fields_of_built_in_kinds(kubectl: Kubectl):
    said = kubectl("explain", "pod.spec.containers")
    assert "FIELD: containers <[]Container>" in said
    assert "env\t<[]EnvVar>" in said
    assert "FIELD: data <map[string]string>" in kubectl("explain", "configmap.data")
    assert "minReplicas" not in kubectl("explain", "job.spec")


def test_explain_reads_the_older_openapi_too(kubectl: Kubectl):
    said = kubectl("explain", "models.spec.adapters", "--output=plaintext-openapiv2")
    assert "VERSION:  kubeai.org/v1" in said
    assert "RESOURCE: adapters <[]Object>" in said
    assert "url\t<string> -required-" in said
    said = kubectl("explain", "pod.spec.containers.env", "--output=plaintext-openapiv2")
    assert "valueFrom\t<Object>" in said
    said = kubectl("explain", "cm.data", "--output=plaintext-openapiv2")
    assert "FIELD:    data <map[string]string>" in said


# Events and leases.


def test_events_of_an_object(kubectl: Kubectl, api_server, namespace: str):
    kubectl("apply", "-f", "-", given=MODEL)
    for name, kind, version in (("one", "Model", "kubeai.org/v1"), ("two", "Pod", "v1")):
        event = {
            "metadata": {"name": name}, "reason": name.title(), "message": "something",
            "type": "Normal",
            "involvedObject": {
                "kind": kind, "apiVersion": version, "name": "tiny", "namespace": namespace
            },
            "firstTimestamp": "2026-01-01T00:00:00Z", "lastTimestamp": "2026-01-01T00:00:00Z",
        }  # fmt: skip
        assert api_server.request("POST", f"/api/v1/namespaces/{namespace}/events", event)[0] == 201
    said = kubectl("events", "--for", "model/tiny")
    assert "One" in said
    assert "Two" not in said
    chosen = kubectl("get", "events", "--field-selector", "reason=Two", "-o", "name")
    assert chosen == "event/two\n"


def test_leases_are_shown_with_their_holder(kubectl: Kubectl):
    lease = {
        "apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": "leader"},
        "spec": {"holderIdentity": "first", "leaseDurationSeconds": 15,
                 "renewTime": "2026-01-01T00:00:00.123456Z"},
    }  # fmt: skip
    kubectl("create", "-f", "-", given=yaml.safe_dump(lease))
    assert kubectl("get", "leases", "--no-headers").split()[:2] == ["leader", "first"]
    kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", given=yaml.safe_dump(
        {**lease, "spec": {"holderIdentity": "second"}}
    ))  # fmt: skip
    shown = orjson.loads(kubectl("get", "lease", "leader", "-o", "json"))["spec"]
    assert shown["holderIdentity"] == "second"
    assert shown["renewTime"] == "2026-01-01T00:00:00.123456Z"
