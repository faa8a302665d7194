"""The system config: every key is read, every error has its path, every default is usable."""

import re

import msgspec
import pytest
import yaml
from msgspec import inspect
from repository import REPOSITORY
from structlog.testing import capture_logs

from kubeai.api.config.duration import parse_duration
from kubeai.api.config.profiles import resolve_profile, server_image
from kubeai.api.config.quantity import parse_quantity
from kubeai.api.config.system import GatewayConfig, SystemConfig, load_config, parse_config
from kubeai.errors import ConfigError, ModelError

EVERYTHING = """
secretNames: {alibaba: s1, aws: s2, gcp: s3, huggingface: s4}
modelServers:
  OLlama: {images: {default: o}}
  VLLM: {images: {default: v, cpu: vc}}
  FasterWhisper: {images: {default: f}}
  Infinity: {images: {default: i}}
modelLoading: {image: loader}
resourceProfiles:
  gpu:
    imageName: nvidia-gpu
    requests: {cpu: 500m, memory: 1Gi, nvidia.com/gpu: "1"}
    limits: {nvidia.com/gpu: 1}
    nodeSelector: {pool: gpu}
    affinity:
      nodeAffinity:
        requiredDuringSchedulingIgnoredDuringExecution:
          nodeSelectorTerms: [{matchExpressions: [{key: a, operator: Exists}]}]
    tolerations: [{key: k, operator: Equal, value: v, effect: NoExecute, tolerationSeconds: 5}]
    schedulerName: special
    runtimeClassName: nvidia
cacheProfiles:
  efs: {sharedFilesystem: {storageClassName: efs-sc}}
  old: {sharedFilesystem: {persistentVolumeName: pv}}
messaging:
  errorMaxBackoff: 5s
  streams:
    - {requestsURL: "nats://in", responsesURL: "nats://out"}
    - {requestsURL: "kafka://in", responsesURL: "kafka://out", maxHandlers: 3}
metricsAddr: 127.0.0.1:9090
healthAddress: ":9091"
modelAutoscaling: {interval: 250ms, timeWindow: 1m30s, stateConfigMapName: state}
modelServerPods:
  serviceAccountName: models
  podSecurityContext: {runAsNonRoot: true}
  securityContext: {capabilities: {drop: [ALL]}}
  imagePullSecrets: [{name: pull}]
  jsonPatches:
    - {op: add, path: /spec/priorityClassName, value: high}
    - {op: move, from: /a, path: /b}
modelRollouts: {surge: 0}
leaderElection: {leaseDuration: 3s, renewDeadline: 2s, retryPeriod: 500ms}
allowPodAddressOverride: true
fixedSelfMetricAddrs: ["10.0.0.1:8080", "[::1]:8080"]
gateway: {holdTimeout: 1m, bodyMaxBytes: 1Mi, retries: 0, drainAccept: 0, drainTimeout: 1s}
"""


def test_every_key_is_read():
    config = parse_config(EVERYTHING)
    assert config.secret_names.huggingface == "s4"
    assert config.model_servers.images("VLLM") == {"default": "v", "cpu": "vc"}
    assert config.model_loading.image == "loader"
    gpu = config.resource_profiles["gpu"]
    assert gpu.requests == {"cpu": "500m", "memory": "1Gi", "nvidia.com/gpu": "1"}
    assert gpu.limits == {"nvidia.com/gpu": "1"}
    assert gpu.tolerations[0].toleration_seconds == 5
    assert "requiredDuringSchedulingIgnoredDuringExecution" in gpu.affinity.node_affinity
    assert (gpu.scheduler_name, gpu.runtime_class_name) == ("special", "nvidia")
    assert config.cache_profiles["efs"].shared_filesystem.storage_class_name == "efs-sc"
    assert config.cache_profiles["old"].shared_filesystem.persistent_volume_name == "pv"
    assert config.messaging.error_max_backoff_s == 5
    assert [stream.max_handlers for stream in config.messaging.streams] == [1, 3]
    assert config.messaging.streams[1].requests_url == "kafka://in"
    assert (config.metrics_addr, config.health_address) == ("127.0.0.1:9090", ":9091")
    assert config.model_autoscaling.interval_s == 0.25
    assert config.model_autoscaling.time_window_s == 90
    assert config.model_autoscaling.state_config_map_name == "state"
    pods = config.model_server_pods
    assert pods.pod_security_context == {"runAsNonRoot": True}
    assert pods.image_pull_secrets[0].name == "pull"
    assert [patch.operation() for patch in pods.json_patches] == [
        {"op": "add", "path": "/spec/priorityClassName", "value": "high"},
        {"op": "move", "path": "/b", "from": "/a"},
    ]
    assert config.model_rollouts.surge == 0
    assert config.leader_election.retry_period_s == 0.5
    assert config.allow_pod_address_override is True
    assert config.fixed_self_metric_addrs == ("10.0.0.1:8080", "[::1]:8080")
    assert config.gateway.hold_timeout_s == 60
    assert config.gateway.body_max_bytes == 1 << 20
    assert config.gateway.retries == 0


def test_origins_are_read_in_lower_case_and_may_be_none():
    text = "gateway: {corsOrigins: ['*', 'HTTPS://A.Example:8443', 'http://[::1]:*'], %s}"
    config = parse_config(text % "holdCommentAfter: 0, holdCommentInterval: 1s").gateway
    assert config.cors_origins == ("*", "https://a.example:8443", "http://[::1]:*")
    assert (config.hold_comment_after_s, config.hold_comment_interval_s) == (0, 1)
    defaults = {"gateway": {"corsOrigins": ["*"]}}
    assert parse_config("gateway: {corsOrigins: []}", defaults=defaults).gateway.cors_origins == ()
    assert parse_config("", defaults=defaults).gateway.cors_origins == ("*",)


@pytest.mark.parametrize("text", ["", "# nothing\n", "{}", "modelRollouts:\n", "null"])
def test_an_empty_config_has_all_defaults(text):
    assert parse_config(text) == SystemConfig() == load_config(None)


def test_defaults_equal_the_reference():
    config = SystemConfig()
    assert (config.metrics_addr, config.health_address) == (":8080", ":8081")
    assert config.model_autoscaling.interval_s == 10
    assert config.model_autoscaling.time_window_s == 600
    assert config.model_rollouts.surge == 1
    lease = config.leader_election
    assert (lease.lease_duration_s, lease.renew_deadline_s, lease.retry_period_s) == (15, 10, 2)
    assert {"cpu", "nvidia-gpu-l4", "nvidia-gpu-h100"} <= set(config.resource_profiles)
    for engine in ("OLlama", "VLLM", "FasterWhisper", "Infinity"):
        assert config.model_servers.images(engine)["default"]


def test_a_json_file_is_read():
    assert parse_config('{"modelRollouts": {"surge": 4}}').model_rollouts.surge == 4


MISTAKES = [
    ("gateway: {accessLogSample: 1.5}", "gateway.accessLogSample", "must be at most 1, not 1.5"),
    ("gateway: {queue: {saturationPercent: -1}}", "gateway.queue.saturationPercent", "at least 0"),
    ("gateway: {queue: {objectives: {a: 1001}}}", "gateway.queue.objectives.a", "at most 1000"),
    ("gateway: {accessLogSample: -0.1}", "gateway.accessLogSample", "must be at least 0, not -0.1"),
    ("gateway: {accessLogSample: .nan}", "gateway.accessLogSample", "must be at least 0, not nan"),
    ("gateway: {accessLogSample: often}", "gateway.accessLogSample", "must be a number"),
    ("gateway: {accessLogPrompts: true}", "gateway.accessLogPrompts", "accessLogSample above 0"),
    ("gateway: {accessLogSample: true}", "gateway.accessLogSample", "must be a number"),
    ("gateway: {ejectTime: 1m, ejectMaxTime: 30s}", "gateway.ejectMaxTime", "gateway.ejectTime"),
    ("gateway: {corsOrigins: [a.example]}", "gateway.corsOrigins[0]", "such as https://chat"),
    ("gateway: {corsOrigins: ['*', 5]}", "gateway.corsOrigins[1]", "an origin such as"),
    ("gateway: {corsOrigins: ['https://a/']}", "gateway.corsOrigins[0]", "has no path"),
    ("gateway: {corsOrigins: ['https://*.a']}", "gateway.corsOrigins[0]", "an origin such as"),
    ("gateway: {corsOrigins: ['http://a:99999']}", "gateway.corsOrigins[0]", "an origin such as"),
    ("gateway: {corsOrigins: '*'}", "gateway.corsOrigins", "must be a list"),
    ("gateway: {holdCommentAfter: 2}", "gateway.holdCommentAfter", 'unit, as "2s"'),
    ("gateway: {bufferMaxBytes: 1Mi}", "gateway.bufferMaxBytes", "gateway.bodyMaxBytes"),
    ("modelAutoscalling: {}", "modelAutoscalling", "did you mean 'modelAutoscaling'?"),
    ("gateway: {bodyMaxSize: 1}", "gateway.bodyMaxSize", "did you mean 'bodyMaxBytes'?"),
    ("modelservers: {}", "modelservers", "did you mean 'modelServers'?"),
    ("modelAutoscaling: {interval: 10}", "modelAutoscaling.interval", 'unit, as "10s"'),
    ("modelAutoscaling: {interval: 10d}", "modelAutoscaling.interval", "unknown unit 'd'"),
    ("modelAutoscaling: {interval: -1s}", "modelAutoscaling.interval", "negative"),
    ("modelAutoscaling: {interval: [1s]}", "modelAutoscaling.interval", "a duration"),
    ("modelAutoscaling: 3", "modelAutoscaling", "must be a map"),
    ("modelRollouts: {surge: -1}", "modelRollouts.surge", "at least 0"),
    ("modelRollouts: {surge: 1.5}", "modelRollouts.surge", "whole number"),
    ("modelRollouts: {surge: true}", "modelRollouts.surge", "whole number"),
    ("modelRollouts: {surge: '1'}", "modelRollouts.surge", "whole number"),
    ("allowPodAddressOverride: 1", "allowPodAddressOverride", "true or false"),
    ("metricsAddr: 8080", "metricsAddr", "an address such as"),
    ("metricsAddr: ':99999'", "metricsAddr", "an address such as"),
    ("fixedSelfMetricAddrs: [5]", "fixedSelfMetricAddrs[0]", "must be a string"),
    ("fixedSelfMetricAddrs: [null]", "fixedSelfMetricAddrs[0]", "must be a string"),
    ("modelAutoscaling: {interval: 99999999}", "modelAutoscaling.interval", "with a unit"),
    ("modelAutoscaling: {interval: -1}", "modelAutoscaling.interval", "with a unit"),
    ("modelAutoscaling: {interval: false}", "modelAutoscaling.interval", "a duration"),
    ("modelAutoscaling: {interval: {}}", "modelAutoscaling.interval", "a duration"),
    ("messaging: {streams: {}}", "messaging.streams", "must be a list"),
    ("modelServers: {VLLM: []}", "modelServers.VLLM", "must be a map"),
    ("modelRollouts: {surge: ''}", "modelRollouts.surge", "whole number"),
    ("fixedSelfMetricAddrs: ':1'", "fixedSelfMetricAddrs", "must be a list"),
    ("secretNames: {aws: 5}", "secretNames.aws", "put it in quotes"),
    ("gateway: {bodyMaxBytes: 64KB}", "gateway.bodyMaxBytes", "unknown suffix 'KB'"),
    ("gateway: {bodyMaxBytes: 100m}", "gateway.bodyMaxBytes", "whole number of bytes"),
    ("gateway: {bodyMaxBytes: -1}", "gateway.bodyMaxBytes", "negative"),
    ("gateway: {drainAccept: 10m}", "gateway.drainAccept", "not be longer than"),
    ("gateway: {multipartMaxBytes: 5Gi}", "gateway.spoolMaxBytes", "not be less than"),
    (
        "resourceProfiles: {g: {requests: {cpu: lots}}}",
        "resourceProfiles.g.requests.cpu",
        "not a quantity",
    ),
    (
        "resourceProfiles: {g: {limits: {nvidia.com/gpu: -1}}}",
        "resourceProfiles.g.limits.nvidia.com/gpu",
        "negative",
    ),
    (
        "resourceProfiles: {g: {nodeSelector: {gpu: true}}}",
        "resourceProfiles.g.nodeSelector.gpu",
        "put it in quotes",
    ),
    (
        "resourceProfiles: {g: {tolerations: [{key: a}, {kye: b}]}}",
        "resourceProfiles.g.tolerations[1].kye",
        "did you mean 'key'?",
    ),
    ("resourceProfiles: {5: {}}", "resourceProfiles", "key 5 must be a string"),
    (
        "resourceProfiles: {g: {imageName: a, imageName: b}}",
        "resourceProfiles.g.imageName",
        "duplicate key",
    ),
    ("modelServers: {vLLM: {images: {}}}", "modelServers.vLLM", "did you mean 'VLLM'?"),
    (
        "messaging: {streams: [{requestsURL: a}]}",
        "messaging.streams[0].responsesURL",
        "is required",
    ),
    (
        "messaging: {streams: [{requestsURL: a, responsesURL: b, maxHandlers: -1}]}",
        "messaging.streams[0].maxHandlers",
        "at least 1",
    ),
    (
        "modelServerPods: {jsonPatches: [{op: put, path: /a}]}",
        "modelServerPods.jsonPatches[0].op",
        "must be one of",
    ),
    (
        "modelServerPods: {jsonPatches: [{op: add, path: a}]}",
        "modelServerPods.jsonPatches[0].path",
        "start with '/'",
    ),
    (
        "modelServerPods: {jsonPatches: [{op: copy, path: /a}]}",
        "modelServerPods.jsonPatches[0].from",
        "is required with op copy",
    ),
    (
        "leaderElection: {leaseDuration: 5s}",
        "leaderElection.leaseDuration",
        "longer than leaderElection.renewDeadline",
    ),
    (
        "leaderElection: {renewDeadline: 1s}",
        "leaderElection.renewDeadline",
        "longer than leaderElection.retryPeriod",
    ),
    ("proxy: {mode: outside}", "proxy.mode", "must be one of external, internal"),
    *(
        (
            f"cacheProfiles: {{c: {{sharedFilesystem: {{storageSize: {size}}}}}}}",
            "cacheProfiles.c.sharedFilesystem.storageSize",
            why,
        )
        for size, why in (
            ("-1Gi", "must not be negative"),
            ("1Xi", "has the unknown suffix 'Xi'"),
            ("[1]", "must be a quantity"),
        )
    ),
    ("a: 1\na: 2", "a", "duplicate key (line 2)"),
]


@pytest.mark.parametrize(("text", "path", "reason"), MISTAKES)
def test_an_error_is_reported_with_its_path(text, path, reason):
    with pytest.raises(ConfigError) as caught:
        parse_config(text)
    assert caught.value.path == path
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: [1", "sys.yaml:1:6: invalid YAML"),
        ("a: b: c", "sys.yaml:1:5: invalid YAML"),
        ("- a", "sys.yaml: must be a map"),
        ("words", "sys.yaml: must be a map"),
        ("a: !!python/object/apply:os.getpid []", "sys.yaml:1:4: invalid YAML"),
        ("--- {}\n--- {}", "invalid YAML"),
        ("a: \x00", "invalid YAML"),
    ],
)
def test_anything_but_a_yaml_map_is_rejected_with_its_position(text, reason):
    with pytest.raises(ConfigError, match=re.escape(reason)):
        parse_config(text, "sys.yaml")


def test_an_unreadable_file_is_reported_by_name(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read the config .*missing.yaml: No such file"):
        load_config(tmp_path / "missing.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_config(tmp_path / "binary.yaml")


def test_the_file_overrides_the_callers_defaults(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("gateway: {drainTimeout: 7s, retries:}\n")
    defaults = {"gateway": {"drainTimeout": "9s", "drainAccept": "1s", "retries": 5}}
    config = load_config(file, defaults=defaults)
    assert config.gateway.drain_timeout_s == 7
    assert (config.gateway.drain_accept_s, config.gateway.retries) == (1, 5)
    assert load_config(None, defaults=defaults).gateway.drain_timeout_s == 9


def test_the_gateway_section_reaches_a_worker_unchanged():
    gateway = parse_config(EVERYTHING).gateway
    wire = msgspec.json.encode(msgspec.to_builtins(gateway))
    assert msgspec.json.decode(wire, type=GatewayConfig) == gateway


def test_a_profile_is_multiplied_by_its_count():
    config = parse_config(EVERYTHING)
    three = resolve_profile(config, "gpu:3")
    assert three.requests == {"cpu": "1500m", "memory": "3Gi", "nvidia.com/gpu": "3"}
    assert three.limits == {"nvidia.com/gpu": "3"}
    assert three.node_selector == {"pool": "gpu"}
    assert config.resource_profiles["gpu"].requests["cpu"] == "500m"


def test_no_profile_requests_no_resources():
    profile = resolve_profile(SystemConfig(), "")
    assert (profile.requests, profile.limits, profile.image_name) == ({}, {}, "")


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        ("nvidia-gpu-l5:1", "did you mean 'nvidia-gpu-l4'?"),
        ("nosuch:1", "no resource profile 'nosuch'"),
        ("cpu", "must be <profile>:<count>"),
        ("cpu:", "must be <profile>:<count>"),
        ("cpu:two", "must be <profile>:<count>"),
        ("cpu:-1", "must be <profile>:<count>"),
        ("cpu:1:2:3", "must be <profile>:<count>"),
        ("cpu:1:0", "the nodes of 'cpu:1:0' must be from 1 to"),
        ("cpu:0", "from 1 to"),
        ("cpu:" + "9" * 5000, "from 1 to"),
    ],
)
def test_an_invalid_or_unknown_profile_is_reported(wanted, reason):
    with pytest.raises(ModelError, match=re.escape(reason)) as caught:
        resolve_profile(SystemConfig(), wanted)
    assert (caught.value.field, caught.value.reason) == ("spec.resourceProfile", "InvalidProfile")


def test_the_image_of_a_profile_falls_back_to_the_default():
    config = parse_config("modelServers: {VLLM: {images: {default: d, cpu: c}}}")
    cpu, gpu = (resolve_profile(config, wanted) for wanted in ("cpu:1", "nvidia-gpu-l4:1"))
    assert server_image(config, "VLLM", cpu) == "c"
    assert server_image(config, "VLLM", gpu) == "d"
    assert server_image(config, "VLLM", resolve_profile(config, "")) == "d"


def test_an_engine_without_a_default_image_is_reported():
    config = parse_config("modelServers: {VLLM: {images: {cpu: c}}}")
    with pytest.raises(ModelError, match=r"modelServers\.VLLM\.images\.default") as caught:
        server_image(config, "VLLM", resolve_profile(config, ""))
    assert caught.value.field == "spec.image"


def leaves(type_, default, path="", unit=None):
    """Each leaf key of the config: its path, default and unit."""
    match type_:
        case inspect.Metadata(type=inner, extra=extra):
            yield from leaves(inner, default, path, (extra or {}).get("unit", unit))
        case inspect.UnionType(types=types):
            yield from leaves(types[0], default, path, unit)
        case inspect.StructType():
            for field in type_.fields:
                unset = None if field.default is msgspec.NODEFAULT else field.default
                value = getattr(default, field.name, msgspec.NODEFAULT if field.required else unset)
                name = f"{path}.{field.encode_name}".lstrip(".")
                yield from leaves(field.type, value, name, unit)
        case inspect.DictType(value_type=inspect.StructType() as value):
            yield from leaves(value, None, f"{path}.<name>")
        case inspect.VarTupleType(item_type=inspect.StructType() as item):
            yield from leaves(item, None, f"{path}[]")
        case _:
            yield path, default, unit


def written(default, unit):
    """A default as the docs show it."""
    if default is msgspec.NODEFAULT:
        return "required"
    if unit == "duration":
        return parse_duration
    if unit == "bytes":
        return lambda text: parse_quantity(text).whole()
    if default in ("", None, {}, (), msgspec.UNSET):
        return "—"
    return f"`{default}`".replace("True", "true").replace("False", "false")


def test_the_docs_list_every_key_with_its_default_and_no_other():
    text = (REPOSITORY / "docs/reference/configuration.md").read_text()
    tables = text.partition("## Images")[0]
    documented = dict(re.findall(r"^\| `([^`]+)` \| ([^|]+) \|", tables, re.MULTILINE))
    known = {
        path: (default, unit)
        for path, default, unit in leaves(inspect.type_info(SystemConfig), SystemConfig())
    }
    assert set(documented) == set(known)
    for path, (default, unit) in known.items():
        shown = written(default, unit)
        if callable(shown):
            assert shown(documented[path].strip("`")) == default, path
        elif path.endswith(".images"):
            assert documented[path] == "see below"
            for name, image in default.items():
                row = rf"^\| {path.split('.')[1]} \| .*`{name}`.* \| `{re.escape(image)}` \|$"
                assert re.search(row, text, re.MULTILINE), (path, name)
        elif path.endswith("[].value") and default is None:
            assert documented[path] in ("—", "`null`")
        else:
            assert documented[path] == shown, path


def test_every_documented_key_can_be_set_in_a_file():
    """The documented defaults are read from a file, so that each type of value is parsed."""
    tables = (REPOSITORY / "docs/reference/configuration.md").read_text().partition("## Images")[0]
    config = {}
    for path, default in re.findall(r"^\| `([\w.]+)` \| `([^`]+)` \|", tables, re.MULTILINE):
        *sections, key = path.split(".")
        section = config
        for name in sections:
            section = section.setdefault(name, {})
        section[key] = yaml.safe_load(default)
    assert len(config["gateway"]) > 20
    assert parse_config(yaml.safe_dump(config)) == SystemConfig()


@pytest.mark.parametrize("written", ["0", "0.25", "1"])
def test_a_share_is_between_zero_and_one(written):
    config = parse_config(f"gateway: {{accessLogSample: {written}}}")
    assert config.gateway.access_log_sample == float(written)


@pytest.mark.parametrize(
    ("written", "seconds"),
    [("250ms", 0.25), ("1m30s", 90), ("+1.5s", 1.5), ("10000000000", 10), ("1e8", 0.1)],
)
def test_a_duration_is_parsed_as_in_go(written, seconds):
    config = parse_config(f"modelAutoscaling: {{interval: {written}}}".replace("1e8", "1.0e+8"))
    assert config.model_autoscaling.interval_s == seconds


@pytest.mark.parametrize(
    ("text", "path", "kept"),
    [
        ("fixedSelfMetricAddrs: ['127.0.0.1:', '10.0.0.1:8080']", "[0]", ("10.0.0.1:8080",)),
        ("fixedSelfMetricAddrs: ['10.0.0.1:8080', localhost]", "[1]", ("10.0.0.1:8080",)),
        ("fixedSelfMetricAddrs: ['']", "[0]", ()),
        ("fixedSelfMetricAddrs: ['::1:8080']", "[0]", ()),
        ("fixedSelfMetricAddrs: ['a:99999']", "[0]", ()),
    ],
)
def test_an_unusable_peer_address_is_skipped_with_a_warning(text, path, kept):
    with capture_logs() as logs:
        config = parse_config(text)
    assert config.fixed_self_metric_addrs == kept
    (line,) = logs
    assert line["path"] == f"fixedSelfMetricAddrs{path}"
    assert line["log_level"] == "warning"
    assert "must be an address such as" in line["error"]


def test_a_peer_address_without_a_host_is_on_this_machine():
    config = parse_config("fixedSelfMetricAddrs: [':8080']")
    assert config.fixed_self_metric_addrs == ("127.0.0.1:8080",)


@pytest.mark.parametrize("name", ["a:b", ""])
def test_a_profile_that_no_model_can_reference_is_skipped_with_a_warning(name):
    with capture_logs() as logs:
        config = parse_config(f"resourceProfiles: {{'{name}': {{}}, g: {{}}}}")
    assert set(config.resource_profiles) == {"g"}
    assert [line["path"] for line in logs] == [f"resourceProfiles.{name}"]


def test_published_cache_profiles_for_clusters_without_a_shared_file_system_are_read():
    config = parse_config(
        "cacheProfiles: {none: {}, default: {sharedFilesystem: {storageClassName: ''}},"
        " nothing: null, fast: {sharedFilesystem: {storageClassName: nfs}}}"
    )
    assert config.cache_profiles["fast"].shared_filesystem.storage_class_name == "nfs"
    assert set(config.cache_profiles) == {"none", "default", "fast"}


def test_the_local_example_is_a_valid_config():
    load_config(REPOSITORY / "examples/config/local.yaml")


@pytest.mark.parametrize("host", ["https://box", "box:8000", "", "-box", "a b"])
def test_a_host_of_the_console_is_a_name(host):
    with pytest.raises(ConfigError, match="host name") as caught:
        parse_config(yaml.safe_dump({"gateway": {"ui": {"hosts": ["ok.example", host]}}}))
    assert caught.value.path == "gateway.ui.hosts[1]"
