"""Manifests on the command line: errors are reported with their position; apply is three-way."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from repository import REPOSITORY

from kubeai.errors import KubeAIError
from kubeai.local.manifests import PROBLEMS_MAX, merge_patch, read_manifests

EXAMPLES = REPOSITORY / "examples"

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
        ("- a", "must be a mapping"),
        ("kind: Model\nmetadata: {name: a}", "apiVersion"),
        ("apiVersion: kubeai.org/v1\nmetadata: {name: a}", "kind"),
        ("apiVersion: kubeai.org/v1\nkind: Model", "metadata.name"),
        ("apiVersion: kubeai.org/v1\nkind: Model\nmetadata: {name: 3}", "metadata.name"),
        ("apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: a}", "apps/v1/Deployment"),
        (f"{MODEL}---\nkind: Model", "document 2"),
    ],
)
def test_an_invalid_manifest_is_reported_with_its_position(tmp_path, text, named):
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    with pytest.raises(KubeAIError) as error:
        read_manifests([file])
    assert str(file) in str(error.value)
    assert named in str(error.value)


SPEC = "spec:\n  url: hf://a/b\n  engine: VLLM\n  features: [TextGeneration]\n"
JOB = """\
apiVersion: batch/v1
kind: Job
metadata: {name: j}
spec:
  template:
    metadata: {labls: {a: b}}
    spec:
      restartPolicy: Never
      containers: [{name: c, image: i, comand: [ls]}]
"""


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (
            f"{MODEL}{SPEC}  minReplica: 1\n",
            ['unknown field "spec.minReplica", did you mean "spec.minReplicas"?'],
        ),
        (f"{MODEL}{SPEC}  zzz: 1\n", ['unknown field "spec.zzz"']),
        (f"{MODEL}spce: {{}}\n", ['unknown field "spce", did you mean "spec"?']),
        (
            f"{MODEL}{SPEC}  files: [{{path: /a, contents: b}}]\n",
            ['unknown field "spec.files[0].contents", did you mean "spec.files[0].content"?'],
        ),
        (
            MODEL.replace("{name: a}", "{name: a, lables: {}}"),
            ['unknown field "metadata.lables", did you mean "metadata.labels"?'],
        ),
        (
            f"{MODEL}{SPEC}  minReplicas: 1\n  minReplicas: 2\n",
            ['duplicate field "spec.minReplicas" (again on line 9)'],
        ),
        (
            JOB,
            [
                'unknown field "spec.template.metadata.labls", did you mean '
                '"spec.template.metadata.labels"?',
                'unknown field "spec.template.spec.containers[0].comand", did you mean '
                '"spec.template.spec.containers[0].command"?',
            ],
        ),
        *(
            (
                f"apiVersion: v1\nkind: {kind}\nmetadata: {{name: a}}\n{field}: {{}}\n",
                [f'{kind} a: unknown field "{field}"'],
            )
            for kind, field in (
                ("ConfigMap", "dat"),
                ("Secret", "stringdata"),
                ("PersistentVolumeClaim", "specs"),
                ("Namespace", "spek"),
            )
        ),
    ],
)
def test_unknown_and_duplicate_fields_are_errors(tmp_path, text, named):
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    with pytest.raises(KubeAIError) as error:
        read_manifests([file])
    for words in named:
        assert f"{file}: " in str(error.value)
        assert words in str(error.value)


def test_every_invalid_field_of_every_file_is_reported_at_once(tmp_path):
    (tmp_path / "a.yaml").write_text(f"{MODEL}{SPEC}---\n{MODEL}{SPEC}  replicaz: 1\n")
    (tmp_path / "b.json").write_text(
        '{"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "c"}, "dta": {}}'
    )
    with pytest.raises(KubeAIError) as error:
        read_manifests([tmp_path])
    first, second = str(error.value).splitlines()
    assert first.startswith(f"{tmp_path}/a.yaml (document 2): Model a: ")
    assert '"spec.replicaz"' in first
    assert f"{tmp_path}/b.json: ConfigMap c: " in second


def test_the_number_of_reported_fields_is_limited(tmp_path):
    (tmp_path / "a.yaml").write_text(MODEL + "".join(f"x{n}: 1\n" for n in range(100)))
    with pytest.raises(KubeAIError) as error:
        read_manifests([tmp_path])
    lines = str(error.value).splitlines()
    assert len(lines) == PROBLEMS_MAX + 1
    assert f"{100 - PROBLEMS_MAX} more" in lines[-1]


def test_a_valid_manifest_is_read_unchanged(tmp_path):
    text = MODEL + SPEC + "  env: {A: b}\nstatus: {}\n"
    (tmp_path / "a.yaml").write_text(text)
    (manifest,) = read_manifests([tmp_path])
    assert manifest.object == yaml.safe_load(text)


def test_a_date_is_read_as_a_string(tmp_path):
    (tmp_path / "a.yaml").write_text(
        MODEL.replace("{name: a}", "{name: a, labels: {since: 2026-01-01}}")
    )
    (manifest,) = read_manifests([tmp_path])
    assert manifest.object["metadata"]["labels"] == {"since": "2026-01-01"}


def test_a_value_that_json_cannot_hold_is_an_error(tmp_path):
    (tmp_path / "a.yaml").write_text(f"{MODEL}{SPEC}  env: {{A: !!binary aGk=}}\n")
    with pytest.raises(KubeAIError, match=r"a\.yaml"):
        read_manifests([tmp_path])


@pytest.mark.parametrize("folder", sorted({p.parent for p in EXAMPLES.rglob("*.yaml")}))
def test_the_examples_have_no_unknown_fields(folder):
    for file in folder.glob("*.yaml"):
        if "kind: Model" in file.read_text():
            assert read_manifests([file])


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
    """JSON merge patch, RFC 7396."""
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
def test_apply_is_idempotent(live, wanted):
    once = merged(live, merge_patch({}, live, wanted))
    assert merge_patch(wanted, once, wanted) == {}


@given(OBJECTS, OBJECTS)
def test_an_object_written_only_by_apply_becomes_the_manifest(last, wanted):
    assert merged(last, merge_patch(last, last, wanted)) == wanted


def test_fields_set_by_others_are_kept():
    patch = merge_patch({"a": 1, "b": 1}, {"a": 1, "b": 1, "theirs": 2}, {"a": 2})
    assert patch == {"a": 2, "b": None}
