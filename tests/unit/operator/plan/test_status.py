"""What the status reports: conditions of the pods, errors in the spec, rejections, adapters."""

from __future__ import annotations

from datetime import timedelta

import msgspec
import pytest
from fakes.plans import NOW, conditions, make_model, make_pod, plan_of, with_adapters

from kubeai.api.config.system import parse_config
from kubeai.api.model import ModelStatusAdapter
from kubeai.operator.adapter_steps import AdaptersView
from kubeai.operator.plan import Observed, plan
from kubeai.operator.pods import Trouble

CONFIG = parse_config("resourceProfiles: {cpu: {requests: {cpu: 1}}}")


def test_a_model_error_becomes_a_condition_and_running_pods_are_kept():
    model = make_model(replicas=2, resourceProfile="gone:1")
    creates, deletes, adopted, _, status = plan_of(model, make_pod("a", hash="old"))
    assert (creates, deletes, adopted) == ([], [], [])
    assert conditions(status) == {
        "Ready": ("False", "InvalidProfile"),
        "Progressing": ("False", "InvalidProfile"),
        "Degraded": ("True", "InvalidProfile"),
    }
    assert "gone" in status.conditions[0].message
    assert (status.replicas.all, status.replicas.ready) == (1, 1)


def test_a_model_in_error_can_still_be_scaled_down():
    model = make_model(replicas=0, resourceProfile="gone:1")
    _, deletes, *_ = plan_of(model, make_pod("a"))
    assert deletes == ["a"]


@pytest.mark.parametrize(
    ("spec", "pods", "ready", "progressing"),
    [
        ({"replicas": 0}, [], ("True", "ScaledToZero"), ("False", "UpToDate")),
        ({"replicas": 0, "autoscalingDisabled": True}, [],
         ("False", "ScaledToZero"), ("False", "UpToDate")),
        ({"replicas": 1}, [], ("False", "ReplicasStarting"), ("True", "ReplicasStarting")),
        ({"replicas": 2}, [make_pod("a"), make_pod("b")],
         ("True", "AllReplicasReady"), ("False", "UpToDate")),
        ({"replicas": 2}, [make_pod("a"), make_pod("b", ready=False)],
         ("True", "SomeReplicasReady"), ("True", "ReplicasStarting")),
        ({"replicas": 1},
         [make_pod("a", ready=False, trouble=Trouble("Unschedulable", "no GPU"))],
         ("False", "Unschedulable"), ("True", "ReplicasStarting")),
        ({"replicas": 1}, [make_pod("a", hash="old")],
         ("True", "AllReplicasReady"), ("True", "RollingOut")),
    ],
)  # fmt: skip
def test_conditions_reflect_the_state_of_the_pods(spec, pods, ready, progressing):
    *_, status = plan_of(make_model(**spec), *pods)
    trouble = [pod.trouble.reason for pod in pods if pod.trouble]
    degraded = ("True", trouble[0]) if trouble else ("False", "AsExpected")
    assert conditions(status) == {"Ready": ready, "Progressing": progressing, "Degraded": degraded}
    assert status.selector == "app=model,model=m"


@pytest.mark.parametrize(
    "others", [[make_pod("a", hash="old")], [make_pod("a")]], ids=["rollout", "scale-up"]
)
def test_a_replica_that_cannot_start_is_reported_while_others_serve(others):
    model = make_model(replicas=1 if others[0].hash == "old" else 2)
    trouble = Trouble("CrashLoopBackOff", "container server keeps exiting")
    *_, status = plan_of(model, *others, make_pod("b", ready=False, trouble=trouble))
    ready, progressing, degraded = status.conditions
    assert ready.status == progressing.status == degraded.status == "True"
    assert degraded.reason == "CrashLoopBackOff"
    assert progressing.message.endswith("CrashLoopBackOff: container server keeps exiting")


def test_conditions_show_a_failing_containers_last_lines_until_it_recovers():
    trouble = Trouble("CrashLoopBackOff", "container server keeps exiting", "CUDA error")
    until_s = NOW.timestamp() + 1
    failing = make_pod("a", ready=False, trouble=trouble, trouble_until_s=until_s)
    *_, status = plan_of(make_model(replicas=1), failing)
    told = {c.type: c.message for c in status.conditions}
    text = "container server keeps exiting: CUDA error"
    assert told["Ready"] == told["Degraded"] == text
    assert told["Progressing"].endswith(text)
    recovered = msgspec.structs.replace(failing, trouble_until_s=NOW.timestamp())
    *_, status = plan_of(make_model(replicas=1), recovered)
    assert conditions(status)["Degraded"] == ("False", "AsExpected")


def test_a_rejected_create_is_reported_and_retried():
    trouble = Trouble("PodRefused", "exceeded quota")
    creates, *_, status = plan_of(make_model(replicas=1), create_error=trouble)
    assert len(creates) == 1
    assert conditions(status)["Ready"] == ("False", "PodRefused")
    assert status.replicas.all == 0


def test_an_unchanged_status_is_not_written():
    model = make_model(replicas=1)
    *_, status = plan_of(model, make_pod("a"))
    told = msgspec.structs.replace(model, status=status)
    later = Observed(pods=(make_pod("a"),))
    assert plan(told, CONFIG, later, NOW + timedelta(hours=1)) == []


def test_a_condition_keeps_its_time_until_its_status_changes_and_foreign_ones_are_kept():
    theirs = {"type": "Theirs", "status": "Unknown"}
    model = make_model(replicas=2, status={"conditions": [theirs]})
    *_, first = plan_of(model, make_pod("a"), make_pod("b"))
    model = msgspec.structs.replace(model, status=first)
    later = NOW + timedelta(minutes=1)
    observed = Observed(pods=(make_pod("a"), make_pod("b", ready=False)))
    (patch,) = plan(model, CONFIG, observed, later)
    times = {c.type: c.last_transition_time for c in patch.status.conditions}
    assert times == {"Ready": NOW, "Progressing": later, "Degraded": NOW, "Theirs": None}
    assert patch.status.conditions[-1].status == "Unknown"


@pytest.mark.parametrize(
    ("view", "adapters_loaded", "degraded"),
    [
        (AdaptersView(), ("False", "NoReplicas"), ("False", "AsExpected")),
        (AdaptersView(2, 1), ("False", "Loading"), ("False", "AsExpected")),
        (AdaptersView(2, 2), ("True", "Loaded"), ("False", "AsExpected")),
        (AdaptersView(2, 1, (ModelStatusAdapter(name="a", message="pod a: no such adapter"),)),
         ("False", "LoadFailed"), ("True", "AdaptersFailed")),
    ],
)  # fmt: skip
def test_adapters_are_reported_in_the_status(view, adapters_loaded, degraded):
    *_, status = plan_of(with_adapters(replicas=0), adapters=view)
    assert conditions(status)["AdaptersLoaded"] == adapters_loaded
    assert conditions(status)["Degraded"] == degraded
