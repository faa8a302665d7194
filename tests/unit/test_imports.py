"""What processes do not import, because it would delay their start."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "module",
    [
        "kubeai.gateway.worker",
        "kubeai.supervisor.supervisor",
        "kubeai.cli.serve",
        "kubeai.local.app",
        "kubeai.local.kubelet.__main__",
        "kubeai.local.apiserver.__main__",
    ],
)
def test_a_process_does_not_import_kubernetes_asyncio(module):
    code = f"import sys, {module}; assert 'kubernetes_asyncio' not in sys.modules"
    _run(code)


def test_a_worker_does_not_look_up_its_version():
    _run("import sys, kubeai.gateway.worker; assert 'importlib.metadata' not in sys.modules")


def test_a_worker_makes_the_description_of_the_api_when_it_is_requested():
    _run("import sys, kubeai.gateway.worker; assert 'kubeai.gateway.openapi' not in sys.modules")


@pytest.mark.parametrize(
    "module",
    ["kubeai.gateway.worker", "kubeai.local.kubelet.__main__", "kubeai.supervisor.supervisor"],
)
def test_a_process_that_draws_no_terminal_does_not_import_rich(module):
    _run(f"import sys, {module}; assert 'rich' not in sys.modules")


def test_rich_can_be_imported_after_logging():
    _run("import kubeai.logs, rich.console")


def _run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
