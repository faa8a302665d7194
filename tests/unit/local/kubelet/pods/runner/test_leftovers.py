"""Pods of a kubelet that has died or shut down."""

import pytest
from fakes.running_pods import POLITE, PYTHON, SLEEP, is_ready


def life(state, **fields):
    return {
        "phase": "Running",
        "startTime": "2026-01-01T00:00:00Z",
        "containerStatuses": [{"name": "server", "state": state, "restartCount": 2, **fields}],
    }


RAN = {"running": {"startedAt": "2026-01-01T00:00:00Z"}}
ENDED = {"terminated": {"exitCode": 0, "reason": "Completed"}}


async def test_a_container_whose_kubelet_died_is_restarted_and_counted(run):
    pod = run({"command": SLEEP}, status=life(RAN))
    await pod.until_ready()
    assert pod.container()["restartCount"] == 3
    ended = pod.container()["lastState"]["terminated"]
    assert (ended["exitCode"], ended["reason"]) == (137, "ContainerStatusUnknown")
    assert pod.status["startTime"] == "2026-01-01T00:00:00Z"


async def test_a_pod_with_restart_policy_never_fails_with_its_kubelet(run):
    pod = run({"command": SLEEP}, status=life(RAN), restartPolicy="Never")
    await pod.over()
    assert pod.status["phase"] == "Failed"
    assert pod.container()["restartCount"] == 2


async def test_a_succeeded_container_is_not_run_again(run):
    pod = run({"command": SLEEP}, status=life(ENDED), restartPolicy="OnFailure")
    await pod.over()
    assert pod.status["phase"] == "Succeeded"


@pytest.mark.parametrize("policy", ["Always", "OnFailure", "Never"])
async def test_the_next_kubelet_starts_the_pods_of_one_that_shut_down(run, policy):
    pod = run({"command": [*PYTHON, POLITE]}, restartPolicy=policy)
    await pod.until(lambda: pod.log() == ["up"])
    await pod.runner.shut_down(5)
    left = pod.status
    assert pod.log() == ["up", "terminated"]
    assert (left["phase"], is_ready(left)) == ("Running", False)
    assert pod.container()["state"]["waiting"]["reason"] == "KubeletStopped"
    assert pod.container()["lastState"]["terminated"]["reason"] == "KubeletStopped"
    again = run({"command": SLEEP}, status=left, restartPolicy=policy)
    await again.until_ready()
    assert again.container()["restartCount"] == 1
