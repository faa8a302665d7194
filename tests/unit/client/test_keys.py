"""`kubeai key` on an API in memory: what it writes, shows and refuses, and its command line."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from datetime import UTC, datetime
from typing import get_args

import msgspec
import pytest
from fakes.kube import FakeKube
from typer.testing import CliRunner

from kubeai.api.api_key import KeySecret, read_key
from kubeai.cli import cluster
from kubeai.cli import key as command
from kubeai.client import keys
from kubeai.client.keys import NewKey
from kubeai.errors import KubeAIError
from kubeai.kube.resources import SECRETS

NOW_S = datetime(2026, 7, 1, tzinfo=UTC).timestamp()


@pytest.fixture
async def kube():
    return FakeKube()


def written(kube, name="alice"):
    return kube.objects["secrets", name]


async def create(kube, name="alice", **fields):
    return await keys.create(kube, "default", NewKey(name=name, **fields), NOW_S)


async def test_a_key_is_256_random_bits_and_the_secret_has_only_its_sha256(kube):
    first, second = await create(kube), await create(kube, "bob")
    assert first != second
    assert re.fullmatch(r"sk-kubeai-[A-Za-z0-9_-]{43}", first)
    secret = written(kube)
    assert secret["metadata"]["labels"] == {"kubeai.org/api-key": "true"}
    assert secret["metadata"]["annotations"] == {}
    digest = hashlib.sha256(first.encode())
    assert secret["data"] == {"sha256": base64.b64encode(digest.hexdigest().encode()).decode()}
    assert first.removeprefix("sk-kubeai-") not in str(kube.objects)
    assert read_key(msgspec.convert(secret, KeySecret)).digest == digest.digest()


async def test_options_become_annotations(kube):
    await create(
        kube, tenant="search", models="team=search", rpm=5, tpm=6, max_in_flight=7, priority=-8,
        expires="90d", admin=True,
    )  # fmt: skip
    assert written(kube)["metadata"]["annotations"] == {
        "kubeai.org/tenant": "search",
        "kubeai.org/models": "team=search",
        "kubeai.org/rpm": "5",
        "kubeai.org/tpm": "6",
        "kubeai.org/max-in-flight": "7",
        "kubeai.org/priority": "-8",
        "kubeai.org/expires": "2026-09-29T00:00:00Z",
        "kubeai.org/admin": "true",
    }


async def test_authorino_finds_the_key_itself(kube):
    key = await create(kube, authorino=True)
    secret = written(kube)
    assert secret["metadata"]["labels"]["authorino.kuadrant.io/managed-by"] == "authorino"
    assert base64.b64decode(secret["data"]["api_key"]).decode() == key


async def test_priority_zero_is_written(kube):
    await create(kube, priority=0)
    assert written(kube)["metadata"]["annotations"] == {"kubeai.org/priority": "0"}


@pytest.mark.parametrize(
    ("text", "time"),
    [
        ("30m", "2026-07-01T00:30:00Z"),
        ("12h", "2026-07-01T12:00:00Z"),
        ("1w", "2026-07-08T00:00:00Z"),
        ("2027-01-31T00:00:00Z", "2027-01-31T00:00:00Z"),
        ("2027-01-31T02:00:00.5+02:00", "2027-01-31T00:00:00Z"),
    ],
)
def test_an_expiry_is_a_duration_or_a_time(text, time):
    assert keys.expiry(text, NOW_S) == time


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "neither a duration"),
        ("90", "neither a duration"),
        ("90y", "neither a duration"),
        ("-1d", "neither a duration"),
        ("٣d", "neither a duration"),
        ("9999999999w", "neither a duration"),
        ("2027-01-31T00:00:00", "UTC offset"),
        ("2026-06-30T00:00:00Z", "not in the future"),
        ("0d", "not in the future"),
    ],
)
def test_another_expiry_is_refused(text, words):
    with pytest.raises(KubeAIError, match=f"^--expires: .*{words}"):
        keys.expiry(text, NOW_S)


@pytest.mark.parametrize(
    "fields",
    [
        {"models": "a=b=c"},
        {"tenant": "a\nb"},
        # `--models "$MODELS"` with an unset variable must not allow all Models.
        {"models": ""},
        {"tenant": ""},
        {"expires": ""},
    ],
)
async def test_nothing_is_written_with_an_invalid_option(kube, fields):
    with pytest.raises(KubeAIError, match=r"kubeai\.org/|^--expires: "):
        await create(kube, **fields)
    assert kube.objects == {}


async def test_an_existing_secret_is_not_overwritten(kube):
    await create(kube)
    before = written(kube)
    with pytest.raises(KubeAIError, match="Secret alice exists"):
        await create(kube)
    assert written(kube) == before


async def test_the_list_names_states_and_problems_and_no_key(kube):
    made = await create(kube, "a", tenant="t", rpm=5, expires="1d")
    await create(kube, "b", admin=True)
    bad = keys.secret_of(NewKey(name="c"), "sk-c", NOW_S)
    bad["metadata"]["annotations"]["kubeai.org/rpm"] = "many"
    twin = keys.secret_of(NewKey(name="d"), made, NOW_S)
    other = {"metadata": {"name": "unrelated"}, "data": {}}
    for secret in (bad, twin, other):
        await kube.create(SECRETS, secret, "default")
    listed = await keys.keys(kube, "default", NOW_S + 2 * 86400)
    assert [(each.name, each.state) for each in listed] == [
        ("a", "Expired"), ("b", "Active"), ("c", "Unusable"), ("d", "Unusable"),
    ]  # fmt: skip
    assert (listed[0].tenant, listed[0].rpm, listed[0].admin) == ("t", 5, False)
    assert (listed[1].tenant, listed[1].rpm, listed[1].admin) == ("b", 0, True)
    assert "kubeai.org/rpm" in listed[2].problem
    assert listed[3].problem == "the Secret a, which is older, has the same key"
    shown = msgspec.json.encode(listed).decode()
    for secret in (made, hashlib.sha256(made.encode()).hexdigest()):
        assert secret not in shown


async def test_revoking_deletes_the_secret(kube):
    await create(kube)
    await keys.revoke(kube, "default", "alice")
    assert kube.objects == {}
    with pytest.raises(KubeAIError, match="no Secret 'alice' in the namespace default"):
        await keys.revoke(kube, "default", "alice")


async def test_a_secret_that_is_no_key_is_not_deleted(kube):
    for labels in ({}, {"kubeai.org/api-key": "false"}):
        secret = {"metadata": {"name": f"tls-{len(labels)}", "labels": labels}, "data": {}}
        await kube.create(SECRETS, secret, "default")
        with pytest.raises(KubeAIError, match="is no API key"):
            await keys.revoke(kube, "default", secret["metadata"]["name"])
    assert len(kube.objects) == 2


class TestCommandLine:
    @pytest.fixture(autouse=True)
    def connected(self, kube, monkeypatch):
        kube.namespace = "here"
        kube.closed = False

        async def connect(kubeconfig=None):
            return kube

        async def close():
            kube.closed = True

        kube.close = close
        monkeypatch.setattr("kubeai.kube.client.Kube.connect", connect)
        monkeypatch.setenv("KUBECONFIG", "x")
        monkeypatch.setattr(keys, "now_s", lambda: NOW_S)

    def run(self, *arguments):
        result = CliRunner().invoke(command.key(), arguments)
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    def test_stdout_of_create_is_the_key_alone(self, kube):
        result = self.run("create", "alice", "--rpm", "5", "--admin")
        assert re.fullmatch(r"sk-kubeai-[\w-]{43}\n", result.stdout)
        assert "Secret alice created in the namespace here" in result.stderr
        assert kube.closed
        again = json.loads(self.run("create", "bob", "-o", "json", "-n", "there").stdout)
        assert (again["name"], again["namespace"]) == ("bob", "there")
        assert again["key"].startswith("sk-kubeai-")

    def test_the_list_is_a_table_or_json(self):
        assert self.run("list").stderr.startswith("no keys; create one")
        self.run("create", "alice", "--rpm", "5", "--tenant", "search")
        head, row = self.run("list").stdout.splitlines()
        assert head.split()[:3] == ["NAME", "STATE", "TENANT"]
        assert row.split()[:6] == ["alice", "Active", "search", "all", "5", "-"]
        (listed,) = json.loads(self.run("list", "--output", "json").stdout)
        assert (listed["name"], listed["rpm"], listed["maxInFlight"]) == ("alice", 5, 0)

    def test_problems_are_printed_without_control_characters(self, kube):
        self.run("create", "alice")
        kube.objects["secrets", "alice"]["metadata"]["annotations"]["kubeai.org/rpm"] = "\x1b[2J"
        result = self.run("list")
        assert "\x1b" not in result.stdout + result.stderr
        assert "alice: annotation kubeai.org/rpm" in result.stderr

    def test_several_keys_are_revoked(self, kube):
        self.run("create", "alice")
        self.run("create", "bob")
        assert self.run("revoke", "alice", "bob").stdout == "alice revoked\nbob revoked\n"
        assert kube.objects == {}

    def test_one_that_does_not_exist_keeps_no_other_from_being_revoked(self, kube):
        self.run("create", "alice")
        self.run("create", "bob")
        with pytest.raises(KubeAIError, match=r"'nobody'.*; .*'no-one'"):
            self.run("revoke", "alice", "nobody", "bob", "no-one")
        assert kube.objects == {}

    @pytest.mark.parametrize(
        "arguments", [("--rpm", "0"), ("--priority", "1001"), ("--tpm", "many"), ("--rmp", "1")]
    )
    def test_limits_out_of_range_are_refused(self, kube, arguments):
        assert self.run("create", "alice", *arguments).exit_code == 2
        assert kube.objects == {}


@pytest.mark.parametrize(
    ("present", "environment", "found"),
    [
        (("home", "local"), {"KUBECONFIG": "/x"}, None),
        (("home", "local"), {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),
        (("home", "local"), {}, "home/.kube/config"),
        (("local",), {}, "data/kubeai/kubeconfig"),
    ],
)
def test_which_kubeconfig_is_used(monkeypatch, tmp_path, present, environment, found):
    files = {"home": "home/.kube/config", "local": "data/kubeai/kubeconfig"}
    for name in present:
        (tmp_path / files[name]).parent.mkdir(parents=True)
        (tmp_path / files[name]).touch()
    for name in ("KUBECONFIG", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cluster.find_kubeconfig(None) == (found and str(tmp_path / found))
    assert cluster.find_kubeconfig(tmp_path / "given") == str(tmp_path / "given")


def test_without_a_kubeconfig_the_error_says_what_to_do(monkeypatch, tmp_path):
    for name in ("KUBECONFIG", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "XDG_DATA_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    with pytest.raises(KubeAIError, match="start `kubeai local`, or use --kubeconfig"):
        cluster.find_kubeconfig(None)


def test_clients_take_the_key_from_kubeais_variable_before_openais():
    from kubeai.cli.options import ApiKey
    from kubeai.loadtest.arguments import API_KEY_VARIABLES

    assert API_KEY_VARIABLES == ["KUBEAI_API_KEY", "OPENAI_API_KEY"]
    (given,) = get_args(ApiKey)[1:]
    assert given.envvar == API_KEY_VARIABLES


def test_the_command_has_the_limits_of_the_api():
    from kubeai.api import api_key

    for name in ("LIMIT_MAX", "PRIORITY_MIN", "PRIORITY_MAX"):
        assert getattr(command, name) == getattr(api_key, name)
