"""API keys on a Kubernetes API: `kubeai key` writes them, and every replica sees them."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
import sys
import time

import pytest
from operators import CONFIG, Replica, as_operator, until
from servers import embedded, install_models

from kubeai.kube.client import Kube
from kubeai.kube.resources import EVENTS, SECRETS
from kubeai.operator import events

KEYS = CONFIG + "gateway: {keys: {required: true}}\n"
EFFECTIVE_MAX_S = 1.0  # what docs/reference/keys.md promises for a change


def secret(name, key="", **annotations):
    entries = {"api_key": base64.b64encode(key.encode()).decode()} if key else {}
    return {
        "metadata": {
            "name": name,
            "labels": {"kubeai.org/api-key": "true"},
            "annotations": {f"kubeai.org/{each}": text for each, text in annotations.items()},
        },
        "data": entries,
    }


async def kubeai_key(kubeconfig, *arguments, code=0):
    """The standard output of `kubeai key`, as a user runs it."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "kubeai", "key", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "KUBECONFIG": kubeconfig},
    )
    out, err = await process.communicate()
    assert process.returncode == code, err
    return (out if code == 0 else err).decode()


@pytest.fixture
async def kube(kube_api):
    kube = await Kube.connect(kube_api)
    yield kube
    await kube.close()


@pytest.fixture
async def replicas(api_server, namespace, tmp_path):
    """Two replicas, with the rights that the chart grants."""
    account = as_operator(api_server, namespace, keys=True)
    kubeconfig = str(account.kubeconfig(tmp_path / "account", namespace))
    clients = [await Kube.connect(kubeconfig) for _ in range(2)]
    running = [Replica(client, f"r{i}", KEYS) for i, client in enumerate(clients)]
    await until(lambda: all(r.operator.synced.is_set() for r in running), "both are synced")
    yield running
    for replica in running:
        await replica.stop()
    for client in clients:
        await client.close()


async def within_a_second(true, what):
    """Wait for a state that a change of ours leads to; measures it on an idle machine."""
    began_s = time.monotonic()
    await until(true, what)
    if os.getloadavg()[0] < (os.cpu_count() or 1):
        assert time.monotonic() - began_s < EFFECTIVE_MAX_S, what


async def test_a_key_is_created_listed_and_revoked(kube_api, namespace, replicas):
    key = (await kubeai_key(kube_api, "create", "alice", "--rpm", "5", "--models", "a=b")).strip()
    digest = hashlib.sha256(key.encode()).digest()
    await within_a_second(lambda: all("alice" in r.keys for r in replicas), "both know the key")
    for replica in replicas:
        found = replica.keys["alice"]
        assert (found.digest, found.requests_per_minute, found.models) == (digest, 5, "a=b")
    listed = await kubeai_key(kube_api, "list")
    assert listed.splitlines()[1].split()[:6] == ["alice", "Active", "alice", "a=b", "5", "-"]
    assert key not in listed
    assert "exists" in await kubeai_key(kube_api, "create", "alice", code=2)
    assert await kubeai_key(kube_api, "revoke", "alice") == "alice revoked\n"
    await within_a_second(lambda: not any(r.keys for r in replicas), "both have forgotten it")
    assert "no Secret" in await kubeai_key(kube_api, "revoke", "alice", code=2)


async def test_a_secret_of_somebody_else_is_a_key_only_with_the_label(kube, replicas):
    other = secret("tls", "not-a-key-of-kubeai")
    del other["metadata"]["labels"]
    await kube.create(SECRETS, other)
    await kube.create(SECRETS, secret("app", "authorinos-key", tenant="t"))
    await until(lambda: all(set(r.keys) == {"app"} for r in replicas), "both know one key")
    assert replicas[0].keys["app"].tenant == "t"
    label = {"metadata": {"labels": {"kubeai.org/api-key": None}}}
    await kube.patch(SECRETS, "app", label)
    await until(lambda: not any(r.keys for r in replicas), "without the label it is none")


async def test_an_edit_holds_at_once_and_an_invalid_one_revokes(kube, replicas):
    await kube.create(SECRETS, secret("app", "k1", rpm="5"))
    await until(lambda: all("app" in r.keys for r in replicas), "both know the key")
    for rpm, expected in (("7", 7), ("none", None), ("9", 9)):
        await kube.patch(SECRETS, "app", {"metadata": {"annotations": {"kubeai.org/rpm": rpm}}})

        def are_changed(expected=expected):
            found = [r.keys.get("app") for r in replicas]
            return all((key and key.requests_per_minute) == expected for key in found)

        await within_a_second(are_changed, f"the limit is {rpm}")


async def test_a_secret_that_waits_for_a_finalizer_has_no_key(kube, replicas):
    finalized = secret("app", "k1")
    finalized["metadata"]["finalizers"] = ["example.com/hold"]
    await kube.create(SECRETS, finalized)
    await until(lambda: all("app" in r.keys for r in replicas), "both know the key")
    await kube.delete(SECRETS, "app")
    await within_a_second(lambda: not any(r.keys for r in replicas), "it is revoked")
    await kube.patch(SECRETS, "app", {"metadata": {"finalizers": None}})


async def test_the_leader_writes_an_event_about_an_unusable_secret(kube, replicas, monkeypatch):
    monkeypatch.setattr(events, "DELAY_S", 0.0)
    await until(lambda: any(r.operator.leads for r in replicas), "one leads")
    await kube.create(SECRETS, secret("app", "k1", rmp="5"))

    async def found():
        listed, _ = await kube.list(EVENTS, kube.namespace)
        return [each for each in listed if each["involvedObject"]["name"] == "app"]

    await until(found, "there is an Event")
    (event,) = await found()
    assert (event["involvedObject"]["kind"], event["type"]) == ("Secret", "Warning")
    assert event["reason"] == "UnusableAPIKey"
    assert "did you mean kubeai.org/rpm?" in event["message"]


async def test_without_the_right_to_read_secrets_a_replica_is_not_synced(
    api_server, namespace, tmp_path
):
    if api_server.kind == "embedded":
        pytest.skip("the embedded API has no RBAC")
    account = as_operator(api_server, namespace)
    kube = await Kube.connect(str(account.kubeconfig(tmp_path / "account", namespace)))
    replica = Replica(kube, "r0", KEYS)
    try:
        await until(lambda: replica.operator.store.listed, "the Models are listed")
        assert not replica.operator.synced.is_set()
    finally:
        await replica.stop()
        await kube.close()


async def test_keys_stay_while_the_api_is_away(tmp_path):
    with embedded(tmp_path / "api") as server:
        install_models(server)
        kube = await Kube.connect(str(server.kubeconfig(tmp_path / "kubeconfig", "default")))
        await kube.create(SECRETS, secret("app", "k1"))
        await kube.create(SECRETS, secret("other", "k2"))
        replica = Replica(kube, "r0", KEYS)
        try:
            await until(lambda: set(replica.keys) == {"app", "other"}, "the keys are known")
            server.program.kill()
            await asyncio.sleep(0)
            assert set(replica.keys) == {"app", "other"}
            server.program.start("--ready-fd", "1")

            async def is_deleted():
                try:
                    await kube.delete(SECRETS, "app")
                except Exception:
                    return False
                return True

            await until(is_deleted, "the API is back and the Secret is deleted")
            await until(lambda: set(replica.keys) == {"other"}, "the deletion is seen")
        finally:
            await replica.stop()
            await kube.close()
