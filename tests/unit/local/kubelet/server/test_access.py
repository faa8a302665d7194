"""Access to a kubelet that serves a real API server: client certificates over TLS."""

from __future__ import annotations

import ssl
import subprocess
import sys

import aiohttp
import pytest
from fakes.authority import Authority

from kubeai.errors import KubeAIError
from kubeai.local.kubelet.server.access import CertificateAccess
from kubeai.local.kubelet.server.execs import Refusal
from kubeai.local.kubelet.server.server import KubeletServer


class NoPods:
    def find_log(self, namespace, pod, container, previous):
        raise Refusal(404, "no such pod")

    def find_container(self, namespace, pod, container):
        raise Refusal(404, "no such pod")


@pytest.fixture
def authority(tmp_path):
    return Authority(tmp_path, "authority")


@pytest.fixture
async def status_for(tmp_path, authority):
    """The response status for a client; 404 comes from the pods' routes: it was admitted."""
    servers = []

    async def status_for(client, name=""):
        access = CertificateAccess(authority.file, name, "127.0.0.1", tmp_path)
        server = KubeletServer(NoPods(), access)
        servers.append(server)
        port = await server.start()
        context = ssl._create_unverified_context()  # as API servers do
        if client is not None:
            context.load_cert_chain(client.certificate, client.key)
        url = f"https://127.0.0.1:{port}/containerLogs/default/p/c"
        async with aiohttp.ClientSession() as session, session.get(url, ssl=context) as answer:
            return answer.status

    yield status_for
    for server in servers:
        await server.close()


async def test_a_client_with_a_certificate_of_the_authority_is_admitted(status_for, authority):
    assert await status_for(authority.client("api")) == 404
    assert await status_for(authority.client("api"), name="api") == 404


async def test_a_client_with_another_name_is_rejected(status_for, authority):
    assert await status_for(authority.client("somebody"), name="api") == 401


async def test_a_client_without_a_certificate_is_rejected(status_for):
    assert await status_for(None) == 401


async def test_a_client_of_another_authority_is_rejected(status_for, tmp_path):
    with pytest.raises((aiohttp.ClientError, ssl.SSLError)):
        await status_for(Authority(tmp_path, "other").client("api"))


async def test_the_kubelets_certificate_contains_its_address(tmp_path, authority):
    access = CertificateAccess(authority.file, "", "127.0.0.1", tmp_path)
    server = KubeletServer(NoPods(), access)
    port = await server.start()
    trusting = ssl.create_default_context(cafile=str(tmp_path / "kubelet.crt"))
    url = f"https://127.0.0.1:{port}/"
    async with aiohttp.ClientSession() as session, session.get(url, ssl=trusting) as answer:
        assert answer.status == 401
    await server.close()
    assert (tmp_path / "kubelet.key").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("content", [None, "", "no certificate"])
def test_an_invalid_authority_file_is_reported_by_name(tmp_path, content):
    file = tmp_path / "ca.crt"
    if content is not None:
        file.write_text(content)
    with pytest.raises(KubeAIError, match=f"--client-ca-file: {file}: "):
        CertificateAccess(file, "", "127.0.0.1", tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--capacity", "nvidia.com/gpu"], "'nvidia.com/gpu' is not key=value"),
        (["--capacity", "nvidia.com/gpu=two"], "nvidia.com/gpu: 'two' is not a quantity"),
        (["--label", "=l4"], "'=l4' is not key=value"),
        (["--client-name", "api"], "--client-name requires --client-ca-file"),
    ],
)
def test_an_invalid_option_is_reported_by_name(tmp_path, options, message):
    command = [sys.executable, "-m", "kubeai.local.kubelet", "--data-dir", str(tmp_path), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2
    assert message in done.stderr
