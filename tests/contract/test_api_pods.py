"""Pods and Jobs on both APIs: defaults, what is rejected or immutable, and their deletion."""

from __future__ import annotations

import pytest
from widgets import STRATEGIC, TABLE, Collection, job, pod

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
