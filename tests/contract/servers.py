"""The Kubernetes APIs that the tests run against, as processes on loopback.

- :func:`embedded`: the one of ``kubeai local``;
- :func:`real`: etcd and kube-apiserver, nothing else;
- :func:`cluster`: the same with controller-manager, scheduler, and kwok for nodes and kubelets.

The real ones ask kubelets over TLS and show them a certificate.

Their binaries are in the folder that KUBEBUILDER_ASSETS names; see tests/cluster.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import orjson
import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from fakes import forked
from fakes.authority import Authority

from kubeai.local.apiserver import credentials

START_TIMEOUT_S = 120.0  # of a machine that is busy with other things
KUBELET_CLIENT = "kube-apiserver-kubelet-client"
KWOK_LABEL = "kubeai.org/played-by-kwok"
CONTROL_PLANE = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kwok")


class Program:
    """A server's process; one that was killed starts again where it was."""

    def __init__(self, command: Sequence[str], log: Path | None = None) -> None:
        self._command = command
        self._log = log
        self._process: subprocess.Popen[bytes] | forked.Forked

    def start(self, *options: str, pass_fds: tuple[int, ...] = ()) -> None:
        """``options``: of this start only."""
        with contextlib.ExitStack() as stack:
            log = self._log and stack.enter_context(self._log.open("ab"))
            output = None if log is None else log.fileno()
            self._process = forked.popen([*self._command, *options], pass_fds, output)

    def freeze(self) -> None:
        """Accept connections without answering."""
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """Kill it, so that connections are refused."""
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        self.thaw()
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self.kill()


class ApiServer(NamedTuple):
    """A running API."""

    kind: str  # embedded or real
    url: str
    token: str
    ca_file: str
    client_ca_file: str = ""  # of the certificate that it shows to kubelets, if it shows one
    program: Program | None = None  # the API's own process, for who takes it away
    accounts: Mapping[str, str] = MappingProxyType({})  # tokens of <namespace>:<service account>

    def request(
        self,
        method: str,
        path: str,
        body: object = None,
        kind: str = "application/json",
        accept: str = "application/json",
        headers: dict[str, str] | None = None,
    ):
        """Status code and decoded answer, over a connection of its own; bytes are sent as is."""
        data = body if body is None or isinstance(body, bytes) else orjson.dumps(body)
        request = urllib.request.Request(self.url + path, data, headers or {}, method=method)
        request.add_header("Authorization", f"Bearer {self.token}")
        request.add_header("Accept", accept)
        request.add_header("Content-Type", kind)
        context = ssl.create_default_context(cafile=self.ca_file)
        try:
            with urllib.request.urlopen(request, timeout=30, context=context) as answer:
                return answer.status, _decoded(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, _decoded(error.read())

    def is_ready(self, path: str) -> bool:
        """Whether an object's condition Ready is True."""
        _, found = self.request("GET", path)
        conditions = found.get("status", {}).get("conditions") or []
        return any((c["type"], c["status"]) == ("Ready", "True") for c in conditions)

    @contextlib.contextmanager
    def watch(self, path: str, accept: str = "application/json"):
        """The events of a watch, decoded, as an iterator that waits for the next."""
        request = urllib.request.Request(self.url + path)
        request.add_header("Authorization", f"Bearer {self.token}")
        request.add_header("Accept", accept)
        context = ssl.create_default_context(cafile=self.ca_file)
        with urllib.request.urlopen(request, timeout=30, context=context) as answer:
            yield (orjson.loads(line) for line in answer)

    def kubeconfig(self, path: Path, namespace: str) -> Path:
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "clusters": [
                {
                    "name": "test",
                    "cluster": {"server": self.url, "certificate-authority": self.ca_file},
                }
            ],
            "users": [{"name": "test", "user": {"token": self.token}}],
            "contexts": [
                {
                    "name": "test",
                    "context": {"cluster": "test", "user": "test", "namespace": namespace},
                }
            ],
        }
        path.write_text(yaml.safe_dump(config))
        path.chmod(0o600)
        return path


def _decoded(body: bytes):
    """JSON, or the text that a real API says before it is ready."""
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        return body.decode()


@contextlib.contextmanager
def embedded(directory: Path):
    """The embedded API as a process, once it says that it is ready."""
    command = (sys.executable, "-m", "kubeai.local.apiserver", "--data-dir", str(directory))
    with kept_ports(1) as (port,):
        program = Program((*command, "--port", str(port)))
        read, write = os.pipe()
        program.start("--ready-fd", str(write), pass_fds=(write,))
        os.close(write)
        try:
            with os.fdopen(read) as pipe:
                line = pipe.readline().split()
            assert line == ["ready", str(port)], "the embedded API did not start"
            yield ApiServer(
                "embedded",
                f"https://127.0.0.1:{port}",
                (directory / "token").read_text(),
                str(directory / "ca.crt"),
                program=program,
            )
        finally:
            program.stop()


def assets(*names: str) -> Path | None:
    """The folder with these binaries, if there is one."""
    folder = os.environ.get("KUBEBUILDER_ASSETS")
    if folder and all((Path(folder) / name).exists() for name in names):
        return Path(folder)
    return None


@contextlib.contextmanager
def real(directory: Path, *options: str, accounts: Sequence[str] = ()):
    """etcd and kube-apiserver on loopback, nothing else. ``options``: more of kube-apiserver's.

    ``accounts``: <namespace>:<name> of service accounts that get a token before they are there, as
    no kubelet of these tests asks for one.
    """
    folder = assets("etcd", "kube-apiserver")
    assert folder is not None
    directory.mkdir(parents=True)
    token, tokens = _write_tokens(directory / "tokens.csv", accounts)
    credentials.load(directory)  # certificates for loopback
    key = directory / "service-accounts.key"
    _make_rsa_key(key)
    clients = Authority(directory, "kubelet-clients")
    client = clients.client(KUBELET_CLIENT)
    log = directory / "kube-apiserver.log"
    with _etcd(folder, directory) as etcd_url, kept_ports(1) as (port,):
        command = (
            str(folder / "kube-apiserver"),
            f"--etcd-servers={etcd_url}",
            f"--secure-port={port}",
            "--bind-address=127.0.0.1",
            f"--cert-dir={directory / 'certificates'}",
            f"--tls-cert-file={directory / 'tls.crt'}",
            f"--tls-private-key-file={directory / 'tls.key'}",
            f"--kubelet-client-certificate={client.certificate}",
            f"--kubelet-client-key={client.key}",
            "--service-cluster-ip-range=10.0.0.0/24",
            f"--service-account-key-file={key}",
            f"--service-account-signing-key-file={key}",
            "--service-account-issuer=https://kubernetes.default.svc",
            "--authorization-mode=RBAC",
            f"--token-auth-file={directory / 'tokens.csv'}",
            "--disable-admission-plugins=ServiceAccount",
            *options,
        )
        url, ca_file = f"https://127.0.0.1:{port}", str(directory / "ca.crt")
        with running(log, *command) as program:
            server = ApiServer("real", url, token, ca_file, str(clients.file), program, tokens)
            ready = lambda: _is_healthy(server) and _takes_services(server)  # noqa: E731
            wait_until(ready, "kube-apiserver is ready", log)
            yield server


def _write_tokens(file: Path, accounts: Sequence[str]) -> tuple[str, dict[str, str]]:
    """The administrator's token, and those of the service accounts."""
    token = secrets.token_hex(16)
    tokens = {account: secrets.token_hex(16) for account in accounts}
    users = [f'{token},admin,admin,"system:masters"\n']
    users += [
        f'{one},system:serviceaccount:{account},{account},"system:serviceaccounts"\n'
        for account, one in tokens.items()
    ]
    file.write_text("".join(users))
    return token, tokens


@contextlib.contextmanager
def _etcd(folder: Path, directory: Path):
    """The URL of an etcd on loopback, whose binary is in ``folder``."""
    with kept_ports(2) as (port, peer_port):
        url, peer_url = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{peer_port}"
        command = (
            str(folder / "etcd"),
            f"--data-dir={directory / 'etcd'}",
            f"--listen-client-urls={url}",
            f"--advertise-client-urls={url}",
            f"--listen-peer-urls={peer_url}",
            f"--initial-advertise-peer-urls={peer_url}",
            f"--initial-cluster=default={peer_url}",
            "--unsafe-no-fsync",
        )
        with running(directory / "etcd.log", *command):
            yield url


def _is_healthy(server: ApiServer) -> bool:
    """The controller-manager gives up after waiting for this for 10 s."""
    return server.request("GET", "/healthz")[0] == 200


def _takes_services(server: ApiServer) -> bool:
    """Until its allocator of cluster IPs is ready, kube-apiserver refuses Services with 422."""
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "probe"},
        "spec": {"ports": [{"port": 80}]},
    }
    path = "/api/v1/namespaces/default/services?dryRun=All"
    return server.request("POST", path, service)[0] == 201


@contextlib.contextmanager
def cluster(
    directory: Path,
    *options: str,
    calls_per_s: int | None = None,
    accounts: Sequence[str] = (),
    kwok: bool = True,
    prepare: Callable[[ApiServer], None] = lambda _: None,
):
    """A whole control plane, and kwok: the Nodes that :func:`node` makes become Ready, every pod
    on one Running. Other Nodes are for a kubelet of the test's own; without ``kwok``, all are.

    ``options`` and ``accounts``: as of :func:`real`. ``calls_per_s``: what scheduler and
    controller-manager may ask of it, where their default (50 and 20) is not what a cluster of any
    size is given. ``prepare``: what is in the API before the controllers start. The
    controller-manager looks for new types only every 30 s.
    """
    folder = assets(*CONTROL_PLANE)
    assert folder is not None
    limits = ()
    if calls_per_s is not None:
        limits = f"--kube-api-qps={calls_per_s}", f"--kube-api-burst={calls_per_s}"
    with real(directory, *options, accounts=accounts) as server, contextlib.ExitStack() as stack:
        prepare(server)
        kubeconfig = server.kubeconfig(directory / "admin.kubeconfig", "default")

        def run(name: str, *options: str) -> Path:
            log = directory / f"{name}.log"
            command = (str(folder / name), f"--kubeconfig={kubeconfig}", *options)
            stack.enter_context(running(log, *command))
            return log

        run(
            "kube-controller-manager",
            f"--service-account-private-key-file={directory / 'service-accounts.key'}",
            f"--root-ca-file={directory / 'ca.crt'}",
            "--leader-elect=false",
            "--secure-port=0",
            *limits,
        )
        run("kube-scheduler", "--leader-elect=false", "--secure-port=0", *limits)
        if not kwok:
            yield server
            return
        config = directory / "kwok.yaml"  # or it would read the user's
        config.write_text("kind: KwokConfiguration\napiVersion: config.kwok.x-k8s.io/v1alpha1\n")
        # Without leases the controller-manager takes every node for dead after 40 s.
        log = run(
            "kwok",
            f"--manage-nodes-with-label-selector={KWOK_LABEL}",
            "--node-lease-duration-seconds=40",
            f"--config={config}",
        )
        server.request("POST", "/api/v1/nodes", node("first", {"pods": "1"}))
        wait_until(lambda: server.is_ready("/api/v1/nodes/first"), "kwok has a node ready", log)
        server.request("DELETE", "/api/v1/nodes/first")
        yield server


def node(name: str, capacity: dict[str, str], labels: dict[str, str] | None = None, **spec: object):
    """A Node to create; kwok makes it Ready."""
    capacity = {"cpu": "32", "memory": "256Gi", "pods": "110", **capacity}
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": {KWOK_LABEL: "true", **(labels or {})}},
        "spec": spec,
        "status": {"capacity": capacity, "allocatable": capacity},
    }


def _make_rsa_key(path: Path) -> None:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )


@contextlib.contextmanager
def kept_ports(count: int):
    """Ports for servers that cannot say which they chose, or that are to come back on theirs.

    They are bound here as well, which the kernel bears as long as only one of the two listens. So
    nobody else is given them while their server is away, or not there yet.
    """
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind(("127.0.0.1", 0))
        yield [one.getsockname()[1] for one in sockets]


@contextlib.contextmanager
def running(log: Path, *command: str):
    program = Program(command, log)
    program.start()
    try:
        yield program
    finally:
        program.stop()


def wait_until(
    true: Callable[[], bool],
    what: str,
    log: Path | None = None,
    timeout_s: float = START_TIMEOUT_S,
) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if true():
                return
        time.sleep(0.05)
    said = log.read_text()[-2000:] if log is not None else ""
    raise AssertionError(f"not within {timeout_s} s: {what}; {said}")


def install_models(server: ApiServer) -> None:
    from kubeai.api.crd import model_crd

    path = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
    code, answer = server.request("POST", path, model_crd())
    assert code in (201, 409), answer
    wait_until(
        lambda: server.request("GET", "/apis/kubeai.org/v1/models")[0] == 200,
        "the Models CRD is served",
    )
