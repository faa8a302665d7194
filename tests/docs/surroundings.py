"""What runs before a page's commands: nothing, `kubeai local`, or a cluster with KubeAI.

The mock engine runs instead of each engine that is not on the machine.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE

import yaml
from doc_pages import STORES, Page
from kubelets import Kubelet
from repository import REPOSITORY
from servers import ApiServer, cluster, install_models, wait_until

from kubeai.api.config.images import DEFAULT_IMAGES

ENDPOINT = "http://127.0.0.1:8000"
READY_TIMEOUT_S = 90.0
MOCK_IMAGE = "kubeai/mock-engine"
GPUS = 8
NAMESPACE = "kubeai"  # of the chart's release, if a page does not install it itself
ACCOUNTS = [f"{namespace}:kubeai" for namespace in (NAMESPACE, "default")]
HELM_TIMEOUT_S = 120
# As NVIDIA's GPU operator labels a node with L4s.
LABELS = {
    "nvidia.com/gpu.product": "NVIDIA-L4",
    "nvidia.com/gpu.family": "ada-lovelace",
    "nvidia.com/gpu.memory": "23034",
}
CAPACITY = {"nvidia.com/gpu": GPUS, "cpu": 96, "memory": "768Gi"}
CHART = REPOSITORY / "charts/kubeai"
# kube-apiserver advertises no loopback address, and otherwise looks for a default route. This is
# reserved for documentation; nothing connects to it.
ADDRESS = "192.0.2.1"
POLICY = Path(__file__).with_name("policy.yaml")


class Surroundings:
    """A context in which a page runs; ``environment`` is that of the page's shell."""

    def __init__(self, folder: Path, page: Page, environment: dict[str, str]) -> None:
        self.folder, self.page, self.environment = folder, page, environment
        self.stores: dict[str, str] = {}  # variables by which programs find the stores
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Surroundings:
        with contextlib.ExitStack() as stack:
            if STORES in self.page.needs:
                self._start_stores(stack)
            self.start(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def start(self, stack: contextlib.ExitStack) -> None:
        """Start everything; ``stack`` stops it."""

    def _start_stores(self, stack: contextlib.ExitStack) -> None:
        """Start the hub and the buckets of stores.py; loaders and the page's shell use them."""
        command = [sys.executable, str(Path(__file__).with_name("stores.py"))]
        log = stack.enter_context((self.folder / "stores.log").open("wb"))
        process = stack.enter_context(
            subprocess.Popen(command, stdin=PIPE, stdout=PIPE, stderr=log, text=True)
        )
        stack.callback(process.terminate)
        assert process.stdout is not None
        lines = [process.stdout.readline().strip() for _ in range(2)]
        assert all(lines), f"the stores did not start: {(self.folder / 'stores.log').read_text()}"
        # A loader must not look for credentials of a cloud's node.
        self.stores = dict(line.split("=", 1) for line in lines)
        self.stores["AWS_EC2_METADATA_DISABLED"] = "true"
        self.environment |= self.stores

    def logs(self) -> list[tuple[str, Path]]:
        """Name and log of each program."""
        return []

    def run(self, stack: contextlib.ExitStack, name: str, *command: str) -> subprocess.Popen[bytes]:
        """Start a program of the reader's, which ends with the stack."""
        log = stack.enter_context((self.folder / f"{name}.log").open("wb"))
        process = subprocess.Popen(
            command, env=self.environment, cwd=self.folder, stdout=log, stderr=log
        )
        stack.callback(process.wait)
        stack.callback(process.terminate)
        return process


class Local(Surroundings):
    """`kubeai local`, as somebody has it who has every engine and eight GPUs."""

    def start(self, stack: contextlib.ExitStack) -> None:
        """Start `kubeai local`, unless the page does."""
        if "kubeai local" in self.page.starts:
            return
        data = Path(self.environment["HOME"]) / ".local/share/kubeai"
        self.environment["KUBECONFIG"] = str(data / "kubeconfig")
        config = self.folder / "config.yaml"
        images = {engine: {"images": {"default": MOCK_IMAGE}} for engine in DEFAULT_IMAGES}
        # Of the chart's profiles, only the GPUs: this machine's memory is not that of the reader's.
        profiles = yaml.safe_load((CHART / "values.yaml").read_text())["resourceProfiles"]
        for profile in profiles.values():
            profile["requests"] = profile.get("limits", {})
        config.write_text(yaml.safe_dump({"modelServers": images, "resourceProfiles": profiles}))
        options = ("--config", str(config), "--gpus", str(GPUS))
        process = self.run(stack, "kubeai local", "kubeai", "local", *options)
        wait_until(
            lambda: process.poll() is not None or _is_ready(),
            "kubeai local is ready",
            timeout_s=READY_TIMEOUT_S,
        )

    def logs(self) -> list[tuple[str, Path]]:
        """Its log."""
        return [("kubeai local", self.folder / "kubeai local.log")]


class Cluster(Surroundings):
    """A control plane whose node is the process kubelet, with the chart."""

    def start(self, stack: contextlib.ExitStack) -> None:
        """Start the control plane and the node; install the chart unless the page does."""
        installs = "chart" not in self.page.starts
        server = stack.enter_context(
            cluster(
                self.folder / "cluster",
                f"--advertise-address={ADDRESS}",
                accounts=ACCOUNTS,
                kwok=False,
                # The reader's controller-manager has known Models for longer than 30 s.
                prepare=install_models if installs else lambda _: None,
            )
        )
        kubeconfig = server.kubeconfig(
            self.folder / "kubeconfig", NAMESPACE if installs else "default"
        )
        self.environment["KUBECONFIG"] = str(kubeconfig)
        self._apply_policy(server)
        stack.enter_context(self._node(server, str(kubeconfig)))
        if installs:
            self._install()
            if "port-forward" not in self.page.starts:
                forward = ("kubectl", "port-forward", "svc/kubeai", "8000:80")
                self.run(stack, "port-forward", *forward)
                wait_until(_is_ready, "the gateway answers", timeout_s=READY_TIMEOUT_S)

    def logs(self) -> list[tuple[str, Path]]:
        """Those of the node and of KubeAI's pods."""
        pods = sorted(self.folder.glob("node/data/pods/*kubeai*/*/*.log"))
        return [("kubelet", self.folder / "kubelet.log"), *((p.parts[-3], p) for p in pods)]

    def _apply_policy(self, server: ApiServer) -> None:
        """Change what differs on a machine without containers, as policy.yaml describes."""
        accounts = self.folder / "accounts"
        accounts.mkdir()
        for account, token in server.accounts.items():
            namespace, _, _ = account.partition(":")
            server._replace(token=token).kubeconfig(accounts / namespace, namespace)
        images = {image for each in DEFAULT_IMAGES.values() for image in each.values()}
        # The longest first: some are the beginning of others.
        ordered = sorted(images, key=len, reverse=True)
        replaced = "".join(f'.replace("{image}", "{MOCK_IMAGE}")' for image in ordered)
        text = POLICY.read_text().replace("ACCOUNTS", str(accounts))
        self._kubectl("apply", "-f", "-", text=text.replace(".REPLACED", replaced))
        wait_until(
            lambda: _is_in_force(server, ordered[0]),
            "the policies are in force",
            timeout_s=READY_TIMEOUT_S,
        )

    def _kubectl(self, *arguments: str, text: str = "") -> None:
        subprocess.run(
            ["kubectl", *arguments],
            env=self.environment,
            input=text.encode(),
            stdout=subprocess.DEVNULL,
            check=True,
        )

    @contextlib.contextmanager
    def _node(self, server: ApiServer, kubeconfig: str) -> Iterator[None]:
        options = [f"--label={key}={value}" for key, value in LABELS.items()]
        options += [f"--capacity={key}={value}" for key, value in CAPACITY.items()]
        kubelet = Kubelet(
            server, kubeconfig, self.folder / "node", "gpu-node", *options, bind=False
        )
        kubelet.start("env", *(f"{name}={value}" for name, value in self.stores.items()))
        try:
            yield
        finally:
            kubelet.clean_up()

    def _install(self) -> None:
        options = ("--set", "image.repository=registry.example.com/kubeai", "--create-namespace")
        options += ("--take-ownership",)  # of the Models' type
        subprocess.run(
            ["helm", "install", "kubeai", str(CHART), "-n", NAMESPACE, *options, "--wait"],
            env=self.environment,
            check=True,
            timeout=HELM_TIMEOUT_S,
            stdout=subprocess.DEVNULL,
        )


def _is_in_force(server: ApiServer, image: str) -> bool:
    """Whether the API server applies both policies, which it does some time after they are made."""
    container = {"name": "c", "image": "c", "args": ["serve"]}
    pod = {"containers": [container], "serviceAccountName": "kubeai"}
    path = "/api/v1/namespaces/default/{}?dryRun=All"
    meta = {"metadata": {"name": "probe"}}
    _, pod = server.request("POST", path.format("pods"), {**meta, "spec": pod})
    data = {"system.yaml": image}
    _, config = server.request("POST", path.format("configmaps"), {**meta, "data": data})
    args = pod.get("spec", {"containers": [{}]})["containers"][0].get("args", ())
    return "--host=$(POD_IP)" in args and config["data"]["system.yaml"] == MOCK_IMAGE


def _is_ready() -> bool:
    with urllib.request.urlopen(f"{ENDPOINT}/readyz") as answer:
        return bool(answer.status == 200)


SURROUNDINGS: dict[str, type[Surroundings]] = {
    "none": Surroundings,
    "local": Local,
    "cluster": Cluster,
}
