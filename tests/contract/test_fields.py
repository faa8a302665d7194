"""The effect of each Model field in a cluster: on the pods and the conditions.

Both APIs, with the operator, and `Nodes` in the place of kubelets. docs/reference/fields.md says
for every field which test shows its effect; most of those are in the files test_fields*.py.
"""

from __future__ import annotations

import secrets

import pytest
from fakes.engine_pods import ENGINES, URLS, server
from model_fields import FAST, env, pod_of, told
from operators import until

from kubeai.kube.resources import CONFIGMAPS, MODELS

EVERYTHING = (
    FAST
    + """
secretNames: {huggingface: hub}
modelServers:
  VLLM: {images: {default: wrong, gpu: "vllm/vllm-openai:v0.33.0"}}
  OLlama: {images: {default: wrong, gpu: ollama-gpu}}
  FasterWhisper: {images: {default: wrong, gpu: whisper-gpu}}
  Infinity: {images: {default: wrong, gpu: infinity-gpu}}
  SGLang: {images: {default: wrong, gpu: sglang-gpu}}
  LlamaCpp: {images: {default: wrong, gpu: llama-cpp-gpu}}
modelServerPods:
  serviceAccountName: models
  podSecurityContext: {fsGroup: 7, runAsNonRoot: true}
  securityContext:
    runAsUser: 7
    allowPrivilegeEscalation: false
    readOnlyRootFilesystem: false
    capabilities: {drop: [ALL]}
  imagePullSecrets: [{name: pull}]
  jsonPatches:
    - {op: add, path: /metadata/annotations/example.com~1team, value: speech}
    - {op: add, path: /spec/containers/0/env/-, value: {name: LAST, value: patched}}
    - {op: remove, path: /spec/containers/0/livenessProbe}
resourceProfiles:
  gpu:
    imageName: gpu
    requests: {cpu: 500m, memory: 1Gi}
    limits: {nvidia.com/gpu: 1}
    nodeSelector: {pool: gpu}
    affinity:
      nodeAffinity:
        requiredDuringSchedulingIgnoredDuringExecution:
          nodeSelectorTerms: [{matchExpressions: [{key: zone, operator: In, values: [a]}]}]
    tolerations: [{key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}]
    schedulerName: special
    runtimeClassName: nvidia
gateway: {drainTimeout: 90500ms}
"""
)
EVERY_FIELD = {
    "image": "",
    "resourceProfile": "gpu:2",
    "args": ["--one", "--two=2"],
    "env": {"ZED": "z", "ABLE": "$(HF_TOKEN)", "EMPTY": ""},
    "envFrom": [
        {"prefix": "C_", "configMapRef": {"name": "settings"}},
        {"configMapRef": {"name": "more", "optional": True}},
        {"prefix": "S_", "secretRef": {"name": "keys", "optional": True}},
        {"secretRef": {"name": "others"}},
    ],
    "files": [
        {"path": "/config/chat-template.jinja", "content": "{{ messages }}\n"},
        {"path": "/etc/words", "content": "über\n"},
    ],
    "priorityClassName": "urgent",
    "minReplicas": 1,
}
OWN_VARIABLES = {"ABLE": "$(HF_TOKEN)", "EMPTY": "", "ZED": "z", "LAST": "patched"}
TOKEN = {"HF_TOKEN": {"secretKeyRef": {"name": "hub", "key": "token", "optional": True}}}
# What is the engine's own: image, command, args, variables, the path of its probes.
EACH = {
    "VLLM": (
        "vllm/vllm-openai:v0.33.0",
        ["vllm", "serve"],
        ["org/name", "--served-model-name=m", "--one", "--two=2"],
        TOKEN,
        "/health",
    ),
    "OLlama": (
        "ollama-gpu",
        None,
        ["--one", "--two=2"],
        {"OLLAMA_HOST": "0.0.0.0:8000", "OLLAMA_KEEP_ALIVE": "999999h"},
        "/",
    ),
    "FasterWhisper": (
        "whisper-gpu",
        None,
        ["--one", "--two=2"],
        {"WHISPER__MODEL": "org/name", "ENABLE_UI": "false", **TOKEN},
        "/health",
    ),
    "Infinity": (
        "infinity-gpu",
        None,
        ["v2", "--one", "--two=2"],
        {
            "INFINITY_MODEL_ID": "org/name",
            "INFINITY_SERVED_MODEL_NAME": "m",
            "INFINITY_URL_PREFIX": "/v1",
            "INFINITY_ENGINE": "torch",
            "INFINITY_PORT": "8000",
            **TOKEN,
        },
        "/health",
    ),
    "SGLang": (
        "sglang-gpu",
        ["python3", "-m", "sglang.launch_server"],
        [
            "--model-path=org/name",
            "--served-model-name=m",
            "--host=0.0.0.0",
            "--port=8000",
            "--one",
            "--two=2",
        ],
        TOKEN,
        "/health",
    ),
    "LlamaCpp": (
        "llama-cpp-gpu",
        None,
        [
            *("--host", "0.0.0.0", "--port", "8000", "--alias", "m", "--metrics"),
            *("-hf", "org/name", "--one", "--two=2"),
        ],
        {"LLAMA_CACHE": "/llama-cache", **TOKEN},
        "/health",
    ),
}


def install_classes(api_server):
    """What a real API looks up before it takes a pod that names it; the embedded one does not."""
    if api_server.kind != "real":
        return
    for path, body in (
        ("scheduling.k8s.io/v1/priorityclasses", {"metadata": {"name": "urgent"}, "value": 1000}),
        ("node.k8s.io/v1/runtimeclasses", {"metadata": {"name": "nvidia"}, "handler": "nvidia"}),
    ):
        code, answer = api_server.request("POST", f"/apis/{path}", body)
        assert code in (201, 409), answer


@pytest.mark.parametrize("engine", ENGINES)
async def test_all_pod_settings_reach_the_pod_of_each_engine(world, api_server, engine):
    install_classes(api_server)
    replica = world.start(config=EVERYTHING)
    await world.create(engine=engine, url=URLS.get(engine, "hf://org/name"), **EVERY_FIELD)
    pod = await pod_of(world)
    image, command, args, variables, path = EACH[engine]
    container = server(pod)
    assert (container["image"], container.get("command")) == (image, command)
    assert container["args"] == args
    assert env(pod) == variables | OWN_VARIABLES
    assert [one["name"] for one in container["env"]][-4:] == ["ABLE", "EMPTY", "ZED", "LAST"]
    assert container["envFrom"] == EVERY_FIELD["envFrom"]
    assert_frame(pod, path)
    assert_settings(pod)
    if api_server.kind == "real":
        assert pod["spec"]["priority"] == 1000
    files = await world.kube.get(CONFIGMAPS, "model-m-files")
    assert files["data"] == {
        "_config_chat-template.jinja": "{{ messages }}\n",
        "_etc_words": "über\n",
    }
    await world.replicas_are(1, 1)
    assert replica.routes["m"].engine == engine


def assert_frame(pod, path):
    """Port, probes, volumes and labels: the same for all engines."""
    container, meta = server(pod), pod["metadata"]
    assert container["ports"] == [{"name": "http", "containerPort": 8000, "protocol": "TCP"}]
    assert container["readinessProbe"]["httpGet"]["path"] == path
    assert "livenessProbe" not in container  # a patch took it
    assert container["startupProbe"]["failureThreshold"] > 1
    volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
    assert volumes["dshm"]["emptyDir"] == {"medium": "Memory"}
    assert volumes["model-files"]["configMap"]["name"] == "model-m-files"
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    assert mounts["/dev/shm"]["name"] == "dshm"
    for file, key in (
        ("/config/chat-template.jinja", "_config_chat-template.jinja"),
        ("/etc/words", "_etc_words"),
    ):
        assert (mounts[file]["name"], mounts[file]["subPath"]) == ("model-files", key)
        assert mounts[file]["readOnly"] is True
    assert meta["labels"]["app"] == "model"
    assert meta["labels"]["model"] == "m"
    assert meta["labels"]["app.kubernetes.io/managed-by"] == "kubeai"
    assert meta["annotations"]["example.com/team"] == "speech"


def assert_settings(pod):
    """What profile and system config say, in every engine's pod."""
    spec, container = pod["spec"], server(pod)
    assert container["resources"] == {
        "requests": {"cpu": "1", "memory": "2Gi", "nvidia.com/gpu": "2"},
        "limits": {"nvidia.com/gpu": "2"},
    }
    assert container["securityContext"] == {
        "runAsUser": 7,
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": False,
        "capabilities": {"drop": ["ALL"]},
    }
    assert spec["securityContext"] == {"fsGroup": 7, "runAsNonRoot": True}
    assert spec["serviceAccountName"] == "models"
    assert spec["imagePullSecrets"] == [{"name": "pull"}]
    assert spec["nodeSelector"] == {"pool": "gpu"}
    (term,) = spec["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"][
        "nodeSelectorTerms"
    ]
    assert term == {"matchExpressions": [{"key": "zone", "operator": "In", "values": ["a"]}]}
    toleration = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
    assert toleration in spec["tolerations"]
    assert spec["schedulerName"] == "special"
    assert spec["runtimeClassName"] == "nvidia"
    assert spec["priorityClassName"] == "urgent"
    assert spec["terminationGracePeriodSeconds"] == 91


async def test_a_model_that_sets_nothing_gets_a_pod_of_each_engine(world):
    world.start(config=FAST)
    for engine in ENGINES:
        url = URLS.get(engine, "hf://org/name")
        name = engine.lower()
        await world.create(
            name, engine=engine, url=url, image="", resourceProfile="", minReplicas=1
        )
    for engine in ENGINES:
        pod = await pod_of(world, engine.lower())
        assert server(pod).get("resources", {}) == {}
        assert server(pod).get("securityContext", {}) == {}
        assert server(pod).get("envFrom", []) == []
        assert "priorityClassName" not in pod["spec"]
        cache = ["llama-cache"] if engine == "LlamaCpp" else []
        assert [volume["name"] for volume in pod["spec"]["volumes"]] == ["dshm", *cache]


async def test_image_of_model_overrides_profile_overrides_default(world):
    config = """
modelServers: {VLLM: {images: {default: of-the-engine, gpu: of-the-profile}}}
resourceProfiles: {gpu: {imageName: gpu}, tpu: {imageName: not-listed}, cpu: {}}
"""
    world.start(config=FAST + config)
    for name, profile, image in (
        ("own", "gpu:1", "mine"),
        ("profile", "gpu:1", ""),
        ("not-listed", "tpu:1", ""),
        ("default", "cpu:1", ""),
        ("no-profile", "", ""),
    ):
        await world.create(name, resourceProfile=profile, image=image, minReplicas=1)
    images = {}
    for name in ("own", "profile", "not-listed", "default", "no-profile"):
        images[name] = server(await pod_of(world, name))["image"]
    assert images == {
        "own": "mine",
        "profile": "of-the-profile",
        "not-listed": "of-the-engine",
        "default": "of-the-engine",
        "no-profile": "of-the-engine",
    }


async def test_a_profile_with_dra_claims_devices_for_each_unit(world):
    config = """
resourceProfiles:
  own: {dra: {resourceClaimTemplateName: one-gpu, claimRequest: gpu}}
  shared: {dra: {resourceClaimName: all-gpus, claimName: gpus}, limits: {memory: 1Gi}}
  both: {dra: {resourceClaimTemplateName: a, resourceClaimName: b}}
  none: {dra: {claimName: a}}
"""
    world.start(config=FAST + config)
    for name, profile in (("own", "own:2"), ("shared", "shared:1")):
        await world.create(name, resourceProfile=profile, minReplicas=1)
    pod = await pod_of(world, "own")
    assert pod["spec"]["resourceClaims"] == [
        {"name": name, "resourceClaimTemplateName": "one-gpu"}
        for name in ("devices-0", "devices-1")
    ]
    assert server(pod)["resources"] == {
        "claims": [{"name": name, "request": "gpu"} for name in ("devices-0", "devices-1")]
    }
    pod = await pod_of(world, "shared")
    assert pod["spec"]["resourceClaims"] == [{"name": "gpus", "resourceClaimName": "all-gpus"}]
    assert server(pod)["resources"]["claims"] == [{"name": "gpus"}]
    assert server(pod)["resources"]["limits"] == {"memory": "1Gi"}
    for name, profile, why in (
        ("both", "both:1", "must set either resourceClaimTemplateName or resourceClaimName"),
        ("none", "none:1", "must set either resourceClaimTemplateName or resourceClaimName"),
        ("twice", "shared:2", "names a single claim, which cannot be multiplied"),
        ("many", "own:33", "the count must be at most 32"),
    ):
        await world.create(name, resourceProfile=profile, minReplicas=1)
        assert why in await told(world, "InvalidProfile", name)


async def test_missing_priority_class_is_reported_and_awaited(world, api_server):
    if api_server.kind != "real":
        pytest.skip("the embedded API has no admission: it looks up no PriorityClass")
    name = f"class-{secrets.token_hex(4)}"
    world.start()
    await world.create(priorityClassName=name, minReplicas=1)
    said = await told(world, "PodRefused")
    assert f"no PriorityClass with name {name} was found" in said
    assert await told(world, "PodRefused", type_="Progressing") == said
    path = "/apis/scheduling.k8s.io/v1/priorityclasses"
    code, answer = api_server.request("POST", path, {"metadata": {"name": name}, "value": 7})
    assert code == 201, answer
    pod = await pod_of(world)
    assert (pod["spec"]["priorityClassName"], pod["spec"]["priority"]) == (name, 7)
    await world.replicas_are(1, 1)


async def test_missing_profile_is_reported(world):
    world.start()
    for name, profile, why in (
        ("unknown", "gpu:1", "the system config has no resource profile 'gpu'"),
        ("count", "cpu", "'cpu' must be <profile>:<count>"),
        ("none", "cpu:0", "the count of 'cpu:0' must be from 1"),
    ):
        await world.create(name, resourceProfile=profile, minReplicas=1)
        said = await told(world, "InvalidProfile", name)
        assert said.startswith("spec.resourceProfile: ")
        assert why in said


async def test_conditions_have_transition_time_and_generation(world):
    world.start()
    await world.create()

    async def ready():
        model = await world.model()
        found = model.get("status", {}).get("conditions", [])
        (ready,) = (c for c in found if c["type"] == "Ready")
        return ready, model["metadata"]["generation"]

    await until(world.is_up_to_date, "told")
    first, generation = await ready()
    assert first["observedGeneration"] == generation
    assert first["lastTransitionTime"].startswith("20")
    await world.kube.patch(MODELS, "m", {"spec": {"targetRequests": 7}})
    await until(world.is_up_to_date, "told of the change")
    again, later = await ready()
    assert again["observedGeneration"] == later == generation + 1
    assert again["lastTransitionTime"] == first["lastTransitionTime"]
