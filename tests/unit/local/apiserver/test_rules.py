"""Validation rules, selectors, paths and printing of the embedded API: the pure parts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kubeai.local.apiserver.apply import patch
from kubeai.local.apiserver.errors import StatusError
from kubeai.local.apiserver.http import protobuf
from kubeai.local.apiserver.kinds import printing
from kubeai.local.apiserver.schema.rules import Rules
from kubeai.local.apiserver.schema.structural import Schema
from kubeai.local.apiserver.storage import selectors

META = {"name": "x"}


def broken(rule: str | dict, value: object, old: object = None, **schema: object) -> list[str]:
    """The error messages of a rule on ``spec``."""
    rule = {"rule": rule, "message": "broken"} if isinstance(rule, str) else rule
    root = {
        "type": "object",
        "properties": {"spec": {**schema, "x-kubernetes-validations": [rule]}},
    }
    rules = Rules(root)
    assert rules.mistakes == []
    before = None if old is None else {"metadata": META, "spec": old}
    return [cause.message for cause in rules.check({"metadata": META, "spec": value}, before)]


@pytest.mark.parametrize(
    ("rule", "good", "bad"),
    [
        ("self.startsWith('hf://') || self.startsWith('s3://')", "s3://a", "gs://a"),
        ("self.matches('^[a-z]+$')", "abc", "a1"),
        ("self.lowerAscii() == self && self.size() <= 3", "abc", "Abc"),
        ("self.split('/').size() == 2", "a/b", "a"),
        ("self.substring(1, 2) == 'b' && self.indexOf('c') == 2", "abc", "acb"),
        ("self.replace('a', 'b').trim() == 'bb'", " ab ", " aa c"),
        ("self.find('[0-9]+') == '12'", "a12b", "a1b"),
        ("self.all(x, x > 1) && self.isSorted() && self.sum() < 10", [2, 3], [3, 2]),
        ("self.exists_one(x, x == 1)", [1, 2], [1, 1]),
        ("self.map(x, x * 2).exists(x, x == 4)", [2], [3]),
        ("self.filter(x, x.size() > 1).size() == 1", ["a", "bb"], ["a"]),
        ("!has(self.max) || self.min <= self.max", {"min": 1}, {"min": 3, "max": 2}),
        ("self.all(k, self[k].startsWith('v'))", {"a": "v1"}, {"a": "x"}),
        ("size(self) in [1, 2] ? true : false", [1], []),
        ("self.join('-') == 'a-b'", ["a", "b"], ["a"]),
    ],
)
def test_validation_rules(rule: str, good: object, bad: object):
    assert broken(rule, good) == []
    assert len(broken(rule, bad)) == 1


def test_a_rule_that_cannot_be_evaluated_fails_validation():
    (message,) = broken("self.none > 1", {}, type="object")
    assert message == 'Invalid value: "object": no such key: none evaluating rule: broken'


def test_properties_with_reserved_names_are_escaped():
    properties = {"namespace": {"type": "string"}, "a-b": {"type": "string"}}
    rule = "self.__namespace__ == 'x' && self.a__dash__b == 'y'"
    assert broken(rule, {"namespace": "x", "a-b": "y"}, properties=properties) == []
    assert broken(rule, {"namespace": "x", "a-b": "z"}, properties=properties)


def test_optional_old_self_is_available_on_creation():
    rule = {"rule": "!oldSelf.hasValue() || oldSelf.value() == self", "optionalOldSelf": True}
    assert broken(rule, "a") == []
    assert broken(rule, "a", "a") == []
    assert broken(rule, "a", "b")


def test_transition_rules_are_skipped_without_an_old_object():
    assert broken("self == oldSelf", "a") == []
    assert broken("self == oldSelf", "a", "b") == ['Invalid value: "a": broken']


@pytest.mark.parametrize("rule", ["self.(x", "self.?x.orValue(1) == 1", "quantity(self) > 1", ""])
def test_unusable_rules_are_reported(rule: str):
    root = {"type": "object", "x-kubernetes-validations": [{"rule": rule}]}
    (mistake,) = Schema(root).mistakes
    assert mistake.field == ".x-kubernetes-validations[0].rule"
    assert "compilation failed" in mistake.message


def test_a_schema_with_a_bad_pattern_is_rejected():
    with pytest.raises(ValueError, match=r"pattern|regex"):
        Schema({"type": "object", "properties": {"a": {"type": "string", "pattern": "("}}})


# Selectors.


@pytest.mark.parametrize(
    "text", ["a in b", "a in (b", "=a", "a=b c", "a,,b", "a=b,", "!a=b", "a>x", "a in (b c)", "$"]
)
def test_bad_label_selectors_are_rejected(text: str):
    with pytest.raises(StatusError) as refused:
        selectors.labels(text)
    assert refused.value.code == 400


@given(st.dictionaries(st.sampled_from("abc"), st.sampled_from("xyz")), st.sampled_from("abc"),
       st.sampled_from("xyz"))  # fmt: skip
def test_opposite_selectors_partition_all_objects(found: dict[str, str], key: str, value: str):
    for one, other in (
        (f"{key}={value}", f"{key}!={value}"),
        (f"{key} in ({value})", f"{key} notin ({value})"),
        (key, f"!{key}"),
    ):
        assert selectors.labels(one)(found) is not selectors.labels(other)(found)


@given(st.text(max_size=30))
def test_arbitrary_selectors_do_not_crash(text: str):
    for read in (selectors.labels, lambda t: selectors.fields(t, ("metadata.name",))):
        try:
            read(text)
        except StatusError as error:
            assert error.code == 400  # noqa: PT017


# Patches.

_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3)
    ),
    max_leaves=8,
)
_objects = st.dictionaries(st.sampled_from("abc"), _values, max_size=3)


def _without_nulls(value: object) -> object:
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return value


@given(_objects, _objects)
def test_a_merge_patch_is_idempotent_and_does_not_modify_its_target(target: dict, change: dict):
    before = repr(target)
    once = patch.merge(target, change)
    assert patch.merge(once, change) == once
    assert repr(target) == before
    assert patch.merge({}, _without_nulls(change)) == _without_nulls(change)


@pytest.mark.parametrize(
    ("live", "change", "expected"),
    [
        ("abc", {"$setElementOrder/l": ["c", "a"], "l": ["c"]}, "bca"),
        ("ab", {"l": ["c"]}, "cab"),
        ("abc", {"l": [{"n": "b", "$patch": "delete"}]}, "ac"),
        ("abc", {"l": [{"$patch": "replace"}, {"n": "z"}]}, "z"),
        ("ab", {"$setElementOrder/l": ["b", "a"]}, "ba"),
        ("ab", {"l": None}, ""),
    ],
)
def test_lists_are_merged_by_key(live: str, change: dict, expected: str):
    schema = Schema(
        {
            "type": "object",
            "properties": {
                "l": {
                    "type": "array",
                    "x-kubernetes-patch-strategy": "merge",
                    "x-kubernetes-patch-merge-key": "n",
                    "items": {"type": "object", "properties": {"n": {"type": "string"}}},
                }
            },
        }
    )
    change = {
        k: [{"n": i} if isinstance(i, str) else i for i in v] if v else v
        for k, v in change.items()
    }  # fmt: skip
    merged = patch.strategic({"l": [{"n": name} for name in live]}, change, schema)
    assert "".join(item["n"] for item in merged.get("l", [])) == expected


# Protobuf.


def _field(number: int, value: bytes) -> bytes:
    return bytes([number << 3 | 2, len(value)]) + value


def _sent(kind: str, raw: bytes) -> bytes:
    meta = _field(1, b"v1") + _field(2, kind.encode())
    return b"k8s\x00" + _field(1, meta) + _field(2, raw)


def test_protobuf_decodes_to_the_same_object_as_json():
    metadata = _field(1, b"s") + _field(2, b"") + _field(8, b"")
    entry = _field(1, b"token") + _field(2, b"abc")
    raw = _field(1, metadata) + _field(2, entry) + _field(3, b"Opaque")
    assert protobuf.decode(_sent("Secret", raw)) == {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "s"},
        "data": {"token": "YWJj"},
        "type": "Opaque",
    }


@given(st.binary(max_size=60), st.sampled_from(["Secret", "Pod", "Nothing"]))
def test_broken_protobuf_is_a_bad_request(raw: bytes, kind: str):
    for body in (raw, _sent(kind, raw)):
        try:
            protobuf.decode(body)
        except StatusError as error:
            assert error.code == 400  # noqa: PT017


# Printing.


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0, "0s"), (119, "119s"), (120, "2m"), (125, "2m5s"), (600, "10m"), (3 * 3600, "3h"),
        (3 * 3600 + 300, "3h5m"), (47 * 3600, "47h"), (49 * 3600, "2d1h"), (9 * 86400, "9d"),
        (800 * 86400, "2y70d"), (-10, "<invalid>"),
    ],
)  # fmt: skip
def test_ages_are_printed_like_kubectl(seconds: int, expected: str):
    assert printing.human_duration(seconds) == expected


def _pod(status: dict, **metadata: object) -> dict:
    return {"metadata": {"name": "p", **metadata}, "spec": {"containers": []}, "status": status}


def _container(ready: bool = False, **state: object) -> dict:
    return {"name": "c", "ready": ready, "restartCount": 0, "state": state}


@pytest.mark.parametrize(
    ("pod", "expected"),
    [
        (_pod({"phase": "Pending"}), "Pending"),
        (
            _pod({"phase": "Running", "containerStatuses": [_container(True, running={})]}),
            "Running",
        ),
        (
            _pod({"phase": "Running",
                  "containerStatuses": [_container(waiting={"reason": "CrashLoopBackOff"})]}),
            "CrashLoopBackOff",
        ),
        (
            _pod({"phase": "Failed",
                  "containerStatuses": [_container(terminated={"reason": "OOMKilled"})]}),
            "OOMKilled",
        ),
        (_pod({"containerStatuses": [_container(terminated={"exitCode": 3})]}), "ExitCode:3"),
        (_pod({"containerStatuses": [_container(terminated={"signal": 9})]}), "Signal:9"),
        (_pod({"phase": "Running"}, deletionTimestamp="2026-01-01T00:00:00Z"), "Terminating"),
        (_pod({"phase": "Pending", "initContainerStatuses": [_container(running={})]}),
         "Init:0/1"),
        (_pod({"phase": "Failed", "reason": "Evicted"}), "Evicted"),
    ],
)  # fmt: skip
def test_the_status_column_of_pods(pod: dict, expected: str):
    assert printing.pod_status(pod) == expected


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (".a.b", [1]),
        ("{.a.b}", [1]),
        (".a['b']", [1]),
        (".l[0].n", ["x"]),
        (".l[-1].n", ["y"]),
        (".l[*].n", ["x", "y"]),
        ('.l[?(@.n=="y")].v', [2]),
        (r".d\.e", [3]),
        (".none.b", []),
    ],
)
def test_paths_are_parsed(path: str, expected: list):
    obj = {"a": {"b": 1}, "l": [{"n": "x", "v": 1}, {"n": "y", "v": 2}], "d.e": 3}
    assert printing.find(printing.parse_path(path), obj) == expected
