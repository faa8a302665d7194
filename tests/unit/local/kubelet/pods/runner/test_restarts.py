"""Restarts of a pod's containers: back-off, policies, probes, and the memory limit."""

import os
import uuid

import pytest
from fakes.running_pods import HTTP, PORTS, PYTHON, SERVE, SLEEP, is_ready

from kubeai.local.kubelet.pods.container import CrashLoopBackoff
from kubeai.local.kubelet.pods.host import Timing


def test_restarts_back_off_from_10_s_to_5_min_and_reset_after_10_min():
    backoff = CrashLoopBackoff(10, 300, 600)
    waits = [backoff.after(1) for _ in range(8)]
    assert waits == [0, 10, 20, 40, 80, 160, 300, 300]
    assert backoff.after(600) == 0
    assert backoff.after(1) == 10


async def test_a_crashing_container_is_restarted_and_reported(run):
    command = [*PYTHON, "print('the reason'); raise SystemExit(7)"]
    pod = run({"command": command, "terminationMessagePolicy": "FallbackToLogsOnError"})
    await pod.until(lambda: pod.container()["restartCount"] >= 3)
    reasons = [
        s["containerStatuses"][0]["state"].get("waiting", {}).get("reason") for s in pod.statuses
    ]
    assert "CrashLoopBackOff" in reasons
    ended = pod.container()["lastState"]["terminated"]
    assert (ended["exitCode"], ended["reason"]) == (7, "Error")
    assert ended["message"].strip() == "the reason"
    logs = pod.runner.host.pod_directory(pod.runner.pod.metadata) / "server"
    assert len(list(logs.glob("*.log"))) <= 2


async def test_a_failed_containers_log_is_its_termination_message_only_with_the_policy(run):
    pod = run(
        {"command": [*PYTHON, "print('private'); raise SystemExit(7)"]}, restartPolicy="Never"
    )
    await pod.over()
    assert "message" not in pod.container()["state"]["terminated"]


WRITE_LAST_WORDS = """
import os
print("in the log")
with open(os.environ["MESSAGE_PATH"], "w") as file: file.write("x" * 5000 + "the reason")
raise SystemExit(7)
"""


async def test_a_container_may_write_its_termination_message_to_a_file(run):
    path, policy = f"/kubeai-test-{uuid.uuid4().hex}", "FallbackToLogsOnError"
    pod = run(
        {
            "command": [*PYTHON, WRITE_LAST_WORDS],
            "env": [{"name": "MESSAGE_PATH", "value": path}],
            "terminationMessagePath": path,
            "terminationMessagePolicy": policy,
        },
        restartPolicy="Never",
    )
    await pod.over()
    message = pod.container()["state"]["terminated"]["message"]
    assert len(message) == 4096
    assert message.endswith("xthe reason")
    assert path.strip("/") not in os.listdir("/")


async def test_the_first_restart_is_immediate(run, host):
    host.timing = Timing(restart_first_s=60)
    pod = run({"command": [*PYTHON, "raise SystemExit(1)"]})
    await pod.until(lambda: pod.container()["restartCount"] == 1)
    await pod.until(lambda: "waiting" in pod.container()["state"])
    assert "back-off 60s" in pod.container()["state"]["waiting"]["message"]


@pytest.mark.parametrize(
    ("policy", "code", "phase"),
    [("Never", 0, "Succeeded"), ("Never", 1, "Failed"), ("OnFailure", 0, "Succeeded")],
)
async def test_a_pod_that_is_not_restarted_finishes(run, policy, code, phase):
    pod = run({"command": [*PYTHON, f"raise SystemExit({code})"]}, restartPolicy=policy)
    await pod.over()
    assert pod.status["phase"] == phase
    assert pod.container()["restartCount"] == 0


async def test_restart_policy_on_failure_restarts_until_success(run):
    code = "import os; e = os.path.exists('x'); open('x', 'w'); raise SystemExit(0 if e else 1)"
    pod = run({"command": [*PYTHON, code]}, restartPolicy="OnFailure")
    await pod.over()
    assert (pod.status["phase"], pod.container()["restartCount"]) == ("Succeeded", 1)


async def test_a_failed_liveness_probe_restarts_the_container(run):
    pod = run(
        {
            "command": [*PYTHON, "open('status', 'w').write('500')\n" + SERVE],
            "ports": PORTS,
            "startupProbe": {
                "tcpSocket": {"port": "http"},
                "periodSeconds": 1,
                "failureThreshold": 60,
            },
            "livenessProbe": HTTP | {"failureThreshold": 1, "timeoutSeconds": 10},
        }
    )
    await pod.until(lambda: pod.container()["restartCount"] == 1)
    message = pod.container()["lastState"]["terminated"]["message"]
    assert message.startswith("liveness probe failed: GET http://127.")
    assert message.endswith("HTTP status 500")


async def test_a_failed_startup_probe_restarts_the_container_and_liveness_waits(run):
    pod = run(
        {
            "command": SLEEP,
            "ports": PORTS,
            "startupProbe": HTTP | {"failureThreshold": 1},
            "livenessProbe": {"exec": {"command": ["/no/such"]}, "failureThreshold": 1},
        }
    )
    await pod.until(lambda: pod.container()["restartCount"] == 1)
    assert "startup probe failed" in pod.container()["lastState"]["terminated"]["message"]
    assert not any(s["containerStatuses"][0]["started"] for s in pod.statuses)


async def test_readiness_changes_without_a_restart(run, host):
    pod = run(
        {
            "command": [*PYTHON, SERVE],
            "ports": PORTS,
            "readinessProbe": HTTP | {"failureThreshold": 1},
        }
    )
    await pod.until_ready()
    work = host.pod_directory(pod.runner.pod.metadata) / ".work" / "server"
    (work / "status").write_text("500")
    await pod.until(lambda: not is_ready(pod.status))
    (work / "status").unlink()
    await pod.until_ready()
    assert pod.container()["restartCount"] == 0


async def test_a_container_over_its_memory_limit_is_killed(run):
    pod = run(
        {
            "command": [*PYTHON, "import time; x = b'x' * (128 << 20); time.sleep(600)"],
            "resources": {"limits": {"memory": "64Mi"}},
        },
        restartPolicy="Never",
    )
    await pod.over()
    ended = pod.container()["state"]["terminated"]
    assert (ended["reason"], ended["exitCode"]) == ("OOMKilled", 137)
    assert "67108864" in ended["message"]
