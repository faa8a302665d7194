"""``kubeai doctor``: what is installed, what is missing, and what would fail on this machine.

Each check tries what ``kubeai local`` would do, rather than guess from versions: it binds the
ports, opens a database in the data directory, mounts a directory as the kubelet does. Nothing is
changed and nothing is left behind. Checks that run programs or use the network have time limits.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import importlib
import importlib.util
import os
import platform
import resource
import shutil
import socket
import sqlite3
import sys
import tempfile
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Literal

import msgspec

import kubeai
from kubeai.errors import KubeAIError, install_hint
from kubeai.local import ports
from kubeai.local.engine_env import read_engine_envs
from kubeai.local.engines import EngineEnvs, survey
from kubeai.local.kubelet.gpus import find_gpus
from kubeai.local.kubelet.runtime.children import run_helper
from kubeai.port_owners import port_owner
from kubeai.supervisor.listeners import authority

Status = Literal["ok", "warning", "problem"]

ENGINE_PORT = 8000
PROGRAM_TIMEOUT_S = 5.0
CLUSTER_TIMEOUT_S = 5.0
DISK_MIN_BYTES, DISK_LOW_BYTES = 200 << 20, 5 << 30
MEMORY_LOW_BYTES = 2 << 30
DESCRIPTORS_MIN, DESCRIPTORS_LOW = 512, 8192  # a client may need two
PYTHON_MIN = (3, 11)
# One of each group of compiled modules; all are built together.
CORE = "_load", "_ring", "_pick", "_prefix", "gateway._fast_path", "gateway.relay._exchange"
NETWORK_FILE_SYSTEMS = ("nfs", "nfs4", "cifs", "smb3", "9p", "fuse.sshfs", "ceph", "glusterfs")
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
_MOUNT = """
import os, sys
from kubeai.local.kubelet.runtime.shim.mounts import mount_volumes
here = sys.argv[1]
try:
    mount_volumes([(here + "/source", here + "/target", False)], here + "/root", "auto")
    sys.exit(os.listdir(here + "/target") != ["file"])
except Exception as error:
    print(error)
    sys.exit(1)
"""


class Check(msgspec.Struct, frozen=True):
    """The outcome of one check. ``hint``: what to do, if something is wrong."""

    name: str
    status: Status
    message: str
    hint: str = ""


class Setting(msgspec.Struct, frozen=True):
    """What ``kubeai local`` would be started with."""

    host: str
    port: int
    data_dir: Path
    engine_envs: tuple[str, ...] = ()  # NAME=DIR


async def examine(setting: Setting, environ: Mapping[str, str] = os.environ) -> list[Check]:
    """Run all checks. A check that fails itself is a problem with its error as the message.

    KubeAIError names a wrong value of ``--engine-env``.
    """
    envs = await read_engine_envs(setting.engine_envs)
    checks: list[tuple[str, Callable[[], Awaitable[list[Check]]]]] = [
        ("Python", _plain(check_python)),
        ("compiled core", _plain(check_core)),
        ("system", _plain(check_system)),
        ("port", _plain(lambda: check_ports(setting))),
        ("data directory", _plain(lambda: check_data_dir(setting.data_dir))),
        ("disk and memory", _plain(lambda: check_space(setting.data_dir))),
        ("descriptors", _plain(check_descriptors)),
        ("mounts", check_mounts),
        ("kubectl", check_kubectl),
        ("engines", lambda: check_engines(envs)),
        ("GPUs", check_gpus),
        ("loader", _plain(check_loader)),
        ("proxies", _plain(lambda: check_proxies(environ))),
        ("cluster", lambda: check_cluster(environ)),
    ]
    return [check for name, run in checks for check in await _guarded(name, run)]


def _plain(check: Callable[[], list[Check]]) -> Callable[[], Awaitable[list[Check]]]:
    async def run() -> list[Check]:
        return check()

    return run


async def _guarded(name: str, run: Callable[[], Awaitable[list[Check]]]) -> list[Check]:
    try:
        return await run()
    except Exception as error:
        return [Check(name, "problem", f"{type(error).__name__}: {error}")]


def check_python() -> list[Check]:
    """The version of Python, and KubeAI's."""
    message = f"{platform.python_version()} at {sys.executable}, KubeAI {kubeai.__version__}"
    if sys.version_info < PYTHON_MIN:
        wanted = ".".join(map(str, PYTHON_MIN))
        return [Check("Python", "problem", message, f"install Python {wanted} or newer")]
    return [Check("Python", "ok", message)]


def check_core() -> list[Check]:
    """Whether the compiled modules load."""
    for module in CORE:
        try:
            importlib.import_module(f"kubeai.{module}")
        except ImportError as error:
            hint = "in a checkout: make build; otherwise reinstall kubeai-gateway"
            return [Check("compiled core", "problem", str(error), hint)]
    return [Check("compiled core", "ok", "loads")]


def check_system() -> list[Check]:
    """Linux, and the system calls that the kubelet needs."""
    name = f"{platform.system()} {platform.release()}"
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError):
        return [Check("system", "problem", name, "KubeAI needs Linux 5.3 or newer (pidfd_open)")]
    return [Check("system", "ok", name)]


def check_ports(setting: Setting) -> list[Check]:
    """The gateway's port, the Kubernetes API's kept port, and the port of the engines."""
    runs = _is_running(setting.data_dir)
    checks = []
    if runs:
        message = f"kubeai local is running with {setting.data_dir}"
        hint = "a second one needs another --data-dir and --port"
        checks.append(Check("kubeai local", "warning", message, hint))
    taken: Status = "warning" if runs else "problem"
    name = f"port {setting.port}"
    if why := _unbindable(setting.host, setting.port):
        hint = "stop that program, or use kubeai local --port with another port"
        where = authority(setting.host, setting.port)
        checks.append(Check(name, taken, f"{where}: {why}", hint))
    else:
        checks.append(Check(name, "ok", f"is free on {setting.host}"))
    # Pods use this port on loopback addresses of their own.
    if why := _unbindable("127.255.0.1", ENGINE_PORT):
        hint = "stop the program that listens on all addresses; engines need this port"
        checks.append(Check("port of the engines", "problem", f"{ENGINE_PORT}: {why}", hint))
    kept = ports.kept_port(setting.data_dir)
    if kept and not runs and (why := _unbindable("127.0.0.1", kept)):
        hint = "kubeai local will choose another one; update copies of the kubeconfig"
        checks.append(Check("port of the Kubernetes API", "warning", f"{kept}: {why}", hint))
    return checks


def _is_running(data_dir: Path) -> bool:
    """Whether another process has the lock of a data directory."""
    try:
        with (data_dir / "lock").open("r") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _unbindable(host: str, port: int) -> str:
    """Why a port cannot be listened on; empty if it can."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # ignore TIME_WAIT
        try:
            tried.bind((host, port))
            tried.listen(1)
        except OSError as error:
            owner = port_owner(port) if error.errno == errno.EADDRINUSE else ""
            return f"in use by {owner}" if owner else str(error.strerror)
    return ""


def check_data_dir(data_dir: Path) -> list[Check]:
    """Whether locks and databases work in the data directory, or where it would be created."""
    there = _existing(data_dir)
    name, hint = "data directory", "choose another one with --data-dir, on a local disk"
    try:
        with tempfile.TemporaryDirectory(prefix=".kubeai-doctor-", dir=there) as folder:
            _use(Path(folder))
    except (OSError, sqlite3.Error) as error:
        why = getattr(error, "strerror", None) or str(error)
        return [Check(name, "problem", f"{there}: cannot be used: {why}", hint)]
    kind = _file_system(there)
    if kind in NETWORK_FILE_SYSTEMS:
        message = f"{data_dir} is on {kind}, where locks and SQLite's log may be unreliable"
        return [Check(name, "warning", message, hint)]
    state = "is writable" if there == data_dir else f"will be created in {there}"
    return [Check(name, "ok", f"{data_dir} {state}" + (f" ({kind})" if kind else ""))]


def _existing(path: Path) -> Path:
    return next((p for p in (path, *path.parents) if p.exists()), Path("/"))


def _use(folder: Path) -> None:
    """Do what the embedded API and the kubelet do in the data directory."""
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with contextlib.closing(sqlite3.connect(folder / "objects.db")) as database:
        (mode,) = database.execute("PRAGMA journal_mode=WAL").fetchone()
        if mode != "wal":
            raise OSError(errno.ENOTSUP, "SQLite's write-ahead log does not work here")
        database.execute("CREATE TABLE t (c)")
        database.commit()


def _file_system(path: Path) -> str:
    """The type of the file system that contains a path; empty if unknown."""
    best, kind = "", ""
    with contextlib.suppress(OSError, IndexError):
        for line in Path("/proc/self/mounts").read_text().splitlines():
            _, mount, found = line.split()[:3]
            inside = path.is_relative_to(mount.replace("\\040", " "))
            if inside and len(mount) >= len(best):
                best, kind = mount, found
    return kind


def check_space(data_dir: Path) -> list[Check]:
    """Free space for weights and logs, and available memory."""
    free = shutil.disk_usage(_existing(data_dir)).free
    message = f"{free / 1e9:.1f} GB free for {data_dir}"
    if free < DISK_LOW_BYTES:
        status: Status = "problem" if free < DISK_MIN_BYTES else "warning"
        hint = "free some space, or choose another --data-dir; weights need gigabytes"
        disk = Check("disk", status, message, hint)
    else:
        disk = Check("disk", "ok", message)
    available = _available_bytes()
    message = f"{available / 1e9:.1f} GB available, {os.cpu_count()} CPUs"
    if available and available < MEMORY_LOW_BYTES:
        hint = "the mock engine runs; a real engine needs its weights' size and more"
        return [disk, Check("memory", "warning", message, hint)]
    return [disk, Check("memory", "ok", message)]


def _available_bytes() -> int:
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    return 0


def check_descriptors() -> list[Check]:
    """The limit of open files: two for each client. Workers raise the soft limit by themselves."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    message = "no limit of open files" if hard == resource.RLIM_INFINITY else f"{hard} open files"
    if hard == resource.RLIM_INFINITY or hard >= DESCRIPTORS_LOW:
        return [Check("descriptors", "ok", message)]
    status: Status = "problem" if hard < DESCRIPTORS_MIN else "warning"
    hint = f"a worker serves about {hard // 2} clients at a time; raise the limit: ulimit -Hn"
    return [Check("descriptors", status, message, hint)]


async def check_mounts() -> list[Check]:
    """Whether the kubelet can mount volumes: as root, or with unprivileged user namespaces."""
    with tempfile.TemporaryDirectory(prefix="kubeai-doctor-") as folder:
        for name in ("source", "source/file", "target", "root"):
            os.mkdir(os.path.join(folder, name))
        code, output = await run_helper([sys.executable, "-c", _MOUNT, folder], PROGRAM_TIMEOUT_S)
    if code == 0:
        return [Check("mounts", "ok", "volumes can be mounted")]
    why = output.strip().splitlines()[-1] if output.strip() else "the trial mount failed"
    hint = (
        "Models with volumes, caches or files cannot run: run as root, or allow user namespaces "
        "(sysctl kernel.unprivileged_userns_clone=1, on Ubuntu "
        "kernel.apparmor_restrict_unprivileged_userns=0)"
    )
    return [Check("mounts", "warning", why, hint)]


async def check_kubectl() -> list[Check]:
    """Kubectl, and its version."""
    program = shutil.which("kubectl")
    if program is None:
        hint = "optional; see https://kubernetes.io/docs/tasks/tools/"
        return [Check("kubectl", "warning", "is not installed", hint)]
    code, output = await run_helper(
        [program, "version", "--client", "--output=json"], PROGRAM_TIMEOUT_S
    )
    try:
        version = msgspec.json.decode(output)["clientVersion"]["gitVersion"]
    except (msgspec.DecodeError, KeyError, TypeError):
        message = f"{program} does not report its version (exit status {code})"
        return [Check("kubectl", "warning", message, "reinstall it")]
    return [Check("kubectl", "ok", f"{version} at {program}")]


async def check_engines(envs: EngineEnvs) -> list[Check]:
    """The engines that are installed; without any, only the mock engine can run."""
    engines = await survey(envs, os.environ.get("PATH", os.defpath))
    missing: Status = "ok" if any(one.program for one in engines) else "warning"
    return [
        Check(one.title, "ok", f"{one.version} at {one.program} ({one.source})".strip())
        if one.program
        else Check(one.title, missing, f"is not installed; to install it: {one.hint}")
        for one in engines
    ]


async def check_gpus() -> list[Check]:
    """The NVIDIA GPUs that `kubeai local` assigns to replicas, and what nvidia-smi reports."""
    count = len((await find_gpus()).ids)
    program = shutil.which("nvidia-smi")
    if program is None:
        found = f"{count} (no nvidia-smi)" if count else "none: engines run on the CPU"
        return [Check("GPUs", "ok", found)]
    query = "--query-gpu=name,memory.total,driver_version"
    code, output = await run_helper([program, query, "--format=csv,noheader"], PROGRAM_TIMEOUT_S)
    if code != 0:
        hint = "run nvidia-smi and fix what it reports, such as a driver that is not loaded"
        return [Check("GPUs", "warning", f"nvidia-smi fails with {code}", hint)]
    gpus = [line.strip() for line in output.splitlines() if line.strip()]
    return [Check("GPUs", "ok", f"{count} for replicas: {'; '.join(gpus)}" if gpus else "none")]


def check_loader() -> list[Check]:
    """The packages that `kubeai load` needs."""
    modules = ("huggingface_hub", "obstore")
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        message = f"kubeai load lacks {' and '.join(missing)}: model caches cannot be filled"
        return [Check("loader", "warning", message, install_hint("load"))]
    return [Check("loader", "ok", "kubeai load can download from hubs and buckets")]


def check_proxies(environ: Mapping[str, str]) -> list[Check]:
    """Proxies that clients would use for this machine's own addresses."""

    def value(name: str) -> str:
        return environ.get(name.lower()) or environ.get(name) or ""

    proxies = [name for name in _PROXIES if value(name)]
    excluded = {word.strip() for word in value("NO_PROXY").split(",")}
    if not proxies:
        return [Check("proxies", "ok", "no proxy is set")]
    if "*" in excluded or ("localhost" in excluded and _covers_loopback(excluded)):
        return [Check("proxies", "ok", f"{', '.join(proxies)} not used for loopback")]
    message = f"{', '.join(proxies)} set: curl and Python clients would use it for 127.0.0.1"
    hint = "export NO_PROXY=localhost,127.0.0.1,127.0.0.0/8,::1 and no_proxy alike"
    return [Check("proxies", "warning", message, hint)]


def _covers_loopback(excluded: set[str]) -> bool:
    return bool(excluded & {"127.0.0.1", "127.0.0.0/8", "127.*"})


async def check_cluster(environ: Mapping[str, str]) -> list[Check]:
    """The cluster that `kubeai serve` would use, if there is one."""
    from kubeai.kube.auth import ACCOUNT_DIR
    from kubeai.kube.client import Kube
    from kubeai.kube.errors import ApiError
    from kubeai.kube.resources import CRDS

    kubeconfig = environ.get("KUBECONFIG", "")
    if not kubeconfig and not ACCOUNT_DIR.exists():
        return [Check("cluster", "ok", "KUBECONFIG is not set; only kubeai serve needs it")]
    where = kubeconfig or "the pod's service account"
    try:
        async with asyncio.timeout(CLUSTER_TIMEOUT_S):
            client = await Kube.connect(kubeconfig or None)
            try:
                await client.get(CRDS, "models.kubeai.org")
            finally:
                await client.close()
    except TimeoutError:
        message = f"{where}: no answer within {CLUSTER_TIMEOUT_S:g} s"
    except ApiError as error:
        if error.status == 404:
            hint = "install it: kubeai crd | kubectl apply -f -"
            message = f"{where}: reachable, without the Model type"
            return [Check("cluster", "warning", message, hint)]
        message = f"{where}: {error}"
    except KubeAIError as error:
        message = str(error)
    else:
        return [Check("cluster", "ok", f"{where}: reachable, with the Model type")]
    hint = "kubeai serve would fail; kubeai local does not need a cluster"
    return [Check("cluster", "warning", message, hint)]
