"""The process kubelet with one image that it has: containers of it run in its root file system.

They run as contained.py says, as the image's user, with their volumes mounted there, and with the
variables of their manifest and of the image only. Other images are names of programs as usual.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import contained
from layouts import Image

from kubeai.local.kubelet import __main__ as kubelet
from kubeai.local.kubelet.pods import programs


def program(image: Image, repository: str, data_dir: Path) -> list[str]:
    """The arguments of Python that run such a kubelet, before the kubelet's own."""
    wanted = {
        "repository": repository,
        "data_dir": str(data_dir),
        "root": str(image.root),
        "user": image.user,
        "env": image.env,
        "entrypoint": image.entrypoint,
    }
    code = f"import sys; sys.path[:0] = {sys.path!r}\nimport imaged_kubelet\n"
    return ["-c", f"{code}imaged_kubelet.main({json.dumps(wanted)!r})"]


def main(text: str) -> None:
    """Run the kubelet."""
    wanted: dict[str, Any] = json.loads(text)
    installed = programs.resolve

    async def resolve(
        image: str,
        command: Sequence[str],
        args: Sequence[str],
        env: dict[str, str],
        ip: str,
        *rest: Any,
    ) -> list[str]:
        if image.rpartition(":")[0] != wanted["repository"]:
            return await installed(image, command, args, env, ip, *rest)
        words = (*(command or wanted["entrypoint"]), *args)
        declared = {key: value for key, value in env.items() if os.environ.get(key) != value}
        return contained.command(
            Path(wanted["root"]),
            [programs.bind_to_pod(word, ip) for word in words],
            user=wanted["user"],
            env=wanted["env"] | declared,
            mounts={},
            mounts_from=wanted["data_dir"],
            share_processes=True,
        )

    programs.resolve = resolve
    kubelet.main()
