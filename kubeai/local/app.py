"""The main process of ``kubeai local``.

It owns the data directory, runs the embedded API and the process kubelet as child processes
(restarted when they exit), applies the CRD, the given manifests and the Models of ``--model``,
runs the supervisor and the Job controller, and reports what happens (report.py). Everything stops
with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shlex
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from pathlib import Path
from typing import IO, Any

import msgspec

from kubeai.api.config.system import KeysConfig, SystemConfig, load_config
from kubeai.api.crd import model_crd
from kubeai.errors import ConfigError, KubeAIError
from kubeai.kube.client import Kube
from kubeai.kube.errors import ApiError
from kubeai.kube.resources import CRDS, MODELS, NAMESPACES, NODES, PVCS
from kubeai.local import from_url, ports
from kubeai.local.child import Child
from kubeai.local.engine_env import read_engine_envs
from kubeai.local.engines import (
    ENGINES,
    MOCK_IMAGE,
    EngineEnvs,
    Found,
    ModelPath,
    survey,
)
from kubeai.local.jobs.controller import JobController
from kubeai.local.kubelet.capacity import allocatable
from kubeai.local.kubelet.gpus import check_gpus
from kubeai.local.kubelet.pods.pod import GPU
from kubeai.local.locks import lock_data_dir
from kubeai.local.manifests import Manifest, apply, read_manifests
from kubeai.local.report import Report, Show
from kubeai.local.unserved import Unserved
from kubeai.local.volumes import check_claim, read_volumes
from kubeai.logs import get_logger
from kubeai.port_owners import port_owner
from kubeai.processes import Spawn
from kubeai.supervisor.listeners import authority, is_loopback
from kubeai.supervisor.supervisor import Supervisor

log = get_logger(__name__)

NODE_NAME = "local"
DEFAULT_NAMESPACE = "default"
ENGINE_PORT = 8000
CRD_TIMEOUT_S = 10.0
# The modules of the processes that the main process starts.
PROCESSES = "kubeai.local.apiserver", "kubeai.local.kubelet", "kubeai.gateway.worker"
NO_MODEL = (
    "apply a manifest with kubectl or in the console, or start with --model URL, such as "
    "hf://Qwen/Qwen3-0.6B or ollama://qwen2.5:0.5b"
)
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
    models: tuple[str, ...] = ()  # URLs of weights
    engine_envs: tuple[str, ...] = ()  # NAME=DIR
    volumes: tuple[str, ...] = ()  # NAME=DIR
    gpus: str = "all"
    swap: bool = False
    require_keys: bool = False


class Inputs(msgspec.Struct, frozen=True):
    """What the command line names, read and checked."""

    config: SystemConfig
    manifests: list[Manifest]
    volumes: dict[str, Path]
    envs: EngineEnvs
    drafts: list[from_url.Draft]  # of --model
    surveying: asyncio.Task[list[Found]]  # the engines in `envs` and on PATH


class Machine(msgspec.Struct, frozen=True):
    """What was found on this machine, for the greeting."""

    engines: list[Found]
    gpus: int
    models: list[from_url.Draft]  # of --model


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


async def run(options: Options, spawn: Spawn, show: Show | None = None) -> None:
    """Run ``kubeai local`` until Ctrl-C or SIGTERM.

    ``spawn`` starts its processes. ``show`` shows the table of Models, if there is a terminal.
    """
    inputs = await _read(options)
    config, drafts, surveying = inputs.config, inputs.drafts, inputs.surveying
    data_dir = options.data_dir
    lock = _lock(data_dir)
    kubeconfig = data_dir / "kubeconfig"
    api = Child("Kubernetes API", lambda: _api_command(options, api), data_dir / "api.log", spawn)
    kubelet = Child(
        "kubelet",
        lambda: _kubelet_command(options, kubeconfig, inputs),
        data_dir / "kubelet.log",
        spawn,
    )
    kept_port = ports.kept_port(data_dir)
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
                started=lambda: _greet(options, supervisor, api.port, machine),
                local=True,
            )
            await _install_crd(client)
            await _create_namespace(client)
            await kubelet.start()
            node = await client.get(NODES, NODE_NAME)
            resources = allocatable(node["status"]["allocatable"])
            gpus = resources.get(GPU, 0) // 10**9
            if options.swap:
                supervisor.operator.enable_swap(resources)
            await _apply(client, inputs.manifests + await _models(client, drafts, gpus, config))
            machine = Machine(await _engines(client, inputs.envs, surveying), gpus, drafts)
            report = Report(client, data_dir, show, supervisor.models)
            beside = JobController(client).run(), Unserved(client).run(), report.run()
            async with _beside(supervisor.stop, *beside):
                await supervisor.run()
        finally:
            await client.close()
    finally:
        surveying.cancel()
        await kubelet.stop()
        await api.stop()
        lock.close()


async def _read(options: Options) -> Inputs:
    _check_host(options)
    _check_namespace(options)
    check_gpus(options.gpus)
    config = _load_config(options.config)
    if options.require_keys:
        gateway = msgspec.structs.replace(config.gateway, keys=KeysConfig(required=True))
        config = msgspec.structs.replace(config, gateway=gateway)
    manifests = read_manifests(options.manifests)
    _check_namespaces(manifests, options.namespace)
    volumes = read_volumes(options.volumes)
    envs = await read_engine_envs(options.engine_envs)
    # Concurrently with the start of the API: it may have to ask the programs on PATH.
    surveying = asyncio.create_task(survey(envs, _path()))
    drafts = [from_url.draft(url, await surveying) for url in options.models]
    _check_drafts(options, drafts, manifests, volumes)
    return Inputs(config, manifests, volumes, envs, drafts, surveying)


def _load_config(path: Path | None) -> SystemConfig:
    """The config, with a profile for Models of ``--model`` on a GPU."""
    config = load_config(path, defaults=LOCAL_DEFAULTS)
    if config.external:
        raise ConfigError(
            "proxy.mode", "external is for clusters: `kubeai local` serves the requests itself"
        )
    return from_url.with_gpu_profile(config)


def _path() -> str:
    return os.environ.get("PATH", os.defpath)


def _check_drafts(
    options: Options,
    drafts: Sequence[from_url.Draft],
    manifests: Sequence[Manifest],
    volumes: dict[str, Path],
) -> None:
    """Check that each Model of ``--model`` has a name of its own, and its weights a directory."""
    taken = {one.name: one.source for one in manifests if one.resource is MODELS}
    claims = {one.name for one in manifests if one.resource is PVCS}
    for draft in drafts:
        if draft.name in taken:
            raise KubeAIError(
                f"{draft.source}: its Model would be named {draft.name}, like that of "
                f"{taken[draft.name]}; write a manifest with another name"
            )
        taken[draft.name] = draft.source
        kept = options.data_dir / "volumes" / options.namespace
        check_claim(draft.url, volumes, kept, claims)


async def _models(
    client: Kube, drafts: Sequence[from_url.Draft], gpus: int, config: SystemConfig
) -> list[Manifest]:
    """The Models of ``--model``. An existing one must be for the same weights."""
    manifests = []
    for draft in drafts:
        wanted = from_url.manifest(draft, gpus, config)
        manifests.append(Manifest(draft.source, MODELS, wanted))
        try:
            live = await client.get(MODELS, draft.name, client.namespace)
        except ApiError as error:
            if error.status != 404:
                raise
            continue
        if live["spec"]["url"] != draft.url.original:
            raise KubeAIError(
                f"{draft.source}: the Model {draft.name} exists, with the url "
                f"{live['spec']['url']}; delete it first (kubectl delete model {draft.name}), or "
                f"write a manifest with another name"
            )
    return manifests


async def _engines(
    client: Kube, envs: EngineEnvs, surveying: asyncio.Task[list[Found]]
) -> list[Found]:
    """The engines of this machine, with those that only Models have on their PATH."""
    models, _ = await client.list(MODELS, client.namespace)
    paths = [
        ModelPath(model["metadata"]["name"], model["spec"]["engine"], model["spec"]["env"]["PATH"])
        for model in models
        if model["spec"].get("engine") in ENGINES and model["spec"].get("env", {}).get("PATH")
    ]
    return await survey(envs, _path(), paths) if paths else await surveying


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


def _kubelet_command(options: Options, kubeconfig: Path, inputs: Inputs) -> list[str]:
    return [
        "kubeai.local.kubelet",
        f"--kubeconfig={kubeconfig}",
        f"--data-dir={options.data_dir}",
        f"--node-name={NODE_NAME}",
        f"--gpus={options.gpus}",
        *(f"--engine-env={engine}={directory}" for engine, directory in inputs.envs.items()),
        *(f"--volume={claim}={directory}" for claim, directory in inputs.volumes.items()),
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
    """Log when the API's port changed, as copies of the kubeconfig contain it."""
    if kept_port and not options.api_port and port != kept_port:
        owner = port_owner(kept_port) or "another program"
        log.warning(
            "port of the Kubernetes API changed",
            message=f"the previous port {kept_port} is in use by {owner}. Update copies of the "
            f"kubeconfig, or set --api-port",
            port=port,
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
        kind = manifest.resource.kind
        log.info("manifest applied", kind=kind, name=manifest.name, outcome=outcome)


def _greet(options: Options, supervisor: Supervisor, api_port: int, machine: Machine) -> None:
    host = "127.0.0.1" if options.host in ("0.0.0.0", "::") else options.host
    gateway = f"http://{authority(host, supervisor.port)}"
    endpoint = f"{gateway}/openai/v1"
    kubeconfig = options.data_dir / "kubeconfig"
    namespace = options.namespace if options.namespace != DEFAULT_NAMESPACE else ""
    shows_console = supervisor.config.gateway.ui.enabled
    _advise_on_keys(options, supervisor)
    log.info("engines found", **_found(machine))
    for draft in machine.models:
        log.info(
            "first request",
            model=draft.name,
            engine=draft.engine.title,
            command=from_url.curl(draft, endpoint),
        )
    log.info(
        "serving",
        message="Ctrl-C stops it. Models are kept in the data directory.",
        endpoint=endpoint,
        **({"console": f"{gateway}/"} if shows_console else {}),
        kubernetes_api=f"https://127.0.0.1:{api_port}",
        **({"namespace": namespace} if namespace else {}),
        metrics=f"http://{supervisor.metrics_address}/metrics",
        kubectl=f"export KUBECONFIG={shlex.quote(str(kubeconfig))}",
    )
    if not any(supervisor.operator.models()):
        log.info("no Model yet", message=NO_MODEL)


def _advise_on_keys(options: Options, supervisor: Supervisor) -> None:
    """Warn if everybody in the network may send requests, and say how to create a first key."""
    if supervisor.keys is None:
        if not is_loopback(options.host):
            log.warning(
                "no keys are required",
                message=f"anyone who can reach {options.host} can use the Models. Restart with "
                "--require-keys, and create keys with `kubeai key create`",
            )
    elif not len(supervisor.keys):
        kubeconfig = shlex.quote(str(options.data_dir / "kubeconfig"))
        log.warning(
            "there are no keys yet",
            message="all requests are refused until there is one",
            command=f"kubeai key create NAME --admin --kubeconfig {kubeconfig}",
        )


def _found(machine: Machine) -> dict[str, str]:
    """By title, what was found of each engine, installed or not, and the GPUs, if there are any."""
    fields: dict[str, str] = {}
    for found in machine.engines:
        if found.program:
            what = f"{found.version or 'unknown version'}  {found.program} ({found.source})"
        else:
            what = f"not installed; to install it: {found.hint}"
        # A Model's own PATH may have a second one.
        fields[found.title] = "; ".join(filter(None, (fields.get(found.title), what)))
    fields["Mock engine"] = f"built in; for Models with image: {MOCK_IMAGE}"
    if machine.gpus:
        fields["GPUs"] = str(machine.gpus)
    return fields
