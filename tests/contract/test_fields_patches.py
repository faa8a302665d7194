"""The effect of a Model's files and patches in a cluster: on its config map, pods and status."""

from __future__ import annotations

import pytest
from fakes.engine_pods import server
from model_fields import ENV, env, pod_of, told
from operators import CONFIG, until

from kubeai.kube.resources import CONFIGMAPS, MODELS


@pytest.mark.parametrize(
    ("after", "data"),
    [
        ([("/etc/a", "one"), ("/etc/b", "another")], {"_etc_a": "one", "_etc_b": "another"}),
        ([("/etc/a", "one")], {"_etc_a": "one"}),
        ([("/etc/a", "one"), ("/srv/b", "two")], {"_etc_a": "one", "_srv_b": "two"}),
    ],
    ids=["content", "removed", "path"],
)
async def test_an_edited_file_is_in_the_config_map_and_rolls_the_pods(world, after, data):
    replica = world.start()
    files = [{"path": "/etc/a", "content": "one"}, {"path": "/etc/b", "content": "two"}]
    await world.create(files=files, minReplicas=2)
    await world.replicas_are(2, 2)
    old = set(replica.endpoints("m"))
    files = [{"path": path, "content": content} for path, content in after]
    await world.kube.patch(MODELS, "m", {"spec": {"files": files}})
    await until(lambda: not old & set(replica.endpoints("m")), "new endpoints")
    await until(world.is_up_to_date, "rolled out")
    await world.replicas_are(2, 2)
    assert (await world.kube.get(CONFIGMAPS, "model-m-files"))["data"] == data
    for pod in await world.pods():
        mounts = [m["mountPath"] for m in server(pod)["volumeMounts"]]
        assert mounts == ["/dev/shm", *(path for path, _ in after)]


async def test_invalid_file_is_reported(world):
    world.start()
    for name, paths, why in (
        ("same-key", ["/a/b", "/a_b"], "spec.files[1].path: '/a_b' and '/a/b'"),
        ("odd-name", ["/a b"], "spec.files[0].path: '/a b' may contain only letters"),
        ("volume", ["/x", "/dev/shm"], "spec.files[1].path: '/dev/shm' is already the mount path"),
    ):
        files = [{"path": path, "content": ""} for path in paths]
        await world.create(name, files=files, minReplicas=1)
        assert (await told(world, "InvalidFile", name)).startswith(why)


@pytest.mark.parametrize(
    ("patch", "why"),
    [
        ("{op: remove, path: /spec/nothing}", "remove '/spec/nothing' cannot be applied"),
        ("{op: remove, path: /metadata/labels/model}", "a label that KubeAI needs"),
        (
            "{op: replace, path: /spec/containers/0/name, value: x}",
            "it removes the container 'server'",
        ),
    ],
)
async def test_a_patch_that_cannot_be_applied_is_named_in_the_conditions(world, patch, why):
    good = "{op: add, path: /spec/hostname, value: engine}"
    world.start(config=CONFIG + f"modelServerPods: {{jsonPatches: [{good}, {patch}]}}")
    await world.create(minReplicas=1)
    said = await told(world, "InvalidPatch")
    assert said.startswith("modelServerPods.jsonPatches[1]: ")
    assert why in said
    assert await world.pods() == []


async def test_a_models_patches_are_applied_after_those_of_the_config(world):
    hostname = "{op: add, path: /spec/hostname, value: config}"
    world.start(config=CONFIG + f"modelServerPods: {{jsonPatches: [{hostname}]}}")
    patches = [
        ENV,
        {"op": "replace", "path": "/spec/hostname", "value": "model"},
        {"op": "copy", "from": "/spec/hostname", "path": "/metadata/annotations/host"},
        {"op": "add", "path": "/spec/terminationGracePeriodSeconds", "value": 7},
        {"op": "remove", "path": "/spec/containers/0/livenessProbe"},
        {"op": "test", "path": "/spec/containers/0/name", "value": "server"},
    ]
    created = await world.create(jsonPatches=patches, minReplicas=1)
    assert created["spec"]["jsonPatches"] == patches
    await world.create("plain", minReplicas=1)
    pod = await pod_of(world)
    assert env(pod)["A"] == "1"
    assert pod["spec"]["hostname"] == pod["metadata"]["annotations"]["host"] == "model"
    assert pod["spec"]["terminationGracePeriodSeconds"] == 7
    assert "livenessProbe" not in server(pod)
    assert (await pod_of(world, "plain"))["spec"]["hostname"] == "config"
    # A patch is a new version of the pods.
    await world.kube.patch(MODELS, "m", {"spec": {"jsonPatches": None}})

    async def replaced():
        pods = await world.pods()
        return len(pods) == 1 and pods[0]["spec"]["hostname"] == "config"

    await until(replaced, "replaced")


@pytest.mark.parametrize(
    ("patch", "why"),
    [
        ({"op": "remove", "path": "/spec/nothing"}, "remove '/spec/nothing' cannot be applied"),
        ({"op": "remove", "path": "/metadata/labels/model"}, "a label that KubeAI needs"),
        ({"op": "replace", "path": "/spec/containers", "value": []}, "the container 'server'"),
        ({"op": "add", "path": "/spec/initContainers", "value": ["x"]}, "$.spec.initContainers[0]"),
    ],
)
async def test_a_models_patch_that_cannot_be_applied_is_named_in_the_conditions(world, patch, why):
    world.start()
    await world.create(jsonPatches=[ENV, patch], minReplicas=1)
    said = await told(world, "InvalidPatch")
    assert said.startswith("spec.jsonPatches[1]: ")
    assert why in said
    assert await world.pods() == []


async def test_patch_rejected_by_the_api_is_reported_in_conditions(world):
    patch = "{op: add, path: /spec/restartPolicy, value: Sometimes}"
    world.start(config=CONFIG + f"modelServerPods: {{jsonPatches: [{patch}]}}")
    await world.create(minReplicas=1)
    assert "spec.restartPolicy" in await told(world, "PodRefused")
