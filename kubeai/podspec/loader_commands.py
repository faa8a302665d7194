"""Commands for the loader's container besides `load`, for images without a shell.

They need `python3`, which KubeAI's image and the loader image of KubeAI in Go have.
"""

from __future__ import annotations

_PYTHON = ("python3", "-IS", "-c")
# As a container's first process: it reaps the processes that others leave, and a signal without a
# handler would be ignored, which would keep a deleted pod and its GPUs for the whole grace period.
_WAIT = """\
from signal import *
pthread_sigmask(SIG_BLOCK, {SIGTERM})
signal(SIGCHLD, SIG_IGN)
sigwait({SIGTERM})
"""
_REMOVE = """\
import os, shutil, sys
for path in sys.argv[1:]:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    elif os.path.lexists(path):
        os.unlink(path)
"""
_LINK = """\
import os, sys
_, target, link = sys.argv
if not os.path.isdir(target):
    sys.exit(f"{target} is not a folder of the claim")
if os.path.islink(link):
    os.unlink(link)
os.symlink(target, link)
"""


def wait() -> list[str]:
    """Wait for SIGTERM, then exit with 0."""
    return [*_PYTHON, _WAIT]


def remove(*paths: str) -> list[str]:
    """Remove files and folders; not an error for those that do not exist. Follows no links."""
    return [*_PYTHON, _REMOVE, *paths]


def link(target: str, path: str) -> list[str]:
    """Make ``path`` a link to the folder ``target``, which must exist."""
    return [*_PYTHON, _LINK, target, path]
