"""Run the process kubelet as a process, with pods whose processes are real."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

from fakes import forked
from servers import KUBELET_CLIENT

PYTHON = [sys.executable, "-S", "-E", "-u", "-c"]
DEADLINE_S = 60.0  # a busy machine is slow
READY_S = 120  # a program that starts on a busy machine
# A server, and below it two daemons that nothing but their environment and parents remember: one
# keeps its environment, the other empties it. Both ignore signals.
NASTY = """
import os, signal, socket, sys
children = []
def forget():
    os.setsid()
    if os.fork():
        os._exit(0)
    for s in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(s, signal.SIG_IGN)
    d = os.environ["PIDS"]
    with open(f"{d}/{os.getpid()}.tmp", "w"):
        pass
    os.rename(f"{d}/{os.getpid()}.tmp", f"{d}/{os.getpid()}")
for empty in (False, True):
    if os.fork() == 0:
        forget()
        program = [sys.executable, "-S", "-E", "-c", "import time; time.sleep(600)"]
        os.execve(program[0], program, {} if empty else os.environ)
os.close(os.open(f"{os.environ['PIDS']}/{os.getpid()}", os.O_CREAT))
with socket.create_server((os.environ["POD_IP"], 8000)) as server:
    print("serving on", os.environ["POD_IP"])
    while True:
        c, _ = server.accept()
        c.recv(4096)
        print("asked")
        c.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: 0\\r\\n\\r\\n")
        c.close()
"""


def until(condition, what="the state did not come"):
    """Wait until ``condition`` returns a true value; return it."""
    deadline = time.monotonic() + DEADLINE_S
    while not (value := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.02)
    return value


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# The kubelet with a shorter back-off.
IMPATIENT = """
from functools import partial
from kubeai.local.kubelet import __main__ as kubelet
from kubeai.local.kubelet.pods.host import Host, Timing
kubelet.Host = partial(Host, timing=Timing(restart_first_s={restart_first_s}))
kubelet.main()
"""


class Kubelet:
    """The kubelet's process; `start` again goes on with the same data directory."""

    def __init__(
        self,
        server,
        kubeconfig: str,
        directory: Path,
        node: str,
        *options: str,
        bind: bool,
        restart_first_s: float | None = None,
    ) -> None:
        """``restart_first_s``: the back-off before the second restart of a container."""
        self.server, self.node, self.directory = server, node, directory
        self.pids = directory / "pids"
        self.pids.mkdir(parents=True)
        run = ["-m", "kubeai.local.kubelet"]
        if restart_first_s is not None:
            run = ["-c", IMPATIENT.format(restart_first_s=restart_first_s)]
        self.command = [
            *(sys.executable, *run),
            *("--kubeconfig", kubeconfig, "--data-dir", str(directory / "data")),
            *("--node-name", node, *(() if bind else ("--no-bind",)), *options),
        ]
        if server.client_ca_file:
            self.command += ["--client-ca-file", server.client_ca_file]
            self.command += ["--client-name", KUBELET_CLIENT]
        self.process: subprocess.Popen[bytes] | forked.Forked | None = None

    def start(self, *prefix: str) -> None:
        read, write = os.pipe()
        command = [*prefix, *self.command, "--ready-fd", str(write)]
        self.process = forked.popen(command, pass_fds=(write,))
        os.close(write)
        with os.fdopen(read) as pipe:
            assert select.select([pipe], [], [], READY_S)[0], "the kubelet is not ready"
            assert pipe.readline().startswith("ready ")

    def kill(self, number: int = signal.SIGKILL) -> None:
        assert self.process is not None
        self.process.send_signal(number)
        self.process.wait(DEADLINE_S)

    def clean_up(self) -> None:
        """Stop the kubelet and any processes that a failed test left."""
        if self.process is not None and self.process.poll() is None:
            self.kill()
        for file in self.pids.iterdir():
            with contextlib.suppress(ProcessLookupError, ValueError):
                os.kill(int(file.name), signal.SIGKILL)

    def engine_pids(self) -> list[int]:
        """The main process and the two daemons below it, once all of them are there."""
        return until(lambda: p if len(p := [int(f.name) for f in self._pid_files()]) == 3 else None)

    def forget_pids(self) -> None:
        for file in self._pid_files():
            file.unlink()

    def _pid_files(self) -> list[Path]:
        return [file for file in self.pids.iterdir() if file.name.isdigit()]

    def shims(self) -> list[int]:
        assert self.process is not None
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in path.read_text().split()]


class Pods:
    """Pods of one namespace."""

    def __init__(self, server, namespace: str) -> None:
        self._server = server
        self.namespace = namespace
        self.collection = f"/api/v1/namespaces/{namespace}/pods"

    def create(self, name: str = "p", *, node: str = "", pids: Path | None = None, **spec):
        container = {
            "name": "server",
            "image": "engine",
            "command": [*PYTHON, NASTY],
            "env": [{"name": "PIDS", "value": str(pids)}],
            "ports": [{"name": "http", "containerPort": 8000}],
            "readinessProbe": {"httpGet": {"path": "/", "port": "http"}, "periodSeconds": 1},
        }
        spec = {"containers": [container], "nodeName": node, **spec}
        spec.setdefault("terminationGracePeriodSeconds", 1)
        code, pod = self._server.request(
            "POST", self.collection, {"metadata": {"name": name}, "spec": spec}
        )
        assert code == 201, pod
        return pod

    def get(self, name: str = "p"):
        code, pod = self._server.request("GET", f"{self.collection}/{name}")
        return pod if code == 200 else None

    def delete(self, name: str = "p") -> None:
        code, answer = self._server.request("DELETE", f"{self.collection}/{name}")
        assert code in (200, 202), answer

    def until_ready(self, name: str = "p", restarts: int = 0):
        def ready():
            pod = self.get(name)
            statuses = pod["status"].get("containerStatuses") or [{}]
            return pod if statuses[0].get("ready") and restarts_of(pod) >= restarts else None

        return until(ready, f"pod {name} is not ready: {self.get(name)}")


def restarts_of(pod) -> int:
    return pod["status"]["containerStatuses"][0]["restartCount"]


def is_ready(pod) -> bool:
    conditions = pod["status"].get("conditions", ())
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)


def is_serving(pod) -> bool:
    """Whether a Service that selects the pod leads to it."""
    return is_ready(pod) and "deletionTimestamp" not in pod["metadata"]
