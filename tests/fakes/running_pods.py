"""A runner of pods with real processes, and containers for it."""

import asyncio
import contextlib
import sys

from kubeai.local.kubelet.pods.host import Timing

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


POLITE = """
import signal, sys, time
def end(*_):
    print("terminated")
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
print("up")
time.sleep(600)
"""
