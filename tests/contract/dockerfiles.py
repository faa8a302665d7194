"""Builds a Dockerfile's stages without a container engine, and runs what comes of it.

The instructions are read from the file. RUN lines are executed by chroot in a copy of a Debian that
debootstrap made, with the capabilities that an engine leaves them; COPY copies, the rest is kept.
What comes of it runs as layouts.py says. Needs root.

It differs from an engine in what docs/reference/image.md lists.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dockerfile_parse import DockerfileParser
from layouts import Image

CACHE = Path.home() / ".cache" / "kubeai-image"
BUILD_TIMEOUT_S = 900
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
    arguments: dict[str, str] = {}
    stages: dict[str, Stage] = {}
    stage: Stage | None = None
    for step in parser.structure:
        name, value = step["instruction"], step["value"]
        if name == "COMMENT":
            continue
        if name == "ARG" and stage is None:
            key, _, default = value.partition("=")
            arguments[key] = given.get(key, default)
        elif name == "ARG":
            key, _, default = value.partition("=")
            stage.arguments[key] = given.get(key, default)
        elif name == "FROM":
            base, _, alias = value.partition(" AS ")
            for key, default in arguments.items():
                base = base.replace(f"${{{key}}}", default)
            stage = Stage(work / (alias or "image"))
            stages[alias or "image"] = stage
            if base == "scratch":
                stage.root.mkdir()
            else:
                stage.env["PATH"] = "/usr/sbin:/usr/bin:/sbin:/bin"
                subprocess.run(["cp", "-a", _debian(base), stage.root], check=True)
        else:
            assert stage is not None, step["content"]
            _apply(stage, stages, context, name, value)
    return stages


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
