"""Manifests on the command line: what is wrong is named with its place; apply is three-way."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kubeai.errors import KubeAIError
from kubeai.local.manifests import merge_patch, read_manifests

MODEL = "apiVersion: kubeai.org/v1\nkind: Model\nmetadata: {name: a}\n"


def test_a_folder_is_read_in_order_and_empty_documents_are_skipped(tmp_path):
    (tmp_path / "b.yaml").write_text(MODEL.replace("name: a", "name: b"))
    (tmp_path / "a.yml").write_text(f"---\n---\n{MODEL}---\n")
    (tmp_path / "notes.txt").write_text("not a manifest")
    assert [m.name for m in read_manifests([tmp_path])] == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("a: [", ":1:"),
        ("- a", "a manifest is a mapping"),
        ("kind: Model\nmetadata: {name: a}", "apiVersion"),
        ("apiVersion: kubeai.org/v1\nmetadata: {name: a}", "kind"),
        ("apiVersion: kubeai.org/v1\nkind: Model", "metadata.name"),
        ("apiVersion: kubeai.org/v1\nkind: Model\nmetadata: {name: 3}", "metadata.name"),
        ("apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: a}", "apps/v1/Deployment"),
        (f"{MODEL}---\nkind: Model", "document 2"),
    ],
)
def test_a_wrong_manifest_is_named_with_its_place(tmp_path, text, named):
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    with pytest.raises(KubeAIError) as error:
        read_manifests([file])
    assert str(file) in str(error.value)
    assert named in str(error.value)


def test_a_missing_path_and_an_empty_folder_are_errors(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(KubeAIError, match=str(path)):
            read_manifests([path])


VALUES = st.recursive(
    st.integers(0, 3) | st.text("ab", max_size=1),
    lambda inner: st.dictionaries(st.sampled_from("abcd"), inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.sampled_from("abcd"), VALUES, max_size=4)


def merged(live, patch):
    """RFC 7396."""
    if not isinstance(patch, dict):
        return patch
    result = dict(live) if isinstance(live, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merged(result.get(key), value)
    return result


@given(OBJECTS, OBJECTS)
def test_applying_again_changes_nothing(live, wanted):
    once = merged(live, merge_patch({}, live, wanted))
    assert merge_patch(wanted, once, wanted) == {}


@given(OBJECTS, OBJECTS)
def test_an_object_that_only_apply_wrote_becomes_what_is_wanted(last, wanted):
    assert merged(last, merge_patch(last, last, wanted)) == wanted


def test_what_others_set_stays():
    patch = merge_patch({"a": 1, "b": 1}, {"a": 1, "b": 1, "theirs": 2}, {"a": 2})
    assert patch == {"a": 2, "b": None}
