"""The reported trouble of a pod whose containers fail, over whole crash loops."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import msgspec
import pytest

from kubeai.operator.pod_trouble import OUTPUT_MAX_CHARS
from kubeai.operator.pods import PodObject, observe

START = datetime(2026, 1, 1, tzinfo=UTC)


def at(seconds):
    return (START + timedelta(seconds=seconds)).isoformat().replace("+00:00", "Z")


def exited(began_s, ended_s, code=1, reason="Error", message=""):
    times = {"startedAt": at(began_s), "finishedAt": at(ended_s)}
    return {"terminated": {"exitCode": code, "reason": reason, "message": message, **times}}


def running(since_s):
    return {"running": {"startedAt": at(since_s)}}


WAITING = {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 10s restarting failed"}}


def trouble(state, last=None, *, restarts=0, now_s=0.0, ready_since_s=None, unready_since_s=0.0,
            name="server", policy="Always", init=False, deleted=False):  # fmt: skip
    """The trouble at ``now_s`` of a pod with one container."""
    ready = ready_since_s is not None
    since_s = ready_since_s if ready else unready_since_s
    status = {"name": name, "ready": ready, "restartCount": restarts, "state": state,
              "lastState": last or {}}  # fmt: skip
    condition = {"type": "Ready", "status": str(ready), "lastTransitionTime": at(since_s)}
    containers = "initContainerStatuses" if init else "containerStatuses"
    meta = {"name": "p", "labels": {"model": "m"}}
    if deleted:
        meta["deletionTimestamp"] = at(0)
    pod = {
        "metadata": meta,
        "spec": {"restartPolicy": policy, "containers": [{"name": name}]},
        "status": {"phase": "Running", "conditions": [condition], containers: [status]},
    }
    observed = observe(msgspec.convert(pod, PodObject))
    return observed.trouble_at((START + timedelta(seconds=now_s)).timestamp())


def reasons(*troubles):
    return [trouble and trouble.reason for trouble in troubles]


def crash_loop(run_s, backoffs_s, reason="Error"):
    """The troubles from a kubelet's statuses, one second after each and at the end of each."""
    found, began_s, last = [], 0.0, None
    for restarts, backoff_s in enumerate(backoffs_s):
        ended_s = began_s + run_s
        end = exited(began_s, ended_s, reason=reason)
        found.append(trouble(running(began_s), last, restarts=restarts, now_s=began_s + 1))
        found.append(trouble(running(began_s), last, restarts=restarts, now_s=ended_s))
        found.append(trouble(end, last, restarts=restarts, now_s=ended_s))
        if backoff_s:
            found.append(trouble(WAITING, end, restarts=restarts, now_s=ended_s + 1))
        began_s, last = ended_s + backoff_s, end
    return reasons(*found)


@pytest.mark.parametrize("run_s", [2.0, 90.0, 590.0, 3000.0])
def test_a_crash_loop_is_one_trouble_in_every_phase_of_its_container(run_s):
    """Runs of 15 minutes are typical of an engine that fails after loading its weights."""
    waits = run_s < 600
    found = crash_loop(run_s, (0, 10, 20, 40, 300) if waits else (0,) * 5)
    assert found[:2] == [None, None]
    assert found[2:5] == ["ContainerExited"] * 3
    assert set(found[5:]) == {"CrashLoopBackOff"}


def test_a_container_that_keeps_running_out_of_memory_stays_oom_killed():
    found = crash_loop(30.0, (0, 10, 20, 40), reason="OOMKilled")
    assert set(found[2:]) == {"OOMKilled"}


def test_a_crash_loop_outlasts_readiness_until_a_run_has_lasted_ten_minutes():
    last = exited(0, 60)
    found = [
        trouble(running(70), last, restarts=3, ready_since_s=90, now_s=now_s)
        for now_s in (91, 600, 669, 671)
    ]
    assert reasons(*found) == ["CrashLoopBackOff"] * 3 + [None]


def test_a_single_exit_is_cleared_once_the_container_is_ready():
    last = exited(0, 60)
    assert reasons(
        trouble(running(61), last, restarts=1, now_s=70),
        trouble(running(61), last, restarts=1, ready_since_s=80, now_s=81),
    ) == ["ContainerExited", None]


def test_an_engine_that_served_for_days_and_crashed_is_not_crash_looping():
    day_s = 86400.0
    last = exited(0, 3 * day_s)
    state = {"restarts": 7, "unready_since_s": 3 * day_s}
    assert reasons(
        trouble(running(3 * day_s), last, now_s=3 * day_s + 60, **state),
        trouble(running(3 * day_s), last, now_s=3 * day_s + 3000, **state),
        trouble(
            running(3 * day_s),
            last,
            restarts=7,
            ready_since_s=3 * day_s + 60,
            now_s=3 * day_s + 61,
        ),
    ) == ["ContainerExited", "ContainerExited", None]


def test_a_container_that_runs_ten_minutes_longer_than_the_run_that_failed_has_recovered():
    last = exited(0, 100)
    found = [trouble(running(200), last, restarts=4, now_s=now_s) for now_s in (201, 899, 901)]
    assert reasons(*found) == ["CrashLoopBackOff", "CrashLoopBackOff", None]


@pytest.mark.parametrize(
    ("policy", "init", "code", "reason"),
    [
        ("Always", False, 0, "ContainerExited"),  # a server must not exit
        ("OnFailure", False, 0, None),
        ("OnFailure", False, 1, "ContainerExited"),
        ("Always", True, 0, None),
        ("Always", True, 1, "ContainerExited"),
    ],
)
def test_a_container_that_may_succeed_is_not_in_trouble_after_exit_code_0(
    policy, init, code, reason
):
    ended = exited(0, 5, code=code)
    assert reasons(trouble(ended, policy=policy, init=init)) == [reason]


@pytest.mark.parametrize("reason", ["ContainerStatusUnknown", "KubeletStopped"])
def test_a_node_restart_is_no_container_trouble(reason):
    last = exited(0, 5, code=137, reason=reason)
    assert trouble(running(6), last, restarts=3, now_s=7) is None


def test_the_containers_of_a_deleted_pod_may_exit():
    assert trouble(exited(0, 5, code=143), restarts=3, deleted=True) is None


def test_the_last_lines_of_a_container_are_shown_in_one_printable_line():
    message = "Traceback:\n\x1b[31m  File 'x'\x1b[0m\r\n\nValueError:  no\tKV cache\x07\n"
    found = trouble(WAITING, exited(0, 5, message=message), restarts=1)
    assert found.message == "container server keeps exiting (exit code 1)"
    assert found.output == "Traceback: | File 'x' | ValueError: no KV cache"
    assert found.text == f"{found.message}: {found.output}"


def test_only_the_end_of_long_last_lines_is_kept():
    message = "x" * 4000 + "\nCUDA out of memory"
    found = trouble(WAITING, exited(0, 5, message=message), restarts=1)
    assert len(found.output) == OUTPUT_MAX_CHARS
    assert found.output.startswith("…x")
    assert found.output.endswith("x | CUDA out of memory")


def test_without_last_lines_the_message_refers_to_the_logs():
    found = trouble(WAITING, exited(0, 5), restarts=1)
    assert found.text == "container server keeps exiting (exit code 1); see its logs"
