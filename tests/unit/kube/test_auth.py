"""Where the address and the credentials of the cluster come from."""

from __future__ import annotations

import stat
import subprocess
import sys

import orjson
import pytest
from fakes.scripted_api import kubeconfig, thing

from kubeai.errors import KubeAIError
from kubeai.kube import auth
from kubeai.kube.auth import load_access
from kubeai.kube.client import Kube
from kubeai.kube.errors import ApiError
from kubeai.kube.resources import CONFIGMAPS

URL = "https://127.0.0.1:1/"
AUTHORITY = "-----BEGIN CERTIFICATE-----\n"


@pytest.fixture
def account(tmp_path, monkeypatch):
    """A pod's service account."""
    directory = tmp_path / "account"
    directory.mkdir()
    (directory / "token").write_text("first\n")
    (directory / "ca.crt").write_text(AUTHORITY)
    (directory / "namespace").write_text("models\n")
    monkeypatch.setattr(auth, "ACCOUNT_DIR", directory)
    monkeypatch.delenv("KUBECONFIG", raising=False)
    monkeypatch.delenv("POD_NAMESPACE", raising=False)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    return directory


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now_s = 1000.0

        def monotonic(self):
            return self.now_s

    clock = Clock()
    monkeypatch.setattr(auth, "time", clock)
    return clock


# -- in a pod ------------------------------------------------------------------------------------


async def test_a_pod_uses_its_service_account(account):
    access = await load_access()
    assert (access.host, access.namespace) == ("https://10.0.0.1:443", "models")
    assert access.ca_file == str(account / "ca.crt")
    assert access.verify_tls
    assert await access.credentials.authorization() == "Bearer first"


async def test_the_namespace_is_that_of_the_environment_the_account_or_default(
    account, monkeypatch
):
    (account / "namespace").unlink()
    assert (await load_access()).namespace == "default"
    monkeypatch.setenv("POD_NAMESPACE", "other")
    assert (await load_access()).namespace == "other"


@pytest.mark.parametrize("host", ["fd00::1", "fe80::1%eth0"])
async def test_an_ipv6_address_is_bracketed(account, monkeypatch, host):
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", host)
    assert (await load_access()).host == f"https://[{host}]:443"


async def test_the_token_is_read_again_each_minute(account, clock):
    credentials = (await load_access()).credentials
    (account / "token").write_text("second\n")
    clock.now_s += 59
    assert await credentials.authorization() == "Bearer first"
    clock.now_s += 1
    assert await credentials.authorization() == "Bearer second"


@pytest.mark.parametrize("name", ["KUBERNETES_SERVICE_HOST", "KUBERNETES_SERVICE_PORT"])
@pytest.mark.parametrize("value", [None, ""])
async def test_without_an_address_this_is_not_a_pod(account, monkeypatch, name, value):
    if value is None:
        monkeypatch.delenv(name)
    else:
        monkeypatch.setenv(name, value)
    with pytest.raises(KubeAIError, match=f"this is not a pod .*{name}"):
        await load_access()


@pytest.mark.parametrize("name", ["token", "ca.crt"])
async def test_a_missing_or_empty_file_of_the_account_is_reported_by_name(account, name):
    (account / name).write_text("")
    with pytest.raises(KubeAIError, match=f"this is not a pod .*{name} is empty"):
        await load_access()
    (account / name).unlink()
    with pytest.raises(KubeAIError, match=f"this is not a pod .*No such file.*{name}"):
        await load_access()


@pytest.mark.parametrize("damage", ["empty", "missing"])
async def test_a_token_that_cannot_be_read_again_fails_the_call(account, clock, damage):
    access = await load_access()
    kube = Kube(
        auth.Access(host="http://127.0.0.1:1", namespace="ns", credentials=access.credentials)
    )
    if damage == "empty":
        (account / "token").write_text("")
    else:
        (account / "token").unlink()
    clock.now_s += 61
    with pytest.raises(ApiError, match="token") as caught:
        await kube.get(CONFIGMAPS, "a")
    assert caught.value.status == 0
    await kube.close()


async def test_a_rejected_service_account_is_not_tried_again(account, server):
    access = await load_access()
    kube = Kube(auth.Access(host=server.url, namespace="ns", credentials=access.credentials))
    server.tokens = {"Bearer other"}
    with pytest.raises(ApiError) as caught:
        await kube.get(CONFIGMAPS, "a")
    assert caught.value.status == 401
    assert [h["Authorization"] for _, _, h, _ in server.requests] == ["Bearer first"]
    await kube.close()


# -- kubeconfigs ---------------------------------------------------------------------------------


def test_a_kubeconfig_with_only_a_token_does_not_need_kubernetes_asyncio(tmp_path):
    (tmp_path / "ca.crt").write_text(AUTHORITY)
    path = kubeconfig(
        tmp_path / "config",
        URL,
        {"token": "secret"},
        {"namespace": "other"},
        **{"certificate-authority": "ca.crt"},
    )
    code = (
        "import asyncio, sys\n"
        "from kubeai.kube.auth import load_access\n"
        f"access = asyncio.run(load_access({path!r}))\n"
        f"assert access.ca_file == {str(tmp_path / 'ca.crt')!r}, access\n"
        "assert (access.host, access.namespace) == ('https://127.0.0.1:1', 'other'), access\n"
        "assert asyncio.run(access.credentials.authorization()) == 'Bearer secret'\n"
        "assert 'kubernetes_asyncio' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr


async def test_both_ways_to_read_a_kubeconfig_agree(tmp_path):
    (tmp_path / "ca.crt").write_text(AUTHORITY)
    cluster = {"certificate-authority": "ca.crt"}
    read = await load_access(kubeconfig(tmp_path / "a", URL, {"token": "secret"}, **cluster))
    cluster["insecure-skip-tls-verify"] = False  # left to kubernetes_asyncio
    loaded = await load_access(kubeconfig(tmp_path / "b", URL, {"token": "secret"}, **cluster))
    assert type(read.credentials) is not type(loaded.credentials)
    for access in (read, loaded):
        assert await access.credentials.authorization() == "Bearer secret"
        assert access.host == "https://127.0.0.1:1"
        assert access.ca_file == str(tmp_path / "ca.crt")
        assert (access.namespace, access.verify_tls, access.proxy) == ("ns", True, None)


async def test_settings_of_the_cluster_are_used(tmp_path):
    settings = {
        "insecure-skip-tls-verify": True,
        "tls-server-name": "api.example",
        "proxy-url": "http://127.0.0.1:2",
    }
    access = await load_access(
        kubeconfig(tmp_path / "config", URL, {"token": "secret"}, **settings)
    )
    assert not access.verify_tls
    assert (access.tls_server_name, access.proxy) == ("api.example", "http://127.0.0.1:2")


@pytest.mark.parametrize(
    ("user", "cluster", "text"),
    [
        ({"token": "secret"}, {"certificate-authority": "nowhere.crt"}, "nowhere.crt"),
        ({"client-certificate": "nowhere.pem"}, {}, "nowhere.pem"),
    ],
)
async def test_a_file_that_a_kubeconfig_names_and_that_is_missing_is_reported(
    tmp_path, user, cluster, text
):
    with pytest.raises(KubeAIError, match=text):
        await load_access(kubeconfig(tmp_path / "config", URL, user, **cluster))


async def test_an_exec_plugin_provides_the_token_and_runs_again_after_a_401(tmp_path):
    plugin, count = tmp_path / "plugin", tmp_path / "count"
    credential = {
        "apiVersion": "client.authentication.k8s.io/v1",
        "kind": "ExecCredential",
        "status": {"token": "TOKEN"},
    }
    text = orjson.dumps(credential).decode().replace("TOKEN", "run-$(wc -c < COUNT | tr -d ' ')")
    text = text.replace("COUNT", str(count)).replace('"', '\\"')
    plugin.write_text(f'#!/bin/sh\nprintf x >> {count}\necho "{text}"\n')
    plugin.chmod(plugin.stat().st_mode | stat.S_IXUSR)
    user = {"exec": {"apiVersion": "client.authentication.k8s.io/v1", "command": str(plugin)}}
    credentials = (await load_access(kubeconfig(tmp_path / "config", URL, user))).credentials
    assert await credentials.authorization() == "Bearer run-1"
    assert await credentials.renew()
    assert await credentials.authorization() == "Bearer run-2"
    assert not await credentials.renew(), "not again within 10 s"


async def test_a_rotated_token_file_is_read_again(server, tmp_path):
    token = tmp_path / "token"
    token.write_text("first")
    path = kubeconfig(tmp_path / "kubeconfig", server.url, {"tokenFile": str(token)})
    kube = await Kube.connect(path)
    server.tokens = {"Bearer second"}
    server.answer = 200, orjson.dumps(thing("a", 1)), {}
    token.write_text("second")
    assert (await kube.get(CONFIGMAPS, "a"))["metadata"]["name"] == "a"
    server.tokens = {"Bearer third"}
    with pytest.raises(ApiError) as caught:
        await kube.get(CONFIGMAPS, "a")
    assert caught.value.status == 401
    await kube.close()


async def test_a_missing_or_invalid_kubeconfig_is_reported_by_name(tmp_path, monkeypatch):
    with pytest.raises(KubeAIError, match="nowhere: no such file"):
        await Kube.connect(str(tmp_path / "nowhere"))
    (tmp_path / "wrong").write_text("clusters: 7")
    with pytest.raises(KubeAIError, match="wrong"):
        await Kube.connect(str(tmp_path / "wrong"))
    monkeypatch.delenv("KUBECONFIG", raising=False)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(KubeAIError, match="KUBECONFIG is not set"):
        await Kube.connect()
