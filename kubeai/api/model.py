"""The Model resource (``kubeai.org/v1``) as typed values.

These types are the schema: `kubeai.api.crd` generates the CustomResourceDefinition from them, so a
field's type, default, limits and description are defined only here. The API server enforces the
limits. Decoding enforces types and enums only, so that one invalid stored object cannot prevent a
list from being read. Decoding drops unknown fields, so all writes to the API are patches, never a
whole Model.

Used by the operator (informers), podspec (pods), the console, `kubeai local` and the CRD generator.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

import msgspec

from kubeai.api.json_patch import JSON_PATCHES_MAX, JSONPatch
from kubeai.api.model_status import ModelStatus as ModelStatus
from kubeai.api.model_status import ModelStatusAdapter as ModelStatusAdapter
from kubeai.api.model_status import ModelStatusCache as ModelStatusCache
from kubeai.api.model_status import ModelStatusReplicas as ModelStatusReplicas
from kubeai.api.model_url import (
    ADAPTER_SCHEMES,
    CACHE_SCHEMES,
    MODEL_SCHEMES,
    URL_PATTERN,
    listed,
)
from kubeai.api.names import DURATION_PATTERN, Alias, Canary, ModelName
from kubeai.api.names import NAME_MAX_CHARS as NAME_MAX_CHARS
from kubeai.api.objects import ApiValue, ObjectMeta, Rule, doc
from kubeai.errors import ModelError

GROUP = "kubeai.org"
VERSION = "v1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND = "Model"
PLURAL = "models"

URL_MAX_CHARS = 2048
FILES_MAX = 10
ADAPTERS_MAX = 1000  # the API server rejects the rules of an unlimited list as too costly
FILE_PATH_MAX_CHARS = 1024
FILE_CONTENT_MAX_CHARS = 100_000
REPLICATION_MAX = 10_000
TARGET_REQUESTS_DEFAULT = 100
ALIASES_MAX = 100
FALLBACKS_MAX = 10

Engine = Literal["OLlama", "VLLM", "FasterWhisper", "Infinity", "SGLang", "LlamaCpp"]
Feature = Literal["TextGeneration", "TextEmbedding", "Reranking", "SpeechToText"]
Strategy = Literal["LeastLoad", "PrefixHash", "PrefixCache"]

# Annotations that are copied from a Model to its pods, and labels that KubeAI sets.
POD_IP_ANNOTATION = "model-pod-ip"
POD_PORT_ANNOTATION = "model-pod-port"
POD_MODEL_LABEL = "model"
POD_HASH_LABEL = "pod-hash"
# On the pods that serve requests, for the Services of `proxy.mode: external`. As in KubeAI in Go.
MODEL_LABEL = "kubeai.org/model"
MODEL_UID_LABEL = "kubeai.org/model-uid"
# On pods. When the leader began to drain it (Unix seconds). It gets no new requests from then on.
DRAINING_ANNOTATION = "kubeai.org/draining-since"
FEATURE_LABEL_PREFIX = "features.kubeai.org/"


def _one_of(schemes: tuple[str, ...], subject: str = "self") -> str:
    return " || ".join(f"{subject}.startsWith('{scheme}://')" for scheme in schemes)


_HAS_CACHE = "has(self.cacheProfile) && self.cacheProfile != ''"
_HAD_CACHE = "has(oldSelf.cacheProfile) && oldSelf.cacheProfile != ''"


class Adapter(ApiValue, frozen=True, kw_only=True):
    """A LoRA adapter that is served alongside the base model, as `<model>_<adapter>`."""

    name: Annotated[
        str,
        doc(
            "Name of the adapter, which clients append to the model's name after an underscore. "
            "Lower-case letters, digits and dashes.",
            maxLength=63,
            minLength=1,
            pattern="^[a-z0-9-]+$",
        ),
    ]
    url: Annotated[
        str,
        doc(
            f"URL of the adapter's weights: {listed(ADAPTER_SCHEMES)}. Weights at "
            "pvc://<claim>/<path> are used in place.",
            maxLength=URL_MAX_CHARS,
            rules=(
                Rule(
                    _one_of(ADAPTER_SCHEMES),
                    f"an adapter's url must start with one of {listed(ADAPTER_SCHEMES)}",
                ),
            ),
        ),
    ]


class LocalReference(ApiValue, frozen=True, kw_only=True):
    """A ConfigMap or Secret in the Model's namespace."""

    name: Annotated[str, doc("Name of the object.")] = ""
    optional: Annotated[bool, doc("Whether a pod may start while the object does not exist.")] = (
        False
    )


class EnvFrom(ApiValue, frozen=True, kw_only=True):
    """A source of environment variables: all keys of a ConfigMap or Secret."""

    prefix: Annotated[str, doc("Prepended to each key to form the variable's name.")] = ""
    config_map_ref: Annotated[LocalReference | None, doc("The ConfigMap to take keys from.")] = None
    secret_ref: Annotated[LocalReference | None, doc("The Secret to take keys from.")] = None


class PrefixHash(ApiValue, frozen=True, kw_only=True):
    """Settings of PrefixHash, which uses consistent hashing with bounded loads."""

    mean_load_factor: Annotated[
        int,
        doc(
            "Maximum load of a replica, in percent of the mean load of all replicas. Requests "
            "beyond it go to the next replica on the ring.",
            format="int32",
            minimum=100,
        ),
    ] = 125
    replication: Annotated[
        int,
        doc(
            "Number of virtual nodes per replica on the ring. More virtual nodes spread keys more "
            "evenly, but cost memory and slightly slow down each lookup.",
            format="int32",
            minimum=1,
            maximum=REPLICATION_MAX,
        ),
    ] = 20
    prefix_char_length: Annotated[
        int,
        doc(
            "Number of characters of a request's first input that are used for its hash key. The "
            "system prompt is always used in full and does not count towards this number.",
            format="int32",
            minimum=0,
        ),
    ] = 100


class PrefixCache(ApiValue, frozen=True, kw_only=True):
    """Settings of PrefixCache. None is needed."""

    mean_load_factor: Annotated[
        int | None,
        doc(
            "Maximum load of a replica, in percent of the mean load of all replicas. A request is "
            "not sent beyond it if another replica can serve it. Unset: there is no maximum.",
            format="int32",
            minimum=100,
        ),
    ] = None


class LoadBalancing(ApiValue, frozen=True, kw_only=True):
    """How requests are distributed over the Model's replicas."""

    strategy: Annotated[
        Strategy,
        doc(
            "LeastLoad sends each request to the replica with the least work. "
            "PrefixHash sends requests with the same prefix to the same replica, to make use of "
            "its prefix cache. PrefixCache sends each request to the replica where it costs all "
            "requests the least time: it knows what was sent where, and what is still to be done."
        ),
    ] = "LeastLoad"
    prefix_hash: Annotated[PrefixHash, doc("Settings of PrefixHash.")] = msgspec.field(
        default_factory=PrefixHash
    )
    prefix_cache: Annotated[PrefixCache | None, doc("Settings of PrefixCache.")] = None
    max_requests_per_replica: Annotated[
        int | None,
        doc(
            "Maximum number of requests in flight on a replica. Further requests wait in the "
            "gateway, in a queue that is fair to tenants, until a replica has room. 0: there is no "
            "maximum. Unset: gateway.queue.saturationPercent of targetRequests.",
            format="int32",
            minimum=0,
        ),
    ] = None


class File(ApiValue, frozen=True, kw_only=True):
    """A small file that is mounted in every pod of the Model."""

    path: Annotated[
        str,
        doc(
            "Path of the file in the engine's container. Must be absolute, without a colon.",
            maxLength=FILE_PATH_MAX_CHARS,
            minLength=1,
            rules=(
                Rule(
                    "self.startsWith('/') && !self.contains(':')",
                    "path must be absolute (start with /) and must not contain a colon",
                ),
            ),
        ),
    ]
    content: Annotated[str, doc("Content of the file, as text.", maxLength=FILE_CONTENT_MAX_CHARS)]


class ModelSpec(ApiValue, frozen=True, kw_only=True):
    """The desired state: the model, its engine, its resources and its replicas."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            f"!({_HAS_CACHE}) || {_one_of(CACHE_SCHEMES, 'self.url')}",
            f"cacheProfile is only possible with urls that start with {listed(CACHE_SCHEMES)}",
        ),
        Rule(
            f"!self.url.startsWith('gs://') || ({_HAS_CACHE})",
            "a url that starts with gs:// needs a cacheProfile",
        ),
        Rule(
            f"!self.url.startsWith('oss://') || ({_HAS_CACHE})",
            "a url that starts with oss:// needs a cacheProfile",
        ),
        Rule(
            "!has(self.maxReplicas) || !has(self.minReplicas)"
            " || self.minReplicas <= self.maxReplicas",
            "minReplicas must be less than or equal to maxReplicas",
        ),
        Rule(
            "!has(self.adapters) || self.adapters.size() == 0 || self.engine == 'VLLM'",
            "adapters are only possible with the VLLM engine",
        ),
        Rule(
            f"!({_HAS_CACHE}) || self.engine != 'LlamaCpp'",
            "cacheProfile is not possible with the LlamaCpp engine",
        ),
        Rule(
            f"!({_HAD_CACHE}) || ({_HAS_CACHE} && self.cacheProfile == oldSelf.cacheProfile)",
            "cacheProfile is immutable once it is set",
        ),
        Rule(
            f"!({_HAD_CACHE}) || self.url == oldSelf.url",
            "url is immutable while cacheProfile is set",
        ),
        Rule(
            "!has(self.files) || self.files.all(f, self.files.exists_one(g, g.path == f.path))",
            "each path in files must be unique",
        ),
        Rule(
            "!has(self.fallbacks) || self.fallbacks.all(f, self.fallbacks.exists_one(g, g == f))",
            "each entry of fallbacks must be unique",
        ),
    )

    url: Annotated[
        str,
        doc(
            "Where the model's weights come from.\n\n"
            "VLLM, SGLang, FasterWhisper and Infinity:\n"
            "hf://<org>/<name>, pvc://<claim>, pvc://<claim>/<path>, s3://<bucket>/<path>,\n"
            "gs://<bucket>/<path> and oss://<bucket>/<path>. gs and oss need a cacheProfile; s3\n"
            "needs one except with VLLM and SGLang.\n\n"
            "LlamaCpp:\n"
            "hf://<org>/<name>[:<quantization>], pvc://<claim>[/<path>]?model=<file>.gguf, and\n"
            "pvc://<claim>/<path>.gguf.\n\n"
            "OLlama:\n"
            "ollama://<name>[:<tag>], with ?insecure=true for a registry without TLS and\n"
            "?pull=false for a model that is already in the image;\n"
            "pvc://<claim>?model=<name>[:<tag>].\n\n"
            "All except OLlama:\n"
            "oci://<registry>/<repository>:<tag>, a container image with the weights, which is\n"
            "mounted as an image volume. LlamaCpp needs ?model=<file>.gguf.",
            maxLength=URL_MAX_CHARS,
            rules=(
                Rule(
                    _one_of(MODEL_SCHEMES),
                    f"url must start with one of {listed(MODEL_SCHEMES)}",
                ),
                Rule(
                    f"self.matches('{URL_PATTERN}')",
                    "between the scheme and the parameters, url may contain only letters, digits, "
                    "'.', '_', ':', '/' and '-'",
                ),
            ),
        ),
    ]
    engine: Annotated[Engine, doc("The model server that runs the model.")]
    features: Annotated[
        tuple[Feature, ...],
        doc("Capabilities of the model. They determine which APIs serve and list it."),
    ]
    adapters: Annotated[
        tuple[Adapter, ...],
        doc(
            "LoRA adapters served alongside the base model (VLLM only).",
            maxItems=ADAPTERS_MAX,
        ),
    ] = ()
    aliases: Annotated[
        tuple[Alias, ...],
        doc(
            "Further names that clients may use for this Model, for example "
            "meta-llama/Llama-3.1-8B-Instruct or gpt-4o. A name belongs to one Model of the "
            "namespace: the one that is called so, else the oldest one that lists it.",
            maxItems=ALIASES_MAX,
            **{"x-kubernetes-list-type": "set"},
        ),
    ] = ()
    fallbacks: Annotated[
        tuple[ModelName, ...],
        doc(
            "Models that serve this one's requests, in order, if it cannot: because no replica "
            "becomes ready within waitBeforeFallback, or all fail or are saturated. Their own "
            "fallbacks do not count.",
            maxItems=FALLBACKS_MAX,
        ),
    ] = ()
    wait_before_fallback: Annotated[
        str,
        doc(
            "How long a request waits for a replica before a fallback serves it, for example 0s "
            "or 1m30s. Default: 10s.",
            maxLength=32,
            pattern=DURATION_PATTERN,
        ),
    ] = ""
    canary: Annotated[
        Canary | None,
        doc("Another Model that serves a part of this one's clients, for example a new version."),
    ] = None
    resource_profile: Annotated[
        str,
        doc(
            "Resources of one replica, as <profile>:<count>: a resource profile of the system "
            "config and its multiple. For example, nvidia-gpu-l4:2 is two L4 GPUs.\n\n"
            "VLLM: <profile>:<count>:<nodes> runs a replica on several nodes, each with <count>\n"
            "units. Tensor parallelism uses the units of a node, pipeline parallelism the nodes.\n"
            "This requires the LeaderWorkerSet API."
        ),
    ] = ""
    cache_profile: Annotated[
        str,
        doc(
            "Cache profile of the system config that keeps the model's files on a shared file "
            "system, so that a new replica need not download them. Cannot be changed once set."
        ),
    ] = ""
    image: Annotated[
        str,
        doc(
            "Container image of the engine. Defaults to the system config's image for the engine "
            "and the resource profile."
        ),
    ] = ""
    args: Annotated[
        tuple[str, ...], doc("Arguments for the engine, appended to those that KubeAI sets.")
    ] = ()
    env: Annotated[
        dict[str, str],
        doc("Environment variables for the engine. They override those that KubeAI sets."),
    ] = msgspec.field(default_factory=dict)
    env_from: Annotated[
        tuple[EnvFrom, ...],
        doc("ConfigMaps and Secrets whose keys become environment variables of the engine."),
    ] = ()
    replicas: Annotated[
        int | None,
        doc(
            "Desired number of replicas. KubeAI sets it, within minReplicas and maxReplicas, "
            "unless autoscalingDisabled is true.",
            format="int32",
            minimum=0,
        ),
    ] = None
    min_replicas: Annotated[
        int,
        doc(
            "Minimum number of replicas. With 0, an idle model is scaled to zero, and the next "
            "request scales it up again.",
            format="int32",
            minimum=0,
        ),
    ] = 0
    max_replicas: Annotated[
        int | None,
        doc(
            "Maximum number of replicas. Unlimited if empty.",
            format="int32",
            minimum=1,
        ),
    ] = None
    autoscaling_disabled: Annotated[
        bool, doc("If true, KubeAI does not change replicas; you set it yourself.")
    ] = False
    target_requests: Annotated[
        int,
        doc(
            "Target for the average number of active requests per replica. The autoscaler scales "
            "the replicas to meet it. OLlama also serves this number in parallel, unless it is "
            "the default or env sets OLLAMA_NUM_PARALLEL.",
            format="int32",
            minimum=1,
        ),
    ] = TARGET_REQUESTS_DEFAULT
    scale_down_delay_seconds: Annotated[
        int,
        doc(
            "How long fewer replicas must have been sufficient before the Model is scaled down.",
            format="int64",
            minimum=0,
        ),
    ] = 30
    owner: Annotated[
        str,
        doc("Deprecated. Shown as owned_by in the list of models and not used otherwise."),
    ] = ""
    load_balancing: Annotated[LoadBalancing, doc("How requests are distributed over replicas.")] = (
        msgspec.field(default_factory=LoadBalancing)
    )
    files: Annotated[
        tuple[File, ...],
        doc("Small files that are mounted in the engine's container.", maxItems=FILES_MAX),
    ] = ()
    priority_class_name: Annotated[
        str,
        doc(
            "PriorityClass of the Model's pods. It must exist before the pods are created. Pods of "
            "lower priority are preempted by pods of higher priority."
        ),
    ] = ""
    json_patches: Annotated[
        tuple[JSONPatch, ...],
        doc(
            "Experimental. JSON Patch operations (RFC 6902) on the Model's pods, applied after "
            "those of the system config. They cannot remove KubeAI's labels or the container "
            "named server.",
            maxItems=JSON_PATCHES_MAX,
        ),
    ] = ()


class Model(ApiValue, frozen=True, kw_only=True):
    """A model that KubeAI serves: its weights, its engine, and how it is scaled."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            f"size(self.metadata.name) <= {NAME_MAX_CHARS}",
            f"the name must not be longer than {NAME_MAX_CHARS} characters",
        ),
    )

    api_version: str = API_VERSION
    kind: str = KIND
    metadata: ObjectMeta = msgspec.field(default_factory=ObjectMeta)
    spec: ModelSpec
    status: ModelStatus = msgspec.field(default_factory=ModelStatus)


_ERROR_PATH = re.compile(
    r"^(?P<message>.*?)(?: - at `(?:key in )?\$\.?(?P<path>.*?)`)?$", re.DOTALL
)


def decode_model(source: bytes | str | dict[str, Any]) -> Model:
    """Decode a Model from JSON or from a plain object. ModelError names the invalid field."""
    try:
        if isinstance(source, dict):
            return msgspec.convert(source, Model)
        return msgspec.json.decode(source, type=Model)
    except msgspec.MsgspecError as error:
        match = _ERROR_PATH.match(str(error))
        assert match is not None
        raise ModelError(match["path"] or "model", match["message"]) from None
