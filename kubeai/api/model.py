"""The Model resource (``kubeai.org/v1``) as typed values.

These types are the schema: `kubeai.api.crd` makes the CustomResourceDefinition from them, so a
field's type, default, limits and description stand here and nowhere else. The limits are enforced
by the API server. Decoding enforces types and enums only, so that one odd stored object cannot
stop a list from being read. Decoding drops unknown fields, and whoever writes to the API sends
patches, never a whole Model.

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
CACHE_SCHEMES: tuple[Scheme, ...] = ("hf", "s3", "gs", "oss")  # what a loader can fetch

# Annotations on a Model that reach its pods, and labels that KubeAI sets.
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
    """What the CRD says of a field: its description, its limits, its rules."""
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
    """What all API values share: frozen, camelCase on the wire, defaults left out."""

    RULES: ClassVar[tuple[Rule, ...]] = ()


class OwnerReference(_Object, frozen=True, kw_only=True):
    """An object that this one is deleted with."""

    api_version: str
    kind: str
    name: str
    uid: str
    controller: bool = False
    block_owner_deletion: bool = False


class ObjectMeta(_Object, frozen=True, kw_only=True):
    """The part of Kubernetes' metadata that KubeAI reads, of any object."""

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
        """The resourceVersion as a number, by which one object's versions are ordered.

        Kubernetes lets those of one resource be compared (since 1.35, and in fact ever since
        etcd 3). 0 where it is no number.
        """
        return int(self.resource_version) if self.resource_version.isdecimal() else 0


class Adapter(_Object, frozen=True, kw_only=True):
    """A LoRA adapter that is served beside the base model, as `<model>_<adapter>`."""

    name: Annotated[
        str,
        doc(
            "What clients write after the underscore: lower-case letters, digits and dashes.",
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
    """Every key of a ConfigMap or Secret as an environment variable."""

    prefix: Annotated[str, doc("Put before each key to make the variable's name.")] = ""
    config_map_ref: Annotated[LocalReference | None, doc("The ConfigMap to take keys from.")] = None
    secret_ref: Annotated[LocalReference | None, doc("The Secret to take keys from.")] = None


class PrefixHash(_Object, frozen=True, kw_only=True):
    """How PrefixHash spreads requests over replicas (consistent hashing with bounded loads)."""

    mean_load_factor: Annotated[
        int,
        doc(
            "How far above the mean a replica's load may go before its requests move on to the "
            "next one on the ring, in percent of the mean.",
            format="int32",
            minimum=100,
        ),
    ] = 125
    replication: Annotated[
        int,
        doc(
            "Virtual nodes of each replica on the ring. More of them spread keys more evenly and "
            "cost memory and a little time in each lookup.",
            format="int32",
            minimum=1,
            maximum=REPLICATION_MAX,
        ),
    ] = 20
    prefix_char_length: Annotated[
        int,
        doc(
            "How many characters of a request's first input make its hash key. The system prompt "
            "always counts as a whole and is not part of this number.",
            format="int32",
            minimum=0,
        ),
    ] = 100


class LoadBalancing(_Object, frozen=True, kw_only=True):
    """How requests are spread over the Model's replicas."""

    strategy: Annotated[
        Strategy,
        doc(
            "LeastLoad sends a request to the replica with the fewest in flight. PrefixHash sends "
            "requests that begin alike to the same replica, whose cache then knows them."
        ),
    ] = "LeastLoad"
    prefix_hash: Annotated[PrefixHash, doc("Settings of PrefixHash.")] = msgspec.field(
        default_factory=PrefixHash
    )


class File(_Object, frozen=True, kw_only=True):
    """A small file that every pod of the Model finds at a given path."""

    path: Annotated[
        str,
        doc(
            "Where the engine finds the file: an absolute path without a colon.",
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
    content: Annotated[str, doc("What the file holds, as text.", maxLength=FILE_CONTENT_MAX_CHARS)]


class ModelSpec(_Object, frozen=True, kw_only=True):
    """What should be served, by which engine, on what, and how many times."""

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
            "gs://<bucket>/<path> and oss://<bucket>/<path> (these two with a cacheProfile;\n"
            "s3 without one only on VLLM).\n\n"
            "OLlama:\n"
            "ollama://<name>[:<tag>], with ?insecure=true for a registry without TLS and\n"
            "?pull=false for a model that is in the image already;\n"
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
        doc("What the model can do, and so which APIs it is offered on and listed for."),
    ]
    adapters: Annotated[
        tuple[Adapter, ...], doc("LoRA adapters served beside the base model (VLLM only).")
    ] = ()
    resource_profile: Annotated[
        str,
        doc(
            "What hardware one replica gets: <profile>:<count>, a resource profile of the system "
            "config and how many times of it. nvidia-gpu-l4:2 is two L4 GPUs."
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
            "Container image of the engine. When empty, the system config's image for the engine "
            "and the resource profile."
        ),
    ] = ""
    args: Annotated[
        tuple[str, ...], doc("Arguments for the engine, after those that KubeAI sets.")
    ] = ()
    env: Annotated[
        dict[str, str],
        doc("Environment variables for the engine. They win over those that KubeAI sets."),
    ] = {}
    env_from: Annotated[
        tuple[EnvFrom, ...],
        doc("ConfigMaps and Secrets whose keys become environment variables of the engine."),
    ] = ()
    replicas: Annotated[
        int | None,
        doc(
            "How many replicas should serve the model. KubeAI sets it, within minReplicas and "
            "maxReplicas, unless autoscalingDisabled is true.",
            format="int32",
            minimum=0,
        ),
    ] = None
    min_replicas: Annotated[
        int,
        doc(
            "KubeAI never scales below this number of replicas. 0 lets an idle model go away; the "
            "next request brings it back.",
            format="int32",
            minimum=0,
        ),
    ] = 0
    max_replicas: Annotated[
        int | None,
        doc(
            "KubeAI never scales above this number of replicas. No limit when empty.",
            format="int32",
            minimum=1,
        ),
    ] = None
    autoscaling_disabled: Annotated[
        bool, doc("True leaves replicas to you: KubeAI does not change the number.")
    ] = False
    target_requests: Annotated[
        int,
        doc(
            "How many requests in flight one replica should have on average. The autoscaler "
            "wants so many replicas that this holds.",
            format="int32",
            minimum=1,
        ),
    ] = 100
    scale_down_delay_seconds: Annotated[
        int,
        doc(
            "How long fewer replicas must have been enough before one is taken away.",
            format="int64",
            minimum=0,
        ),
    ] = 30
    owner: Annotated[
        str,
        doc("Deprecated. Shown as owned_by in the list of models and used for nothing else."),
    ] = ""
    load_balancing: Annotated[LoadBalancing, doc("How requests are spread over the replicas.")] = (
        msgspec.field(default_factory=LoadBalancing)
    )
    files: Annotated[
        tuple[File, ...],
        doc("Small files that the engine finds in its container.", maxItems=FILES_MAX),
    ] = ()
    priority_class_name: Annotated[
        str,
        doc(
            "PriorityClass of the Model's pods. It must exist before the pods are made. Pods of "
            "a lower priority make room for pods of a higher one."
        ),
    ] = ""


class Condition(_Object, frozen=True, kw_only=True):
    """One statement about the Model's state, with its reason."""

    type: Annotated[str, doc("What the statement is about, e.g. Ready.", maxLength=316)]
    status: Annotated[Literal["True", "False", "Unknown"], doc("Whether it holds.")]
    reason: Annotated[
        str,
        doc(
            "Why, as one word for programs.",
            maxLength=1024,
            pattern="^([A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?)?$",
        ),
    ] = ""
    message: Annotated[str, doc("Why, in words for people.", maxLength=32768)] = ""
    last_transition_time: Annotated[
        datetime | None, doc("When the status last changed.", format="date-time")
    ] = None
    observed_generation: Annotated[
        int | None,
        doc("The metadata.generation that it was made from.", format="int64", minimum=0),
    ] = None


class ModelStatusReplicas(_Object, frozen=True, kw_only=True):
    """How many pods the Model has."""

    all: Annotated[int, doc("Pods that exist and are not being deleted.", format="int32")]
    ready: Annotated[int, doc("Pods that can be sent requests.", format="int32")]


class ModelStatusCache(_Object, frozen=True, kw_only=True):
    """The state of the Model's files in its cache."""

    loaded: Annotated[bool, doc("Whether all files are in the cache.")]


class ModelStatusAdapter(_Object, frozen=True, kw_only=True):
    """An adapter that could not be loaded or unloaded."""

    name: Annotated[str, doc("The adapter's name.")]
    message: Annotated[str, doc("Why, on one of the pods; it is tried again.")] = ""


class ModelStatus(_Object, frozen=True, kw_only=True):
    """What KubeAI has seen of the Model's pods."""

    replicas: Annotated[ModelStatusReplicas | None, doc("How many pods there are.")] = None
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
            "What is going on, and why the Model does not serve when it does not.",
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
    """A Model from JSON or from a decoded object; ModelError names the field that is wrong."""
    try:
        if isinstance(source, dict):
            return msgspec.convert(source, Model)
        return msgspec.json.decode(source, type=Model)
    except msgspec.MsgspecError as error:
        match = _ERROR_PATH.match(str(error))
        assert match is not None
        raise ModelError(match["path"] or "model", match["message"]) from None


class ModelURL(Struct, frozen=True):
    """A Model's url, taken apart."""

    original: str
    scheme: Scheme
    ref: str  # all between :// and ?
    name: str  # ref up to its first slash: organisation, bucket or claim
    path: str = ""  # the rest of ref
    model: str = ""  # ?model=, the name of the model on a claim (OLlama)
    insecure: bool = False  # ?insecure=true, pull without TLS
    pull: bool = True  # ?pull=false, the model is already there

    @property
    def base(self) -> str:
        """The URL without its parameters."""
        return f"{self.scheme}://{self.ref}"


_URL = re.compile(r"(?P<scheme>[a-z0-9]+)://(?P<ref>[^?]+)(?:\?(?P<params>.*))?", re.DOTALL)
_REF = re.compile(r"[A-Za-z0-9_][^\s\x00-\x1f\x7f]*")
_CLAIM = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")
_OLLAMA_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:/@-]*")
# Which parameter means something, by scheme.
_PARAMS: dict[str, frozenset[str]] = {
    "pvc": frozenset({"model"}),
    "ollama": frozenset({"insecure", "pull"}),
}


def parse_url(url: str, field: str = "spec.url") -> ModelURL:
    """Take a model's URL apart; ModelError on ``field`` when it is not one that can be served."""
    match = _URL.fullmatch(url)
    if match is None or match["scheme"] not in MODEL_SCHEMES:
        raise ModelError(field, f"{url!r} must be a URL of {_listed(MODEL_SCHEMES)}", "InvalidURL")
    scheme: Scheme = match["scheme"]
    ref = match["ref"]
    if not _REF.fullmatch(ref):
        raise ModelError(
            field,
            f"{url!r}: what follows {scheme}:// must start with a letter or digit and hold no "
            "white space or control character",
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
            field, f"{url!r}: {claim!r} is no name of a PersistentVolumeClaim", "InvalidURL"
        )
    if ".." in path.split("/"):  # Kubernetes refuses such a subPath
        raise ModelError(field, f"{url!r}: the path must not contain '..'", "InvalidURL")


def _check_ollama_name(url: str, name: str, field: str) -> None:
    if not _OLLAMA_NAME.fullmatch(name):
        raise ModelError(field, f"{url!r}: {name!r} is no name of an Ollama model", "InvalidURL")


def _params(url: str, scheme: str, query: str | None, field: str) -> dict[str, str]:
    params: dict[str, str] = {}
    known = _PARAMS.get(scheme, frozenset())
    for key, value in parse_qsl(query or "", keep_blank_values=True):
        if key not in known:
            means = f"only {', '.join(sorted(known))}" if known else "none"
            raise ModelError(
                field,
                f"{url!r}: the parameter {key!r} means nothing with {scheme}:// ({means} does)",
                "InvalidURL",
            )
        if key in params:
            raise ModelError(field, f"{url!r}: {key!r} is given twice", "InvalidURL")
        params[key] = value
    return params


def _flag(url: str, params: dict[str, str], key: str, default: bool, field: str) -> bool:
    value = params.get(key)
    if value is None:
        return default
    if value.lower() not in ("true", "false"):
        raise ModelError(field, f"{url!r}: {key} must be true or false", "InvalidURL")
    return value.lower() == "true"
