"""`kubeai serve` as a process, and a machine whose kubelet runs what it asks for."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import signal
import stat
import sys
from pathlib import Path

import aiohttp
import yaml
from harness import CONFIG, START_TIMEOUT_S, until
from kubelets import Kubelet
from operators import as_operator
from servers import ApiServer

from kubeai.kube.client import Kube
from kubeai.kube.errors import ApiError
from kubeai.kube.resources import JOBS, MODELS, PODS, PVCS, Resource
from kubeai.local.jobs.controller import JobController

EXEC_TIMEOUT_S = 20.0
RESTART_FIRST_S = 3.0  # of the kubelet's back-off, which is 10 s elsewhere
QUOTAS = Resource("", "v1", "resourcequotas", "ResourceQuota")
# Stands for the loader's image: leaves a file that says what was fetched. It waits while the file
# GATE exists, and fails for URLs that say so.
LOAD = """#!/bin/sh
set -e
while [ -e 'GATE' ]; do sleep 0.02; done
case "$1" in *missing*) echo "no such repository: $1" >&2; exit 1;; esac
mkdir -p "$2"
echo "$1" > "$2/url"
"""


class Serve:
    """A `kubeai serve` process and what it logged."""

    def __init__(self, process):
        self.process = process
        self.log = []

    async def read(self):
        async for line in self.process.stderr:
            try:
                self.log.append(json.loads(line))
            except ValueError:  # a traceback, say
                self.log.append({"text": line.decode(errors="replace").rstrip()})

    def said(self, event):
        return next((entry for entry in self.log if entry.get("event") == event), None)

    def signal_all(self, number):
        """To every process of it, as when a container is killed or a machine hangs."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


@contextlib.asynccontextmanager
async def attended(process):
    """What it logs is read; all its processes are gone in the end. In a session of its own."""
    serve = Serve(process)
    reader = asyncio.create_task(serve.read())
    try:
        yield serve
    finally:
        serve.signal_all(signal.SIGKILL)
        await process.wait()
        await reader
        print(*serve.log, sep="\n")


@contextlib.asynccontextmanager
async def launched(
    tmp_path,
    kubeconfig,
    namespace,
    *,
    name="kubeai-1",
    host="127.0.0.1",
    port=0,
    workers=2,
    within=(),
    **config,
):
    """A `kubeai serve` that may not be up yet; ``name``: its POD_NAME, the lease's holder.

    ``within``: a command that runs another in surroundings of its own, as itself.
    """
    file = tmp_path / f"{name}.yaml"
    addresses = {"metricsAddr": f"{host}:0", "healthAddress": f"{host}:0"}
    file.write_text(yaml.safe_dump(CONFIG | addresses | config))
    process = await asyncio.create_subprocess_exec(
        *(*within, sys.executable, "-m", "kubeai", "serve", "--host", host),
        *("--port", str(port), "--workers", str(workers)),
        stderr=asyncio.subprocess.PIPE,
        env=os.environ
        | {
            "CONFIG_PATH": str(file),
            "KUBECONFIG": kubeconfig,
            "POD_NAME": name,
            "POD_NAMESPACE": namespace,
        },
        start_new_session=True,
    )
    async with attended(process) as serve:
        yield serve


@contextlib.asynccontextmanager
async def serving(tmp_path, kubeconfig, namespace, **options):
    """A `kubeai serve` that is up; ``options``: as :func:`launched` takes them."""
    async with launched(tmp_path, kubeconfig, namespace, **options) as serve:
        await until(
            "kubeai serve is up",
            lambda: serve.process.returncode is not None or serve.said("serving"),
            START_TIMEOUT_S,
        )
        assert serve.process.returncode is None, serve.log
        yield serve


class Machine:
    """One namespace, `kubeai serve` in it, and a kubelet whose pods are processes."""

    def __init__(self, api: ApiServer, namespace: str, directory: Path) -> None:
        self.api = api
        self.namespace = namespace
        self.directory = directory
        self.gate = directory / "gate"
        self.config = {
            "modelLoading": {"image": "kubeai-model-loader"},
            "cacheProfiles": {"shared": {"sharedFilesystem": {"storageClassName": namespace}}},
            "leaderElection": {
                "leaseDuration": "2s",
                "renewDeadline": "1s",
                "retryPeriod": "200ms",
            },
        }
        self.kubeconfig = str(api.kubeconfig(directory / "kubeconfig", namespace))
        account = as_operator(api, namespace).kubeconfig(directory / "account", namespace)
        self.account = str(account)  # the kubeconfig of `kubeai serve`
        self._stack = contextlib.AsyncExitStack()
        self._serving = contextlib.AsyncExitStack()
        self._changed: dict = {}
        self.kube: Kube
        self.endpoint = ""

    @property
    def is_alone(self) -> bool:
        """Whether the API has no scheduler and no controllers: then pods are bound here."""
        return self.api.kind == "embedded"

    async def start(self) -> None:
        """The kubelet, and where the API is alone what a controller-manager does for Jobs."""
        kubelet = Kubelet(
            self.api,
            self.kubeconfig,
            self.directory / "kubelet",
            f"machine-{self.namespace}",
            bind=self.is_alone,
            restart_first_s=RESTART_FIRST_S,
        )
        # Or the scheduler would give the next machine's pods to it.
        self._stack.callback(self.api.request, "DELETE", f"/api/v1/nodes/{kubelet.node}")
        self._stack.callback(kubelet.clean_up)
        await asyncio.to_thread(kubelet.start)
        self.kube = await Kube.connect(self.kubeconfig)
        self._stack.push_async_callback(self.kube.close)
        if self.is_alone:
            jobs = asyncio.create_task(JobController(self.kube).run())
            self._stack.callback(jobs.cancel)
        else:
            self._make_volume()
        self._stack.push_async_callback(self._delete_models)
        await self.serve()

    def _make_volume(self) -> None:
        """What a class of shared file systems would make for the claim."""
        spec = {
            "accessModes": ["ReadWriteMany"],
            "capacity": {"storage": "10Gi"},
            "storageClassName": self.namespace,
            "hostPath": {"path": str(self.directory / "volume")},
        }
        volume = {"metadata": {"name": self.namespace}, "spec": spec}
        code, answer = self.api.request("POST", "/api/v1/persistentvolumes", volume)
        assert code == 201, answer

    async def _replace_volume(self) -> None:
        """A claim that is gone has used its volume up."""
        path = f"/api/v1/persistentvolumes/{self.namespace}"
        self.api.request("DELETE", path)
        await until("the volume is gone", lambda: self.api.request("GET", path)[0] == 404)
        self._make_volume()

    async def serve(self, **config) -> None:
        """`kubeai serve`, in place of the one that runs."""
        await self._serving.aclose()
        self._changed = config
        context = serving(self.directory, self.account, self.namespace, **(self.config | config))
        serve = await self._serving.enter_async_context(context)
        self.endpoint = serve.said("serving")["endpoint"]

    async def close(self) -> None:
        await self._stack.aclose()
        await self._serving.aclose()

    async def clear(self) -> None:
        """As at first: no Models, pods, Jobs, claims and quotas, and its own config."""
        await self._delete_models()
        for resource in (JOBS, PVCS) if self.is_alone else (JOBS, PVCS, QUOTAS):
            for found in (await self.kube.list(resource, self.namespace))[0]:
                name = found["metadata"]["name"]
                with contextlib.suppress(ApiError):  # it has ended by itself
                    # The default for Jobs is Orphan, which would leave their pods.
                    await self.kube.delete(resource, name, propagation="Background")

        async def empty() -> bool:
            lists = [await self.kube.list(one, self.namespace) for one in (PODS, JOBS, PVCS)]
            return not any(items for items, _ in lists)

        await until("pods, Jobs and claims are gone", empty, 60)
        if not self.is_alone:
            await self._replace_volume()
        if self._changed:
            await self.serve()

    async def _delete_models(self) -> None:
        self.gate.unlink(missing_ok=True)
        for found in (await self.kube.list(MODELS, self.namespace))[0]:
            await self.kube.delete(MODELS, found["metadata"]["name"])

        async def gone():
            return not (await self.kube.list(MODELS, self.namespace))[0]

        await until("all Models are gone", gone, 60)

    # -- what a person looks at ------------------------------------------------------------------

    async def create(self, model: dict) -> dict:
        """Create a Model, and wait until the gateway knows it."""
        made = await self.kube.create(MODELS, model)

        async def known() -> bool:
            url = f"{self.endpoint}/models"
            async with aiohttp.ClientSession() as session, session.get(url) as answer:
                listed = (await answer.json())["data"]
            return any(one["id"] == made["metadata"]["name"] for one in listed)

        await until("the gateway knows the Model", known)
        return made

    async def pods(self, name: str = "m") -> list[dict]:
        pods, _ = await self.kube.list(PODS, self.namespace, labels=f"app=model,model={name}")
        return [pod for pod in pods if "deletionTimestamp" not in pod["metadata"]]

    async def condition(self, type_: str, name: str = "m") -> tuple[str, str, str]:
        model = await self.kube.get(MODELS, name)
        for c in model.get("status", {}).get("conditions") or []:
            if c["type"] == type_:
                return c["status"], c["reason"], c["message"]
        return "", "", ""

    async def is_so(self, type_: str, status: str, reason: str, name: str = "m") -> bool:
        return (await self.condition(type_, name))[:2] == (status, reason)

    async def read(self, path: str, container: str = "server") -> str:
        """A file in the one pod of the Model."""
        (pod,) = await self.pods()
        name = pod["metadata"]["name"]
        result = await self.kube.exec(
            name, ["cat", path], container=container, timeout_s=EXEC_TIMEOUT_S
        )
        return result.output.strip() if result.exit_code == 0 else ""

    async def kill_engine(self) -> None:
        """The first process of the engine's container, by SIGKILL."""
        (pod,) = await self.pods()
        find = "cat /proc/$PPID/task/$PPID/children"
        with contextlib.suppress(ApiError):  # the command's own container ends
            await self.kube.exec(
                pod["metadata"]["name"],
                ["sh", "-c", f"kill -9 $({find} | cut -d' ' -f1)"],
                container="server",
                timeout_s=EXEC_TIMEOUT_S,
            )

        async def restarted() -> bool:
            (now,) = await self.pods()
            statuses = now["status"].get("containerStatuses") or ()
            return any(s["name"] == "server" and s["restartCount"] for s in statuses)

        await until("the engine's container starts again", restarted)

    async def ask(self, model: str) -> tuple[int, dict]:
        """A chat through the gateway."""
        question = {"model": model, "messages": [{"role": "user", "content": "hi"}]}
        url = f"{self.endpoint}/chat/completions"
        async with (
            aiohttp.ClientSession() as session,
            session.post(url, json=question | {"max_tokens": 4}) as answer,
        ):
            return answer.status, await answer.json()


@contextlib.asynccontextmanager
async def machine(api: ApiServer, directory: Path, kind: type[Machine] = Machine):
    """One of a ``kind``, in a namespace of its own."""
    namespace = f"test-{secrets.token_hex(4)}"
    code, answer = api.request("POST", "/api/v1/namespaces", {"metadata": {"name": namespace}})
    assert code == 201, answer
    one = kind(api, namespace, directory)
    try:
        await one.start()
        yield one
    finally:
        await one.close()


def install_load(directory: Path, gate: Path) -> None:
    """Put the program `load` into a folder. It waits while there is a file ``gate``."""
    directory.mkdir()
    program = directory / "load"
    program.write_text(LOAD.replace("GATE", str(gate)))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
