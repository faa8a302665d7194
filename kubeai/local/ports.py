"""The embedded API's port, which stays the same over restarts.

The kubeconfig in the data directory is where it is kept: clients hold on to that file, or to copies
of it. The API's process chooses the port, `kubeai local` compares.
"""

from __future__ import annotations

import random
from pathlib import Path
from urllib.parse import urlsplit

import yaml

# Below the ports that Linux gives to outgoing connections (32768 and up by default), so that none
# of them takes the port between two starts; below Kubernetes' node ports (30000 and up), too.
FIRST, LAST = 20_000, 29_999
TRIES_MAX = 20


def kept_port(directory: Path) -> int:
    """The port in the data directory's kubeconfig; 0 when there is none."""
    try:
        content = yaml.safe_load((directory / "kubeconfig").read_bytes())
        return urlsplit(content["clusters"][0]["cluster"]["server"]).port or 0
    except (OSError, ValueError, yaml.YAMLError, LookupError, TypeError, AttributeError):
        return 0


def candidates(directory: Path, asked: int) -> list[int]:
    """The ports to try, in order: the one that was asked for alone, else the kept one first.

    The last is 0, which is any that is free.
    """
    if asked:
        return [asked]
    kept = kept_port(directory)
    chosen = random.sample(range(FIRST, LAST + 1), TRIES_MAX)
    return [*([kept] if kept else []), *chosen, 0]
