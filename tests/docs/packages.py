"""Download what a page installs with pip or npm, because a page runs without a network.

A page names the packages in its front matter (`pip`, `npm`). They are kept in the user's cache.
docs/tutorials/constraints.txt pins those from PyPI, the page itself those from npm.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

from caches import made_once
from doc_pages import DOCS, Page

CONSTRAINTS = DOCS / "tutorials" / "constraints.txt"
TIMEOUT_S = 600.0


def prepare(page: Page) -> Path | None:
    """Download the page's packages, unless they are there. Returns their folder, or None."""
    if not page.pip and not page.npm:
        return None
    key = json.dumps([page.pip, page.npm, CONSTRAINTS.read_text(), sys.version_info[:2]])
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    return made_once("kubeai-docs", digest, partial(_download, page))


def _download(page: Page, into: Path) -> None:
    if page.pip:
        pip = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check"]
        options = ["-c", str(CONSTRAINTS), "-d", str(into / "wheels")]
        subprocess.run([*pip, *options, *page.pip], check=True, timeout=TIMEOUT_S)
    if page.npm:
        npm = ["npm", "install", "--silent", "--no-audit", "--no-fund"]
        options = ["--prefix", str(into / "installed"), "--cache", str(into / "npm")]
        subprocess.run([*npm, *options, *page.npm], check=True, timeout=TIMEOUT_S)
        shutil.rmtree(into / "installed")  # what an installation reads is in the cache


def environment(folder: Path) -> dict[str, str]:
    """The variables by which pip and npm find the packages of this folder, and only those."""
    return {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(folder / "wheels"),
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_NO_COMPILE": "1",  # of thousands of modules; the few that are used are compiled then
        "PYTHONDONTWRITEBYTECODE": "",
        "npm_config_cache": str(folder / "npm"),
        "npm_config_offline": "true",
        "npm_config_update_notifier": "false",
    }
