"""What a Secret says about its API key, and everything that makes it unusable."""

from __future__ import annotations

import base64
import hashlib
import re
from datetime import UTC, datetime

import msgspec
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from repository import REPOSITORY

from kubeai.api.api_key import (
    ANNOTATIONS,
    ENTRY_KEY,
    ENTRY_SHA256,
    KEY_MAX_BYTES,
    LIMIT_MAX,
    PRIORITY_MAX,
    PRIORITY_MIN,
    TENANT_MAX_CHARS,
    ApiKey,
    ApiKeyError,
    KeySecret,
    age,
    read_key,
    time_text,
)
from kubeai.api.objects import ObjectMeta

KEY = "sk-kubeai-0123456789abcdefghijklmnopqrstuvwxyzABCDEF"
DIGEST = hashlib.sha256(KEY.encode()).digest()


def encoded(text: str | bytes) -> str:
    return base64.b64encode(text.encode() if isinstance(text, str) else text).decode()


def secret(data=None, name="alice", **annotations):
    """A Secret; ``max_in_flight="1"`` is the annotation kubeai.org/max-in-flight."""
    return msgspec.convert(
        {
            "metadata": {
                "name": name,
                "labels": {"kubeai.org/api-key": "true"},
                "annotations": {
                    f"kubeai.org/{key.replace('_', '-')}": value
                    for key, value in annotations.items()
                },
            },
            "data": {"api_key": encoded(KEY)} if data is None else data,
        },
        KeySecret,
    )


def problem(*args, **annotations) -> str:
    with pytest.raises(ApiKeyError) as caught:
        read_key(secret(*args, **annotations))
    return str(caught.value)


def test_a_secret_without_annotations_is_a_tenant_of_its_own_without_limits():
    assert read_key(secret()) == ApiKey("alice", DIGEST, "alice")


def test_annotations_are_the_rights_and_limits():
    key = read_key(
        secret(
            tenant="Search & Ads",
            models="team in (search, ads), !internal",
            rpm="600",
            tpm=str(LIMIT_MAX),
            max_in_flight="1",
            priority="-1000",
            expires="2027-01-31T01:00:00+01:00",
            admin="true",
        )
    )
    assert key == ApiKey(
        name="alice",
        digest=DIGEST,
        tenant="Search & Ads",
        models="team in (search, ads), !internal",
        requests_per_minute=600,
        tokens_per_minute=LIMIT_MAX,
        in_flight_max=1,
        priority=PRIORITY_MIN,
        expires_s=datetime(2027, 1, 31, tzinfo=UTC).timestamp(),
        is_admin=True,
    )


@pytest.mark.parametrize(
    "data",
    [
        {"sha256": encoded(DIGEST.hex())},
        {"sha256": encoded(DIGEST.hex().upper() + "\n")},
        {"api_key": encoded(KEY), "sha256": encoded(DIGEST.hex())},
        {"api_key": encoded(KEY), "unrelated": encoded(b"\xff")},
    ],
)
def test_the_key_or_its_sha256_identifies_it(data):
    assert read_key(secret(data)).digest == DIGEST


@pytest.mark.parametrize("length", [1, KEY_MAX_BYTES])
def test_a_key_may_have_every_visible_character(length):
    key = "".join(map(chr, range(0x21, 0x7F)))
    key = (key * 6)[:length]
    assert (
        read_key(secret({"api_key": encoded(key)})).digest == hashlib.sha256(key.encode()).digest()
    )


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({}, "neither the entry api_key nor sha256"),
        ({"api_key": ""}, "neither the entry api_key nor sha256"),
        ({"apikey": encoded(KEY)}, "neither the entry api_key nor sha256"),
        ({"api_key": encoded(KEY + "\n")}, "white space"),
        ({"api_key": encoded(" " + KEY)}, "white space"),
        ({"api_key": encoded("two words")}, "visible ones of ASCII"),
        ({"api_key": encoded("schlüssel")}, "visible ones of ASCII"),
        ({"api_key": encoded(b"\x00" * 32)}, "visible ones of ASCII"),
        ({"api_key": encoded("k" * (KEY_MAX_BYTES + 1))}, "longer than 512 bytes"),
        ({"api_key": "%%%"}, "entry api_key: is not base64"),
        ({"sha256": encoded(DIGEST.hex()[:-1])}, "64 hexadecimal digits"),
        ({"sha256": encoded(DIGEST)}, "64 hexadecimal digits"),
        ({"sha256": encoded(f"{DIGEST.hex()}  -")}, "sha256sum"),
        ({"sha256": encoded(hashlib.sha256(b"").hexdigest())}, "SHA-256 of an empty key"),
        ({"sha256": encoded(hashlib.sha256(b"\n").hexdigest())}, "SHA-256 of an empty key"),
        ({"api_key": encoded("other"), "sha256": encoded(DIGEST.hex())}, "not the SHA-256 of"),
        ({"api_key": None}, "neither"),
    ],
)
def test_a_secret_without_a_valid_entry_has_no_key(data, words):
    assert words in problem(data)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(
            (name, value)
            for name in ("rpm", "tpm", "max_in_flight")
            for value in ("0", "-1", "1.5", "1e3", "", " 1", "1\n", "unlimited", "1_000", "٣",
                          str(LIMIT_MAX + 1), "9" * 100)
        ),
        *(("priority", value) for value in ("1001", "-1001", "high", "", "+1", "1.0")),
        *(
            ("expires", value)
            for value in ("", "never", "2027-01-31", "2027-01-31T00:00:00", "1801353600",
                          "2027-13-01T00:00:00Z", "2027-01-31 00:00:00Z", "1969-12-31T23:59:59Z",
                          "20270131T000000Z", "9999-12-31T23:59:59-05:00")
        ),
        *(("admin", value) for value in ("True", "yes", "1", "")),
        *(("tenant", value) for value in ("", " a", "a ", "a\nb", "a\x00", "a\u202eb",
                                         "t" * (TENANT_MAX_CHARS + 1))),
        *(("models", value) for value in ("", " ", "a=b=c", "a in ()(", "=x", "a=b,", "a;b")),
    ],
)  # fmt: skip
def test_an_invalid_annotation_makes_the_secret_unusable_and_is_named(name, value):
    message = problem(**{name: value})
    assert message.startswith(f"annotation kubeai.org/{name.replace('_', '-')}: ")
    assert len(message) < 1000


@pytest.mark.parametrize(
    ("name", "hint"),
    [("rmp", "kubeai.org/rpm"), ("max_inflight", "kubeai.org/max-in-flight"), ("zzzzzz", "")],
)
def test_an_unknown_annotation_of_kubeai_makes_the_secret_unusable(name, hint):
    message = problem(**{name: "1"})
    assert "is unknown" in message
    assert (f"did you mean {hint}?" in message) == bool(hint)


def test_annotations_of_others_do_not_matter():
    meta = ObjectMeta(name="alice", annotations={"example.com/rpm": "many", "kubeai": "x"})
    read_key(KeySecret(meta, {"api_key": encoded(KEY)}))


def test_an_error_lists_all_problems():
    message = problem({}, rpm="x", models="((", admin="maybe")
    for words in ("neither", "kubeai.org/rpm", "kubeai.org/models", "kubeai.org/admin"):
        assert words in message


@given(st.binary(max_size=600))
def test_no_error_contains_the_key(raw):
    """Nor does what is read of it: only its digest."""
    held = secret({"api_key": base64.b64encode(raw).decode()})
    try:
        shown = repr(read_key(held))
    except ApiKeyError as error:
        shown = str(error)
    if len(raw) > 6:  # shorter ones may occur by chance
        assert repr(raw)[2:-1] not in shown


def test_only_the_first_unknown_annotations_are_reported():
    with pytest.raises(ApiKeyError) as caught:
        read_key(secret(**{f"none{number}": "" for number in range(1000)}))
    assert str(caught.value).count("is unknown") == 10


@given(st.dictionaries(st.sampled_from(ANNOTATIONS), st.text(max_size=40)))
def test_any_annotations_give_a_key_or_an_error(annotations):
    meta = ObjectMeta(name="alice", annotations=annotations)
    try:
        key = read_key(KeySecret(meta, {"api_key": encoded(KEY)}))
    except ApiKeyError:
        return
    limits = key.requests_per_minute, key.tokens_per_minute, key.in_flight_max
    assert all(0 <= limit <= LIMIT_MAX for limit in limits)
    assert PRIORITY_MIN <= key.priority <= PRIORITY_MAX


def test_times_are_written_as_they_are_read():
    assert time_text(read_key(secret(expires="2027-01-31T02:00:00+02:00")).expires_s) == (
        "2027-01-31T00:00:00Z"
    )


def test_the_older_of_two_secrets_sorts_first_and_names_decide_between_equals():
    metas = [
        ObjectMeta(name="c", creation_timestamp=datetime(2026, 1, 2, tzinfo=UTC)),
        ObjectMeta(name="b", creation_timestamp=datetime(2026, 1, 1, tzinfo=UTC)),
        ObjectMeta(name="a", creation_timestamp=datetime(2026, 1, 2, tzinfo=UTC)),
    ]
    assert [meta.name for meta in sorted(metas, key=age)] == ["b", "a", "c"]


# -- docs/reference/keys.md ---------------------------------------------------------------------

DOCS = (REPOSITORY / "docs/reference/keys.md").read_text()


def test_the_docs_list_every_annotation_and_entry():
    rows = re.findall(r"^\| `([^`]+)` \|", DOCS, re.MULTILINE)
    assert [row for row in rows if row.startswith("kubeai.org/")] == list(ANNOTATIONS)
    assert {ENTRY_KEY, ENTRY_SHA256} <= set(rows)


def test_the_secret_in_the_docs_has_a_key():
    (block,) = re.findall(r"```yaml\n(apiVersion: v1\nkind: Secret.*?)```", DOCS, re.DOTALL)
    manifest = yaml.safe_load(block)
    text = manifest.pop("stringData")
    manifest["data"] = {name: encoded(value) for name, value in text.items()}
    key = read_key(msgspec.convert(manifest, KeySecret))
    assert (key.tenant, key.requests_per_minute, key.priority) == ("search", 600, 10)
