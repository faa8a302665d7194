"""KubeAI in Go: its program, its chart, and the engine that its images hold.

UPSTREAM names a clone of its repository (kubeai-project/kubeai). The program is built from it with
Go and kept in ``~/.cache/kubeai-upstream``. Pods here share one network, so three lines of the
source are changed while it is compiled (the clone stays as it is): the program listens on its
pod's address instead of on all of them, and its identity is its pod's name instead of the host's.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import yaml

UPSTREAM = os.environ.get("UPSTREAM", "")
BUILD_TIMEOUT_S = 1800
PROGRAM = "manager"  # the command of its chart is /app/manager
SOURCE = "internal/manager/run.go"
EDITS = {
    '\t\treturn fmt.Errorf("invalid config: %w", err)\n\t}\n': (
        '\t\treturn fmt.Errorf("invalid config: %w", err)\n\t}\n'
        '\tcfg.MetricsAddr = os.Getenv("POD_IP") + cfg.MetricsAddr\n'
        '\tcfg.HealthAddress = os.Getenv("POD_IP") + cfg.HealthAddress\n'
    ),
    '":8000"': 'os.Getenv("POD_IP") + ":8000"',
    "os.Hostname()": 'os.Getenv("IDENTITY"), error(nil)',
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
    source = Path(UPSTREAM).absolute() / SOURCE
    text = source.read_text()
    for before, after in EDITS.items():
        assert before in text, f"{SOURCE} has changed: {before}"
        text = text.replace(before, after, 1)
    key = hashlib.sha256(f"{git('rev-parse', 'HEAD^{tree}')}{text}".encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "kubeai-upstream" / key
    if not (folder / PROGRAM).exists():
        folder.mkdir(parents=True, exist_ok=True)
        edited, overlay = folder / "run.go", folder / "overlay.json"
        edited.write_text(text)
        overlay.write_text(json.dumps({"Replace": {str(source): str(edited)}}))
        partial = folder / f"{PROGRAM}.{os.getpid()}"
        subprocess.run(
            ["go", "build", f"-overlay={overlay}", "-o", str(partial), "./cmd"],
            cwd=UPSTREAM,
            env=os.environ | {"CGO_ENABLED": "0"},
            check=True,
            timeout=BUILD_TIMEOUT_S,
        )
        partial.rename(folder / PROGRAM)
    return folder


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
