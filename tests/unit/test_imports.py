"""What processes do not import, because it would delay their start."""

from __future__ import annotations

import subprocess
import sys

import pytest

SERVE_MODULES_MAX = 720


# It reads credentials that kubeai.kube.auth cannot read itself.
EVERY_PROCESS = {"kubernetes_asyncio"}
WITHOUT_TERMINAL = EVERY_PROCESS | {"prompt_toolkit", "rich"}
# What a worker imports when it is needed: its version, and the description of the API.
WORKER = WITHOUT_TERMINAL | {"importlib.metadata", "kubeai.gateway.openapi"}


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("kubeai.gateway.worker", WORKER),
        ("kubeai.supervisor.supervisor", WITHOUT_TERMINAL),
        ("kubeai.local.kubelet.__main__", WITHOUT_TERMINAL),
        ("kubeai.local.apiserver.__main__", WITHOUT_TERMINAL),
        ("kubeai.cli.serve", EVERY_PROCESS),
        ("kubeai.local.app", EVERY_PROCESS),
    ],
)
def test_a_process_does_not_import_what_it_does_not_need_to_start(module, unwanted):
    _run(f"import sys, {module}; assert not {unwanted} & set(sys.modules), {unwanted}")


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
