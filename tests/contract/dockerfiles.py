"""Builds a Dockerfile's stages without a container engine, and runs what comes of it.

The instructions are read from the file. RUN lines are executed by chroot in a copy of a Debian that
debootstrap made, with the capabilities that an engine leaves them; COPY copies, the rest is kept.
As in an engine, the results of RUN lines are used again by the next run, until a line or a copied
file before them changes; of each stage, only those before a folder is copied. What comes of it runs
as layouts.py says. Needs root.

It differs from an engine in what docs/reference/image.md lists.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dockerfile_parse import DockerfileParser
from layouts import Image

CACHE = Path.home() / ".cache" / "kubeai-image"
BUILD_TIMEOUT_S = 900
KEPT_S = 7 * 24 * 3600
# What an engine hands into RUN lines, and what this machine's pip needs besides.
RESOLVER_FILES = ("/etc/resolv.conf", "/etc/hosts")
CERTIFICATES = "/run/certificates.pem"
# What Docker and BuildKit leave to a RUN line.
CAPABILITIES = (
    *("chown", "dac_override", "fowner", "fsetid", "kill", "setgid", "setuid", "setpcap"),
    *("net_bind_service", "net_raw", "sys_chroot", "mknod", "audit_write", "setfcap"),
)


@dataclass
class Stage(Image):
    """What the instructions so far have made; in the end an image."""

    arguments: dict[str, str] = field(default_factory=dict)


def build(context: Path, work: Path, **given: str) -> dict[str, Stage]:
    """The stages of ``context``'s Dockerfile; ``work``: an empty folder for the roots.

    ``given``: build arguments. A stage without a name is called "image".
    """
    parser = DockerfileParser(str(context / "Dockerfile"), cache_content=True)
    steps = [(each["instruction"], each["value"]) for each in parser.structure]
    steps = [step for step in steps if step[0] != "COMMENT"]
    first = next(place for place, (name, _) in enumerate(steps) if name == "FROM")
    arguments: dict[str, str] = {}
    for _, value in steps[:first]:
        _argument(arguments, value, given)
    stages: dict[str, Stage] = {}
    while steps := steps[first:]:
        base, _, alias = steps[0][1].partition(" AS ")
        for key, default in arguments.items():
            base = base.replace(f"${{{key}}}", default)
        stage = Stage(work / (alias or "image"))
        stages[alias or "image"] = stage
        names = [name for name, _ in steps[1:]]
        first = 1 + names.index("FROM") if "FROM" in names else len(steps)
        _make(stage, base, steps[1:first], stages, context, given)
    return stages


def _make(
    stage: Stage,
    base: str,
    steps: Sequence[tuple[str, str]],
    stages: dict[str, Stage],
    context: Path,
    given: Mapping[str, str],
) -> None:
    count, kept = _kept(base, steps, context)
    made = kept.exists()
    if base == "scratch":
        stage.root.mkdir()
    else:
        stage.env["PATH"] = "/usr/sbin:/usr/bin:/sbin:/bin"
        subprocess.run(["cp", "-a", kept if made else _debian(base), stage.root], check=True)
    if made:
        os.utime(kept)
    for place, (name, value) in enumerate(steps):
        if name == "ARG":
            _argument(stage.arguments, value, given)
        elif place >= count or not made or name not in ("RUN", "COPY"):
            _apply(stage, stages, context, name, value)
        if place == count - 1 and not made:
            _keep(stage.root, kept)


def _kept(base: str, steps: Sequence[tuple[str, str]], context: Path) -> tuple[int, Path]:
    """How many of the steps other runs can use as well, and where their result is kept."""
    digest, count = hashlib.sha256(base.encode()), 0
    found = ""
    for place, (name, value) in enumerate(steps):
        if name == "COPY":
            sources = [context / each for each in shlex.split(value)[:-1]]
            if not all(path.is_file() for path in sources):  # of a stage, or a folder
                break
            for path in sources:
                digest.update(path.read_bytes())
        elif name == "ARG":
            break
        digest.update(f"\n{name} {value}\n".encode())
        if name == "RUN":
            count, found = place + 1, digest.hexdigest()[:16]
    return count, CACHE / f"after-{found}"


def _keep(root: Path, kept: Path) -> None:
    """Copy a root for other runs, and remove those that none used for a week."""
    making = kept.with_name(f".{kept.name}.{os.getpid()}")
    subprocess.run(["cp", "-a", root, making], check=True)
    os.utime(making)
    try:
        making.rename(kept)
    except OSError:  # another run was faster
        shutil.rmtree(making)
    for each in CACHE.glob("after-*"):
        if each.stat().st_mtime < time.time() - KEPT_S:
            shutil.rmtree(each)


def _argument(arguments: dict[str, str], value: str, given: Mapping[str, str]) -> None:
    key, _, default = value.partition("=")
    arguments[key] = given.get(key, default)


def _apply(stage: Stage, stages: dict[str, Stage], context: Path, name: str, value: str) -> None:
    match name:
        case "RUN":
            _execute(stage, value)
        case "COPY":
            source, parts = context, shlex.split(value)
            if parts[0].startswith("--from="):
                source = stages[parts.pop(0).removeprefix("--from=")].root
            _copy(
                source, parts[:-1], stage.root / stage.directory.lstrip("/"), stage.root, parts[-1]
            )
        case "ENV":
            stage.env |= dict(pair.split("=", 1) for pair in shlex.split(value))
        case "WORKDIR":
            stage.directory = value
            (stage.root / value.lstrip("/")).mkdir(parents=True, exist_ok=True)
        case "USER":
            stage.user = value
        case "ENTRYPOINT":
            stage.entrypoint = json.loads(value)
        case "CMD":
            stage.command = json.loads(value)
        case "EXPOSE":
            pass
        case _:
            raise NotImplementedError(f"{name} {value}")


def _execute(stage: Stage, line: str) -> None:
    env = {key: value for key, value in os.environ.items() if key.startswith("PIP_")}
    env.pop("PIP_FIND_LINKS", None)
    outside = {path: path for path in RESOLVER_FILES}
    if "PIP_CERT" in env:
        outside[CERTIFICATES] = env["PIP_CERT"]
        env["PIP_CERT"] = env["SSL_CERT_FILE"] = CERTIFICATES  # pip's, uv's
    for place in outside:
        (stage.root / place.lstrip("/")).touch()
    steps = [_mount("--rbind", stage.root, stage.root), *_devices(stage.root)]
    steps += [_mount("--bind", path, f"{stage.root}{place}") for place, path in outside.items()]
    command = _apart(stage, steps, ["/bin/sh", "-c", line], stage.arguments | env)
    done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S)
    assert done.returncode == 0, f"RUN {line}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"


def _copy(source: Path, names: list[str], directory: Path, root: Path, target: str) -> None:
    place = root / target.lstrip("/") if target.startswith("/") else directory / target
    for name in names:
        one = source / name.lstrip("/")
        if one.is_dir():  # its content, as COPY has it
            shutil.copytree(one, place, symlinks=True, dirs_exist_ok=True)
        elif target.endswith("/"):
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy2(one, place / one.name)
        else:
            shutil.copy2(one, place)


def _apart(
    stage: Stage, steps: Sequence[str], command: Sequence[str], env: Mapping[str, str]
) -> list[str]:
    """A command in namespaces of its own: after the mounts, with the stage's root."""
    variables = [f"{key}={value}" for key, value in (stage.env | dict(env)).items()]
    inside = ["env", "-i", f"--chdir={stage.directory}", *variables, *command]
    kept = ",".join(("-all", *(f"+{name}" for name in CAPABILITIES)))
    chroot = ["setpriv", f"--bounding-set={kept}", "chroot", str(stage.root), *inside]
    script = " && ".join((*steps, f"exec {shlex.join(chroot)}"))
    return ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", script]


def _mount(*arguments: object) -> str:
    return shlex.join(["mount", *map(str, arguments)])


def _devices(root: Path) -> list[str]:
    return [_mount("-t", "proc", "proc", root / "proc"), _mount("--rbind", "/dev", root / "dev")]


def _debian(base: str) -> Path:
    """A minimal Debian like the image ``debian:<suite>-slim``; kept from one run to the next."""
    name, _, tag = base.partition(":")
    suite = tag.removesuffix("-slim")
    assert name == "debian", f"FROM {base}: no Debian"
    root = CACHE / suite
    if not root.exists():
        making = CACHE / f".{suite}.{os.getpid()}"
        making.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            ["debootstrap", "--variant=minbase", suite, making],
            check=True,
            stdout=subprocess.DEVNULL,
            timeout=BUILD_TIMEOUT_S,
        )
        shutil.rmtree(making / "var/cache/apt/archives")  # nor has the image these
        making.rename(root)
    return root
