"""Request bodies of the embedded API."""

from __future__ import annotations

import orjson
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from kubeai.api.kubernetes_yaml import DEPTH_MAX
from kubeai.local.apiserver.http.bodies import read_json, read_yaml

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.text(st.characters(codec="utf-8")),
    lambda below: (
        st.lists(below, max_size=3) | st.dictionaries(st.text("ab:{é"), below, max_size=3)
    ),
    max_leaves=10,
)


@settings(deadline=None)
@given(values)
def test_json_and_yaml_decode_alike(value: object):
    raw = orjson.dumps(value)
    assert read_json(raw, duplicates=True) == read_yaml(raw) == (value, [])


@pytest.mark.parametrize(
    ("raw", "value"),
    [
        ("a: 2026-01-01", {"a": "2026-01-01"}),
        ("a: 2026-01-01T00:00:00Z", {"a": "2026-01-01T00:00:00Z"}),
        ("2: a\ntrue: b", {"2": "a", "true": "b"}),
        ("a: |\n  one\n  two\n", {"a": "one\ntwo\n"}),
        ("# nothing", None),
    ],
)
def test_yaml_is_read_with_json_types(raw: str, value: object):
    assert read_yaml(raw.encode()) == (value, [])


def test_duplicate_keys_are_reported_with_their_path():
    raw = b'{"a":{"b":1,"b":2},"c":[{"d":1,"d":1,"d":1}],"a":{"b":3,"e":4}}'
    assert read_json(raw, duplicates=True)[1] == ["a.b", "c[0].d", "a"]
    assert read_json(raw) == ({"a": {"b": 3, "e": 4}, "c": [{"d": 1}]}, [])
    block = b"a: {b: 1, b: 2}\nc:\n- d: 1\n  d: 2\na: 3\n"
    assert read_yaml(block) == ({"a": 3, "c": [{"d": 2}]}, ["a.b", "c[0].d", "a"])


@pytest.mark.parametrize(
    "raw",
    [
        b"a: [",
        b"a: &x 1\nb: *x",
        b"a: &x [1]\nb: {<<: *x}",
        b"a: !!binary aGk=",
        b"!!python/object/apply:os.getpid []",
        b"a: 1\n---\na: 2",
        b"\xff\xfe\x00",
        b"? [1]\n: 2",
        *(opening * (DEPTH_MAX + 1) for opening in (b"[", b"- ", b"{a: ", b"? ")),
        b"[" * 200_000,
        b"- " * 200_000,
        b'{"a":' * 200_000,
    ],
    ids=lambda raw: raw[:12].decode(errors="replace"),
)
def test_yaml_that_json_cannot_express_is_rejected(raw: bytes):
    with pytest.raises(ValueError, match=r"."):
        read_yaml(raw)


def test_json_nested_too_deeply_is_rejected():
    for depth in (1000, 100_000):
        raw = b'{"a":' * depth + b"1" + b"}" * depth
        with pytest.raises(ValueError, match=r"."):
            read_json(raw, duplicates=True)


def test_yaml_within_the_depth_limit_is_read():
    raw = b"- " * (DEPTH_MAX - 1) + b"1"
    assert yaml.safe_load(raw) == read_yaml(raw)[0]
