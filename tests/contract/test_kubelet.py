"""The process kubelet as a process, against an API: pods run, end, and never leave a process.

The pods' processes are real, and so are the kills. Where the API is a cluster's, the kubelet is
given its pods by node name, as a scheduler would.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import ssl
import subprocess
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from kubelets import (
    DEADLINE_S,
    PYTHON,
    Kubelet,
    Pods,
    is_alive,
    is_ready,
    until,
)


@pytest.fixture
def pods(api_server, namespace):
    return Pods(api_server, namespace)


@pytest.fixture
def kubelet(api_server, namespace, kube_api, tmp_path):
    """A kubelet whose node is the test's alone; pods are given to it by name."""
    kubelet = Kubelet(api_server, kube_api, tmp_path / "kubelet", namespace, bind=False)
    kubelet.start()
    yield kubelet
    kubelet.clean_up()


def test_the_node_shows_what_the_machine_has(api_server, kubelet):
    code, node = api_server.request("GET", f"/api/v1/nodes/{kubelet.node}")
    assert code == 200
    status = node["status"]
    assert status["capacity"]["cpu"] == str(os.cpu_count())
    assert status["addresses"][0] == {"type": "InternalIP", "address": "127.0.0.1"}
    assert status["daemonEndpoints"]["kubeletEndpoint"]["Port"] > 0
    assert {c["type"]: c["status"] for c in status["conditions"]}["Ready"] == "True"


def test_a_pod_runs_becomes_ready_and_ends_when_it_is_deleted(kubelet, pods):
    pods.create(node=kubelet.node, pids=kubelet.pids)
    pod = pods.until_ready()
    assert pod["status"]["phase"] == "Running"
    assert is_ready(pod)
    with urllib.request.urlopen(f"http://{pod['status']['podIP']}:8000/", timeout=5) as answer:
        assert answer.status == 200
    engine = kubelet.engine_pids()
    assert list((kubelet.directory / "data" / "pods").iterdir())
    pods.delete()
    until(lambda: pods.get() is None)
    assert not any(map(is_alive, engine))
    until(lambda: not list((kubelet.directory / "data" / "pods").iterdir()))


def test_a_pod_without_a_node_is_bound(api_server, kube_api, namespace, pods, tmp_path):
    kubelet = Kubelet(api_server, kube_api, tmp_path / "kubelet", namespace, bind=True)
    pods.create(pids=kubelet.pids)
    kubelet.start()
    try:
        assert pods.until_ready()["spec"]["nodeName"] == namespace
    finally:
        kubelet.kill()


def test_a_cordoned_node_gets_no_new_pods(api_server, kube_api, namespace, pods, tmp_path):
    kubelet = Kubelet(api_server, kube_api, tmp_path / "kubelet", namespace, bind=True)
    kubelet.start()

    def cordon(unschedulable: bool) -> None:
        path, patch = f"/api/v1/nodes/{namespace}", {"spec": {"unschedulable": unschedulable}}
        kind = "application/merge-patch+json"
        assert api_server.request("PATCH", path, patch, kind)[0] == 200

    def why_pending() -> str:
        conditions = pods.get()["status"].get("conditions") or []
        found = [c for c in conditions if c["type"] == "PodScheduled" and c["status"] == "False"]
        return f"{found[0]['reason']}: {found[0]['message']}" if found else ""

    def place(name: str) -> None:
        """A pod that the kubelet sees after `p` and may bind."""
        tolerations = [{"key": "node.kubernetes.io/unschedulable", "operator": "Exists"}]
        pods.create(name, pids=kubelet.pids, tolerations=tolerations)
        until(lambda: pods.get(name)["spec"].get("nodeName"))

    try:
        cordon(True)
        pods.create(pids=kubelet.pids)
        assert until(why_pending).startswith("Unschedulable: 0/1 nodes are available: 1 node(s)")
        place("tolerant")
        kubelet.kill()
        kubelet.start()
        place("later")
        pod = pods.get()
        assert not pod["spec"].get("nodeName")
        assert pod["status"]["phase"] == "Pending"
        _, events = api_server.request("GET", f"/api/v1/namespaces/{namespace}/events")
        assert [e["reason"] for e in events["items"] if e["involvedObject"]["name"] == "p"] == [
            "FailedScheduling"
        ]
        cordon(False)
        assert pods.until_ready()["spec"]["nodeName"] == namespace
    finally:
        kubelet.clean_up()


def test_nothing_is_written_while_nothing_changes(kubelet, pods):
    pods.create(node=kubelet.node, pids=kubelet.pids)
    before = pods.until_ready()["metadata"]["resourceVersion"]
    log = next((kubelet.directory / "data" / "pods").glob("*/server/0.log"))
    asked = log.read_text().count("asked")
    until(lambda: log.read_text().count("asked") >= asked + 3)
    assert pods.get()["metadata"]["resourceVersion"] == before


def test_invalid_pod_fails_and_can_be_deleted(kubelet, pods):
    container = {"name": "c", "image": "i", "volumeMounts": [{"name": "v", "mountPath": "/v"}]}
    volume = {"name": "v", "nfs": {"server": "s", "path": "/"}}
    pods.create(node=kubelet.node, containers=[container], volumes=[volume])

    def waiting():
        statuses = pods.get()["status"].get("containerStatuses") or [{}]
        return statuses[0].get("state", {}).get("waiting", {}).get("message")

    assert "volume 'v': unsupported type" in until(waiting)
    pods.delete()
    until(lambda: pods.get() is None)


def test_a_pod_whose_port_is_taken_on_every_address_says_so_and_waits(kubelet, pods):
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = taken.getsockname()[1]
        sleep = [*PYTHON, "import time; time.sleep(600)"]
        ports = [{"containerPort": port}]
        container = {"name": "c", "image": "i", "command": sleep, "ports": ports}
        pods.create(node=kubelet.node, containers=[container])
        message = until(lambda: pods.get()["status"].get("message"))
        assert f"free ports {port}" in message
    assert "message" not in pods.until_ready()["status"]


# -- kills ---------------------------------------------------------------------------------------


def test_kill_9_of_the_kubelet_leaves_no_process_and_its_successor_restarts_the_container(
    kubelet, pods
):
    pods.create(node=kubelet.node, pids=kubelet.pids)
    pods.until_ready()
    engine, shims = kubelet.engine_pids(), kubelet.shims()
    kubelet.kill()
    until(lambda: not any(map(is_alive, engine + shims)))
    kubelet.forget_pids()
    kubelet.start()
    pod = pods.until_ready(restarts=1)
    ended = pod["status"]["containerStatuses"][0]["lastState"]["terminated"]
    assert ended["reason"] == "ContainerStatusUnknown"


def test_kill_9_of_a_shim_leaves_no_process_and_the_container_is_restarted(kubelet, pods):
    pods.create(node=kubelet.node, pids=kubelet.pids)
    pods.until_ready()
    engine = kubelet.engine_pids()
    (shim,) = kubelet.shims()
    kubelet.forget_pids()
    os.kill(shim, signal.SIGKILL)
    until(lambda: not any(map(is_alive, engine)))
    pod = pods.until_ready(restarts=1)
    ended = pod["status"]["containerStatuses"][0]["lastState"]["terminated"]
    assert ended["exitCode"] == 137
    assert "shim" in ended["message"]


def test_kill_9_of_an_engine_leaves_no_process_and_it_is_restarted(kubelet, pods):
    pods.create(node=kubelet.node, pids=kubelet.pids)
    pod = pods.until_ready()
    engine = kubelet.engine_pids()
    (shim,) = kubelet.shims()

    def mains() -> list[int] | None:
        """A daemon looks like the main process until it has called exec."""
        found = [p for p in engine if _parent(p) == str(shim) and _is_main(p)]
        return found if len(found) == 1 else None

    (main,) = until(mains)
    kubelet.forget_pids()
    os.kill(main, signal.SIGKILL)
    until(lambda: not any(map(is_alive, engine)))
    again = pods.until_ready(restarts=1)
    assert again["status"]["podIP"] == pod["status"]["podIP"]
    assert again["status"]["containerStatuses"][0]["lastState"]["terminated"]["signal"] == 9


def _parent(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]


def _is_main(pid: int) -> bool:
    return b"socket.create_server" in Path(f"/proc/{pid}/cmdline").read_bytes()


def test_kill_9_of_the_kubelet_and_a_shim_at_once_is_cleaned_up_by_the_next(kubelet, pods):
    pods.create(node=kubelet.node, pids=kubelet.pids)
    pods.until_ready()
    engine = kubelet.engine_pids()
    (shim,) = kubelet.shims()
    kubelet.process.send_signal(signal.SIGSTOP)  # so that it cannot clean up in between
    os.kill(shim, signal.SIGKILL)
    kubelet.kill()
    until(lambda: not any(map(is_alive, [p for p in engine if _was_main(p)])))
    kubelet.forget_pids()
    kubelet.start()
    pods.until_ready(restarts=1)
    marked = [p for p in engine if is_alive(p) and b"KUBEAI_POD_UID" in _environment(p)]
    assert marked == []
    for pid in engine:  # the one that emptied its environment is beyond the sweep: documented
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _was_main(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return _is_main(pid)
    return False


def _environment(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/environ").read_bytes()
    return b""


def test_the_kubelet_and_all_engines_die_with_the_kubelets_parent(kubelet, pods):
    pods.create(node=kubelet.node, pids=kubelet.pids)
    pods.until_ready()
    kubelet.kill(signal.SIGTERM)
    kubelet.forget_pids()
    parent = "import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:], close_fds=False))"
    kubelet.start(*PYTHON, parent)
    pods.until_ready(restarts=1)
    engine, (child,) = kubelet.engine_pids(), kubelet.shims()
    assert is_alive(child)
    kubelet.kill()  # of the parent
    until(lambda: not any(map(is_alive, [child, *engine])))


def test_sigterm_ends_the_engines_and_leaves_the_pods(kubelet, pods):
    pods.create(node=kubelet.node, pids=kubelet.pids)
    pods.until_ready()
    engine = kubelet.engine_pids()
    kubelet.kill(signal.SIGTERM)
    assert kubelet.process.returncode == 0
    assert not any(map(is_alive, engine))
    pod = pods.get()
    assert not is_ready(pod)
    assert "deletionTimestamp" not in pod["metadata"]
    kubelet.forget_pids()
    kubelet.start()
    pods.until_ready(restarts=1)


def test_a_pod_deleted_while_there_was_no_kubelet_goes_with_the_next(kubelet, pods):
    pods.create(node=kubelet.node, pids=kubelet.pids)
    pods.until_ready()
    kubelet.kill()
    pods.delete()
    assert pods.get() is not None
    kubelet.start()
    until(lambda: pods.get() is None)


def test_second_kubelet_on_a_data_directory_is_rejected(kubelet):
    second = subprocess.run(kubelet.command, capture_output=True, text=True, timeout=DEADLINE_S)
    assert second.returncode == 1
    assert second.stderr.strip().endswith("is in use by another kubelet")
    assert "Traceback" not in second.stderr


# -- its server ----------------------------------------------------------------------------------


def test_logs_come_through_the_api(api_server, kubelet, pods):
    pods.create(node=kubelet.node, pids=kubelet.pids)
    ip = pods.until_ready()["status"]["podIP"]
    url = f"{api_server.url}{pods.collection}/p/log?tailLines=1000&timestamps=true"
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {api_server.token}"})
    context = ssl.create_default_context(cafile=api_server.ca_file)
    with urllib.request.urlopen(request, timeout=10, context=context) as answer:
        first = answer.read().decode().splitlines()[0]
    time_, _, text = first.partition(" ")
    assert text == f"serving on {ip}"
    assert time_.endswith("Z")


@pytest.mark.parametrize("path", ["containerLogs/{}/p/server", "exec/{}/p/server?command=ls"])
def test_logs_and_exec_require_authentication(api_server, kubelet, pods, path):
    code, node = api_server.request("GET", f"/api/v1/nodes/{kubelet.node}")
    assert code == 200
    port = node["status"]["daemonEndpoints"]["kubeletEndpoint"]["Port"]
    scheme = "https" if api_server.client_ca_file else "http"
    url = f"{scheme}://127.0.0.1:{port}/{path.format(pods.namespace)}"
    context = ssl._create_unverified_context()  # as API servers do
    request = urllib.request.Request(url, headers={"Authorization": "Bearer guess"})
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(request, timeout=5, context=context)


def _delete_pods_of_other_tests(api_server) -> None:
    """The kubelet would bind those without a Node, and give them its GPUs."""
    _, listed = api_server.request("GET", "/api/v1/pods")
    for pod in listed["items"]:
        path = f"/api/v1/namespaces/{pod['metadata']['namespace']}/pods/{pod['metadata']['name']}"
        api_server.request("DELETE", f"{path}?gracePeriodSeconds=0")


SHOW_GPUS = """
import os, time
print("gpus", os.environ.get("CUDA_VISIBLE_DEVICES"), flush=True)
time.sleep(600)
"""


def test_pods_have_gpus_of_their_own_also_after_a_kill_of_the_kubelet(
    api_server, kube_api, namespace, pods, tmp_path
):
    _delete_pods_of_other_tests(api_server)
    options = ("--capacity", "nvidia.com/gpu=2")
    kubelet = Kubelet(api_server, kube_api, tmp_path / "kubelet", namespace, *options, bind=True)
    kubelet.start()

    def place(name: str) -> None:
        resources = {"limits": {"nvidia.com/gpu": 1}}
        command = [*PYTHON, SHOW_GPUS]
        container = {"name": "server", "image": "i", "command": command, "resources": resources}
        pods.create(name, containers=[container])

    def devices(name: str, run: int = 0) -> str:
        folder = next((kubelet.directory / "data" / "pods").glob(f"*_{name}_*"), None)
        log = folder and folder / "server" / f"{run}.log"
        text = log.read_text() if log and log.exists() else ""
        return text.partition("gpus ")[2].strip()

    def why_pending(name: str) -> str:
        conditions = pods.get(name)["status"].get("conditions") or []
        return next((c.get("message", "") for c in conditions if c["type"] == "PodScheduled"), "")

    try:
        code, node = api_server.request("GET", f"/api/v1/nodes/{namespace}")
        assert (code, node["status"]["capacity"]["nvidia.com/gpu"]) == (200, "2")
        for name in ("a", "b"):
            place(name)
            until(lambda: devices(name))  # noqa: B023 (called at once)
        kept = devices("b")
        assert {devices("a"), kept} == {"0", "1"}
        place("c")
        until(lambda: "1 Insufficient nvidia.com/gpu." in why_pending("c"))
        kubelet.kill()
        kubelet.start()
        assert until(lambda: devices("b", run=1)) == kept
        assert until(lambda: devices("a", run=1)) != kept
        assert not pods.get("c")["spec"].get("nodeName")
        pods.delete("a")
        assert until(lambda: devices("c")) != kept
        kubelet.kill()
        kubelet.command += ["--capacity", "nvidia.com/gpu=1"]
        kubelet.start()
        had = {"b": kept, "c": devices("c")}
        (lost,) = (name for name, device in had.items() if device == "1")
        until(lambda: pods.get(lost)["status"].get("reason") == "UnexpectedAdmissionError")
        assert pods.get(lost)["status"]["phase"] == "Failed"
    finally:
        kubelet.clean_up()
