"""What a benchmark ran on, for its results: date, command, versions and hardware.

Secrets of the command line, which are the API key and the values of headers, are left out.
"""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kubeai import __version__

HIDDEN = "***"
GPUS = Path("/proc/driver/nvidia/gpus")


def describe(server: str | None = None) -> dict[str, Any]:
    """The environment of a run that starts now. ``server``: its version, if it reports one."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command(sys.argv),
        "versions": {
            "kubeai": __version__,
            "python": platform.python_version(),
            "server": server,
        },
        "hardware": {
            "cpu": _field(Path("/proc/cpuinfo"), "model name") or platform.machine(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "gpus": gpus(GPUS),
        },
    }


def command(argv: Sequence[str]) -> str:
    """The command line, for a shell, without secrets."""
    name = Path(argv[0]).name
    words, hide = ["kubeai" if name == "__main__.py" else name], ""
    for word in argv[1:]:
        option, equals, value = word.partition("=")
        if hide:
            words.append(_hidden(hide, word))
            hide = ""
        elif option in ("--api-key", "--header"):
            words.append(f"{option}={_hidden(option, value)}" if equals else word)
            hide = "" if equals else option
        else:
            words.append(word)
    return shlex.join(words)


def _hidden(option: str, value: str) -> str:
    name, colon, _ = value.partition(":")
    return f"{name}: {HIDDEN}" if option == "--header" and colon else HIDDEN


def gpus(folder: Path) -> list[str]:
    """The models of this machine's NVIDIA GPUs, as their driver reports them."""
    found = (_field(path, "Model") for path in sorted(folder.glob("*/information")))
    return [model for model in found if model]


def _field(path: Path, name: str) -> str:
    """The value of a line ``name: value``; "" if there is none."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    pairs = (line.partition(":") for line in lines)
    return next((value.strip() for key, _, value in pairs if key.strip() == name), "")
