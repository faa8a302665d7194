"""The main process of ``kubeai local``.

It owns the data directory, runs the embedded API and the process kubelet as child processes
(restarted when they exit), applies the CRD and the given manifests, runs the supervisor and the Job
controller, and prints what happens to the terminal. Everything stops with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shlex
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import IO, Any

import msgspec

from kubeai.api.config.system import load_config
from kubeai.api.crd import model_crd
from kubeai.errors import KubeAIError
from kubeai.kube.client import Kube
from kubeai.kube.errors import ApiError
from kubeai.kube.resources import CRDS, MODELS, NAMESPACES, PODS, Resource
from kubeai.local import ports
from kubeai.local.child import Child
from kubeai.local.jobs.controller import JobController
from kubeai.local.locks import lock_data_dir
from kubeai.local.manifests import Manifest, apply, read_manifests
from kubeai.local.unserved import Unserved
from kubeai.logs import get_logger
from kubeai.processes import Spawn
from kubeai.supervisor.supervisor import Supervisor

log = get_logger(__name__)

NODE_NAME = "local"
DEFAULT_NAMESPACE = "default"
ENGINE_PORT = 8000
CRD_TIMEOUT_S = 10.0
# The modules of the processes that the main process starts.
PROCESSES = "kubeai.local.apiserver", "kubeai.local.kubelet", "kubeai.gateway.worker"
_NAMESPACE = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")

# Defaults for interactive use on one machine: scale down soon after the last request, and stop
# quickly. Web pages from this machine may use the API. A config file overrides each key.
LOCAL_DEFAULTS: dict[str, Any] = {
    "metricsAddr": "127.0.0.1:0",
    "healthAddress": "127.0.0.1:0",
    "modelAutoscaling": {"interval": "1s", "timeWindow": "10s"},
    "gateway": {
        "drainAccept": "0s",
        "drainTimeout": "10s",
        "corsOrigins": [
            f"{scheme}://{host}:*"
            for scheme in ("http", "https")
            for host in ("localhost", "127.0.0.1")
        ],
        "ui": {"enabled": True},
    },
}


class Options(msgspec.Struct, frozen=True):
    """The command line of ``kubeai local``."""

    manifests: tuple[Path, ...]
    host: str
    port: int
    workers: int
    data_dir: Path
    config: Path | None
    api_port: int
    namespace: str


def _check_host(options: Options) -> None:
    """Refuse a wildcard address on port 8000: pods use that port on their loopback addresses."""
    if options.host in ("0.0.0.0", "::") and options.port == ENGINE_PORT:
        raise KubeAIError(
            f"--host {options.host}: would take port {ENGINE_PORT} on every address, including the "
            f"pods'; use another --port, or the address of one interface"
        )


def _check_namespace(options: Options) -> None:
    if not _NAMESPACE.fullmatch(options.namespace):
        raise KubeAIError(
            f"--namespace: {options.namespace!r} must consist of lower-case letters, digits and "
            f"'-', begin and end with a letter or digit, and have at most 63 characters"
        )


async def run(options: Options, spawn: Spawn) -> None:
    """Run ``kubeai local`` until Ctrl-C or SIGTERM. ``spawn`` starts its processes."""
    _check_host(options)
    _check_namespace(options)
    config = load_config(options.config, defaults=LOCAL_DEFAULTS)
    manifests = read_manifests(options.manifests)
    _check_namespaces(manifests, options.namespace)
    lock = _lock(options.data_dir)
    kubeconfig = options.data_dir / "kubeconfig"
    api = Child(
        "Kubernetes API",
        lambda: _api_command(options, api),
        options.data_dir / "api.log",
        spawn,
    )
    kubelet = Child(
        "kubelet",
        lambda: [
            "kubeai.local.kubelet",
            f"--kubeconfig={kubeconfig}",
            f"--data-dir={options.data_dir}",
            f"--node-name={NODE_NAME}",
        ],
        options.data_dir / "kubelet.log",
        spawn,
    )
    kept_port = ports.kept_port(options.data_dir)
    try:
        await api.start()
        _say_if_moved(options, kept_port, api.port)
        client = await Kube.connect(str(kubeconfig))
        try:
            supervisor = Supervisor(
                client,
                config,
                namespace=client.namespace,
                # The lock admits one process; after a kill, the next one can renew the lease.
                identity="local",
                host=options.host,
                port=options.port,
                workers=options.workers,
                spawn=spawn,
                started=lambda: _greet(options, supervisor, api.port),
                local=True,
            )
            await _install_crd(client)
            await _create_namespace(client)
            await kubelet.start()
            await _apply(client, manifests)
            beside = JobController(client).run(), Unserved(client, _print).run(), _report(client)
            async with _beside(supervisor.stop, *beside):
                await supervisor.run()
        finally:
            await client.close()
    finally:
        await kubelet.stop()
        await api.stop()
        lock.close()


@contextlib.asynccontextmanager
async def _beside(
    stop: Callable[[], None], *works: Coroutine[Any, Any, None]
) -> AsyncIterator[None]:
    """Run tasks while the block runs. If one fails, call ``stop`` and raise its exception."""
    tasks = [asyncio.create_task(work) for work in works]
    for task in tasks:
        task.add_done_callback(lambda _: stop())
    try:
        yield
    finally:
        faults = [t.exception() for t in tasks if t.done() and not t.cancelled()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for fault in filter(None, faults):
        raise fault


def _api_command(options: Options, api: Child) -> list[str]:
    return [
        "kubeai.local.apiserver",
        f"--data-dir={options.data_dir}",
        f"--port={api.port or options.api_port}",  # a restarted API keeps its port
        f"--namespace={options.namespace}",
    ]


def _lock(data_dir: Path) -> IO[str]:
    if os.pathsep in str(data_dir):  # KUBECONFIG is a list of paths
        raise KubeAIError(f"--data-dir: {data_dir}: must not contain {os.pathsep!r}")
    return lock_data_dir(data_dir, "lock", "`kubeai local`")


async def _install_crd(client: Kube) -> None:
    """Create or update the Model CRD, and wait until the API serves it."""
    crd = model_crd()
    name = crd["metadata"]["name"]
    try:
        live = await client.get(CRDS, name)
        crd["metadata"]["resourceVersion"] = live["metadata"]["resourceVersion"]
        await client.update(CRDS, crd)
    except ApiError as error:
        if error.status != 404:
            raise
        await client.create(CRDS, crd)
    async with asyncio.timeout(CRD_TIMEOUT_S):
        while True:
            live = await client.get(CRDS, name)
            conditions = live.get("status", {}).get("conditions", [])
            if any(c["type"] == "Established" and c["status"] == "True" for c in conditions):
                return
            await asyncio.sleep(0.02)


def _say_if_moved(options: Options, kept_port: int, port: int) -> None:
    """Print a note when the API's port changed, as copies of the kubeconfig contain it."""
    if kept_port and not options.api_port and port != kept_port:
        _print(
            f"Kubernetes API: the previous port {kept_port} is in use by another program. It now "
            f"listens on port {port}. Update copies of the kubeconfig, or set --api-port"
        )


async def _create_namespace(client: Kube) -> None:
    """Create the served namespace if it does not exist."""
    try:
        await client.create(NAMESPACES, {"metadata": {"name": client.namespace}})
    except ApiError as error:
        if error.status != 409:
            raise


def _check_namespaces(manifests: list[Manifest], served: str) -> None:
    for manifest in manifests:
        namespace = manifest.object["metadata"].get("namespace") or served
        if manifest.resource is MODELS and namespace != served:
            raise KubeAIError(
                f"{manifest.source}: metadata.namespace: {namespace}: Models are served in the "
                f"namespace {served} only; use --namespace to choose another"
            )


async def _apply(client: Kube, manifests: list[Manifest]) -> None:
    for manifest in manifests:
        outcome = await apply(client, manifest)
        _print(f"{manifest.resource.kind.lower()} {manifest.name} {outcome}")


def _print(text: str) -> None:
    with contextlib.suppress(OSError):  # a full disk must not stop the server
        print(text, flush=True)


def _greet(options: Options, supervisor: Supervisor, api_port: int) -> None:
    host = "127.0.0.1" if options.host in ("0.0.0.0", "::") else options.host
    _print("")
    _print(f"OpenAI endpoint  http://{host}:{supervisor.port}/openai/v1")
    if supervisor.config.gateway.ui.enabled:
        _print(f"Console          http://{host}:{supervisor.port}/")
    _print(f"Kubernetes API   https://127.0.0.1:{api_port}")
    if options.namespace != DEFAULT_NAMESPACE:
        _print(f"Namespace        {options.namespace}")
    _print(f"Metrics          http://{supervisor.metrics_address}/metrics")
    kubeconfig = shlex.quote(str(options.data_dir / "kubeconfig"))
    _print(f"kubectl          export KUBECONFIG={kubeconfig}")
    _print("Press Ctrl-C to stop. Models are kept in the data directory.")
    _print("")


async def _report(client: Kube) -> None:
    """Print a line for each change of a pod's state, and for Models that cannot run."""
    printed: dict[tuple[str, str], str] = {}

    async def follow(resource: Resource, labels: str, line_of: Callable[[Any], str]) -> None:
        def report(kind: str, obj: dict[str, Any]) -> None:
            key = resource.kind.lower(), obj["metadata"]["name"]
            line = "gone" if kind == "DELETED" else line_of(obj)
            if line and printed.get(key) != line:
                _print(f"{' '.join(key)}: {line}")
            printed[key] = line
            if kind == "DELETED":
                del printed[key]

        def replaced(objects: list[dict[str, Any]]) -> None:
            for obj in objects:
                report("ADDED", obj)

        await client.follow(
            resource, client.namespace, labels=labels, replaced=replaced, changed=report
        )

    await asyncio.gather(follow(PODS, "app=model", _pod_line), follow(MODELS, "", _model_line))


def _model_line(model: dict[str, Any]) -> str:
    """Describe why a Model is neither ready nor progressing; empty otherwise."""
    conditions = {c["type"]: c for c in model.get("status", {}).get("conditions", [])}
    ready, progressing = conditions.get("Ready"), conditions.get("Progressing")
    if not ready or not progressing or "True" in (ready["status"], progressing["status"]):
        return ""
    return f"{ready['reason']}: {ready['message']}"


def _pod_line(pod: dict[str, Any]) -> str:
    status = pod.get("status", {})
    mock = (
        " (mock engine)"
        if pod["metadata"].get("annotations", {}).get("kubeai.org/mock-engine") == "true"
        else ""
    )
    if pod["metadata"].get("deletionTimestamp"):
        return "terminating"
    for container in status.get("containerStatuses", []):
        waiting = container.get("state", {}).get("waiting")
        last = container.get("lastState", {}).get("terminated")
        if waiting and last and waiting.get("reason") == "CrashLoopBackOff":
            return f"exits with {last['exitCode']}; kubectl logs {pod['metadata']['name']}"
        if waiting and waiting.get("reason") not in (None, "ContainerCreating", "PodInitializing"):
            return f"{waiting['reason']}: {waiting.get('message', '')}".rstrip(": ")
    for condition in status.get("conditions", []):
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return f"{condition['reason']}: {condition['message']}"
        if condition["type"] == "Ready" and condition["status"] == "True":
            return f"ready at {status.get('podIP', '?')}{mock}"
    return f"starting{mock}"
