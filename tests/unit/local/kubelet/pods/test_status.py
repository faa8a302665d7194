"""Phase and conditions, derived from the containers' states."""

import pytest

from kubeai.local.kubelet.pods.pod import Condition, Running, Terminated, Waiting, decode_pod
from kubeai.local.kubelet.pods.status import ContainerRecord, PhaseOverride, pod_status

UP = Running("2026-01-01T00:00:00Z")
GOOD, BAD = Terminated(0, "Completed"), Terminated(1, "Error")
CRASHED = Waiting("CrashLoopBackOff")
CREATING = Waiting("ContainerCreating")


def pod(policy="Always", gates=(), conditions=()):
    return decode_pod(
        {
            "metadata": {"name": "p", "namespace": "default", "uid": "u"},
            "spec": {
                "restartPolicy": policy,
                "containers": [{"name": "server"}],
                "readinessGates": [{"conditionType": gate} for gate in gates],
            },
            "status": {"conditions": list(conditions)},
        }
    )


def record(state, **fields):
    return ContainerRecord("server", "image", state, **fields)


def status(of, main, init=(), **options):
    defaults = {
        "sidecars": frozenset(),
        "initialized": True,
        "ip": "127.1.1.1",
        "host_ip": "127.0.0.1",
        "start_time": "t0",
        "now": "t1",
        "before": {},
    }
    return pod_status(of, init, main, **defaults | options)


def conditions(answer):
    return {c["type"]: c for c in answer["conditions"]}


@pytest.mark.parametrize(
    ("policy", "states", "phase"),
    [
        ("Always", [record(CREATING)], "Pending"),
        ("Always", [record(UP)], "Running"),
        ("Always", [record(UP), record(CREATING)], "Pending"),
        ("Always", [record(CRASHED, last=BAD)], "Running"),
        ("Always", [record(BAD)], "Running"),
        ("Always", [record(GOOD)], "Running"),
        ("OnFailure", [record(GOOD)], "Succeeded"),
        ("OnFailure", [record(BAD)], "Running"),
        ("OnFailure", [record(GOOD), record(CRASHED, last=BAD)], "Running"),
        ("OnFailure", [record(GOOD), record(UP)], "Running"),
        ("Never", [record(GOOD)], "Succeeded"),
        ("Never", [record(BAD)], "Failed"),
        ("Never", [record(GOOD), record(BAD)], "Failed"),
        ("Never", [record(GOOD), record(UP)], "Running"),
    ],
)
def test_the_phase_equals_that_of_kubernetes(policy, states, phase):
    assert status(pod(policy), states)["phase"] == phase


@pytest.mark.parametrize(
    ("policy", "state", "phase"),
    [("Always", BAD, "Pending"), ("Never", BAD, "Failed"), ("Never", UP, "Pending")],
)
def test_a_pod_with_unfinished_init_containers_is_pending_or_failed(policy, state, phase):
    answer = status(pod(policy), [record(CREATING)], [record(state)], initialized=False)
    assert answer["phase"] == phase
    assert conditions(answer)["Initialized"]["message"].endswith("[server]")


def test_ready_waits_for_every_container_and_names_the_unready_ones():
    answer = status(pod(), [record(UP, ready=True), ContainerRecord("sidecar", "i", UP)])
    ready = conditions(answer)["Ready"]
    assert (ready["status"], ready["reason"]) == ("False", "ContainersNotReady")
    assert ready["message"] == "containers with unready status: [sidecar]"


def test_ready_waits_for_a_readiness_gate():
    gate = {"type": "gate", "status": "False"}
    of = pod(gates=["gate"], conditions=[gate])
    answer = conditions(status(of, [record(UP, ready=True)]))
    assert answer["ContainersReady"]["status"] == "True"
    assert answer["Ready"]["reason"] == "ReadinessGatesNotReady"
    assert answer["gate"] == gate
    of = pod(gates=["gate"], conditions=[gate | {"status": "True"}])
    assert conditions(status(of, [record(UP, ready=True)]))["Ready"]["status"] == "True"


def test_a_transition_time_changes_only_with_the_status():
    before = {
        "Ready": Condition("Ready", "False", last_transition_time="t0"),
        "Initialized": Condition("Initialized", "True", last_transition_time="t0"),
    }
    answer = conditions(status(pod(), [record(UP, ready=True)], before=before))
    assert answer["Initialized"]["lastTransitionTime"] == "t0"
    assert answer["Ready"]["lastTransitionTime"] == "t1"


def test_a_container_status_has_the_form_that_kubectl_expects():
    last = Terminated(137, "OOMKilled", "used too much", 9, "t0", "t1", "process://u/server/0")
    shown = status(pod(), [record(UP, last=last, restarts=1, ready=True, started=True)])
    container = shown["containerStatuses"][0]
    assert container["state"] == {"running": {"startedAt": "2026-01-01T00:00:00Z"}}
    assert container["lastState"]["terminated"]["exitCode"] == 137
    assert (container["restartCount"], container["ready"]) == (1, True)
    completed = status(pod("Never"), [record(GOOD)])["containerStatuses"][0]["state"]
    assert completed == {"terminated": {"exitCode": 0, "reason": "Completed"}}


def test_a_pods_termination_messages_are_limited_to_12_kib_in_total():
    last = Terminated(1, "Error", "x" * 4096)
    shown = status(pod(), [record(UP, last=last) for _ in range(4)])["containerStatuses"]
    assert {len(c["lastState"]["terminated"]["message"]) for c in shown} == {3072}


def test_an_outcome_is_reported_with_its_reason():
    answer = status(
        pod(), [record(BAD)], override=PhaseOverride("Failed", "DeadlineExceeded", "late")
    )
    assert (answer["phase"], answer["reason"]) == ("Failed", "DeadlineExceeded")
    assert conditions(answer)["Ready"]["reason"] == "PodFailed"


def test_a_pending_pod_reports_what_it_waits_for():
    waiting = Waiting("EngineNotInstalled", "vllm is not installed")
    assert status(pod(), [record(waiting)])["message"] == "vllm is not installed"
    assert status(pod(), [record(UP)])["message"] is None
