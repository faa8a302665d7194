"""Termination messages: what a container that ended says about why.

Kubernetes' rules: what the container wrote to its terminationMessagePath, at most
FILE_MAX_BYTES; if that is nothing, the container failed and its policy is FallbackToLogsOnError,
the end of its log. The default path is not mounted: it would cost each container without mounts a
namespace of its own. Called by the runner.
"""

from __future__ import annotations

import os
from pathlib import Path

from kubeai.local.kubelet.logs import last_lines
from kubeai.local.kubelet.pod import TERMINATION_LOG, Container, PodError
from kubeai.local.kubelet.process import Mount

FILE_MAX_BYTES = 4096


def termination_mounts(container: Container, pod_directory: Path) -> tuple[Mount, ...]:
    """An empty file at the container's terminationMessagePath, for the run about to start."""
    where = container.termination_message_path
    if (path := _file(container, pod_directory)) is None:
        return ()
    if not where.startswith("/"):
        raise PodError(f"terminationMessagePath {where!r} is not absolute")
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"")
    path.chmod(0o666)  # the container may run as another user
    return (Mount(str(path), where, False),)


def termination_message(container: Container, pod_directory: Path, log: Path, code: int) -> str:
    """The message of a container that has ended with ``code``; empty if it left none."""
    message = _read(_file(container, pod_directory))
    if not message and code and container.termination_message_policy == "FallbackToLogsOnError":
        return last_lines(log)
    return message


def _file(container: Container, pod_directory: Path) -> Path | None:
    if container.termination_message_path in ("", TERMINATION_LOG):
        return None
    return pod_directory / ".termination" / container.name


def _read(path: Path | None) -> str:
    if path is None:
        return ""
    try:
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - FILE_MAX_BYTES))
            return file.read(FILE_MAX_BYTES).decode(errors="ignore")
    except OSError:
        return ""
