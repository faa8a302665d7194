"""JSON patches of the pod: those of the config and of the Model, and what is rejected."""

import copy

import pytest
from fakes.engine_pods import env, hash_label, patched, pod, server

from kubeai.errors import ModelError


def test_patches_are_applied_in_order_and_change_the_hash():
    config = patched(
        {"op": "add", "path": "/spec/containers/0/env/-", "value": {"name": "A", "value": "1"}},
        {"op": "add", "path": "/spec/priorityClassName", "value": "low"},
        {"op": "replace", "path": "/spec/priorityClassName", "value": "high"},
        {"op": "add", "path": "/metadata/annotations/x~1y", "value": "z"},
        {"op": "remove", "path": "/spec/containers/0/livenessProbe"},
    )
    built = pod(config=config)
    assert env(built)["A"] == "1"
    assert built["spec"]["priorityClassName"] == "high"
    assert built["metadata"]["annotations"]["x/y"] == "z"
    assert "livenessProbe" not in server(built)
    assert hash_label(built) != hash_label(pod())


def test_building_pods_does_not_modify_the_config():
    config = patched(
        {"op": "add", "path": "/spec/tolerations", "value": [{"key": "a"}]},
        {"op": "add", "path": "/spec/tolerations/-", "value": {"key": "b"}},
        {"op": "replace", "path": "/spec/tolerations/0/key", "value": "c"},
    )
    before = copy.deepcopy(config)
    first, second = pod(config=config), pod(config=config)
    assert first == second
    assert first["spec"]["tolerations"] == [{"key": "c"}, {"key": "b"}]
    first["spec"]["tolerations"].clear()
    assert config == before
    assert pod(config=config) == second


OK = {"op": "add", "path": "/spec/hostname", "value": "x"}


@pytest.mark.parametrize(
    "bad",
    [
        {"op": "remove", "path": "/spec/nosuch"},
        {"op": "replace", "path": "/spec/nosuch", "value": 1},
        {"op": "add", "path": "/spec/nosuch/below", "value": 1},
        {"op": "add", "path": "/spec/containers/7/image", "value": "x"},
        {"op": "add", "path": "/spec/containers/first/image", "value": "x"},
        {"op": "add", "path": "/spec/hostname/below", "value": 1},
        {"op": "test", "path": "/spec/hostname", "value": "y"},
        {"op": "move", "from": "/spec/nosuch", "path": "/spec/x"},
        {"op": "remove", "path": "/spec/containers/0"},
        {"op": "replace", "path": "/spec/containers", "value": 5},
        {"op": "remove", "path": "/metadata/labels/model"},
        {"op": "replace", "path": "", "value": []},
    ],
)
def test_a_patch_that_cannot_be_applied_is_reported_with_its_path(bad):
    with pytest.raises(ModelError) as caught:
        pod(config=patched(OK, bad))
    assert caught.value.field == "modelServerPods.jsonPatches[1]"
    assert caught.value.reason == "InvalidPatch"
    assert f"{bad['op']} {bad['path']!r}" in str(caught.value)


def test_a_models_patches_may_move_and_replace():
    patches = [
        {"op": "move", "from": "/spec/containers/0/livenessProbe", "path": "/spec/probe"},
        {"op": "replace", "path": "/spec/probe/periodSeconds", "value": 7},
        {"op": "move", "from": "/spec/probe", "path": "/spec/containers/0/livenessProbe"},
    ]
    built = pod(jsonPatches=patches)
    assert server(built)["livenessProbe"]["periodSeconds"] == 7
    assert hash_label(built) != hash_label(pod())
    assert built == pod(jsonPatches=patches)  # the patches themselves are unchanged


COPY = {"op": "copy", "from": "/spec", "path": "/spec/x"}


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ({"op": "remove", "path": "/spec/nosuch"}, "remove '/spec/nosuch' cannot be applied"),
        ({"op": "remove", "path": "/metadata/annotations"}, "not the manifest of a pod"),
        ({"op": "replace", "path": "/metadata/labels", "value": []}, "$.metadata.labels"),
        ({"op": "add", "path": "/spec/initContainers", "value": ["x"]}, "$.spec.initContainers[0]"),
        ({"op": "add", "path": "/spec/initContainers", "value": [{}]}, "$.spec.initContainers[0]"),
        ({"op": "replace", "path": "/spec/containers/0", "value": 1}, "$.spec.containers[0]"),
        ({"op": "replace", "path": "/spec/containers/0/args", "value": "x"}, "containers[0].args"),
        ({"op": "add", "path": "/spec/containers/0/ports/-", "value": "x"}, "[0].ports[1]"),
        ({"op": "remove", "path": "/kind"}, "`kind`"),
        ({"op": "replace", "path": "/kind", "value": "Service"}, "$.kind"),
        ({"op": "add", "path": "/metadata/labels/x", "value": 3}, "$.metadata.labels[...]"),
        (
            {
                "op": "add",
                "path": "/metadata/labels/leaderworkerset.sigs.k8s.io~1name",
                "value": "x",
            },
            "'leaderworkerset.sigs.k8s.io/name' is reserved",
        ),
        (
            {"op": "add", "path": "/metadata/labels/kubeai.org~1job", "value": "x"},
            "'kubeai.org/job' is reserved",
        ),
        (
            {"op": "add", "path": "/metadata/annotations/kubeai.org~1draining-since", "value": "1"},
            "'kubeai.org/draining-since' is reserved",
        ),
        ({"op": "add", "path": "/spec/x", "value": "y" * (1 << 20)}, "larger than 1048576 bytes"),
    ],
)
def test_a_models_patch_that_cannot_be_applied_is_reported_with_its_path(bad, why):
    with pytest.raises(ModelError) as caught:
        pod(config=patched(OK), jsonPatches=[OK, bad])
    assert caught.value.field == "spec.jsonPatches[1]"
    assert caught.value.reason == "InvalidPatch"
    assert why in str(caught.value)


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ({"op": "add", "path": "/spec/nosuch/x", "value": 1}, "member 'nosuch' not found"),
        ({"op": "test", "path": "/spec/nosuch", "value": 1}, "member 'nosuch' not found"),
        ({"op": "test", "path": "/spec/containers/0/env", "value": []}, "the value is different"),
        ({"op": "copy", "from": "/spec/containers/0/env/x/y", "path": "/spec/x"}, "'x' is not"),
        ({"op": "move", "from": "/spec/nosuch", "path": "/spec/x"}, "member 'nosuch' not found"),
    ],
)
def test_a_patch_that_cannot_be_applied_does_not_show_the_content_of_the_pod(bad, why):
    # Clients of the API get this message.
    with pytest.raises(ModelError) as caught:
        pod(env={"TOKEN": "secret"}, jsonPatches=[bad])
    assert why in str(caught.value)
    assert "secret" not in str(caught.value)
    assert len(str(caught.value)) < 200


def test_patches_that_double_the_pod_again_and_again_are_stopped():
    with pytest.raises(ModelError, match="jsonPatches"):
        pod(jsonPatches=[COPY, *({**COPY, "path": f"/spec/x{n}"} for n in range(60))])


def test_a_patch_may_set_another_termination_message_policy():
    path = "/spec/containers/0/terminationMessagePolicy"
    built = pod(config=patched({"op": "add", "path": path, "value": "File"}))
    assert server(built)["terminationMessagePolicy"] == "File"
    assert hash_label(built) != hash_label(pod())
