"""Models in all the shapes that people have written them in for KubeAI: the pods that they give.

Both APIs take each with strict validation, as kubectl asks for, and the default config knows all
profiles but those of TPUs, which upstream's values for GKE add.
"""

from __future__ import annotations

import pytest
import yaml
from operators import until
from shapes import IMAGES, SHAPES, gpus

from kubeai.kube.resources import CONFIGMAPS, MODELS

QUIET = """
modelAutoscaling: {interval: 1h}
leaderElection: {leaseDuration: 2s, renewDeadline: 1s, retryPeriod: 200ms}
"""
TPU = """
resourceProfiles:
  google-tpu-v5e-2x2:
    imageName: google-tpu
    limits: {google.com/tpu: 1}
    nodeSelector: {cloud.google.com/gke-tpu-topology: "2x2"}
"""


async def create(world, api_server, name, spec, labels=None):
    """As `kubectl apply` does: a field that the API does not know is an error."""
    path = f"/apis/kubeai.org/v1/namespaces/{world.kube.namespace}/models?fieldValidation=Strict"
    model = {
        "apiVersion": "kubeai.org/v1",
        "kind": "Model",
        "metadata": {"name": name, "creationTimestamp": None, "labels": labels or {}},
        "spec": spec,
        "status": {"replicas": {"all": 0, "ready": 0}},
    }
    code, answer = api_server.request("POST", path, model)
    assert code == 201, answer
    return answer


async def test_models_in_every_published_shape_get_the_pods_that_they_mean(world, api_server):
    replica = world.start(config=QUIET)
    for name, (spec, _) in SHAPES.items():
        await create(world, api_server, name, yaml.safe_load(spec))
    for name, (_, expected) in SHAPES.items():
        count = expected.get("count", 1)
        await until(lambda name=name: replica.routes.get(name), f"a route of {name}")
        scale = {"spec": {"replicas": count}}
        await world.kube.patch(MODELS, name, scale, subresource="scale")
    for name, (_, expected) in SHAPES.items():
        for pod in await world.pods_once(expected.get("count", 1), name):
            assert_pod(pod, name, **expected)
        await world.replicas_are(expected.get("count", 1), expected.get("count", 1), name)
        if "files" in expected:
            found = await world.kube.get(CONFIGMAPS, f"model-{name}-files")
            assert found["data"] == expected["files"]


def assert_pod(pod, name, **expected):
    spec, (container,) = pod["spec"], pod["spec"]["containers"]
    actual = {
        "image": container["image"],
        "args": container.get("args", []),
        "env": {v["name"]: value_of(v) for v in container.get("env", [])},
        "envFrom": container.get("envFrom", []),
        "resources": container.get("resources", {}),
        "tolerations": [
            t for t in spec.get("tolerations", []) if "node.kubernetes.io" not in t["key"]
        ],
        "claim": claim_of(spec),
    }
    if "startup" in expected:
        actual["startup"] = container["startupProbe"]["exec"]["command"][4:]
    wanted = {"claim": None} | {k: v for k, v in expected.items() if k not in ("count", "files")}
    assert {key: actual[key] for key in wanted} == wanted, name
    if "files" in expected:
        mounted = {mount.get("subPath"): mount["mountPath"] for mount in container["volumeMounts"]}
        assert {key: key.replace("_", "/") for key in expected["files"]}.items() <= mounted.items()


def value_of(variable):
    if "valueFrom" not in variable:
        return variable.get("value", "")
    ref = variable["valueFrom"]["secretKeyRef"]
    assert ref["optional"] is True
    return ref["name"], ref["key"]


def claim_of(spec):
    """The claim or image with the weights, and the folder of it that is mounted."""
    volumes = [volume for volume in spec["volumes"] if volume["name"] == "model"]
    mounts = [m for m in spec["containers"][0]["volumeMounts"] if m["name"] == "model"]
    if not volumes:
        return None
    assert [m["mountPath"] for m in mounts] == ["/model"]
    if "image" in volumes[0]:
        return volumes[0]["image"]["reference"], mounts[0].get("subPath")
    return volumes[0]["persistentVolumeClaim"]["claimName"], mounts[0].get("subPath")


async def test_a_profile_that_only_the_users_config_has_is_used(world, api_server):
    world.start(config=QUIET + TPU)
    spec = {
        "features": ["TextGeneration"],
        "url": "hf://org/model",
        "engine": "VLLM",
        "args": ["--distributed-executor-backend=ray"],
        "resourceProfile": "google-tpu-v5e-2x2:4",
        "minReplicas": 1,
    }
    await create(world, api_server, "tpu", spec)
    (pod,) = await world.pods_once(1, "tpu")
    assert_pod(
        pod,
        "tpu",
        image=IMAGES.vllm.images["google-tpu"],
        resources=gpus(4, "google.com/tpu"),
        args=[
            "--model=org/model",
            "--served-model-name=tpu",
            "--distributed-executor-backend=ray",
        ],
    )
    assert pod["spec"]["nodeSelector"] == {"cloud.google.com/gke-tpu-topology": "2x2"}


async def test_models_of_two_tenants_keep_their_labels_and_their_priority(world, api_server):
    if api_server.kind == "real":
        for name, value in (("low", 10), ("high", 1000)):
            body = {"metadata": {"name": f"{name}-priority"}, "value": value}
            path = "/apis/scheduling.k8s.io/v1/priorityclasses"
            assert api_server.request("POST", path, body)[0] in (201, 409)
    replica = world.start(config=QUIET)
    for group, priority in (("a", "low-priority"), ("b", "high-priority")):
        spec = {
            "features": ["TextGeneration"],
            "owner": "somebody",
            "url": "ollama://small:2b",
            "engine": "OLlama",
            "resourceProfile": "cpu:2",
            "priorityClassName": priority,
            "minReplicas": 1,
        }
        await create(world, api_server, f"small-{group}", spec, {"tenancy": f"group-{group}"})
    for group, priority in (("a", "low-priority"), ("b", "high-priority")):
        (pod,) = await world.pods_once(1, f"small-{group}")
        assert pod["spec"]["priorityClassName"] == priority
        await until(lambda group=group: replica.endpoints(f"small-{group}"), "an endpoint")
        assert replica.routes[f"small-{group}"].labels["tenancy"] == f"group-{group}"
        assert replica.routes[f"small-{group}"].owner == "somebody"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"adapters": [{"id": "old-name", "url": "hf://org/lora"}]}, "spec.adapters[0].id"),
        ({"env": {"VLLM_USE_V1": 1}}, "spec.env.VLLM_USE_V1"),
        ({"url": "$MODEL_URL"}, "spec.url"),
        ({"resourceProfil": "cpu:1"}, "spec.resourceProfil"),
    ],
)
def test_shapes_that_upstream_rejects_are_rejected_by_field(api_server, namespace, change, named):
    spec = {"url": "hf://org/model", "engine": "VLLM", "features": ["TextGeneration"], **change}
    model = {"apiVersion": "kubeai.org/v1", "kind": "Model", "metadata": {"name": "m"}}
    path = f"/apis/kubeai.org/v1/namespaces/{namespace}/models?fieldValidation=Strict"
    code, answer = api_server.request("POST", path, model | {"spec": spec})
    assert code in (400, 422)
    assert named in answer["message"]
