"""A pod's lifecycle with real processes: order, probes, restarts, termination, leftovers."""

import asyncio
import contextlib
import os
import signal
import sys
import time
import uuid

import pytest

from kubeai.local.kubelet.pods.addresses import PodAddress
from kubeai.local.kubelet.pods.container import RestartBackoff
from kubeai.local.kubelet.pods.host import Host, Timing
from kubeai.local.kubelet.pods.pod import decode_pod
from kubeai.local.kubelet.pods.probes import Prober
from kubeai.local.kubelet.pods.runner import PodRunner
from kubeai.local.kubelet.runtime.memory import MemoryGuard

PYTHON = [sys.executable, "-S", "-E", "-u", "-c"]
SLEEP = [*PYTHON, "import time; time.sleep(600)"]
# Answers every GET on $POD_IP:8000 with the status in the file `status` (200 without it).
SERVE = """
import os, socket, time
time.sleep(float(os.environ.get("DELAY", 0)))
with socket.create_server((os.environ["POD_IP"], 8000)) as server:
    while True:
        c, _ = server.accept()
        c.recv(4096)
        try: status = open("status").read()
        except OSError: status = "200"
        c.sendall(b"HTTP/1.1 %b OK\\r\\nContent-Length: 0\\r\\n\\r\\n" % status.encode())
        c.close()
"""
FAST = Timing(restart_first_s=0.05, restart_max_s=0.2, config_first_s=0.02, config_max_s=0.05)
HTTP = {"httpGet": {"path": "/", "port": "http"}, "periodSeconds": 1}
PORTS = [{"name": "http", "containerPort": 8000}]


class Objects:
    """The objects in the API other than pods."""

    def __init__(self):
        self.maps, self.secrets = {}, {}

    async def config_map(self, namespace, name):
        return self.maps.get(name)

    async def secret(self, namespace, name):
        return self.secrets.get(name)

    async def open_claim(self, namespace, name):
        return False


@pytest.fixture
async def host(tmp_path):
    prober = Prober()
    yield Host(tmp_path, Objects(), prober, MemoryGuard(poll_interval_s=0.05), FAST)
    await prober.close()


class Running:
    """A runner and the statuses that it reported, in order."""

    def __init__(self, runner):
        self.runner = runner
        self.statuses = []
        self._changed = asyncio.Event()
        self._task = None

    def changed(self):
        self.statuses.append(self.runner.status())
        self._changed.set()

    def start(self):
        self._task = asyncio.create_task(self.runner.run())

    @property
    def status(self):
        return self.runner.status()

    def container(self, name="server"):
        every = [*(self.status["initContainerStatuses"] or ()), *self.status["containerStatuses"]]
        return next(c for c in every if c["name"] == name)

    def log(self, name="server", run=0):
        path = self.runner.host.pod_directory(self.runner.pod.metadata) / name / f"{run}.log"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line.split(" ", 3)[3] for line in lines]

    async def until(self, condition, timeout_s=10):
        """Wait for a state of the status, which is checked after each change."""
        async with asyncio.timeout(timeout_s):
            while not condition():
                self._changed.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(
                        self._changed.wait(), 0.05
                    )  # a log change notifies nobody

    async def until_ready(self):
        await self.until(lambda: is_ready(self.status))

    async def over(self):
        async with asyncio.timeout(20):
            await self.runner.terminated.wait()
            await self._task


def is_ready(status):
    return any(c["type"] == "Ready" and c["status"] == "True" for c in status["conditions"])


@pytest.fixture
async def run(host):
    """Runs pods; ends them with the test."""
    started = []

    def run(*containers, status=None, annotations=None, **spec):
        pod = decode_pod(
            {
                "metadata": {"name": f"p{len(started)}", "namespace": "default", "uid": "u"},
                "spec": {
                    "containers": [{"name": "server", "image": "i", **c} for c in containers],
                    "terminationGracePeriodSeconds": 5,
                    **spec,
                },
                "status": status or {},
            }
        )
        address = PodAddress.claim()
        running = Running(None)
        running.runner = PodRunner(pod, address.ip, host, running.changed)
        started.append((running, address))
        running.start()
        return running

    yield run
    for running, address in started:
        await running.runner.stop(0)
        await running.over()
        address.release()


# -- running and ready ---------------------------------------------------------------------------


async def test_two_pods_serve_the_same_port_on_different_addresses(run):
    pods = [
        run({"command": PYTHON, "args": [SERVE], "ports": PORTS, "readinessProbe": HTTP})
        for _ in "ab"
    ]
    for pod in pods:
        await pod.until_ready()
        assert pod.status["phase"] == "Running"
        assert pod.container()["state"]["running"]["startedAt"].endswith("Z")
    ips = [pod.status["podIP"] for pod in pods]
    assert len(set(ips)) == 2
    assert all(ip.startswith("127.") for ip in ips)
    for ip in ips:
        _, writer = await asyncio.open_connection(ip, 8000)
        writer.close()


async def test_a_cold_start_does_not_wait_for_the_period_of_its_probes(run):
    slow = HTTP | {"periodSeconds": 30, "failureThreshold": 3}
    pod = run(
        {
            "command": PYTHON,
            "args": [SERVE],
            "env": [{"name": "DELAY", "value": "0.3"}],
            "ports": PORTS,
            "startupProbe": slow,
            "readinessProbe": slow,
        }
    )
    began = time.monotonic()
    await pod.until_ready()
    assert time.monotonic() - began < slow["periodSeconds"]


async def test_the_environment_comes_from_the_manifest_and_the_machine_not_the_kubelet(
    run, host, monkeypatch
):
    monkeypatch.setenv("KUBECONFIG", "/secret")
    monkeypatch.setenv("SOME_TOOL_HOME", "/opt/tool")
    host.objects.secrets["s"] = {"key": b"token"}
    code = "import os; print(*(os.environ.get(n) for n in os.environ['SHOW'].split()))"
    pod = run(
        {
            "command": [*PYTHON, code],
            "env": [
                {"name": "SHOW", "value": "KUBECONFIG SOME_TOOL_HOME TOKEN URL POD_IP"},
                {"name": "TOKEN", "valueFrom": {"secretKeyRef": {"name": "s", "key": "key"}}},
                {"name": "URL", "value": "http://0.0.0.0:8000/$(TOKEN)"},
            ],
        },
        restartPolicy="Never",
    )
    await pod.over()
    ip = pod.runner.ip
    assert pod.log() == [f"None /opt/tool token http://{ip}:8000/token {ip}"]


async def test_init_containers_run_in_order_and_share_a_volume(run):
    mount = {"volumeMounts": [{"name": "v", "mountPath": "/kubeai-test"}]}
    write = "import sys; open('/kubeai-test/f', 'a').write(sys.argv[1])"
    pod = run(
        {"command": [*PYTHON, "print(open('/kubeai-test/f').read())"], **mount},
        initContainers=[
            {"name": "one", "command": [*PYTHON, write, "1"], **mount},
            {"name": "two", "command": [*PYTHON, write, "2"], **mount},
        ],
        volumes=[{"name": "v", "emptyDir": {}}],
        restartPolicy="Never",
    )
    await pod.over()
    assert pod.log() == ["12"]
    assert pod.status["phase"] == "Succeeded"
    assert pod.container("one")["state"]["terminated"]["reason"] == "Completed"


async def test_a_failed_init_container_fails_a_pod_with_restart_policy_never(run):
    pod = run(
        {"command": SLEEP},
        initContainers=[{"name": "init", "command": [*PYTHON, "raise SystemExit(2)"]}],
        restartPolicy="Never",
    )
    await pod.over()
    assert pod.status["phase"] == "Failed"
    assert "waiting" in pod.container()["state"]


async def test_a_sidecar_starts_before_the_containers_and_ends_after_them(run, tmp_path):
    up = tmp_path / "up"
    side = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('terminated'), sys.exit(0)))\n"
        "print('up')\n"
        f"open({str(up)!r}, 'w')\n"
        "time.sleep(600)"
    )
    probe = {"exec": {"command": [*PYTHON, f"open({str(up)!r})"]}, "periodSeconds": 1}
    pod = run(
        {"command": [*PYTHON, f"open({str(up)!r}); print('saw it')"]},
        initContainers=[
            {
                "name": "side",
                "command": [*PYTHON, side],
                "restartPolicy": "Always",
                "startupProbe": probe,
            }
        ],
        restartPolicy="Never",
    )
    await pod.over()
    assert pod.log() == ["saw it"]
    assert pod.log("side") == ["up", "terminated"]
    assert pod.status["phase"] == "Succeeded"


# -- restarts ------------------------------------------------------------------------------------


def test_restarts_back_off_from_10_s_to_5_min_and_reset_after_10_min():
    backoff = RestartBackoff(10, 300, 600)
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
            "livenessProbe": HTTP | {"failureThreshold": 1, "initialDelaySeconds": 1},
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


# -- missing prerequisites -----------------------------------------------------------------------


async def test_a_pod_waits_for_a_program_that_is_not_installed(run, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    pod = run({"command": ["kubeai-test-engine"]})
    await pod.until(lambda: pod.container()["state"].get("waiting", {}).get("message"))
    waiting = pod.container()["state"]["waiting"]
    assert waiting["reason"] == "EngineNotInstalled"
    assert "kubeai-test-engine is not installed" in waiting["message"]
    assert pod.status["phase"] == "Pending"
    program = tmp_path / "kubeai-test-engine"
    program.write_text(f"#!{sys.executable}\nimport time; time.sleep(600)")
    program.chmod(0o755)
    await pod.until_ready()
    assert pod.container()["restartCount"] == 0


async def test_a_pod_waits_for_a_missing_secret(run, host):
    ref = {"secretKeyRef": {"name": "s", "key": "k"}}
    pod = run({"command": SLEEP, "env": [{"name": "X", "valueFrom": ref}]})
    await pod.until(lambda: pod.container()["state"].get("waiting", {}).get("message"))
    assert pod.container()["state"]["waiting"]["reason"] == "CreateContainerConfigError"
    host.objects.secrets["s"] = {"k": b"v"}
    await pod.until_ready()


async def test_a_pod_waits_for_a_missing_volume(run, host):
    pod = run({"command": SLEEP}, volumes=[{"name": "v", "configMap": {"name": "c"}}])
    await pod.until(lambda: pod.container()["state"]["waiting"].get("message"))
    assert "configmap 'c' not found" in pod.container()["state"]["waiting"]["message"]
    host.objects.maps["c"] = {}
    await pod.until_ready()


async def test_an_unsupported_mount_is_reported(run, host):
    host.namespace = "none"
    pod = run(
        {"command": SLEEP, "volumeMounts": [{"name": "v", "mountPath": "/kubeai-test"}]},
        volumes=[{"name": "v", "emptyDir": {}}],
    )
    await pod.until(lambda: pod.container()["state"]["waiting"].get("message"))
    assert pod.container()["state"]["waiting"]["reason"] == "MountError"
    assert "/kubeai-test" in pod.container()["state"]["waiting"]["message"]


# -- termination ---------------------------------------------------------------------------------

POLITE = """
import signal, sys, time
def end(*_):
    print("terminated")
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
print("up")
time.sleep(600)
"""
DEAF = POLITE.replace("SIGTERM, end", "SIGTERM, signal.SIG_IGN")


async def test_a_container_gets_a_signal_before_it_is_killed_and_is_unready_at_once(run):
    pod = run({"command": [*PYTHON, POLITE]})
    await pod.until(lambda: pod.log() == ["up"])
    assert is_ready(pod.status)
    stopping = asyncio.create_task(pod.runner.stop(30))
    await pod.until(lambda: not is_ready(pod.status))
    await stopping
    await pod.over()
    assert pod.log() == ["up", "terminated"]
    assert pod.status["phase"] == "Succeeded"


async def test_a_container_that_ignores_the_signal_is_killed_after_the_grace_period(run):
    pod = run({"command": [*PYTHON, DEAF]})
    await pod.until(lambda: pod.log() == ["up"])
    began = time.monotonic()
    await pod.runner.stop(0.5)
    await pod.over()
    assert time.monotonic() - began >= 0.5
    assert pod.container()["state"]["terminated"]["signal"] == signal.SIGKILL
    assert pod.status["phase"] == "Failed"


async def test_a_second_deletion_can_shorten_the_grace_period(run):
    pod = run({"command": [*PYTHON, DEAF]})
    await pod.until(lambda: pod.log() == ["up"])
    first = asyncio.create_task(pod.runner.stop(600))
    await pod.until(lambda: not is_ready(pod.status))
    await pod.runner.stop(0)
    await asyncio.wait_for(first, 5)
    await pod.over()


async def test_the_pre_stop_hook_runs_before_the_signal(run, tmp_path):
    terminated = tmp_path / "terminated"
    hook = f"import time; time.sleep(0.1); open({str(terminated)!r}, 'w').write('hook')"
    code = POLITE.replace('print("terminated")', f"print(open({str(terminated)!r}).read())")
    pod = run(
        {
            "command": [*PYTHON, code],
            "lifecycle": {"preStop": {"exec": {"command": [*PYTHON, hook]}}},
        }
    )
    await pod.until(lambda: pod.log() == ["up"])
    await pod.runner.stop(30)
    await pod.over()
    assert pod.log() == ["up", "hook"]


async def test_stopping_a_pod_that_cannot_start_ends_at_once(run):
    pod = run({"command": ["kubeai-no-such-program"]})
    await pod.until(lambda: pod.container()["state"]["waiting"].get("message"))
    await pod.runner.stop(30)
    await pod.over()


async def test_stopping_at_any_moment_of_the_start_leaves_nothing_behind(run):
    for delay_s in (0, 0.005, 0.02, 0.05, 0.1):
        pod = run({"command": SLEEP})
        await asyncio.sleep(delay_s)  # not a wait for a state: the test varies this moment
        await pod.runner.stop(0)
        await pod.over()
        assert pod.runner.container("server").process is None


async def test_a_pod_over_its_active_deadline_fails(run):
    pod = run({"command": SLEEP}, activeDeadlineSeconds=1)
    await pod.over()
    assert (pod.status["phase"], pod.status["reason"]) == ("Failed", "DeadlineExceeded")


# -- restarts of the kubelet ---------------------------------------------------------------------


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
