"""The Model resource (``kubeai.org/v1``) as typed values.

These types are the schema: `kubeai.api.crd` generates the CustomResourceDefinition from them, so a
field's type, default, limits and description are defined only here. The API server enforces the
limits. Decoding enforces types and enums only, so that one invalid stored object cannot prevent a
list from being read. Decoding drops unknown fields, so all writes to the API are patches, never a
whole Model.

Used by the operator (informers), the engines (pods), `kubeai local` and the CRD generator.
"""

from __future__ import annotations

import re
from datetime import datetime
from typing import Annotated, Any, ClassVar, Literal, NamedTuple
from urllib.parse import parse_qsl

import msgspec
from msgspec import Meta, Struct

from kubeai.errors import ModelError

GROUP = "kubeai.org"
VERSION = "v1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND = "Model"
PLURAL = "models"

NAME_MAX_CHARS = 40
URL_MAX_CHARS = 2048
FILES_MAX = 10
FILE_PATH_MAX_CHARS = 1024
FILE_CONTENT_MAX_CHARS = 100_000
REPLICATION_MAX = 10_000

Engine = Literal["OLlama", "VLLM", "FasterWhisper", "Infinity"]
Feature = Literal["TextGeneration", "TextEmbedding", "Reranking", "SpeechToText"]
Strategy = Literal["LeastLoad", "PrefixHash"]
Scheme = Literal["hf", "pvc", "ollama", "s3", "gs", "oss"]

MODEL_SCHEMES: tuple[Scheme, ...] = ("hf", "pvc", "ollama", "s3", "gs", "oss")
CACHE_SCHEMES: tuple[Scheme, ...] = ("hf", "s3", "gs", "oss")  # supported by the loader

# Annotations that are copied from a Model to its pods, and labels that KubeAI sets.
POD_IP_ANNOTATION = "model-pod-ip"
POD_PORT_ANNOTATION = "model-pod-port"
POD_MODEL_LABEL = "model"
POD_HASH_LABEL = "pod-hash"
FEATURE_LABEL_PREFIX = "features.kubeai.org/"


class Rule(NamedTuple):
    """One CEL rule of the schema (``x-kubernetes-validations``)."""

    rule: str
    message: str


def doc(description: str, *, rules: tuple[Rule, ...] = (), **schema: Any) -> Meta:
    """A field's entry in the CRD: its description, limits and CEL rules."""
    if rules:
        schema["x-kubernetes-validations"] = [r._asdict() for r in rules]
    return Meta(description=description, extra_json_schema=schema or None)


def _one_of(schemes: tuple[str, ...], subject: str = "self") -> str:
    return " || ".join(f"{subject}.startsWith('{scheme}://')" for scheme in schemes)


def _listed(schemes: tuple[str, ...]) -> str:
    return ", ".join(f"{scheme}://" for scheme in schemes)


_HAS_CACHE = "has(self.cacheProfile) && self.cacheProfile != ''"
_HAD_CACHE = "has(oldSelf.cacheProfile) && oldSelf.cacheProfile != ''"


class _Object(Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """Base of all API values: frozen, camelCase on the wire, defaults omitted."""

    RULES: ClassVar[tuple[Rule, ...]] = ()


class OwnerReference(_Object, frozen=True, kw_only=True):
    """A reference to an owner; the object is deleted together with it."""

    api_version: str
    kind: str
    name: str
    uid: str
    controller: bool = False
    block_owner_deletion: bool = False


class ObjectMeta(_Object, frozen=True, kw_only=True):
    """The fields of Kubernetes' ObjectMeta that KubeAI reads."""

    name: str = ""
    namespace: str = ""
    uid: str = ""
    resource_version: str = ""
    generation: int = 0
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    creation_timestamp: datetime | None = None
    deletion_timestamp: datetime | None = None
    deletion_grace_period_seconds: int | None = None
    finalizers: tuple[str, ...] = ()
    owner_references: tuple[OwnerReference, ...] = ()

    @property
    def version(self) -> int:
        """The resourceVersion as a number, which orders the versions of one object.

        Versions within one resource are comparable (officially since Kubernetes 1.35, in practice
        since etcd 3). 0 if it is not a number.
        """
        return int(self.resource_version) if self.resource_version.isdecimal() else 0


class Adapter(_Object, frozen=True, kw_only=True):
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
            f"Where the adapter's weights are: {_listed(CACHE_SCHEMES)}.",
            maxLength=URL_MAX_CHARS,
            rules=(
                Rule(
                    _one_of(CACHE_SCHEMES),
                    f"an adapter's url must start with one of {_listed(CACHE_SCHEMES)}",
                ),
            ),
        ),
    ]


class LocalReference(_Object, frozen=True, kw_only=True):
    """A ConfigMap or Secret in the Model's namespace."""

    name: Annotated[str, doc("Name of the object.")] = ""
    optional: Annotated[bool, doc("Whether a pod may start while the object does not exist.")] = (
        False
    )


class EnvFrom(_Object, frozen=True, kw_only=True):
    """A source of environment variables: all keys of a ConfigMap or Secret."""

    prefix: Annotated[str, doc("Prepended to each key to form the variable's name.")] = ""
    config_map_ref: Annotated[LocalReference | None, doc("The ConfigMap to take keys from.")] = None
    secret_ref: Annotated[LocalReference | None, doc("The Secret to take keys from.")] = None


class PrefixHash(_Object, frozen=True, kw_only=True):
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


class LoadBalancing(_Object, frozen=True, kw_only=True):
    """How requests are distributed over the Model's replicas."""

    strategy: Annotated[
        Strategy,
        doc(
            "LeastLoad sends each request to the replica with the fewest in-flight requests. "
            "PrefixHash sends requests with the same prefix to the same replica, to make use of "
            "its prefix cache."
        ),
    ] = "LeastLoad"
    prefix_hash: Annotated[PrefixHash, doc("Settings of PrefixHash.")] = msgspec.field(
        default_factory=PrefixHash
    )


class File(_Object, frozen=True, kw_only=True):
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


class ModelSpec(_Object, frozen=True, kw_only=True):
    """The desired state: the model, its engine, its resources and its replicas."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            f"!({_HAS_CACHE}) || {_one_of(CACHE_SCHEMES, 'self.url')}",
            f"cacheProfile is only possible with urls that start with {_listed(CACHE_SCHEMES)}",
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
    )

    url: Annotated[
        str,
        doc(
            "Where the model's weights come from.\n\n"
            "VLLM, FasterWhisper and Infinity:\n"
            "hf://<org>/<name>, pvc://<claim>, pvc://<claim>/<path>, s3://<bucket>/<path>,\n"
            "gs://<bucket>/<path> and oss://<bucket>/<path>. gs and oss need a cacheProfile; s3\n"
            "needs one except with VLLM.\n\n"
            "OLlama:\n"
            "ollama://<name>[:<tag>], with ?insecure=true for a registry without TLS and\n"
            "?pull=false for a model that is already in the image;\n"
            "pvc://<claim>?model=<name>[:<tag>].",
            maxLength=URL_MAX_CHARS,
            rules=(
                Rule(
                    _one_of(MODEL_SCHEMES),
                    f"url must start with one of {_listed(MODEL_SCHEMES)}",
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
        tuple[Adapter, ...], doc("LoRA adapters served alongside the base model (VLLM only).")
    ] = ()
    resource_profile: Annotated[
        str,
        doc(
            "Resources of one replica, as <profile>:<count>: a resource profile of the system "
            "config and its multiple. For example, nvidia-gpu-l4:2 is two L4 GPUs."
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
    ] = {}
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
            "the replicas to meet it.",
            format="int32",
            minimum=1,
        ),
    ] = 100
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


class Condition(_Object, frozen=True, kw_only=True):
    """One aspect of the Model's state, with its reason."""

    type: Annotated[str, doc("Type of the condition, e.g. Ready.", maxLength=316)]
    status: Annotated[Literal["True", "False", "Unknown"], doc("Status of the condition.")]
    reason: Annotated[
        str,
        doc(
            "Machine-readable reason for the status, as one word.",
            maxLength=1024,
            pattern="^([A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?)?$",
        ),
    ] = ""
    message: Annotated[str, doc("Human-readable details.", maxLength=32768)] = ""
    last_transition_time: Annotated[
        datetime | None, doc("When the status last changed.", format="date-time")
    ] = None
    observed_generation: Annotated[
        int | None,
        doc("The metadata.generation that the condition is based on.", format="int64", minimum=0),
    ] = None


class ModelStatusReplicas(_Object, frozen=True, kw_only=True):
    """The number of the Model's pods."""

    all: Annotated[int, doc("Pods that exist and are not being deleted.", format="int32")]
    ready: Annotated[int, doc("Pods that are ready to serve requests.", format="int32")]


class ModelStatusCache(_Object, frozen=True, kw_only=True):
    """The state of the Model's files in its cache."""

    loaded: Annotated[bool, doc("Whether all files are in the cache.")]


class ModelStatusAdapter(_Object, frozen=True, kw_only=True):
    """An adapter that could not be loaded or unloaded."""

    name: Annotated[str, doc("The adapter's name.")]
    message: Annotated[str, doc("The error on one of the pods. KubeAI retries.")] = ""


class ModelStatus(_Object, frozen=True, kw_only=True):
    """The observed state of the Model."""

    replicas: Annotated[ModelStatusReplicas | None, doc("Numbers of pods.")] = None
    selector: Annotated[
        str, doc("Label selector of the Model's pods, for the scale subresource.")
    ] = ""
    cache: Annotated[
        ModelStatusCache | None, doc("State of the cache; absent without a cacheProfile.")
    ] = None
    failed_adapters: Annotated[
        tuple[ModelStatusAdapter, ...],
        doc(
            "Adapters that at least one pod could not load or unload.",
            **{"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
        ),
    ] = ()
    conditions: Annotated[
        tuple[Condition, ...],
        doc(
            "The Model's current state, including why it does not serve.",
            **{"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
        ),
    ] = ()


class Model(_Object, frozen=True, kw_only=True):
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


class ModelURL(Struct, frozen=True):
    """A Model's parsed URL."""

    original: str
    scheme: Scheme
    ref: str  # everything between :// and ?
    name: str  # ref up to its first slash: organisation, bucket or claim
    path: str = ""  # ref after its first slash
    model: str = ""  # ?model=, the name of the model on a claim (OLlama)
    insecure: bool = False  # ?insecure=true, pull without TLS
    pull: bool = True  # ?pull=false, the model is already in the image

    @property
    def base(self) -> str:
        """The URL without its parameters."""
        return f"{self.scheme}://{self.ref}"


_URL = re.compile(r"(?P<scheme>[a-z0-9]+)://(?P<ref>[^?]+)(?:\?(?P<params>.*))?", re.DOTALL)
_REF = re.compile(r"[A-Za-z0-9_][^\s\x00-\x1f\x7f]*")
_CLAIM = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")
_OLLAMA_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:/@-]*")
# Supported parameters by scheme.
_PARAMS: dict[str, frozenset[str]] = {
    "pvc": frozenset({"model"}),
    "ollama": frozenset({"insecure", "pull"}),
}


def parse_url(url: str, field: str = "spec.url") -> ModelURL:
    """Parse a model's URL. ModelError on ``field`` if it is invalid or its scheme unsupported."""
    match = _URL.fullmatch(url)
    if match is None or match["scheme"] not in MODEL_SCHEMES:
        raise ModelError(
            field,
            f"{url!r} must be a URL with one of the schemes {_listed(MODEL_SCHEMES)}",
            "InvalidURL",
        )
    scheme: Scheme = match["scheme"]
    ref = match["ref"]
    if not _REF.fullmatch(ref):
        raise ModelError(
            field,
            f"{url!r}: the part after {scheme}:// must start with a letter or digit and must not "
            "contain white space or control characters",
            "InvalidURL",
        )
    name, _, path = ref.partition("/")
    if scheme == "pvc":
        _check_claim(url, name, path, field)
    if scheme == "ollama":
        _check_ollama_name(url, ref, field)
    params = _params(url, scheme, match["params"], field)
    if "model" in params:
        _check_ollama_name(url, params["model"], field)
    return ModelURL(
        original=url,
        scheme=scheme,
        ref=ref,
        name=name,
        path=path,
        model=params.get("model", ""),
        insecure=_flag(url, params, "insecure", False, field),
        pull=_flag(url, params, "pull", True, field),
    )


def _check_claim(url: str, claim: str, path: str, field: str) -> None:
    if not _CLAIM.fullmatch(claim):
        raise ModelError(
            field, f"{url!r}: {claim!r} is not a valid PersistentVolumeClaim name", "InvalidURL"
        )
    if ".." in path.split("/"):  # Kubernetes rejects such a subPath
        raise ModelError(field, f"{url!r}: the path must not contain '..'", "InvalidURL")


def _check_ollama_name(url: str, name: str, field: str) -> None:
    if not _OLLAMA_NAME.fullmatch(name):
        raise ModelError(field, f"{url!r}: {name!r} is not a valid Ollama model name", "InvalidURL")


def _params(url: str, scheme: str, query: str | None, field: str) -> dict[str, str]:
    params: dict[str, str] = {}
    known = _PARAMS.get(scheme, frozenset())
    for key, value in parse_qsl(query or "", keep_blank_values=True):
        if key not in known:
            means = f"known: {', '.join(sorted(known))}" if known else "none are known"
            raise ModelError(
                field,
                f"{url!r}: unknown parameter {key!r} for {scheme}:// ({means})",
                "InvalidURL",
            )
        if key in params:
            raise ModelError(field, f"{url!r}: duplicate parameter {key!r}", "InvalidURL")
        params[key] = value
    return params


def _flag(url: str, params: dict[str, str], key: str, default: bool, field: str) -> bool:
    value = params.get(key)
    if value is None:
        return default
    if value.lower() not in ("true", "false"):
        raise ModelError(field, f"{url!r}: {key} must be true or false", "InvalidURL")
    return value.lower() == "true"
