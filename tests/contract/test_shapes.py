"""Models in all the shapes that people have written them in for KubeAI: the pods that they give.

The shapes are those of KubeAI's published catalogue, examples and documentation, with names and
numbers of our own: which fields stand together, how values are written, what clients in Go and
Python send. Both APIs take each with strict validation, as kubectl asks for, and the default
config knows all profiles but those of TPUs, which upstream's values for GKE add.
"""

from __future__ import annotations

import pytest
import yaml
from operators import until

from kubeai.api.config.system import SystemConfig
from kubeai.kube.resources import CONFIGMAPS, MODELS

IMAGES = SystemConfig().model_servers
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
GPU_TOLERATION = {
    "key": "nvidia.com/gpu",
    "operator": "Equal",
    "value": "present",
    "effect": "NoSchedule",
}


def gpus(count, resource="nvidia.com/gpu", **requests):
    amounts = {resource: str(count)}
    return {"limits": amounts, "requests": amounts | requests}


def hub(**variables):
    return {"HF_TOKEN": ("kubeai-huggingface", "token")} | variables


SHAPES = {
    # A small model on CPUs: nothing but what is needed, the features as a flow list.
    "ollama": (
        """
        features: [TextGeneration]
        url: ollama://small:2b
        engine: OLlama
        resourceProfile: cpu:2
        """,
        {
            "image": IMAGES.ollama.images["default"],
            "args": [],
            "env": {"OLLAMA_HOST": "0.0.0.0:8000", "OLLAMA_KEEP_ALIVE": "999999h"},
            "resources": {"requests": {"cpu": "2", "memory": "4Gi"}},
            "startup": ["small:2b", "ollama", "pull", "load"],
        },
    ),
    "ollama-gpu": (
        """
        features: [TextGeneration]
        url: ollama://large:27b
        engine: OLlama
        resourceProfile: nvidia-gpu-l4:1
        minReplicas: 0
        """,
        {
            "image": IMAGES.ollama.images["nvidia-gpu"],
            "resources": gpus(1, cpu="6", memory="24Gi"),
            "tolerations": [GPU_TOLERATION],
            "startup": ["large:27b", "ollama-gpu", "pull", "load"],
        },
    ),
    "ollama-embedding": (
        """
        features: ["TextEmbedding"]
        owner: somebody
        url: "ollama://embed-text"
        engine: OLlama
        resourceProfile: cpu:1
        """,
        {"startup": ["embed-text", "ollama-embedding", "pull", "no-load"]},
    ),
    # The model is part of the image; or it is on a claim, with others.
    "ollama-built-in": (
        """
        features: ["TextGeneration"]
        owner: somebody
        image: registry.example/with-model:1
        url: "ollama://small:0.5b?pull=false"
        engine: OLlama
        resourceProfile: cpu:1
        """,
        {
            "image": "registry.example/with-model:1",
            "startup": ["small:0.5b", "ollama-built-in", "present", "load"],
        },
    ),
    "ollama-claim": (
        """
        url: pvc://model-pvc?model=small:0.5b
        minReplicas: 2
        engine: OLlama
        resourceProfile: "cpu:1"
        features: [TextGeneration]
        """,
        {
            "startup": ["small:0.5b", "ollama-claim", "present", "load"],
            "claim": ("model-pvc", None),
            "count": 2,
        },
    ),
    # vLLM: options with and without values, with underscores, a variable whose value is a number.
    "vllm-cpu": (
        """
        features: [TextGeneration]
        url: hf://org/model-8b
        engine: VLLM
        env:
          VLLM_CPU_KVCACHE_SPACE: "4"
        args:
          - --max-model-len=32768
          - --max-num-batched-token=32768
        resourceProfile: cpu:6
        minReplicas: 0
        """,
        {
            "image": IMAGES.vllm.images["cpu"],
            "args": [
                "org/model-8b",
                "--served-model-name=vllm-cpu",
                "--max-model-len=32768",
                "--max-num-batched-token=32768",
            ],
            "env": hub(VLLM_CPU_KVCACHE_SPACE="4"),
            "resources": {"requests": {"cpu": "6", "memory": "12Gi"}},
        },
    ),
    "vllm-eight-gpus": (
        """
        features: [TextGeneration]
        url: hf://org/model-405b
        engine: VLLM
        env:
          VLLM_ATTENTION_BACKEND: FLASHINFER
        args:
          - --tensor-parallel-size=8
          - --pipeline-parallel-size=1
          - --enable-prefix-caching
          - --enable-chunked-prefill=false
          - --gpu-memory-utilization=0.95
          - --load_format=bitsandbytes
          - --trust-remote-code
        resourceProfile: nvidia-gpu-h100:8
        targetRequests: 500
        """,
        {
            "image": IMAGES.vllm.images["nvidia-gpu"],
            "resources": gpus(8),
            "tolerations": [GPU_TOLERATION],
            "env": hub(VLLM_ATTENTION_BACKEND="FLASHINFER"),
        },
    ),
    "vllm-amd": (
        """
        features: [TextGeneration]
        url: hf://org/model-fp8
        engine: VLLM
        env:
          HIP_FORCE_DEV_KERNARG: "1"
          VLLM_USE_TRITON_FLASH_ATTN: "0"
        args: [--max-seq-len-to-capture=16384]
        resourceProfile: amd-gpu-mi300x:8
        targetRequests: 1024
        """,
        {
            "image": IMAGES.vllm.images["amd-gpu"],
            "resources": gpus(8, "amd.com/gpu"),
            "tolerations": [GPU_TOLERATION | {"key": "amd.com/gpu"}],
            "env": hub(HIP_FORCE_DEV_KERNARG="1", VLLM_USE_TRITON_FLASH_ATTN="0"),
        },
    ),
    "vllm-arm": (
        """
        features: [TextGeneration]
        url: hf://org/model-70b
        engine: VLLM
        args: [--cpu-offload-gb=240, --disable-log-requests]
        resourceProfile: nvidia-gpu-gh200:1
        minReplicas: 1
        maxReplicas: 1
        targetRequests: 200
        """,
        {"image": IMAGES.vllm.images["gh200"], "resources": gpus(1)},
    ),
    "vllm-fixed": (
        """
        features: [TextGeneration]
        url: hf://org/model
        engine: VLLM
        resourceProfile: nvidia-gpu-rtx4070-8gb:1
        minReplicas: 3
        maxReplicas: 3
        scaleDownDelaySeconds: 0
        loadBalancing:
          strategy: PrefixHash
          prefixHash:
            meanLoadFactor: 125
            prefixCharLength: 100
            replication: 256
        """,
        {"image": IMAGES.vllm.images["nvidia-gpu"], "resources": gpus(1), "count": 3},
    ),
    "vllm-claim": (
        """
        features: [TextGeneration]
        url: pvc://model-pvc/org/model
        engine: VLLM
        resourceProfile: cpu:1
        minReplicas: 2
        """,
        {
            "args": ["/model", "--served-model-name=vllm-claim"],
            "claim": ("model-pvc", "org/model"),
            "count": 2,
        },
    ),
    # A bucket without a cache, credentials from the Model's own Secret, a store of one's own.
    "vllm-bucket": (
        """
        features: [TextGeneration]
        owner: somebody
        url: s3://models/org/model-1b
        engine: VLLM
        env:
          AWS_ENDPOINT_URL: http://store:9000
        envFrom:
          - secretRef:
              name: store-keys
        """,
        {
            "args": [
                "s3://models/org/model-1b",
                "--served-model-name=vllm-bucket",
                "--load-format=runai_streamer",
            ],
            "env": {
                "AWS_ACCESS_KEY_ID": ("kubeai-aws", "accessKeyID"),
                "AWS_SECRET_ACCESS_KEY": ("kubeai-aws", "secretAccessKey"),
                "AWS_ENDPOINT_URL": "http://store:9000",
            },
            "envFrom": [{"secretRef": {"name": "store-keys"}}],
            "resources": {},
        },
    ),
    # The model in a container image.
    "vllm-image": (
        """
        features: [TextGeneration]
        url: oci://registry.example:5000/somebody/model-8b:latest
        engine: VLLM
        resourceProfile: nvidia-gpu-l4:1
        """,
        {
            "args": ["/model", "--served-model-name=vllm-image"],
            "claim": ("registry.example:5000/somebody/model-8b:latest", None),
            "resources": gpus(1, cpu="6", memory="24Gi"),
        },
    ),
    # A chat template beside other files, quoted paths, a block of text.
    "vllm-files": (
        """
        features: [TextGeneration]
        url: "hf://org/model-125m"
        engine: VLLM
        resourceProfile: "cpu:1"
        minReplicas: 1
        args:
          - --revision=0123456789abcdef0123456789abcdef01234567
          - --chat-template=/config/chat-template.jinja
        files:
          - path: "/config/chat-template.jinja"
            content: |
              {% for m in messages %}{{ 'Q:\\n' + m['content'] }}{% endfor %}
          - path: /config/prompt.txt
            content: "one line"
        """,
        {
            "files": {
                "_config_chat-template.jinja": "{% for m in messages %}"
                "{{ 'Q:\\n' + m['content'] }}{% endfor %}\n",
                "_config_prompt.txt": "one line",
            },
        },
    ),
    "vllm-embedding": (
        """
        features: [TextEmbedding]
        url: hf://org/embed-7b
        engine: VLLM
        resourceProfile: cpu:1
        args: [--gpu-memory-utilization=0.9]
        """,
        {"image": IMAGES.vllm.images["cpu"]},
    ),
    "infinity-embedding": (
        """
        features: [TextEmbedding]
        url: hf://org/embed-small
        engine: Infinity
        resourceProfile: cpu:1
        minReplicas: 0
        """,
        {
            "image": IMAGES.infinity.images["cpu"],
            "args": ["v2"],
            "env": hub(
                INFINITY_MODEL_ID="org/embed-small",
                INFINITY_SERVED_MODEL_NAME="infinity-embedding",
                INFINITY_URL_PREFIX="/v1",
                INFINITY_ENGINE="torch",
                INFINITY_PORT="8000",
            ),
        },
    ),
    "infinity-reranking": (
        """
        features: [Reranking]
        url: hf://org/rerank-base
        engine: Infinity
        resourceProfile: nvidia-gpu-t4:1
        """,
        {"image": IMAGES.infinity.images["nvidia-gpu"], "resources": gpus(1), "tolerations": []},
    ),
    "speech": (
        """
        features: [SpeechToText]
        owner: Somebody
        url: hf://Org/whisper-medium.en
        engine: FasterWhisper
        resourceProfile: cpu:1
        """,
        {
            "image": IMAGES.faster_whisper.images["default"],
            "args": [],
            "env": hub(
                PRELOAD_MODELS='["Org/whisper-medium.en"]',
                STT_MODEL_TTL="-1",
                WHISPER__TTL="-1",
                ENABLE_UI="false",
                UVICORN_HOST="0.0.0.0",
                UVICORN_PORT="8000",
            ),
        },
    ),
    # The engines that came later, as its documentation shows them.
    "sglang": (
        """
        features: [TextGeneration]
        url: hf://org/model-8b
        engine: SGLang
        args: [--tp-size=2]
        resourceProfile: nvidia-gpu-l4:2
        """,
        {
            "image": IMAGES.sglang.images["nvidia-gpu"],
            "args": [
                "--model-path=org/model-8b",
                "--served-model-name=sglang",
                "--host=0.0.0.0",
                "--port=8000",
                "--tp-size=2",
            ],
            "env": hub(),
            "resources": gpus(2, cpu="12", memory="48Gi"),
        },
    ),
    "llamacpp": (
        """
        features: [TextGeneration]
        url: hf://org/model-GGUF:Q4_K_M
        engine: LlamaCpp
        resourceProfile: cpu:2
        """,
        {
            "image": IMAGES.llama_cpp.images["cpu"],
            "args": [
                *("--host", "0.0.0.0", "--port", "8000", "--alias", "llamacpp", "--metrics"),
                *("-hf", "org/model-GGUF:Q4_K_M"),
            ],
            "env": hub(LLAMA_CACHE="/llama-cache"),
        },
    ),
    "llamacpp-claim": (
        """
        features: [TextEmbedding]
        url: pvc://model-pvc/embed?model=embed-q8_0.gguf
        engine: LlamaCpp
        resourceProfile: cpu:1
        """,
        {
            "args": [
                *("--host", "0.0.0.0", "--port", "8000", "--alias", "llamacpp-claim"),
                *("--metrics", "-m", "/model/embed-q8_0.gguf", "--embedding"),
            ],
            "claim": ("model-pvc", "embed"),
        },
    ),
    # As a client in Go sends it: fields that are not set are null or empty, not absent.
    "from-go": (
        """
        url: hf://org/model
        features: [TextGeneration]
        engine: VLLM
        minReplicas: 0
        targetRequests: null
        scaleDownDelaySeconds: null
        owner: ""
        loadBalancing: {prefixHash: {}}
        resourceProfile: cpu:1
        """,
        {"args": ["org/model", "--served-model-name=from-go"]},
    ),
}


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
