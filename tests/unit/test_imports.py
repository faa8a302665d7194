"""Partly imported packages: unused parts are not loaded, and later imports are complete."""

import subprocess
import sys


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr


def test_unused_modules_are_not_imported():
    run(
        "import sys, kubeai.kube.client, kubeai.local.apiserver.schema.rules\n"
        "assert 'kubernetes_asyncio.client.models' not in sys.modules\n"
        "assert 'prompt_toolkit' not in sys.modules\n"
    )


def test_the_packages_are_complete_afterwards():
    run(
        "import kubeai.kube.client, kubeai.local.apiserver.schema.rules\n"
        "import cel.cli, kubernetes_asyncio\n"
        "assert kubernetes_asyncio.client.CoreV1Api and kubernetes_asyncio.client.ApiClient\n"
        "assert kubernetes_asyncio.config.load_kube_config and cel.compile\n"
    )


def test_packages_imported_before_stay_complete():
    run(
        "import cel, kubernetes_asyncio\n"
        "import kubeai.kube.client, kubeai.local.apiserver.schema.rules\n"
        "assert kubernetes_asyncio.client.ApiClient and cel.cli\n"
        "assert kubeai.kube.auth.Configuration is kubernetes_asyncio.client.Configuration\n"
    )


def test_a_worker_does_not_import_traceback_rendering_certificate_authorities_or_its_version():
    run(
        "import kubeai.gateway.worker, aiohttp, ssl, sys\n"
        "assert not {'rich', 'importlib.metadata'} & sys.modules.keys()\n"
        "assert aiohttp.connector._SSL_CONTEXT_VERIFIED.get_ca_certs() == []\n"
        "assert 'set_default_verify_paths' not in vars(ssl.SSLContext)\n"
        "import rich.traceback\n"
    )
