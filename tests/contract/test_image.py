"""The image of a release, and that of the Dockerfile (dockerfiles.py), do what the chart asks."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import os
import re
import shutil
import signal
import subprocess
import tarfile
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import dockerfiles
import imaged_kubelet
import pytest
import yaml
from checkouts import check_out
from fakes.hub import Hub, Repository
from harness import CONFIG, model, until
from layouts import Image, unpack
from machines import Machine, attended, machine
from repository import REPOSITORY
from servers import CONTROL_PLANE, ApiServer, assets, cluster, embedded, install_models
from sites import DEPLOYMENTS, RELEASE, Site

import kubeai
import release.image
from kubeai.kube.resources import MODELS, SECRETS
from kubeai.loading.staging import MARK
from release import architectures, charts, rootfs, wheels
from release.oci import Layout

pytestmark = [pytest.mark.image, pytest.mark.timeout(900)]
ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
RUN_TIMEOUT_S = 60
IMAGE_REPOSITORY = "registry.example.com/kubeai"
VERSION = "1.2.3"
EPOCH = 1767323045
# Prints what cannot be imported, and the number of what can.
IMPORT_EXTENSIONS = """
import importlib, pathlib, sys
count = 0
for base in filter(None, sys.path):
    for path in sorted(pathlib.Path(base).rglob("*.so")):
        inside = path.relative_to(base)
        name = ".".join([*inside.parts[:-1], inside.name.split(".")[0]])
        if inside.parts[0] == "lib-dynload":
            continue  # their folder is on the path as well
        importlib.import_module(name)
        count += 1
print(count)
"""


@pytest.fixture(scope="module")
def stages(tmp_path_factory) -> Iterator[dict[str, dockerfiles.Stage]]:
    """The Dockerfile's stages; the last is named "image"."""
    if os.getuid() != 0 or None in map(shutil.which, ("debootstrap", "mmdebstrap", "go")):
        pytest.skip("needs root, debootstrap, mmdebstrap and Go")
    context = tmp_path_factory.mktemp("context")
    check_out(context)
    roots = tmp_path_factory.mktemp("roots")
    yield dockerfiles.build(context, roots, VERSION=kubeai.__version__)
    shutil.rmtree(roots)  # over a gigabyte


@pytest.fixture(scope="module")
def layout(stages, tmp_path_factory) -> Layout:
    """The layout that a release has, with the wheel that the Dockerfile has compiled."""
    out = tmp_path_factory.mktemp("out")
    (wheel,) = stages["build"].root.glob("wheels/*.whl")
    machine = architectures.machine().machine
    target = wheels.Target(rootfs.PYTHON, machine)
    named = out / wheel.name.replace(f"linux_{machine}", target.platform)
    shutil.copy(wheel, named)
    release.image.build(REPOSITORY, VERSION, EPOCH, out, [named])
    release.image.check(VERSION, out)
    return release.image.unpacked(VERSION, out, out / "layout")


@pytest.fixture(scope="module")
def image(layout, tmp_path_factory) -> Image:
    root = tmp_path_factory.mktemp("image") / "root"
    root.mkdir(mode=0o755)
    return unpack(layout, architectures.machine().oci, root)


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=RUN_TIMEOUT_S)


def python(image: Image, code: str) -> str:
    """What the image's Python prints."""
    done = run(image.run("-c", code, entrypoint=["/opt/kubeai/bin/python"]))
    assert done.returncode == 0, done.stderr
    return done.stdout


def contents(root: Path) -> dict[str, tuple[str, str]]:
    """Each file's mode and digest, or where a link leads; without what a run has mounted."""
    found = {}
    for path in root.rglob("*"):
        name = path.relative_to(root).as_posix()
        if path.is_symlink():
            found[name] = ("link", str(path.readlink()))
        elif path.is_file():
            kind = "program" if path.stat().st_mode & 0o100 else "file"
            found[name] = (kind, hashlib.sha256(path.read_bytes()).hexdigest())
    return found


def test_the_dockerfile_and_the_layout_have_the_same_contents_and_settings(stages, image):
    made = stages["image"]
    ours, theirs = contents(image.root), contents(made.root)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []
    assert len(ours) > 1000
    for setting in ("env", "user", "entrypoint", "command"):
        assert getattr(image, setting) == getattr(made, setting)


def test_the_layers_have_no_times_or_owners_of_the_machine_that_made_them(layout):
    machine = architectures.machine().oci
    for layer in layout.manifest(machine)["layers"]:
        with tarfile.open(fileobj=io.BytesIO(layout.blob(layer))) as files:
            assert {(f.mtime, f.uid, f.gid, f.uname) for f in files} == {(0, 0, 0, "")}
    assert layout.config(machine)["created"] == "2026-01-02T03:04:05Z"


def test_entry_point_prints_version(image):
    done = run(image.run("--version"))
    assert (done.returncode, done.stdout.strip()) == (0, kubeai.__version__)


def test_image_runs_as_numeric_user_with_read_only_root(image):
    """The user is a number, or runAsNonRoot could not be checked by a kubelet."""
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", image.user)
    lines = python(image, "print(open('/proc/self/status').read())").splitlines()
    status = {line.split()[0]: line.split()[1:] for line in lines if line.split()}
    user, group = image.user.split(":")
    assert (status["Uid:"], status["Gid:"]) == ([user] * 4, [group] * 4)
    assert status["CapEff:"] == status["CapBnd:"] == ["0" * 16]
    assert status["NoNewPrivs:"] == ["1"]
    code = "import errno\nfor place in {}:\n    try:\n        open(place + '/x', 'w')\n    "
    code += "except OSError as error:\n        print(errno.errorcode[error.errno])"
    places = ["/", "/opt/kubeai", "/tmp", "/var/tmp", "/run"]
    answers = python(image, code.format(places)).split()
    assert len(answers) == len(places)
    assert set(answers) <= {"EROFS", "EACCES"}


def test_image_has_no_shell_no_compiler_and_no_installer(image):
    """What is on PATH is KubeAI; the rest is libraries and Python."""
    programs = {
        path.relative_to(image.root).as_posix()
        for path in image.root.rglob("*")
        if path.is_file() and path.stat().st_mode & 0o111 and ".so" not in path.name
    }
    expected = {"opt/kubeai/bin/kubeai", "usr/local/bin/load"}
    expected.add(f"usr/bin/python{rootfs.PYTHON}")
    assert {each for each in programs if "/bin/" in each} == expected
    for name in ("pip", "setuptools", "ensurepip"):
        assert not list(image.root.glob(f"**/{name}")), name
    assert not list(image.root.glob("usr/include/**/*.h"))


def test_every_extension_module_of_the_image_can_be_imported(image):
    """Symbols were removed from them, and libraries that none of them needs from the image."""
    counted = python(image, IMPORT_EXTENSIONS).split()
    assert int(counted[-1]) > 100, counted


def test_image_has_exactly_the_pinned_versions(image):
    pinned = dict(
        line.lower().replace("_", "-").split("==")
        for line in (REPOSITORY / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    code = "import importlib.metadata as m; [print(d.name, d.version) for d in m.distributions()]"
    lines = python(image, code).splitlines()
    installed = dict(line.lower().replace("_", "-").split() for line in lines)
    assert installed.pop("kubeai-gateway") == kubeai.__version__
    assert installed
    assert installed.items() <= pinned.items()


def test_image_names_the_debian_packages_for_scanners(image):
    status = image.root / "var/lib/dpkg/status.d"
    names = {path.name for path in status.iterdir() if path.suffix != ".md5sums"}
    assert {"libc6", f"libpython{rootfs.PYTHON}-stdlib", "tzdata"} <= names
    assert not names & {"dpkg", "apt", "dash", "bash", "perl-base", "openssl"}
    for name in names:
        text = (status / name).read_text()
        assert f"Package: {name}\n" in text
        assert (image.root / f"usr/share/doc/{name}/copyright").exists(), name


def test_image_is_precompiled_to_byte_code(image):
    """A start writes nothing and compiles nothing. KubeAI's own lines are in tracebacks."""
    site = image.root / rootfs.SITE
    sources = {path.relative_to(site) for path in site.rglob("*.py")}
    assert {path.parts[0] for path in sources} == {"kubeai"}
    tag = f"cpython-{rootfs.PYTHON.replace('.', '')}"
    for path in sources:
        assert (site / path.parent / "__pycache__" / f"{path.stem}.{tag}.pyc").exists(), path
    code = "from kubeai.openai import request\nimport json\n"
    code += "try: json.loads('{')\nexcept ValueError: import traceback; traceback.print_exc()"
    done = run(image.run("-c", code, entrypoint=["/opt/kubeai/bin/python"]))
    assert "obj, end = self.raw_decode(" in done.stderr


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

    image: Image

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


# -- a release's chart, with the image as what its pods run ----------------------------------------


class ImagedSite(Site):
    """KubeAI's pods run in the image, and find a service account's files where pods have them."""

    def __init__(self, api: ApiServer, namespace: str, folder: Path, image: Image) -> None:
        super().__init__(api, namespace, folder)
        command, data = self._kubelet.command, self._kubelet.directory / "data"
        at = command.index("-m")
        command[at : at + 2] = imaged_kubelet.program(image, IMAGE_REPOSITORY, data)

    @property
    def values(self) -> dict:
        url = urllib.parse.urlsplit(self.api.url)
        mount = {"name": "account", "mountPath": ACCOUNT, "readOnly": True}
        pod_ip = {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}
        return super().values | {
            "env": [
                pod_ip,
                {"name": "KUBERNETES_SERVICE_HOST", "value": str(url.hostname)},
                {"name": "KUBERNETES_SERVICE_PORT", "value": str(url.port)},
            ],
            "volumeMounts": [mount],
        }

    async def give_tokens(self) -> None:
        files = {
            "token": self.api.accounts[f"{RELEASE}:kubeai"],
            "namespace": self.namespace,
            "ca.crt": await asyncio.to_thread(Path(self.api.ca_file).read_text),
        }
        await self.kube.create(SECRETS, {"metadata": {"name": "account"}, "stringData": files})

    def programs(self) -> list[tuple[str, str]]:
        """Program and user of the kubelet's processes that are `kubeai` in the image."""
        marker, found = f"={self._kubelet.directory / 'data'}".encode(), []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if marker in (process / "environ").read_bytes():
                    user = (process / "status").read_text().partition("Uid:")[2].split()[0]
                    found.append((os.readlink(process / "exe"), user))
        return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Iterator[ApiServer]:
    if assets(*CONTROL_PLANE, "helm") is None:
        pytest.skip("KUBEBUILDER_ASSETS holds no whole control plane, or no helm")
    accounts = [f"{RELEASE}:kubeai"]
    with cluster(tmp_path_factory.mktemp("cluster") / "servers", accounts=accounts) as server:
        yield server


async def test_the_packaged_chart_installs_the_image_which_serves_from_zero(whole, image, tmp_path):
    """And loads: the Job of a cache runs `load` in it, and its removal needs no shell."""
    code, answer = whole.request("POST", "/api/v1/namespaces", {"metadata": {"name": RELEASE}})
    assert code == 201, answer
    charts.build(REPOSITORY, VERSION, EPOCH, tmp_path)
    hub = Hub()
    hub.repositories["mock/cached"] = Repository({"config.json": b"{}", "model.bin": b"w" * 9})
    site = ImagedSite(whole, RELEASE, tmp_path, image)
    await site.start()
    await hub.start()
    try:
        site.make_volume()
        package = str(tmp_path / f"kubeai-{VERSION}.tgz")
        options = ("--wait", "--set", f"image.repository={IMAGE_REPOSITORY}")
        await asyncio.to_thread(
            site.helm, "install", "kubeai", package, *options, values=site.values
        )
        deployment = await site.kube.get(DEPLOYMENTS, "kubeai")
        (container,) = deployment["spec"]["template"]["spec"]["containers"]
        assert container["image"] == f"{IMAGE_REPOSITORY}:{VERSION}"
        python = f"{image.root}/usr/bin/python{rootfs.PYTHON}"
        assert site.programs().count((python, image.user.split(":")[0])) >= 2  # with a worker
        await site.kube.create(MODELS, model("m"))
        assert await site.ask("m")
        cached = {"cacheProfile": "shared", "env": {"HF_ENDPOINT": hub.url}}
        await site.kube.create(MODELS, model("cached", **cached))
        assert await site.ask("cached")
        (loaded,) = site.folder.rglob("model.bin")
        assert loaded.read_bytes() == b"w" * 9
        await site.kube.delete(MODELS, "cached")
        await until("the files are removed", lambda: not loaded.exists(), RUN_TIMEOUT_S)
        await asyncio.to_thread(site.helm, "uninstall", "kubeai", "--wait")
    finally:
        await hub.stop()
        await site.close()
