"""Installs a wheel in a fresh virtual environment and uses it: ``python -m release trial WHEEL``.

KubeAI's main job is tried, not only its import: `kubeai local` serves a Model of the mock engine,
from zero replicas, and a chat is answered.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from release.errors import ReleaseError
from release.files import run
from release.versions import Version

TIMEOUT_S = 120
MODEL = """
apiVersion: kubeai.org/v1
kind: Model
metadata:
  name: chat
spec:
  features: [TextGeneration]
  url: hf://example/chat
  engine: VLLM
  image: kubeai/mock-engine
  minReplicas: 0
  maxReplicas: 1
"""
IMPORT = """
import importlib, pathlib, kubeai
root = pathlib.Path(kubeai.__file__).parent
names = [".".join(("kubeai", *path.relative_to(root).parent.parts, path.name.split(".")[0]))
         for path in root.rglob("*.so")]
for name in names:
    importlib.import_module(name)
print(len(names), root)
"""


def interpreter(wheel: Path) -> str | None:
    """Return the interpreter on PATH that a wheel is for, if there is one."""
    match = re.search(r"-cp3(\d+)-cp3\d+-\w+_(x86_64|aarch64)\.whl$", wheel.name)
    if not match or os.uname().machine != match[2]:
        return None
    found = shutil.which(f"python3.{match[1]}")
    if not found or subprocess.run((found, "-c", ""), capture_output=True, check=False).returncode:
        return None
    return found


def check(wheel: Path, constraints: Path, version: Version) -> None:
    """Install `wheel` and use it. Any failure is a ReleaseError."""
    python = interpreter(wheel)
    if python is None:
        raise ReleaseError(f"no interpreter on PATH can run {wheel.name}")
    with tempfile.TemporaryDirectory(prefix="kubeai-trial-") as name:
        folder = Path(name)
        environment = {**os.environ, "HOME": name, "PYTHONNOUSERSITE": "1"}
        environment.pop("PYTHONPATH", None)
        run((python, "-m", "venv", folder / "venv"), cwd=folder)
        own = folder / "venv/bin/python"
        pip = (own, "-m", "pip", "install", "-q", "--disable-pip-version-check")
        run((*pip, "-c", constraints, wheel), cwd=folder)
        printed = run(
            (folder / "venv/bin/kubeai", "--version"), cwd=folder, env=environment
        ).strip()
        if printed != version.python:
            raise ReleaseError(f"{wheel.name}: kubeai --version prints {printed}")
        count, root = run((own, "-c", IMPORT), cwd=folder, env=environment).split()
        if not int(count) or not Path(root).is_relative_to(folder):
            raise ReleaseError(f"{wheel.name}: {count} compiled modules in {root}")
        with served(folder, environment) as endpoint:
            answer = chat(endpoint)
        if answer["choices"][0]["message"]["role"] != "assistant":
            raise ReleaseError(f"{wheel.name}: not a chat completion: {answer}")


@contextmanager
def served(folder: Path, environment: dict[str, str]) -> Iterator[str]:
    """Run `kubeai local` with a Model, and yield the endpoint. It must stop on SIGTERM."""
    (folder / "chat.yaml").write_text(MODEL)
    process = subprocess.Popen(
        (folder / "venv/bin/kubeai", "local", "chat.yaml", "--port", "0", "--data-dir", "data"),
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    lines: list[str] = []
    endpoint: list[str] = []
    serving = threading.Event()

    def read() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line)
            if not endpoint and '"serving"' in line:
                endpoint.append(json.loads(line)["endpoint"])
                serving.set()
        serving.set()  # or it has ended

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        serving.wait(TIMEOUT_S)
        if not endpoint:
            raise ReleaseError("kubeai local does not serve:\n" + "".join(lines[-20:]))
        yield endpoint[0]
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            status = process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait()
        reader.join()
    if status:
        raise ReleaseError(f"kubeai local ended with status {status}:\n" + "".join(lines[-20:]))


def chat(endpoint: str) -> dict[str, list[dict[str, dict[str, str]]]]:
    """Send one chat request, which starts a replica, and return the answer."""
    body = {"model": "chat", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
    request = urllib.request.Request(
        f"{endpoint}/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
                answer: dict[str, list[dict[str, dict[str, str]]]] = json.load(response)
                return answer
        except urllib.error.HTTPError as error:  # the Model may not be observed yet
            if error.code != 404 or time.monotonic() > deadline:
                raise ReleaseError(f"the chat failed: {error}: {error.read()!r}") from error
            time.sleep(0.2)
