"""The effect of each Model field in a cluster: on pods, route, scale and the list of models.

Both APIs, with the operator, and `Nodes` in the place of kubelets. docs/reference/fields.md says
for every field which test shows its effect; most of those are here.
"""

from __future__ import annotations

import contextlib
import secrets

import aiohttp
import pytest
from aiohttp import web
from operators import CONFIG, until

from kubeai._load import LoadTable
from kubeai.api.config.system import GatewayConfig
from kubeai.gateway.context import Context
from kubeai.gateway.local_routes import make_runner
from kubeai.gateway.server import Server
from kubeai.kube.errors import ApiError
from kubeai.kube.resources import CONFIGMAPS, MODELS, PODS, PVCS
from kubeai.routing.publisher import Publisher

FAST = "".join(line for line in CONFIG.splitlines(True) if not line.startswith("resourceProfiles"))
ENGINES = ("VLLM", "OLlama", "FasterWhisper", "Infinity", "SGLang", "LlamaCpp")
URLS = {"OLlama": "ollama://gemma2:2b"}


def server(pod):
    (container,) = pod["spec"]["containers"]
    assert container["name"] == "server"
    return container


def env(pod):
    """The server's variables: what they are, or where from. A real API drops empty values."""
    variables = server(pod).get("env", [])
    return {one["name"]: one.get("valueFrom") or one.get("value", "") for one in variables}


async def pod_of(world, name="m"):
    (pod,) = await world.pods_once(1, name)
    return pod


async def told(world, reason, name="m", type_="Ready"):
    """The message of the condition, once it is False for that reason."""

    async def condition():
        return await world.condition(type_, name) == ("False", reason)

    await until(condition, f"{name} is told {reason}")
    return await message(world, type_, name)


async def message(world, type_="Ready", name="m"):
    conditions = (await world.status(name)).get("conditions") or []
    return next(c["message"] for c in conditions if c["type"] == type_)


async def refusal(world, **spec):
    """What the API says when it refuses to create such a Model."""
    with pytest.raises(ApiError) as caught:
        await world.create(**spec)
    assert caught.value.status == 422, caught.value
    return str(caught.value)


# -- all that makes a pod, at once ---------------------------------------------------------------

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


# -- image ---------------------------------------------------------------------------------------


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


# -- url -----------------------------------------------------------------------------------------

# What comes of a scheme on an engine. "told": in the Model's conditions; "refused": by the API.
SCHEMES = {
    "hf": dict.fromkeys(ENGINES, "pod") | {"OLlama": "told"},
    "pvc": dict.fromkeys(ENGINES, "pod"),
    "ollama": dict.fromkeys(ENGINES, "told") | {"OLlama": "pod"},
    "s3": dict.fromkeys(ENGINES, "told") | {"VLLM": "pod", "SGLang": "pod"},
    "oci": dict.fromkeys(ENGINES, "pod") | {"OLlama": "told"},
    "gs": dict.fromkeys(ENGINES, "refused"),  # these two need a cache
    "oss": dict.fromkeys(ENGINES, "refused"),
}


def url_of(scheme, engine):
    if (scheme, engine) == ("pvc", "OLlama"):
        return "pvc://claim/sub/path?model=qwen:0.5b"
    if (scheme, engine) == ("pvc", "LlamaCpp"):
        return "pvc://claim/sub/path?model=a.gguf"
    if (scheme, engine) == ("oci", "LlamaCpp"):
        return "oci://org/name?model=a.gguf"
    return f"{scheme}://{'claim/sub/path' if scheme == 'pvc' else 'org/name'}"


def source_in(pod, engine):
    """Where the pod says that its weights are."""
    match engine:
        case "VLLM":
            return server(pod)["args"][0].removeprefix("--model=")
        case "OLlama":
            return server(pod)["startupProbe"]["exec"]["command"][4]
        case "SGLang":
            return server(pod)["args"][0].removeprefix("--model-path=")
        case "LlamaCpp":
            return server(pod)["args"][8]
        case "FasterWhisper":  # speaches: the name in a hub, or a folder
            name, folder = server(pod)["startupProbe"]["exec"]["command"][3:]
            return folder or name
        case "Infinity":
            return env(pod)["INFINITY_MODEL_ID"]


async def test_each_engine_accepts_only_its_url_schemes(world):
    world.start(config=FAST)
    cases = [(s, e, comes) for s, by_engine in SCHEMES.items() for e, comes in by_engine.items()]
    assert len(cases) == 7 * len(ENGINES)
    for scheme, engine, comes in cases:
        wanted = {"engine": engine, "url": url_of(scheme, engine), "minReplicas": 1}
        wanted |= {"name": f"{engine}-{scheme}".lower(), "image": "", "resourceProfile": ""}
        if comes == "refused":
            said = await refusal(world, **wanted)
            assert f"a url that starts with {scheme}:// needs a cacheProfile" in said
        else:
            await world.create(**wanted)
    for scheme, engine, comes in cases:
        name = f"{engine}-{scheme}".lower()
        if comes == "told":
            said = await told(world, "InvalidURL", name)
            assert said.startswith(f"spec.url: {engine} cannot load from {scheme}://")
            assert await world.pods(name) == []
        elif comes == "pod":
            assert_source(await pod_of(world, name), engine, scheme)


def assert_source(pod, engine, scheme):
    expected = {"pvc": "/model", "oci": "/model", "s3": "s3://org/name"}.get(scheme, "org/name")
    if (engine, scheme) == ("OLlama", "pvc"):
        expected = "qwen:0.5b"
        assert env(pod)["OLLAMA_MODELS"] == "/model"
    if engine == "LlamaCpp" and scheme in ("pvc", "oci"):
        expected = "/model/a.gguf"
    assert source_in(pod, engine) == expected
    claims = [v for v in pod["spec"]["volumes"] if "persistentVolumeClaim" in v]
    mounts = [m for m in server(pod)["volumeMounts"] if m["name"] == "model"]
    if scheme == "oci":
        (volume,) = (v for v in pod["spec"]["volumes"] if v["name"] == "model")
        assert volume["image"]["reference"] == "org/name"
        assert [(m["mountPath"], m["readOnly"]) for m in mounts] == [("/model", True)]
        assert claims == []
        return
    if scheme != "pvc":
        assert claims == mounts == []
        return
    (claim,), (mount,) = claims, mounts
    assert claim["persistentVolumeClaim"]["claimName"] == "claim"
    assert (mount["mountPath"], mount["subPath"]) == ("/model", "sub/path")


async def test_api_rejects_unloadable_urls(world):
    for url in ("", "name", "http://host/name", "HF://org/name", "file:///x"):
        assert "spec.url" in (said := await refusal(world, url=url)), said
        assert "url must start with one of hf://" in said
    # As in KubeAI in Go since 0.23.
    for url in ("hf://", "hf://org/name@main", "hf://a b", "ollama://q;id", "hf://a?x\ny"):
        said = await refusal(world, url=url)
        assert "between the scheme and the parameters, url may contain only" in said, said
    assert "spec.url" in await refusal(world, url="hf://" + "x" * 2048)
    for engine in ENGINES:
        for scheme in ("pvc", "ollama"):
            said = await refusal(world, engine=engine, url=url_of(scheme, engine), cacheProfile="c")
            assert "cacheProfile is only possible with urls that start with hf://" in said


PARAMETERS = {
    "ollama-model": ("OLlama", "ollama://q?model=x", "unknown parameter 'model' for ollama://"),
    "ollama-odd": ("OLlama", "ollama://q?pull=maybe", "pull must be true or false"),
    "claim-alone": ("OLlama", "pvc://claim", "OLlama needs the model's name on the claim"),
    "claim-pull": ("OLlama", "pvc://claim?model=q&pull=false", "unknown parameter 'pull'"),
    "vllm-model": ("VLLM", "pvc://claim?model=q", "VLLM does not support the parameter 'model'"),
    "vllm-revision": ("VLLM", "hf://org/name?revision=1", "unknown parameter 'revision' for hf://"),
    "no-claim": ("Infinity", "pvc://No_Claim", "not a valid PersistentVolumeClaim name"),
    "outside": ("FasterWhisper", "pvc://claim/../other", "must not contain '..'"),
    "name": ("OLlama", "pvc://claim?model=q;id", "'q;id' is not a valid name of a model"),
    "llmman": ("VLLM", "oci://r/a:1?via=llmman", "the parameter 'via' is not supported"),
    "registry": ("VLLM", "oci://a", "must be an image with its registry"),
    "llama-file": ("LlamaCpp", "pvc://claim/folder", "LlamaCpp needs the GGUF file"),
}


async def test_invalid_url_or_parameters_are_reported(world):
    world.start(config=FAST)
    for name, (engine, url, _) in PARAMETERS.items():
        await world.create(name, engine=engine, url=url, minReplicas=1)
    for name, (_, _, why) in PARAMETERS.items():
        said = await told(world, "InvalidURL", name)
        assert said.startswith("spec.url: ")
        assert why in said
        assert await world.pods(name) == []


async def test_url_parameters_control_how_ollama_pulls_its_model(world):
    world.start(config=FAST)
    urls = {
        "plain": ("ollama://host:5000/q:1b", ["host:5000/q:1b", "plain", "pull", "load"]),
        "insecure": ("ollama://q?insecure=true", ["q", "insecure", "pull-insecure", "load"]),
        "builtin": ("ollama://q?pull=false", ["q", "builtin", "present", "load"]),
    }
    for name, (url, _) in urls.items():
        await world.create(name, engine="OLlama", url=url, image="mine", minReplicas=1)
    for name, (_, arguments) in urls.items():
        probe = server(await pod_of(world, name))["startupProbe"]
        assert probe["exec"]["command"][4:] == arguments


async def test_credentials_come_from_the_secrets_that_the_config_names(world):
    world.start(config=FAST + "secretNames: {aws: keys, huggingface: ''}")
    for name, url in (("bucket", "s3://bucket/path"), ("hub", "hf://org/name")):
        await world.create(name, url=url, image="", resourceProfile="", minReplicas=1)
    assert env(await pod_of(world, "bucket")) == {
        name: {"secretKeyRef": {"name": "keys", "key": key, "optional": True}}
        for name, key in (
            ("AWS_ACCESS_KEY_ID", "accessKeyID"),
            ("AWS_SECRET_ACCESS_KEY", "secretAccessKey"),
        )
    }
    assert env(await pod_of(world, "hub")) == {}


async def test_images_with_weights_are_pulled_with_the_configured_secret(world):
    pull = "modelServerPods: {imagePullSecrets: [{name: engines}]}"
    world.start(config=FAST + "secretNames: {oci: weights}\n" + pull)
    for name, url in (("image", "oci://registry.example/org/name:1"), ("hub", "hf://org/name")):
        await world.create(name, url=url, image="", resourceProfile="", minReplicas=1)
    secrets = {"image": ["engines", "weights"], "hub": ["engines"]}
    for name, expected in secrets.items():
        spec = (await pod_of(world, name))["spec"]
        assert [secret["name"] for secret in spec["imagePullSecrets"]] == expected


async def test_the_claim_of_a_cache_has_the_size_of_its_profile(world):
    shared = "sharedFilesystem: {storageClassName: nfs"
    profiles = f"a: {{{shared}, storageSize: 500Gi}}}}, b: {{{shared}}}}}"
    world.start(config=CONFIG + f"cacheProfiles: {{{profiles}}}")
    for profile, size in (("a", "500Gi"), ("b", "10Gi")):
        await world.create(profile, cacheProfile=profile)
        name = f"shared-model-cache-{profile}"

        async def claimed(name=name):
            claims, _ = await world.kube.list(PVCS, world.kube.namespace)
            return name in [claim["metadata"]["name"] for claim in claims]

        await until(claimed, f"claim {name}")
        claim = await world.kube.get(PVCS, name)
        assert claim["spec"]["resources"]["requests"]["storage"] == size


# -- devices -------------------------------------------------------------------------------------


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


# -- files, patches, priority --------------------------------------------------------------------


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


ENV = {"op": "add", "path": "/spec/containers/0/env/-", "value": {"name": "A", "value": "1"}}


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


# -- scale ---------------------------------------------------------------------------------------


async def test_replicas_set_by_scale_stay_within_their_bounds(world):
    world.start()
    await world.create(minReplicas=1, maxReplicas=3, scaleDownDelaySeconds=3600)
    await world.replicas_are(1, 1)
    await world.kube.patch(MODELS, "m", {"spec": {"replicas": 2}}, subresource="scale")
    await world.replicas_are(2, 2)
    await world.kube.patch(MODELS, "m", {"spec": {"replicas": 9}}, subresource="scale")
    await world.replicas_are(3, 3)
    assert (await world.model())["spec"]["replicas"] == 3
    await world.kube.patch(MODELS, "m", {"spec": {"replicas": 0}}, subresource="scale")
    await world.replicas_are(1, 1)
    assert (await world.model())["spec"]["replicas"] == 1


async def test_new_bounds_move_the_replicas(world):
    world.start()
    await world.create(minReplicas=0, scaleDownDelaySeconds=3600)
    await world.replicas_are(0, 0)
    await world.kube.patch(MODELS, "m", {"spec": {"minReplicas": 3}})
    await world.replicas_are(3, 3)
    await world.kube.patch(MODELS, "m", {"spec": {"minReplicas": 0, "maxReplicas": 2}})
    await world.replicas_are(2, 2)


async def test_scale_subresource_reports_replicas_and_selector(world):
    world.start()
    await world.create(minReplicas=2)
    await world.replicas_are(2, 2)
    path = MODELS._replace(plural="models/m")  # `get` of a subresource
    scale = await world.kube.get(path, "scale")
    assert scale["spec"]["replicas"] == 2
    assert scale["status"] == {"replicas": 2, "selector": "app=model,model=m"}
    found, _ = await world.kube.list(PODS, world.kube.namespace, labels=scale["status"]["selector"])
    assert len(found) == 2


async def test_lower_target_requests_adds_replicas(world):
    replica = world.start()
    await world.create(targetRequests=30)
    await world.replicas_are(0, 0)
    replica.loads.active_by_model["m"] = 25
    await world.replicas_are(1, 1)
    await world.kube.patch(MODELS, "m", {"spec": {"targetRequests": 5}})
    await world.replicas_are(5, 5)  # no maxReplicas: no limit


async def test_scale_down_waits_for_the_models_delay(world):
    replica = world.start()
    for name, delay_s in (("quick", 0), ("patient", 3600)):
        await world.create(name, targetRequests=1, scaleDownDelaySeconds=delay_s)
        replica.loads.active_by_model[name] = 3
    for name in ("quick", "patient"):
        await world.replicas_are(3, 3, name)
    replica.loads.active_by_model.clear()
    await world.replicas_are(0, 0, "quick")
    await world.replicas_are(3, 3, "patient")
    assert (await world.model("patient"))["spec"]["replicas"] == 3
    await world.kube.patch(MODELS, "patient", {"spec": {"scaleDownDelaySeconds": 0}})
    await world.replicas_are(0, 0, "patient")


async def test_load_does_not_scale_when_autoscaling_is_disabled(world):
    replica = world.start()
    fixed = {"autoscalingDisabled": True, "replicas": 1, "minReplicas": 0, "maxReplicas": 1}
    await world.create("fixed", targetRequests=1, **fixed)
    await world.create("other", targetRequests=1)
    for name in ("fixed", "other"):
        replica.loads.active_by_model[name] = 4
    await world.replicas_are(4, 4, "other")
    await world.replicas_are(1, 1, "fixed")
    await world.kube.patch(MODELS, "fixed", {"spec": {"replicas": 2}}, subresource="scale")
    await world.replicas_are(2, 2, "fixed")  # the bounds are the autoscaler's
    assert (await world.model("fixed"))["spec"]["replicas"] == 2
    await world.kube.patch(MODELS, "fixed", {"spec": {"autoscalingDisabled": False}})
    await world.replicas_are(1, 1, "fixed")


# -- routes and the list of models ---------------------------------------------------------------


async def test_load_balancing_reaches_the_route_and_rolls_no_pod(world):
    replica = world.start()
    await world.create(minReplicas=1)
    await until(lambda: replica.endpoints("m"), "an endpoint")

    def balancing():
        route = replica.routes["m"]
        factors = route.mean_load_factor, route.replication, route.prefix_char_length
        return (route.strategy, *factors, route.cache_load_factor)

    assert replica.routes["m"].capacity == 0
    assert balancing() == ("LeastLoad", 125, 20, 100, 0)
    before = replica.endpoints("m")
    hashed = {"meanLoadFactor": 150, "replication": 256, "prefixCharLength": 0}
    wanted = {"strategy": "PrefixHash", "prefixHash": hashed}
    await world.kube.patch(MODELS, "m", {"spec": {"loadBalancing": wanted}})
    await until(lambda: balancing() == ("PrefixHash", 150, 256, 0, 0), "the route has it")
    cached = {
        "strategy": "PrefixCache",
        "prefixCache": {"meanLoadFactor": 140},
        "maxRequestsPerReplica": 12,
    }
    await world.kube.patch(MODELS, "m", {"spec": {"loadBalancing": cached}})
    await until(lambda: balancing()[-1] == 140, "the route has the bound")
    assert replica.routes["m"].capacity == 12
    await until(world.is_up_to_date, "told")
    assert replica.endpoints("m") == before
    assert world.nodes.most == 1
    await world.kube.patch(MODELS, "m", {"spec": {"loadBalancing": None}})
    await until(lambda: balancing() == ("LeastLoad", 125, 20, 100, 0), "the defaults are back")


@contextlib.asynccontextmanager
async def gateway(routes):
    """A gateway that has these routes, and a session to ask it."""
    table = LoadTable.create(64, 1)
    publisher = Publisher(table)
    config = GatewayConfig()
    context = Context(config, lambda model: None)
    routing = Server(context, LoadTable.attach(table.fd, 0)).routes
    for model, route in routes.items():
        routing.apply(publisher.update(model, route))
    runner = make_runner(context)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        async with aiohttp.ClientSession(f"http://127.0.0.1:{runner.addresses[0][1]}") as session:
            yield session
    finally:
        await runner.cleanup()
        table.close()


async def listed(session, query="", *selectors):
    headers = [("X-Label-Selector", selector) for selector in selectors]
    async with session.get(f"/openai/v1/models{query}", headers=headers) as response:
        assert response.status == 200
        return {item["id"]: item for item in (await response.json())["data"]}


async def test_model_list_shows_owner_and_filters_by_features_and_labels(world):
    replica = world.start()
    for name, features, owner, labels in (
        ("chat", ["TextGeneration"], "meta", {"tenancy": "a"}),
        ("both", ["TextEmbedding", "TextGeneration"], "", {"tenancy": "b", "tier": "gold"}),
        ("rank", ["Reranking"], "baai", {"tenancy": "b"}),
        ("speech", ["SpeechToText"], "", {}),
        ("nothing", [], "", {}),
    ):
        await world.create(name, features=features, owner=owner)
        await world.kube.patch(MODELS, name, {"metadata": {"labels": labels}})
    labelled = {"features.kubeai.org/Reranking": "true", "tenancy": "b"}
    await until(lambda: len(replica.routes) == 5, "all routes")
    await until(lambda: replica.routes["rank"].labels == labelled, "labels")
    await until(lambda: "features.kubeai.org/TextEmbedding" in replica.routes["both"].labels, "")
    async with gateway(replica.routes) as session:
        found = await listed(session)
        assert set(found) == {"chat", "both"}
        assert (found["chat"]["owned_by"], found["both"]["owned_by"]) == ("meta", "")
        assert found["chat"]["features"] == ["TextGeneration"]
        made = await world.model("chat")
        assert made["metadata"]["creationTimestamp"].startswith("20")
        assert found["chat"]["created"] == replica.routes["chat"].created_s > 1_600_000_000
        for feature, names in (
            ("Reranking", {"rank"}),
            ("SpeechToText", {"speech"}),
            ("TextEmbedding", {"both"}),
        ):
            assert set(await listed(session, f"?feature={feature}")) == names
        assert set(await listed(session, "", "tenancy=b")) == {"both"}
        assert set(await listed(session, "", "tenancy in (a,b)", "tier!=gold")) == {"chat"}
        assert set(await listed(session, "?feature=Reranking", "tenancy=b")) == {"rank"}
        selector = "features.kubeai.org/TextEmbedding=true"
        assert set(await listed(session, "", selector)) == {"both"}


async def test_models_can_be_selected_by_their_features(world):
    world.start()
    await world.create("a", features=["TextGeneration", "Reranking"])
    await world.create("b", features=["TextGeneration"])

    async def names(feature):
        selector = f"features.kubeai.org/{feature}=true"
        models, _ = await world.kube.list(MODELS, world.kube.namespace, labels=selector)
        return {model["metadata"]["name"] for model in models}

    async def selected(feature, expected):
        async def as_expected():
            return await names(feature) == expected

        await until(as_expected, f"{feature}: {expected}")

    await selected("Reranking", {"a"})
    await selected("TextGeneration", {"a", "b"})
    await world.kube.patch(MODELS, "a", {"spec": {"features": ["SpeechToText"]}})
    await selected("SpeechToText", {"a"})
    await selected("TextGeneration", {"b"})
    await selected("Reranking", set())


async def test_annotations_say_where_the_endpoint_is_if_the_config_allows_it(world):
    given = {"model-pod-ip": "127.9.9.9", "model-pod-port": "4321", "other": "x"}
    model = {"metadata": {"name": "m", "annotations": given}}
    model["spec"] = {"url": "hf://org/name", "engine": "VLLM", "features": [], "minReplicas": 1}
    replica = world.start(config=CONFIG + "allowPodAddressOverride: true")
    await world.kube.create(MODELS, model)
    await until(lambda: replica.endpoints("m"), "an endpoint")
    (endpoint,) = replica.routes["m"].endpoints
    assert endpoint.address == "127.9.9.9:4321"
    assert "other" not in (await pod_of(world))["metadata"]["annotations"]


# -- what the API says of a Model ----------------------------------------------------------------


async def test_the_api_fills_in_the_defaults(world):
    spec = (await world.create())["spec"]
    assert spec["minReplicas"] == 0
    assert spec["targetRequests"] == 100
    assert spec["scaleDownDelaySeconds"] == 30
    assert spec["loadBalancing"] == {
        "strategy": "LeastLoad",
        "prefixHash": {"meanLoadFactor": 125, "replication": 20, "prefixCharLength": 100},
    }


FILE = {"path": "/a", "content": ""}
ADAPTER = {"name": "a", "url": "hf://org/lora"}
# A change of the Model, and what the refusal has to name.
LIMITS = [
    ({"name": "n" * 41}, "the name must not be longer than 40 characters"),
    ({"url": None}, "spec.url"),
    ({"engine": None}, "spec.engine"),
    ({"engine": "vllm"}, "spec.engine"),
    ({"features": None}, "spec.features"),
    ({"features": ["Singing"]}, "spec.features[0]"),
    ({"args": "--one"}, "spec.args"),
    ({"env": {"A": 1}}, "spec.env.A"),
    ({"envFrom": [{"secretRef": "s"}]}, "spec.envFrom[0].secretRef"),
    ({"replicas": -1}, "spec.replicas"),
    ({"replicas": "1"}, "spec.replicas"),
    ({"minReplicas": -1}, "spec.minReplicas"),
    ({"maxReplicas": 0}, "spec.maxReplicas"),
    ({"minReplicas": 3, "maxReplicas": 2}, "minReplicas must be less than or equal to maxReplicas"),
    ({"autoscalingDisabled": "yes"}, "spec.autoscalingDisabled"),
    ({"targetRequests": 0}, "spec.targetRequests"),
    ({"scaleDownDelaySeconds": -1}, "spec.scaleDownDelaySeconds"),
    ({"owner": 1}, "spec.owner"),
    ({"loadBalancing": {"strategy": "Random"}}, "spec.loadBalancing.strategy"),
    (
        {"loadBalancing": {"prefixHash": {"meanLoadFactor": 99}}},
        "spec.loadBalancing.prefixHash.meanLoadFactor",
    ),
    (
        {"loadBalancing": {"prefixHash": {"replication": 0}}},
        "spec.loadBalancing.prefixHash.replication",
    ),
    (
        {"loadBalancing": {"prefixHash": {"prefixCharLength": -1}}},
        "spec.loadBalancing.prefixHash.prefixCharLength",
    ),
    ({"files": [FILE | {"path": "a"}]}, "path must be absolute"),
    ({"files": [FILE | {"path": "/a:b"}]}, "must not contain a colon"),
    ({"files": [FILE | {"path": "/" + "a" * 1024}]}, "spec.files[0].path"),
    ({"files": [FILE | {"content": "x" * 100_001}]}, "spec.files[0].content"),
    ({"files": [{"path": "/a"}]}, "spec.files[0].content"),
    ({"files": [FILE, FILE]}, "each path in files must be unique"),
    ({"files": [FILE | {"path": f"/{n}"} for n in range(11)]}, "spec.files"),
    ({"priorityClassName": 1}, "spec.priorityClassName"),
    ({"jsonPatches": [{"op": "merge", "path": "/a"}]}, "spec.jsonPatches[0].op"),
    ({"jsonPatches": [{"op": "add", "value": 1}]}, "spec.jsonPatches[0].path"),
    ({"jsonPatches": [{"op": "add", "path": "a"}]}, "a JSON pointer must start with '/'"),
    ({"jsonPatches": [{"op": "move", "path": "/a"}]}, "from is required"),
    ({"jsonPatches": [{"op": "copy", "path": "/a", "from": "b"}]}, "a JSON pointer must start"),
    ({"jsonPatches": [ENV] * 65}, "spec.jsonPatches"),
    ({"adapters": [ADAPTER | {"name": "A_1"}]}, "spec.adapters[0].name"),
    ({"adapters": [ADAPTER | {"name": "a" * 64}]}, "spec.adapters[0].name"),
    ({"adapters": [ADAPTER | {"url": "ollama://q"}]}, "spec.adapters[0].url"),
    (
        {"cacheProfile": "c", "engine": "LlamaCpp"},
        "cacheProfile is not possible with the LlamaCpp engine",
    ),
    (
        {"adapters": [ADAPTER], "engine": "Infinity"},
        "adapters are only possible with the VLLM engine",
    ),
]


async def test_out_of_bounds_values_are_rejected_by_field(world):
    for change, named in LIMITS:
        said = await refusal(world, **change)
        assert named in said, said


async def test_values_at_the_bounds_are_accepted(world):
    for change in (
        {"name": "n" * 40},
        {"maxReplicas": 1},
        {"minReplicas": 2, "maxReplicas": 2},
        {"scaleDownDelaySeconds": 0, "targetRequests": 1},
        {"loadBalancing": {"prefixHash": {"meanLoadFactor": 100, "prefixCharLength": 0}}},
        {"files": [FILE | {"path": f"/{n}", "content": "x" * 100_000} for n in range(10)]},
        {"features": []},
        {"adapters": [ADAPTER | {"url": "pvc://claim/path"}]},
        {"adapters": [ADAPTER | {"name": "a" * 63}]},
    ):
        await world.create(**{"name": f"m-{secrets.token_hex(4)}", **change})


async def test_fields_that_the_cache_depends_on_are_immutable(world):
    await world.create("cached", cacheProfile="c")
    await world.create("plain")
    for change, why in (
        ({"cacheProfile": "d"}, "cacheProfile is immutable once it is set"),
        ({"cacheProfile": ""}, "cacheProfile is immutable once it is set"),
        ({"cacheProfile": None}, "cacheProfile is immutable once it is set"),
        ({"url": "hf://org/other"}, "url is immutable while cacheProfile is set"),
    ):
        with pytest.raises(ApiError, match=why) as caught:
            await world.kube.patch(MODELS, "cached", {"spec": change})
        assert caught.value.status == 422
    await world.kube.patch(MODELS, "cached", {"spec": {"args": ["--new"], "minReplicas": 1}})
    await world.kube.patch(MODELS, "plain", {"spec": {"url": "hf://org/other"}})
    await world.kube.patch(MODELS, "plain", {"spec": {"cacheProfile": "c"}})


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
