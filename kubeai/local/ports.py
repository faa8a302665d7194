"""The embedded API's port, which stays the same across restarts.

It is stored in the data directory's kubeconfig, because clients keep using that file or copies of
it. The API process chooses the port; `kubeai local` reports when it changed.
"""

from __future__ import annotations

import random
from pathlib import Path
from urllib.parse import urlsplit

import yaml

# Below Linux's ephemeral ports (32768 and up by default), so that no outgoing connection takes the
# port between two starts; also below Kubernetes' node ports (30000 and up).
FIRST, LAST = 20_000, 29_999
TRIES_MAX = 20


def kept_port(directory: Path) -> int:
    """Return the port in the data directory's kubeconfig, or 0 if there is none."""
    try:
        content = yaml.safe_load((directory / "kubeconfig").read_bytes())
        return urlsplit(content["clusters"][0]["cluster"]["server"]).port or 0
    except (OSError, ValueError, yaml.YAMLError, LookupError, TypeError, AttributeError):
        return 0


def candidates(directory: Path, asked: int) -> list[int]:
    """Return the ports to try, in order.

    If ``asked`` is set, only that port. Otherwise the kept port, random ones, and finally 0, which
    means any free port.
    """
    if asked:
        return [asked]
    kept = kept_port(directory)
    chosen = random.sample(range(FIRST, LAST + 1), TRIES_MAX)
    return [*([kept] if kept else []), *chosen, 0]
