"""Validation rules: CEL expressions, and what they report."""

from __future__ import annotations

from typing import Any

import pytest

from kubeai.local.apiserver.schema.rules import Rules
from kubeai.local.apiserver.schema.structural import Schema

META = {"name": "x"}


def broken(rule: str | dict, value: object, old: object = None, **schema: Any) -> list[str]:
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
def test_a_validation_rule_accepts_good_values_and_rejects_bad_ones(
    rule: str, good: object, bad: object
):
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


def test_lists_below_a_field_that_preserves_unknown_fields_keep_theirs():
    item = {"type": "object", "properties": {"a": {"type": "object"}}}
    any_value = {"x-kubernetes-preserve-unknown-fields": True}
    properties = {
        "any": any_value,
        "listed": {**any_value, "items": item},
        "plain": {"items": item},
    }
    schema = Schema({"type": "object", "properties": properties})
    obj = {
        "any": [[{"b": 1}], {"c": 2}],
        "listed": [{"a": {"b": 1}, "c": 2}],
        "plain": [{"a": {"b": 1}, "c": 2}],
    }
    assert len(schema.prune(obj)) == 3
    assert obj == {
        "any": [[{"b": 1}], {"c": 2}],
        "listed": [{"a": {}, "c": 2}],
        "plain": [{"a": {}}],
    }
