"""Every page follows the conventions, and the commands on it work.

Pages run as docs/contribute/documentation.md describes, each in namespaces of its own.
"""

from __future__ import annotations

import contextlib
import subprocess

import pytest
from doc_pages import Page, PageError, page_names, read_page
from run_page import INSTALL_TIMEOUT_S, command
from servers import CONTROL_PLANE, assets

pytestmark = pytest.mark.docs
PREPARE_TIMEOUT_S = 180.0
PAGES = page_names()


def _to_run() -> list[str]:
    """Pages with commands, the slowest first. Another test reports those that cannot be read."""
    pages = []
    for name in PAGES:
        with contextlib.suppress(PageError):
            pages.append(read_page(name))
    return [page.name.removeprefix("docs/") for page in sorted(pages, key=_weight) if page.runs]


def _weight(page: Page) -> tuple[bool, bool, int]:
    """Smaller for slower pages: they install packages, need a cluster, or have many commands."""
    return not (page.pip or page.npm), page.commands != "cluster", -len(page.steps)


@pytest.mark.parametrize("name", PAGES)
def test_page_follows_the_conventions(name: str) -> None:
    read_page(name)


@pytest.mark.timeout(INSTALL_TIMEOUT_S + PREPARE_TIMEOUT_S + 30)
@pytest.mark.parametrize("name", _to_run())
def test_commands_of_a_page_work(name: str) -> None:
    if assets(*CONTROL_PLANE, "kubectl", "helm") is None:
        pytest.skip("KUBEBUILDER_ASSETS holds no whole control plane")
    done = subprocess.run(
        command(name),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        errors="replace",
        timeout=INSTALL_TIMEOUT_S + PREPARE_TIMEOUT_S,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout
