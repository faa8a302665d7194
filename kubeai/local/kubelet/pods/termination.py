"""Termination messages of containers, under Kubernetes' rules.

The message is what the container wrote to its terminationMessagePath, at most FILE_MAX_BYTES. If
that is empty, the container failed and its policy is FallbackToLogsOnError, it is the end of the
log. The default path is not mounted: containers without other mounts would then each need a mount
namespace. Called by container.py.
"""

from __future__ import annotations

import os
from pathlib import Path

from kubeai.local.kubelet.pods.pod import TERMINATION_LOG, Container, PodError
from kubeai.local.kubelet.runtime.logs import last_lines
from kubeai.local.kubelet.runtime.process import Mount

FILE_MAX_BYTES = 4096


def termination_mounts(container: Container, pod_directory: Path) -> tuple[Mount, ...]:
    """Create an empty file for the next run, mounted at the container's terminationMessagePath."""
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
    """The message of a container that ended with ``code``; empty if there is none."""
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
