"""The system config: KubeAI's own settings, as YAML or JSON at ``CONFIG_PATH``.

It is read once, at start, and strictly: an unknown key, a wrong type, a duration without a unit or
a negative number is a ConfigError with the key's dotted path. Every key has a default, so an empty
config is valid. null and Go's zero values also mean the default (see `kubeai.api.config.strict`),
so a config written by a Go program is valid too. An entry that cannot be used, such as a cache
profile without a volume, does not stop KubeAI: it is an error of the Models that use it, or a
warning.
docs/reference/configuration.md lists all keys.

`load_config` is called by the commands. The operator and the engines get a SystemConfig, the
workers its `gateway` section (as msgspec builtins, through their environment).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, field
from msgspec.structs import replace

from kubeai.api.config.images import DEFAULT_IMAGES
from kubeai.api.config.strict import check_address, read, read_yaml
from kubeai.api.json_patch import JSONPatch
from kubeai.api.model import Engine
from kubeai.errors import ConfigError
from kubeai.logs import get_logger

log = get_logger(__name__)

_HOST_NAME = re.compile(r"[a-zA-Z0-9]([a-zA-Z0-9.-]{0,251}[a-zA-Z0-9])?")
CONFIG_MAX_BYTES = 4 << 20  # a ConfigMap holds 1 MiB

# "zero": 0 or an empty string is a meaningful value. Everywhere else it means the default.
Duration = Annotated[float, Meta(extra={"unit": "duration", "zero": True})]
PositiveDuration = Annotated[float, Meta(extra={"unit": "duration"})]
Bytes = Annotated[int, Meta(extra={"unit": "bytes"})]
Quantity = Annotated[str, Meta(extra={"unit": "quantity"})]  # in canonical form
Size = Annotated[str, Meta(extra={"unit": "size"})]  # a quantity above 0, in canonical form
Address = Annotated[str, Meta(extra={"unit": "address"})]
Origin = Annotated[str, Meta(extra={"unit": "origin"})]
Count = Annotated[int, Meta(ge=0, extra={"zero": True})]
PositiveCount = Annotated[int, Meta(ge=1)]
Priority = Annotated[int, Meta(ge=-1000, le=1000, extra={"zero": True})]
Share = Annotated[float, Meta(ge=0, le=1, extra={"zero": True})]
SecretName = Annotated[str, Meta(extra={"zero": True})]  # empty: no Secret


class _Section(Struct, frozen=True, kw_only=True, rename="camel"):
    """One section of the config; its keys are camelCase in the file."""


class SecretNames(_Section, frozen=True, kw_only=True):
    """Secrets in the Models' namespace with credentials for the sources of weights."""

    alibaba: SecretName = "kubeai-alibaba"
    aws: SecretName = "kubeai-aws"
    gcp: SecretName = "kubeai-gcp"
    huggingface: SecretName = "kubeai-huggingface"
    oci: SecretName = ""  # of type kubernetes.io/dockerconfigjson


class ModelServer(_Section, frozen=True, kw_only=True):
    """The images of one engine, by the image names that resource profiles use."""

    images: dict[str, str]


def _defaults(engine: Engine) -> Callable[[], ModelServer]:
    return lambda: ModelServer(images=dict(DEFAULT_IMAGES[engine]))


class ModelServers(_Section, frozen=True, kw_only=True):
    """The images of each engine. Setting an engine's ``images`` replaces all its defaults."""

    ollama: ModelServer = field(name="OLlama", default_factory=_defaults("OLlama"))
    vllm: ModelServer = field(name="VLLM", default_factory=_defaults("VLLM"))
    faster_whisper: ModelServer = field(
        name="FasterWhisper", default_factory=_defaults("FasterWhisper")
    )
    infinity: ModelServer = field(name="Infinity", default_factory=_defaults("Infinity"))
    sglang: ModelServer = field(name="SGLang", default_factory=_defaults("SGLang"))
    llama_cpp: ModelServer = field(name="LlamaCpp", default_factory=_defaults("LlamaCpp"))

    def images(self, engine: Engine) -> dict[str, str]:
        """The engine's images by image name; the Model's ``engine`` selects the section."""
        servers: dict[Engine, ModelServer] = {
            "OLlama": self.ollama,
            "VLLM": self.vllm,
            "FasterWhisper": self.faster_whisper,
            "Infinity": self.infinity,
            "SGLang": self.sglang,
            "LlamaCpp": self.llama_cpp,
        }
        return servers[engine].images


class Resources(_Section, frozen=True, kw_only=True):
    """A container's resources (Kubernetes' ResourceRequirements)."""

    requests: dict[str, Quantity] = {}
    limits: dict[str, Quantity] = {}


class ModelLoading(_Section, frozen=True, kw_only=True):
    """The loader, which copies weights into caches and adapters into pods."""

    image: str = "ghcr.io/kubeai-project/kubeai-model-loader:v0.14.0"
    resources: Resources = Resources()  # of load and evict Jobs, and of the adapter loader


class Toleration(_Section, frozen=True, kw_only=True, omit_defaults=True):
    """A taint that the pods tolerate (Kubernetes' Toleration)."""

    key: str = ""
    operator: str = ""
    value: str = ""
    effect: str = ""
    toleration_seconds: int | None = None


class Affinity(_Section, frozen=True, kw_only=True, omit_defaults=True):
    """Scheduling constraints (Kubernetes' Affinity; its three parts are passed on unchanged)."""

    node_affinity: dict[str, Any] | None = None
    pod_affinity: dict[str, Any] | None = None
    pod_anti_affinity: dict[str, Any] | None = None


class ResourceClaims(_Section, frozen=True, kw_only=True):
    """Experimental. Devices by dynamic resource allocation. One of the first two must be set."""

    resource_claim_template_name: str = ""  # each pod gets claims of its own
    resource_claim_name: str = ""  # all pods share this claim
    claim_name: str = "devices"  # of the claim inside the pod
    claim_request: str = ""  # of the requests in the claim; empty: all


class ResourceProfile(_Section, frozen=True, kw_only=True):
    """Resources and scheduling of a replica. A Model requests a multiple of the resources."""

    image_name: str = ""
    requests: dict[str, Quantity] = {}
    limits: dict[str, Quantity] = {}
    node_selector: dict[str, str] = {}
    affinity: Affinity = Affinity()
    tolerations: tuple[Toleration, ...] = ()
    scheduler_name: str = ""
    runtime_class_name: str = ""
    dra: ResourceClaims = ResourceClaims()  # unchanged: no claims


def _default_profiles() -> dict[str, ResourceProfile]:
    """The CPU profile and common accelerators, with the names that published Models use."""
    gpu = {"nvidia.com/gpu": "1"}
    bigger = {**gpu, "cpu": "6", "memory": "24Gi"}

    def accelerator(
        requests: dict[str, str], image: str = "nvidia-gpu", resource: str = "nvidia.com/gpu"
    ) -> ResourceProfile:
        taint = Toleration(key=resource, operator="Equal", value="present", effect="NoSchedule")
        limits = {resource: "1"}
        return ResourceProfile(
            image_name=image, limits=limits, requests=requests, tolerations=(taint,)
        )

    return {
        "cpu": ResourceProfile(image_name="cpu", requests={"cpu": "1", "memory": "2Gi"}),
        # As in upstream KubeAI's chart: T4 nodes are expected to have no taint.
        "nvidia-gpu-t4": ResourceProfile(image_name="nvidia-gpu", limits=gpu, requests=gpu),
        "nvidia-gpu-l4": accelerator(bigger),
        "nvidia-gpu-l40s": accelerator(bigger),
        "nvidia-gpu-h100": accelerator({}),
        "nvidia-gpu-gh200": accelerator(gpu, image="gh200"),
        "nvidia-gpu-a100-80gb": accelerator({}),
        "nvidia-gpu-a100-40gb": accelerator({}),
        "nvidia-gpu-a16": accelerator({}),
        "nvidia-gpu-rtx4070-8gb": accelerator({}),
        "amd-gpu-mi300x": accelerator({}, image="amd-gpu", resource="amd.com/gpu"),
    }


class SharedFilesystem(_Section, frozen=True, kw_only=True):
    """A ReadWriteMany file system: a storage class, or an existing volume."""

    storage_class_name: str = ""
    persistent_volume_name: str = ""
    # Required by the API, but ignored by most shared file systems.
    storage_size: Size = "10Gi"


class CacheProfile(_Section, frozen=True, kw_only=True):
    """Where cached Models' files are stored."""

    shared_filesystem: SharedFilesystem = SharedFilesystem()


class MessageStream(_Section, frozen=True, kw_only=True):
    """A pair of topics: one for requests, one for responses."""

    requests_url: str = field(name="requestsURL")
    responses_url: str = field(name="responsesURL")
    max_handlers: PositiveCount = 1


class Messaging(_Section, frozen=True, kw_only=True):
    """Requests that arrive as messages instead of over HTTP."""

    error_max_backoff_s: PositiveDuration = field(name="errorMaxBackoff", default=30.0)
    streams: tuple[MessageStream, ...] = ()


class ModelAutoscaling(_Section, frozen=True, kw_only=True):
    """The autoscaler's interval, averaging window, and ConfigMap for its state."""

    interval_s: PositiveDuration = field(name="interval", default=10.0)
    time_window_s: PositiveDuration = field(name="timeWindow", default=600.0)
    state_config_map_name: str = "kubeai-autoscaler-state"


class LocalObjectReference(_Section, frozen=True, kw_only=True):
    """An object in the same namespace."""

    name: str = ""  # optional as in Kubernetes, which ignores a pull secret without a name


class ModelServerPods(_Section, frozen=True, kw_only=True):
    """Settings of all engine pods."""

    service_account_name: str = ""
    pod_security_context: dict[str, Any] = {}
    security_context: dict[str, Any] = {}
    image_pull_secrets: tuple[LocalObjectReference, ...] = ()
    json_patches: tuple[JSONPatch, ...] = ()


class ModelRollouts(_Section, frozen=True, kw_only=True):
    """How pods are replaced when a Model changes, and how long they are drained."""

    surge: Count = 1
    drain_timeout_s: Duration = field(name="drainTimeout", default=300.0)


class LeaderElection(_Section, frozen=True, kw_only=True):
    """Timing of the leader election between replicas of KubeAI."""

    lease_duration_s: PositiveDuration = field(name="leaseDuration", default=15.0)
    renew_deadline_s: PositiveDuration = field(name="renewDeadline", default=10.0)
    retry_period_s: PositiveDuration = field(name="retryPeriod", default=2.0)


class ConsoleConfig(_Section, frozen=True, kw_only=True):
    """The console: a web page below ``/ui/`` for clients on loopback addresses."""

    enabled: bool = False
    hosts: tuple[str, ...] = ()  # names in Host besides IP addresses and localhost


class QueueConfig(_Section, frozen=True, kw_only=True):
    """The queues of requests that wait for a saturated Model. See docs/explain/tenants.md."""

    # A replica with this percentage of targetRequests in flight is full. None: 200 if keys are
    # required, otherwise 0: replicas are never full.
    saturation_percent: Count | None = None
    objectives: dict[str, Priority] = {}  # priority by the name in X-Gateway-Inference-Objective


class KeysConfig(_Section, frozen=True, kw_only=True):
    """API keys of clients. See docs/how-to/keys.md."""

    required: bool = False
    # Requests with a wrong key, per client address and worker. Beyond it they get 429 and their
    # connection is closed. 0: no limit.
    failures_per_minute: Count = 60


class GatewayConfig(_Section, frozen=True, kw_only=True):
    """Limits of the gateway's workers. All counts are per worker."""

    connections_max: PositiveCount = 16_384  # of clients; less if file descriptors are limited
    # How long requests are held for a model without an endpoint, and how many per model.
    hold_timeout_s: Duration = field(name="holdTimeout", default=600.0)
    hold_max_requests: Count = 1000
    # How long requests are held for a model whose replicas cannot start, from when that is first
    # seen. Nodes are added within minutes; many clients time out after ten.
    start_failure_grace_s: Duration = field(name="startFailureGrace", default=30.0)
    unschedulable_grace_s: Duration = field(name="unschedulableGrace", default=540.0)
    # A held streaming request gets the head of its response and a comment after the first time (0:
    # never), then a comment at this interval, so that clients and proxies do not time out.
    hold_comment_after_s: Duration = field(name="holdCommentAfter", default=2.0)
    hold_comment_interval_s: PositiveDuration = field(name="holdCommentInterval", default=5.0)
    # Origins of web pages whose scripts may use the API (CORS): scheme://host, with a port, with
    # the port * (any), or without. "*": all origins. None: no response has CORS headers.
    cors_origins: Annotated[tuple[Origin, ...], Meta(extra={"zero": True})] = field(
        name="corsOrigins", default=()
    )
    # Limits on the size and duration of client requests.
    body_max_bytes: Bytes = 64 << 20
    buffer_max_bytes: Bytes = 1 << 30  # for all JSON bodies together
    multipart_max_bytes: Bytes = 1 << 30
    # Whether compressed JSON bodies are sent to engines uncompressed. Few engines accept them.
    decompress_bodies: bool = False
    spool_max_bytes: Bytes = 2 << 30  # for all forms together
    head_max_bytes: Bytes = 64 << 10
    head_max_count: PositiveCount = 100
    head_timeout_s: PositiveDuration = field(name="headTimeout", default=10.0)
    body_timeout_s: PositiveDuration = field(name="bodyTimeout", default=60.0)
    keep_alive_timeout_s: PositiveDuration = field(name="keepAliveTimeout", default=75.0)
    # Connections to engines. Idle ones are closed before uvicorn's 5 s keep-alive closes them.
    connect_timeout_s: PositiveDuration = field(name="connectTimeout", default=5.0)
    upstream_idle_timeout_s: PositiveDuration = field(name="upstreamIdleTimeout", default=4.0)
    upstream_max_idle: Count = 256
    first_byte_timeout_s: PositiveDuration = field(name="firstByteTimeout", default=600.0)
    between_bytes_timeout_s: PositiveDuration = field(name="betweenBytesTimeout", default=120.0)
    # After this time without data in either direction, a WebSocket is closed. Pings count as data.
    websocket_idle_timeout_s: PositiveDuration = field(name="websocketIdleTimeout", default=600.0)
    # Retries before the first byte of a response. The budget, per model, limits retries without
    # proof that another endpoint works: a count per ten seconds, and a percentage of the requests
    # answered in that time.
    retries: Count = 3
    retry_first_byte_timeout: bool = False
    retry_budget_min: Count = 10
    retry_budget_percent: Count = 20
    # After this many consecutive failures an endpoint is ejected, for longer each time.
    eject_after_failures: Count = 5  # 0: never
    eject_time_s: PositiveDuration = field(name="ejectTime", default=10.0)
    eject_max_time_s: PositiveDuration = field(name="ejectMaxTime", default=300.0)
    # The share of requests in the access log (failures are always logged); 0 disables the log.
    access_log_sample: Share = 0.0
    # Whether clients may ask, with a header, why an endpoint was picked. The response names
    # endpoints and reports how much of the prompt any client has sent to each of them.
    explain: bool = False
    access_log_prompts: bool = False  # log the hashes of prompts, for `kubeai bench replay`
    # On SIGTERM: how long new requests are still accepted, and how long in-flight ones may take.
    drain_accept_s: Duration = field(name="drainAccept", default=5.0)
    drain_timeout_s: Duration = field(name="drainTimeout", default=300.0)
    ui: ConsoleConfig = ConsoleConfig()
    queue: QueueConfig = QueueConfig()
    keys: KeysConfig = KeysConfig()

    def capacity(self, target_requests: int, given: int | None) -> int:
        """The requests in flight with which a replica is full; 0: it never is.

        ``given``: the Model's maxRequestsPerReplica.
        """
        if given is not None:
            return given
        percent = self.queue.saturation_percent
        if percent is None:
            percent = 200 if self.keys.required else 0
        return -(-target_requests * percent // 100)


class ProxyConfig(_Section, frozen=True, kw_only=True):
    """Whether KubeAI's gateway routes requests to the engines, or another gateway."""

    mode: Literal["internal", "external"] = "internal"


class SystemConfig(_Section, frozen=True, kw_only=True):
    """The whole config."""

    secret_names: SecretNames = field(default_factory=SecretNames)
    model_servers: ModelServers = field(default_factory=ModelServers)
    model_loading: ModelLoading = field(default_factory=ModelLoading)
    resource_profiles: dict[str, ResourceProfile] = field(default_factory=_default_profiles)
    cache_profiles: dict[str, CacheProfile] = {}
    messaging: Messaging = field(default_factory=Messaging)
    metrics_addr: Address = ":8080"
    health_address: Address = ":8081"
    model_autoscaling: ModelAutoscaling = field(default_factory=ModelAutoscaling)
    model_server_pods: ModelServerPods = field(default_factory=ModelServerPods)
    model_rollouts: ModelRollouts = field(default_factory=ModelRollouts)
    leader_election: LeaderElection = field(default_factory=LeaderElection)
    allow_pod_address_override: bool = False
    fixed_self_metric_addrs: tuple[str, ...] = ()
    gateway: GatewayConfig = field(default_factory=GatewayConfig)
    proxy: ProxyConfig = field(default_factory=ProxyConfig)

    @property
    def external(self) -> bool:
        """Whether requests reach the engines through another gateway."""
        return self.proxy.mode == "external"

    def listening_on(self, host: str) -> SystemConfig:
        """The config with this host in those of our listen addresses that have only a port."""
        host = f"[{host}]" if ":" in host else host
        ours = {"metrics_addr": self.metrics_addr, "health_address": self.health_address}
        whole = {key: host + at if at.startswith(":") else at for key, at in ours.items()}
        return replace(self, **whole)


def load_config(
    path: str | Path | None, *, defaults: Mapping[str, Any] | None = None
) -> SystemConfig:
    """Load the config from a file. ConfigError if it is invalid.

    Without a file all keys have their defaults. ``defaults`` (in the file's format) overrides
    some of them, and the file overrides both, key by key.
    """
    if path is None:
        return _config({}, defaults)
    try:
        with Path(path).open("rb") as file:
            raw = file.read(CONFIG_MAX_BYTES + 1)
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError("", f"cannot read the config {path}: {reason}") from None
    if len(raw) > CONFIG_MAX_BYTES:
        raise ConfigError("", f"the config {path} is larger than {CONFIG_MAX_BYTES} bytes")
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        raise ConfigError("", f"the config {path} is not UTF-8") from None
    return parse_config(text, str(path), defaults=defaults)


def parse_config(
    text: str, source: str = "config", *, defaults: Mapping[str, Any] | None = None
) -> SystemConfig:
    """Parse the config from text. ``source`` is its name in YAML errors."""
    value = read_yaml(text, source)
    if value is None:
        value = {}
    if not isinstance(value, dict):
        raise ConfigError("", f"{source}: must be a map")
    return _config(value, defaults)


def _config(value: dict[str, Any], defaults: Mapping[str, Any] | None) -> SystemConfig:
    config = read(value, read(dict(defaults or {}), SystemConfig()))
    config = _without_unusable(config)
    _check_leader_election(config.leader_election)
    _check_patches(config.model_server_pods)
    if config.gateway.drain_accept_s > config.gateway.drain_timeout_s:
        raise ConfigError("gateway.drainAccept", "must not be longer than gateway.drainTimeout")
    if config.gateway.eject_max_time_s < config.gateway.eject_time_s:
        raise ConfigError("gateway.ejectMaxTime", "must not be shorter than gateway.ejectTime")
    if config.gateway.access_log_prompts and not config.gateway.access_log_sample:
        raise ConfigError("gateway.accessLogPrompts", "requires gateway.accessLogSample above 0")
    if config.gateway.buffer_max_bytes < config.gateway.body_max_bytes:
        raise ConfigError("gateway.bufferMaxBytes", "must not be less than gateway.bodyMaxBytes")
    if config.gateway.spool_max_bytes < config.gateway.multipart_max_bytes:
        raise ConfigError(
            "gateway.spoolMaxBytes", "must not be less than gateway.multipartMaxBytes"
        )
    for i, host in enumerate(config.gateway.ui.hosts):
        if not _HOST_NAME.fullmatch(host):
            problem = f"must be a host name without scheme and port, not {host!r}"
            raise ConfigError(f"gateway.ui.hosts[{i}]", problem)
    return config


def _without_unusable(config: SystemConfig) -> SystemConfig:
    """Leave out addresses and profiles that cannot be used, with a warning; fill in hosts."""
    addresses = []
    for i, address in enumerate(config.fixed_self_metric_addrs):
        try:
            check_address(address, f"fixedSelfMetricAddrs[{i}]")
        except ConfigError as error:
            _warn_ignored(error)
        else:
            # As in Go, an empty host means the local machine.
            addresses.append(f"127.0.0.1{address}" if address.startswith(":") else address)
    profiles = dict(config.resource_profiles)
    for name in config.resource_profiles:
        if not name or ":" in name:
            problem = "a profile's name must not be empty or contain a colon"
            _warn_ignored(ConfigError(f"resourceProfiles.{name}", problem))
            del profiles[name]
    return replace(config, fixed_self_metric_addrs=tuple(addresses), resource_profiles=profiles)


def _warn_ignored(problem: ConfigError) -> None:
    log.warning("ignoring invalid config entry", path=problem.path, error=str(problem))


def _check_leader_election(lease: LeaderElection) -> None:
    """A leader must detect that it cannot renew before others may take over."""
    if lease.lease_duration_s <= lease.renew_deadline_s:
        raise ConfigError(
            "leaderElection.leaseDuration", "must be longer than leaderElection.renewDeadline"
        )
    if lease.renew_deadline_s <= lease.retry_period_s:
        raise ConfigError(
            "leaderElection.renewDeadline", "must be longer than leaderElection.retryPeriod"
        )


def _check_patches(pods: ModelServerPods) -> None:
    for i, patch in enumerate(pods.json_patches):
        place = f"modelServerPods.jsonPatches[{i}]"
        if patch.path and not patch.path.startswith("/"):
            raise ConfigError(f"{place}.path", f"must start with '/', not {patch.path!r}")
        if patch.op in ("move", "copy") and patch.from_ is UNSET:
            raise ConfigError(f"{place}.from", f"is required with op {patch.op}")
