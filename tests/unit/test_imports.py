"""What processes do not import, because it would delay their start."""

from __future__ import annotations

import subprocess
import sys

import pytest

SERVE_MODULES_MAX = 720


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
    [
        "kubeai.gateway.worker",
        "kubeai.supervisor.supervisor",
        "kubeai.local.kubelet.__main__",
        "kubeai.local.apiserver.__main__",
    ],
)
def test_a_process_that_draws_no_terminal_does_not_import_what_draws_one(module):
    _run(f"import sys, {module}; assert not {{'rich', 'prompt_toolkit'}} & set(sys.modules)")


def test_kubeai_serve_imports_little_before_it_is_healthy():
    """Its start takes less than a second; `bench/start.py` measures it. There are 629 modules."""
    code = """
import sys
from kubeai import cli
cli._app()
import kubeai.api.config.system, kubeai.kube.client, kubeai.supervisor.supervisor, uvloop
heavy = {
    "aio_pika", "aiobotocore", "aiokafka", "azure", "botocore", "cel", "cryptography", "google",
    "grpc", "huggingface_hub", "jsonschema_rs", "kubernetes_asyncio", "nats", "obstore",
    "opentelemetry.sdk",
}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
assert len(sys.modules) < MODULES_MAX, len(sys.modules)
"""
    _run(code.replace("MODULES_MAX", str(SERVE_MODULES_MAX)))


def test_rich_can_be_imported_after_logging():
    _run("import kubeai.logs, rich.console")


def _run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
