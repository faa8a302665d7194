"""The image, made by the Dockerfile's own lines (dockerfiles.py), does what the chart asks."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
import subprocess
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import dockerfiles
import pytest
import yaml
from checkouts import check_out
from fakes.hub import Hub, Repository
from harness import CONFIG, model, until
from machines import Machine, attended, machine
from repository import REPOSITORY
from servers import ApiServer, embedded, install_models

import kubeai
from kubeai.loading.staging import MARK

pytestmark = [pytest.mark.image, pytest.mark.timeout(900)]
ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
RUN_TIMEOUT_S = 60
PROBES = ("gcc", "cc", "ld", "as", "pip", "pip3", "git", "curl")


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Iterator[dockerfiles.Stage]:
    if os.getuid() != 0 or shutil.which("debootstrap") is None:
        pytest.skip("needs root and debootstrap")
    context = tmp_path_factory.mktemp("context")
    check_out(context)
    roots = tmp_path_factory.mktemp("roots")
    yield dockerfiles.build(context, roots)
    shutil.rmtree(roots)  # over a gigabyte


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=RUN_TIMEOUT_S)


def as_shell(image: dockerfiles.Stage, script: str) -> subprocess.CompletedProcess[str]:
    """What a person sees who gets into the container."""
    return run(image.run("-c", script, entrypoint=["/bin/sh"]))


def test_entry_point_prints_version(image):
    done = run(image.run("--version"))
    assert (done.returncode, done.stdout.strip()) == (0, kubeai.__version__)


def test_image_runs_as_numeric_user_with_read_only_root(image):
    """The user is a number, or runAsNonRoot could not be checked by a kubelet."""
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", image.user)
    user, group = image.user.split(":")
    done = as_shell(image, "id -u; id -g; grep -E 'CapBnd|CapEff|NoNewPrivs' /proc/self/status")
    assert done.stdout.split() == [
        *(user, group, "CapEff:", "0" * 16, "CapBnd:", "0" * 16, "NoNewPrivs:", "1")
    ]
    for place in ("/", "/opt/kubeai", "/tmp", "/var/tmp", "/run"):
        done = as_shell(image, f"touch {place}/x")
        assert "Read-only file system" in done.stderr or "Permission denied" in done.stderr


def test_image_has_no_compiler_and_no_installer(image):
    found = as_shell(image, f"command -v {' '.join(PROBES)}").stdout.split()
    assert found == []
    assert not list(image.root.glob("opt/kubeai/**/pip")), "pip"
    assert not list(image.root.glob("usr/include/python3*")), "headers"


def test_image_has_exactly_the_pinned_versions(image):
    pinned = dict(
        line.lower().replace("_", "-").split("==")
        for line in (REPOSITORY / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    code = "import importlib.metadata as m; [print(d.name, d.version) for d in m.distributions()]"
    done = run(image.run("-c", code, entrypoint=["/opt/kubeai/bin/python"]))
    installed = dict(line.lower().replace("_", "-").split() for line in done.stdout.splitlines())
    assert installed.pop("kubeai-gateway") == kubeai.__version__
    assert installed
    assert installed.items() <= pinned.items()


def test_image_is_precompiled_to_byte_code(image):
    """A start writes nothing and compiles nothing."""
    sources = list(image.root.glob("opt/kubeai/lib/python3*/site-packages/kubeai/**/*.py"))
    compiled = {
        path.parent.parent / path.name.split(".")[0]
        for path in image.root.glob(
            "opt/kubeai/lib/python3*/site-packages/kubeai/**/__pycache__/*.pyc"
        )
    }
    assert sources
    assert {path.with_suffix("") for path in sources} == compiled


@contextlib.asynccontextmanager
async def started(image, *arguments, **options):
    """A program of the image; its processes are gone in the end."""
    process = await asyncio.create_subprocess_exec(
        *image.run(*arguments, **options), stderr=asyncio.subprocess.PIPE, start_new_session=True
    )
    async with attended(process) as program:
        yield program


async def get(url: str) -> int:
    async with aiohttp.ClientSession() as session, session.get(url) as answer:
        return answer.status


async def test_mock_engine_in_the_image_answers_health(image):
    async with started(image, "mock-engine", "--host", "127.0.0.1", "--port", "0") as engine:
        await until("it listens", lambda: engine.said("mock engine listens"), RUN_TIMEOUT_S)
        assert await get(f"http://{engine.said('mock engine listens')['address']}/health") == 200


async def test_load_in_the_image_fills_a_mounted_folder(image, tmp_path):
    """As the Job of a cache runs it."""
    hub = Hub()
    await hub.start()
    hub.repositories["org/m"] = Repository({"config.json": b"{}", "w.safetensors": bytes(1 << 20)})
    models = tmp_path / "models"
    models.mkdir()
    os.chown(models, *map(int, image.user.split(":")))
    try:
        command = image.run(
            *("hf://org/m", "/models/m"),
            entrypoint=["load"],
            mounts={"/models": models},
            HF_ENDPOINT=hub.url,
        )
        done = await asyncio.to_thread(run, command)
    finally:
        await hub.stop()
    assert done.returncode == 0, done.stderr
    loaded = {path.name for path in (models / "m").iterdir()} - {MARK}
    assert loaded == {"config.json", "w.safetensors"}
    assert [path.name for path in models.iterdir()] == ["m"]


class InImage(Machine):
    """`kubeai serve` runs in the image, with what a pod of the chart has."""

    image: dockerfiles.Stage

    def _mounts(self) -> dict[str, Path]:
        """The mounts that a kubelet would make for the pod's volumes."""
        pod = self.directory / "pod"
        account, config, tmp = (pod / name for name in ("account", "config", "tmp"))
        for folder in (account, config, tmp):
            folder.mkdir(parents=True)
        tmp.chmod(0o777)
        (account / "token").write_text(self.api.token)
        (account / "namespace").write_text(self.namespace)
        (account / "ca.crt").write_bytes(Path(self.api.ca_file).read_bytes())
        addresses = {"metricsAddr": "127.0.0.1:0", "healthAddress": "127.0.0.1:0"}
        text = yaml.safe_dump(CONFIG | addresses | self.config)
        (config / "system.yaml").write_text(text)
        return {"/app/config": config, "/app/tmp": tmp, ACCOUNT: account}

    async def serve(self, **config: Any) -> None:
        url = urllib.parse.urlsplit(self.api.url)
        context = started(
            self.image,
            *("serve", "--host", "127.0.0.1", "--port", "0"),
            mounts=self._mounts(),
            CONFIG_PATH="/app/config/system.yaml",
            TMPDIR="/app/tmp",
            POD_NAME="kubeai-0",
            POD_NAMESPACE=self.namespace,
            KUBERNETES_SERVICE_HOST=str(url.hostname),
            KUBERNETES_SERVICE_PORT=str(url.port),
        )
        self.program = await self._serving.enter_async_context(context)
        await until("it serves", lambda: self.program.said("serving"), RUN_TIMEOUT_S)
        self.endpoint = self.program.said("serving")["endpoint"]
        self.health = self.program.said("serving")["health"]


@pytest.fixture(scope="module")
def api(tmp_path_factory) -> Iterator[ApiServer]:
    with embedded(tmp_path_factory.mktemp("api") / "embedded") as server:
        install_models(server)
        yield server


async def test_it_serves_a_model_from_zero_and_stops_on_sigterm_as_process_1(image, api, tmp_path):
    kind = type("Imaged", (InImage,), {"image": image})
    async with machine(api, tmp_path, kind) as one:
        assert await get(f"{one.health}/healthz") == 200
        assert await get(f"{one.health}/readyz") == 200
        await one.create(model("m"))
        status, answer = await one.ask("m")
        assert status == 200, answer
        process_1 = children(one.program.process.pid)
        assert len(process_1) == 1
        os.kill(process_1[0], signal.SIGTERM)
        async with asyncio.timeout(RUN_TIMEOUT_S):
            assert await one.program.process.wait() == 0


def children(pid: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
