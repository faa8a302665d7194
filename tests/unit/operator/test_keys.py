"""Which Secrets have an API key: duplicates, deletions, Events, and what is kept in memory."""

from __future__ import annotations

import asyncio
import base64
import copy
import gc
import logging

import msgspec
import pytest
from fakes.kube import FakeKube
from fakes.time import FAKE_TIME
from hypothesis import given
from hypothesis import strategies as st

from kubeai.api.api_key import KeySecret
from kubeai.kube.decoding import decode_leniently
from kubeai.kube.resources import PODS, SECRETS
from kubeai.operator.keys import DUPLICATE, UNUSABLE, KeyWatch

KEY = "sk-kubeai-abcdefghijklmnopqrstuvwxyz0123456789"


def manifest(name="alice", key=KEY, created=0, uid="", **annotations):
    return {
        "metadata": {
            "name": name,
            "namespace": "default",
            "uid": uid or f"uid-{name}",
            "creationTimestamp": f"2026-01-01T00:{created:02}:00Z",
            "labels": {"kubeai.org/api-key": "true"},
            "annotations": {f"kubeai.org/{name}": value for name, value in annotations.items()},
        },
        "data": {"api_key": base64.b64encode(key.encode()).decode()},
    }


def secret(*args, **fields):
    return msgspec.convert(manifest(*args, **fields), KeySecret)


class Published:
    """The keys as workers would have them, and the order in which they changed."""

    def __init__(self):
        self.keys = {}
        self.log = []
        self.events = []

    def publish(self, name, key):
        self.log.append((name, key is not None))
        if key is None:
            del self.keys[name]
        else:
            self.keys[name] = key
        digests = [each.digest for each in self.keys.values()]
        assert len(set(digests)) == len(digests), "two keys have the same digest"

    def emit(self, subject, reason, message, *, warning):
        assert warning
        self.events.append((subject.metadata.name, reason, message))


@pytest.fixture
def world():
    return Published()


@pytest.fixture
def keys(world):
    keys = KeyWatch(world.publish, world.emit)
    keys.replace([])
    return keys


def test_a_secret_has_a_key_until_it_is_deleted(keys, world):
    keys.changed("ADDED", secret(rpm="5"))
    assert world.keys["alice"].requests_per_minute == 5
    keys.changed("MODIFIED", secret(rpm="6"))
    assert world.keys["alice"].requests_per_minute == 6
    keys.changed("MODIFIED", secret(rpm="6"))
    keys.changed("DELETED", secret())
    assert world.log == [("alice", True), ("alice", True), ("alice", False)]
    assert world.events == []


def test_a_secret_that_is_being_deleted_has_no_key(keys, world):
    keys.changed("ADDED", secret())
    going = manifest()
    going["metadata"] |= {"deletionTimestamp": "2026-01-02T00:00:00Z", "finalizers": ["x/y"]}
    keys.changed("MODIFIED", msgspec.convert(going, KeySecret))
    assert world.keys == {}
    assert world.events == []


def test_an_edit_that_makes_a_secret_unusable_revokes_its_key_and_is_reported_once(keys, world):
    keys.changed("ADDED", secret())
    for _ in range(3):
        keys.changed("MODIFIED", secret(rpm="many"))
    assert world.keys == {}
    ((name, reason, message),) = world.events
    assert (name, reason) == ("alice", UNUSABLE)
    assert "kubeai.org/rpm" in message
    keys.changed("MODIFIED", secret(rpm="5"))
    assert world.keys["alice"].requests_per_minute == 5


@pytest.mark.timeout(30)  # in cubic time, it takes minutes
def test_a_thousand_secrets_with_one_key_are_read_in_quadratic_time(keys, world):
    keys.replace([secret(f"s{number}", created=number % 60) for number in range(1000)])
    assert list(world.keys) == ["s0"]


def test_of_two_secrets_with_one_key_the_older_has_it(keys, world):
    keys.changed("ADDED", secret("young", created=5))
    assert set(world.keys) == {"young"}
    keys.changed("ADDED", secret("old", created=1))
    assert set(world.keys) == {"old"}
    assert world.log[1:] == [("young", False), ("old", True)]
    assert world.events == [
        ("young", DUPLICATE, "the Secret old, which is older, has the same key")
    ]
    keys.changed("DELETED", secret("old", created=1))
    assert set(world.keys) == {"young"}


def test_a_duplicate_takes_over_when_the_older_secret_gets_another_key(keys, world):
    keys.changed("ADDED", secret("old", created=1))
    keys.changed("ADDED", secret("young", created=5))
    keys.changed("MODIFIED", secret("old", KEY + "2", created=1))
    assert set(world.keys) == {"old", "young"}
    keys.changed("MODIFIED", secret("old", created=1))  # takes it back
    assert set(world.keys) == {"old"}


def test_a_duplicate_takes_over_when_the_older_secret_becomes_unusable(keys, world):
    keys.changed("ADDED", secret("old", created=1))
    keys.changed("ADDED", secret("young", created=5))
    keys.changed("MODIFIED", secret("old", created=1, admin="x"))
    assert set(world.keys) == {"young"}


def test_a_secret_that_was_deleted_and_created_again_is_another_key(keys, world):
    keys.changed("ADDED", secret(uid="first"))
    keys.replace([secret(uid="second")])  # both events were missed
    assert world.log == [("alice", True), ("alice", False), ("alice", True)]


def test_a_new_list_removes_what_is_gone_and_keeps_the_rest(keys, world):
    keys.replace([secret("a", "k1"), secret("b", "k2")])
    keys.replace([secret("b", "k2"), secret("c", "k3")])
    assert set(world.keys) == {"b", "c"}
    assert world.log.count(("b", True)) == 1


def test_a_list_of_versions_that_are_known_changes_nothing(keys, world):
    def at(version, *args, **fields):
        given = manifest(*args, **fields)
        given["metadata"]["resourceVersion"] = version
        return msgspec.convert(given, KeySecret)

    keys.changed("ADDED", at("5", rpm="1"))
    keys.replace([at("5", rpm="1")])
    assert world.log == [("alice", True)]
    keys.replace([at("6", rpm="2")])
    assert world.keys["alice"].requests_per_minute == 2
    keys.replace([at("6", rpm="2", uid="another")])
    assert world.log[2:] == [("alice", False), ("alice", True)]


def test_a_new_leader_reports_what_is_unusable(keys, world):
    keys.changed("ADDED", secret(rpm="x"))
    keys.changed("ADDED", secret("b", "k2", tpm="y"))
    keys.changed("DELETED", secret("b", "k2", tpm="y"))
    world.events.clear()
    keys.report()
    assert [(name, reason) for name, reason, _ in world.events] == [("alice", UNUSABLE)]


SECRETS_OF = st.builds(
    secret,
    st.sampled_from("abcd"),
    st.sampled_from(["k1", "k2", "k3"]),
    st.integers(0, 3),
    st.sampled_from(["u1", "u2"]),
    rpm=st.sampled_from(["1", "2", "x"]),
)


@given(
    st.lists(st.one_of(
        st.tuples(st.sampled_from(["MODIFIED", "DELETED"]), SECRETS_OF),
        st.tuples(st.just("LIST"), st.lists(SECRETS_OF, max_size=4)),
    ), max_size=30)
)  # fmt: skip
def test_after_any_history_each_digest_belongs_to_its_oldest_valid_secret(history):
    world = Published()
    keys = KeyWatch(world.publish, world.emit)
    secrets = {}
    for kind, what in history:
        if kind == "LIST":
            secrets = {each.metadata.name: each for each in what}
            keys.replace(secrets.values())
        else:
            keys.changed(kind, what)
            secrets[what.metadata.name] = what
            if kind == "DELETED":
                del secrets[what.metadata.name]
    valid = [s for s in secrets.values() if s.metadata.annotations["kubeai.org/rpm"] != "x"]
    oldest = {}
    for each in sorted(valid, key=lambda s: (s.metadata.creation_timestamp, s.metadata.name)):
        oldest.setdefault(each.data["api_key"], each.metadata.name)
    assert set(world.keys) == set(oldest.values())
    for name, key in world.keys.items():
        assert str(key.requests_per_minute) == secrets[name].metadata.annotations["kubeai.org/rpm"]


def test_neither_keys_nor_annotations_are_kept(keys, world):
    marker = "sk-kubeai-marker-" + "m" * 20
    given = manifest(key=marker)
    given["metadata"]["annotations"]["kubectl.kubernetes.io/last-applied-configuration"] = marker
    keys.changed("ADDED", msgspec.convert(copy.deepcopy(given), KeySecret))
    assert set(world.keys) == {"alice"}
    seen, waiting = set(), [keys, world]
    while waiting:
        each = waiting.pop()
        if id(each) in seen or isinstance(each, type):
            continue
        seen.add(id(each))
        if isinstance(each, str | bytes):
            text = each if isinstance(each, str) else each.decode("latin-1")
            assert marker not in text
            assert base64.b64encode(marker.encode()).decode() not in text
        elif isinstance(each, dict | list | set | tuple | KeyWatch | Published | msgspec.Struct):
            waiting += gc.get_referents(each)


def test_a_secret_that_cannot_be_decoded_is_not_logged(capsys, caplog):
    raw = msgspec.json.encode(manifest() | {"kind": 5})
    with caplog.at_level(logging.DEBUG):
        assert decode_leniently(SECRETS, msgspec.Raw(raw), KeySecret) is None
        assert decode_leniently(PODS, msgspec.Raw(raw), KeySecret) is None
    shown = capsys.readouterr()
    lines = [line for line in (shown.err + shown.out).splitlines() if "object skipped" in line]
    assert len(lines) == 2
    assert [("alice" in line) for line in lines] == [False, True]


class TestWatch:
    pytestmark = FAKE_TIME

    async def test_changes_arrive_and_the_list_is_announced(self):
        kube, world, listed = FakeKube(), Published(), []
        await kube.create(SECRETS, manifest())
        keys = KeyWatch(world.publish, world.emit, lambda: listed.append(True))
        task = asyncio.create_task(keys.run(kube, "default"))
        try:
            await asyncio.sleep(1)
            assert (keys.listed, listed) == (True, [True])
            await kube.create(SECRETS, manifest("bob", "k2"))
            assert set(world.keys) == {"alice", "bob"}
            await kube.delete(SECRETS, "alice")
            assert set(world.keys) == {"bob"}
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def test_without_the_permission_keys_are_not_listed(self, capsys):
        kube, world = FakeKube(), Published()
        kube.missing.add("secrets")
        keys = KeyWatch(world.publish, world.emit)
        task = asyncio.create_task(keys.run(kube, "default"))
        try:
            await asyncio.sleep(10)
            assert not keys.listed
            kube.missing.clear()
            await asyncio.sleep(2)
            assert keys.listed
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
