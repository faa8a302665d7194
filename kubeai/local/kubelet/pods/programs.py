"""Maps a container's image or command to an installed program; images are never pulled.

Also makes engines listen on their pod's address. Called by the runner for a container's main
process, exec probes and hooks. Never runs a shell in between.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from kubeai.local.kubelet.pods.pod import PodError
from kubeai.local.kubelet.runtime.children import run_helper

ENGINE_NOT_INSTALLED = "EngineNotInstalled"
UNKNOWN_IMAGE = "UnknownImage"

_ANY_ADDRESS = re.compile(r"(?<![\d.])0\.0\.0\.0(?![\d.])")
_PYTHON = re.compile(r"python(3(\.\d+)?)?")
_MOCK_HINT = "or set image: kubeai/mock-engine to run the mock engine"
_VLLM_SERVER = ("python3", "-m", "vllm.entrypoints.openai.api_server")

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
    (r"speaches", ("python3", "-m", "uvicorn", "--factory", "speaches.main:create_app")),
)
_INSTALL = {
    "vllm": "pip install vllm",
    "ollama": "see https://ollama.com/download",
    "infinity_emb": "pip install 'infinity-emb[all]'",
    "faster_whisper_server": "see https://github.com/speaches-ai/speaches",
    "speaches": "see https://github.com/speaches-ai/speaches",
}
_interpreters: dict[str, str] = {}  # Python module → an interpreter that has it


def bind_to_pod(text: str, ip: str) -> str:
    """Replace 0.0.0.0 in a manifest's value by the pod's address."""
    return _ANY_ADDRESS.sub(ip, text)


def engine_environment(image: str, command: Sequence[str], ip: str) -> dict[str, str]:
    """Variables that make a known engine listen on ``ip``; the manifest overrides them."""
    program = Path(command[0]).name if command else ""
    name = _image_name(image)
    if program == "ollama" or (not command and name == "ollama"):
        return {"OLLAMA_HOST": f"{ip}:11434"}
    if program == "infinity_emb" or (not command and name.startswith("infinity")):
        return {"INFINITY_HOST": ip}
    if not command and name in ("faster-whisper-server", "speaches"):
        return {"UVICORN_HOST": ip, "UVICORN_PORT": "8000"}
    return {}


async def resolve(
    image: str, command: Sequence[str], args: Sequence[str], env: dict[str, str], ip: str
) -> list[str]:
    """The argv to execute for a container; PodError if the program is not installed."""
    if not command:
        command = _image_command(image)
    argv = [bind_to_pod(word, ip) for word in (*command, *args)]
    if _is_vllm(argv) and not any(word.split("=")[0] == "--host" for word in argv):
        argv.append(f"--host={ip}")
    return await locate(argv, env)


async def locate(argv: Sequence[str], env: dict[str, str]) -> list[str]:
    """``argv`` with its program resolved on this machine; PodError if it is not found."""
    program = Path(argv[0]).name
    if program == "kubeai":
        return [sys.executable, "-m", "kubeai", *argv[1:]]
    module = argv[2].split(".")[0] if _PYTHON.fullmatch(program) and argv[1:2] == ["-m"] else ""
    if module == "uvicorn":  # check for the application instead
        module = next((word.split(".")[0] for word in argv[3:] if ":" in word), module)
    if module in _INSTALL:
        return [await _interpreter(module), *argv[1:]]
    if argv[0] == "load" and not shutil.which("load", path=env.get("PATH", os.defpath)):
        return [sys.executable, "-m", "kubeai", *argv]
    return [_program(argv[0], env), *argv[1:]]


def _image_name(image: str) -> str:
    return image.split("@")[0].rsplit("/", 1)[-1].split(":")[0]


def _image_command(image: str) -> tuple[str, ...]:
    name = _image_name(image)
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


def _program(wanted: str, env: dict[str, str]) -> str:
    path = env.get("PATH", os.defpath)
    # A path inside an image, such as /bin/ollama, may differ on this machine.
    found = shutil.which(wanted, path=path) or shutil.which(Path(wanted).name, path=path)
    if found is None:
        raise _not_installed(Path(wanted).name)
    return found


async def _interpreter(module: str) -> str:
    """A Python interpreter with ``module``: ours, its console script's, or the one on PATH."""
    known = _interpreters.get(module)
    if known is not None and os.access(known, os.X_OK):
        return known
    importlib.invalidate_caches()  # it may have been installed in the meantime
    if (spec := importlib.util.find_spec(module)) is not None and spec.origin is not None:
        return sys.executable
    for candidate in (_beside_script(module), shutil.which("python3")):
        if candidate is None or candidate == sys.executable or not os.access(candidate, os.X_OK):
            continue
        question = f"import importlib.util,sys;sys.exit(not importlib.util.find_spec({module!r}))"
        code, _ = await run_helper([candidate, "-c", question])
        if code == 0:
            _interpreters[module] = candidate
            return candidate
    raise _not_installed(module)


def _beside_script(module: str) -> str | None:
    """The interpreter of a tool that is installed in its own environment."""
    script = shutil.which(module)
    return str(Path(script).resolve().parent / "python3") if script else None


def _not_installed(program: str) -> PodError:
    how = _INSTALL.get(program)
    return PodError(
        f"{program} is not installed on this machine: "
        + (f"install it ({how}), {_MOCK_HINT}" if how else f"put it on PATH, {_MOCK_HINT}"),
        ENGINE_NOT_INSTALLED,
    )
