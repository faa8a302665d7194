"""KubeAI in Go: its program, its chart, and the engine that its images hold.

UPSTREAM names a clone of its repository (kubeai-project/kubeai). The program is built from it with
Go and kept in ``~/.cache/kubeai-upstream``. A few lines of the source are changed while it is
compiled (the clone stays as it is), because of what this machine is: pods share one network, so the
program listens on its pod's address instead of on all of them; they share a host name, so its
identity is its pod's name; and the process kubelet executes commands by WebSocket, not by SPDY.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import venv
from functools import partial
from pathlib import Path

import yaml
from caches import made_once

UPSTREAM = os.environ.get("UPSTREAM", "")
BUILD_TIMEOUT_S = 1800
PROGRAM = "manager"  # the command of its chart is /app/manager
EDITS = {
    "internal/manager/run.go": {
        '\t\treturn fmt.Errorf("invalid config: %w", err)\n\t}\n': (
            '\t\treturn fmt.Errorf("invalid config: %w", err)\n\t}\n'
            '\tcfg.MetricsAddr = os.Getenv("POD_IP") + cfg.MetricsAddr\n'
            '\tcfg.HealthAddress = os.Getenv("POD_IP") + cfg.HealthAddress\n'
        ),
        '":8000"': 'os.Getenv("POD_IP") + ":8000"',
        "os.Hostname()": 'os.Getenv("IDENTITY"), error(nil)',
    },
    "internal/modelcontroller/pod_utils.go": {
        'NewSPDYExecutor(r.RESTConfig, "POST", execReq.URL())': (
            'NewWebSocketExecutor(r.RESTConfig, "GET", execReq.URL().String())'
        )
    },
}
# A package vllm whose server is the mock engine: for `vllm serve` and for the form of older images.
SERVER = """
import os, sys
argv = sys.argv[1:]
os.execv({python!r}, [{python!r}, "-m", "kubeai", "mock-engine", "--engine=VLLM", *argv])
"""
SCRIPT = """#!{python}
import sys
sys.argv[1:3] = ["--model=" + sys.argv[2]]  # serve MODEL
import vllm.entrypoints.openai.api_server
"""


def git(*arguments: str) -> str:
    command = ("git", "-C", UPSTREAM, *arguments)
    return subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip()


def program() -> Path:
    """The folder with its program, built if needed."""
    edited = {path: _edited(path) for path in EDITS}
    key = hashlib.sha256(f"{git('rev-parse', 'HEAD^{tree}')}{edited}".encode()).hexdigest()[:16]
    return made_once("kubeai-upstream", key, partial(_build, edited))


def _build(edited: dict[str, str], folder: Path) -> None:
    replace = {}
    for path, text in edited.items():
        file = folder / Path(path).name
        file.write_text(text)
        replace[str(Path(UPSTREAM).absolute() / path)] = str(file)
    overlay = folder / "overlay.json"
    overlay.write_text(json.dumps({"Replace": replace}))
    subprocess.run(
        ["go", "build", f"-overlay={overlay}", "-o", str(folder / PROGRAM), "./cmd"],
        cwd=UPSTREAM,
        env=os.environ | {"CGO_ENABLED": "0"},
        check=True,
        timeout=BUILD_TIMEOUT_S,
    )


def _edited(path: str) -> str:
    text = (Path(UPSTREAM) / path).read_text()
    for before, after in EDITS[path].items():
        assert before in text, f"{path} has changed: {before}"
        text = text.replace(before, after, 1)
    return text


def chart(folder: Path) -> Path:
    """A copy of its chart without the subchart for Open WebUI, which is on a server of others."""
    copied = folder / "kubeai-in-go"
    shutil.copytree(Path(UPSTREAM) / "charts/kubeai", copied)
    file = copied / "Chart.yaml"
    meta = yaml.safe_load(file.read_text())
    del meta["dependencies"]
    file.write_text(yaml.safe_dump(meta))
    return copied


def engine(folder: Path) -> Path:
    """A virtual environment for `--engine-env VLLM=`, whose vLLM is the mock engine."""
    place = folder / "vllm"
    venv.create(place, with_pip=False, symlinks=True)
    (packages,) = place.glob("lib/python3*/site-packages")
    server = packages / "vllm/entrypoints/openai/api_server.py"
    server.parent.mkdir(parents=True)
    server.write_text(SERVER.format(python=sys.executable))
    for package in list(server.parents)[:3]:
        (package / "__init__.py").touch()
    script = place / "bin/vllm"
    script.write_text(SCRIPT.format(python=place / "bin/python3"))
    script.chmod(0o755)
    return place
