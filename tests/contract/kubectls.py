"""Stock kubectl, each that is found: the one in KUBEBUILDER_ASSETS, and the one on PATH."""

from __future__ import annotations

import contextlib
import os
import queue
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

from servers import assets

TIMEOUT_S = 20.0

MODEL = """
apiVersion: kubeai.org/v1
kind: Model
metadata:
  name: tiny
spec:
  features: [TextGeneration]
  url: hf://org/tiny
  engine: VLLM
  resourceProfile: cpu:1
"""
POD = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"name": "pod", "labels": {"app": "model"}},
    "spec": {"containers": [{"name": "server", "image": "mock:1"}]},
}


def found() -> dict[str, str]:
    folder = assets("kubectl")
    programs = {"assets": str(folder / "kubectl")} if folder else {}
    on_path = shutil.which("kubectl")
    return programs | ({"path": on_path} if on_path else {})


class Kubectl:
    """One kubectl with one kubeconfig; a folder of its own for its caches."""

    def __init__(self, program: str, kubeconfig: str, folder: Path) -> None:
        self.program = program
        self.environment = {
            **os.environ, "KUBECONFIG": kubeconfig, "HOME": str(folder), "TMPDIR": str(folder),
            "TZ": "UTC",
        }  # fmt: skip

    def set_editor(self, command: str) -> None:
        """What ``kubectl edit`` runs; the name of the file is put behind it."""
        self.environment["KUBE_EDITOR"] = command

    def __call__(
        self, *arguments: str, given: str = "", code: int = 0, errors: bool = False
    ) -> str:
        """Standard output; with a `code` other than 0, or when asked for, standard error."""
        done = subprocess.run(
            [self.program, *arguments],
            input=given,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        assert done.returncode == code, (done.stdout, done.stderr)
        return done.stderr if code or errors else done.stdout

    @contextlib.contextmanager
    def following(self, *arguments: str) -> Iterator[Lines]:
        """A command that does not end by itself, and the lines that it prints."""
        process = subprocess.Popen(
            [self.program, *arguments],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            yield Lines(process)
        finally:
            process.kill()
            process.wait()


class Lines:
    """What a process prints, a line at a time, each within a deadline."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._queue: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, args=(process,), daemon=True).start()

    def _read(self, process: subprocess.Popen[str]) -> None:
        for line in process.stdout:
            self._queue.put(line.rstrip("\n"))

    def next(self) -> str:
        return self._queue.get(timeout=TIMEOUT_S)


def rows(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]
