"""Null and Go's zero values in the system config: each means that the key is not given.

KubeAI in Go reads its config into structs, so programs that write one send a zero value for every
field they leave alone. The exceptions are listed here; a new key is either covered or added to one.
"""

import json
from copy import deepcopy
from functools import cache

import jsonschema_rs
import msgspec
import pytest
from msgspec import inspect

from kubeai.api.config.schema import config_schema
from kubeai.api.config.system import SystemConfig, parse_config
from kubeai.errors import ConfigError

# For these keys, 0 or an empty string is a value of its own.
ZERO_IS_A_VALUE = {
    "secretNames.alibaba",  # no Secret
    "secretNames.aws",
    "secretNames.gcp",
    "secretNames.huggingface",
    "resourceProfiles.<name>.tolerations[].tolerationSeconds",  # evict at once
    "modelServerPods.jsonPatches[].path",  # RFC 6901: the whole document
    "modelServerPods.jsonPatches[].from",
    "modelRollouts.surge",  # no extra pods
    "modelRollouts.drainTimeout",  # delete at once
    "gateway.holdCommentAfter",  # no comments
    "gateway.holdTimeout",  # fail at once
    "gateway.holdMaxRequests",
    "gateway.startFailureGrace",  # fail as soon as it is seen
    "gateway.unschedulableGrace",
    "gateway.upstreamMaxIdle",  # no idle connections
    "gateway.retries",  # never
    "gateway.retryBudgetMin",
    "gateway.retryBudgetPercent",
    "gateway.ejectAfterFailures",  # never
    "gateway.keys.failuresPerMinute",  # no limit
    "gateway.queue.saturationPercent",  # never full
    "gateway.drainAccept",
    "gateway.drainTimeout",
}
# These have no default: null and the zero value are rejected with the key's path.
REQUIRED = {
    "modelServerPods.jsonPatches[].op",
    "modelServerPods.jsonPatches[].path",  # null only
    "messaging.streams[].requestsURL",
    "messaging.streams[].responsesURL",
}
SIBLINGS = {  # keys that the list item needs besides the tested one
    "modelServerPods.jsonPatches[]": {"op": "add", "path": "/a"},
    "messaging.streams[]": {"requestsURL": "nats://a", "responsesURL": "nats://b"},
}


def zeros(type_, unit):
    """How the zero value of a type is written in YAML."""
    match type_:
        case inspect.Metadata(type=inner, extra=extra):
            return zeros(inner, (extra or {}).get("unit", unit))
        case inspect.UnionType(types=types):
            return zeros(types[0], unit)
        case inspect.StructType() | inspect.DictType():
            return [{}]
        case inspect.VarTupleType():
            return [[]]
        case inspect.StrType() | inspect.LiteralType():
            return [""]
        case inspect.BoolType():
            return [False]
        case inspect.IntType() | inspect.FloatType():
            return {"duration": ["0s", 0, "0", ""], "bytes": [0, "0", ""]}.get(unit, [0])
    return []


def nodes(type_, path=""):
    """Each key of the config at every depth: its path and zero values."""
    match type_:
        case inspect.Metadata(type=inner):
            yield from nodes(inner, path)
        case inspect.UnionType(types=types):
            yield from nodes(types[0], path)
        case inspect.StructType(fields=fields):
            for field in fields:
                below = f"{path}.{field.encode_name}".lstrip(".")
                yield below, zeros(field.type, None)
                yield from nodes(field.type, below)
        case inspect.DictType(value_type=value):
            yield from nodes(value, f"{path}.<name>")
        case inspect.VarTupleType(item_type=item):
            yield from nodes(item, f"{path}[]")


NODES = dict(nodes(inspect.type_info(SystemConfig)))
CASES = [(path, zero) for path, written in NODES.items() for zero in (None, *written)]


def config_with(path, **given):
    """A config with this key, if a value for it is given, and the keys that must be beside it."""
    *sections, key = path.split(".")
    inner = dict(given)
    inner = {key: inner["value"]} if inner else {}
    for depth in range(len(sections), 0, -1):
        section = sections[depth - 1]
        if section.endswith("[]"):
            above = ".".join(sections[:depth])
            inner = {section.removesuffix("[]"): [SIBLINGS.get(above, {}) | inner]}
        else:
            inner = {section.replace("<name>", "x"): inner}
    if path == "gateway.drainTimeout":  # which must not be shorter
        inner["gateway"]["drainAccept"] = 0
    return inner


def parse(config):
    return _parsed(json.dumps(config))


@cache
def _parsed(text):
    return parse_config(text)


@pytest.mark.parametrize(("path", "zero"), CASES, ids=[f"{p}={z!r}" for p, z in CASES])
def test_null_and_the_zero_value_mean_the_default(path, zero):
    config = config_with(path, value=zero)
    is_string = path.startswith(("secretNames", "modelServerPods"))
    is_value = path in ZERO_IS_A_VALUE and zero is not None and (zero != "" or is_string)
    if path in REQUIRED and not is_value:
        with pytest.raises(ConfigError, match="is required") as caught:
            parse(config)
        assert caught.value.path == path.replace("[]", "[0]")
    elif is_value:
        assert parse(config) != parse(config_with(path))
    else:
        assert parse(config) == parse(config_with(path))


def test_the_exceptions_are_existing_keys():
    assert NODES.keys() >= ZERO_IS_A_VALUE | REQUIRED
    assert len(NODES) > 80


def test_all_zero_values_together_are_the_default_config():
    config = {}
    for path, written in NODES.items():
        plain = "[]" not in path and "<name>" not in path
        if plain and path not in ZERO_IS_A_VALUE:
            section = config
            *sections, key = path.split(".")
            for name in sections:
                section = section.setdefault(name, {})
            section[key] = section.get(key) or deepcopy(written[0])
    assert parse(config) == SystemConfig()


@pytest.mark.parametrize(("path", "zero"), CASES, ids=[f"{p}={z!r}" for p, z in CASES])
def test_the_schema_accepts_the_same_zero_values(path, zero):
    config = config_with(path, value=zero)
    if path in REQUIRED and zero is None:
        return  # a generated schema allows null even for a required value
    assert _validator().is_valid(config), list(_validator().iter_errors(config))


@cache
def _validator():
    return jsonschema_rs.validator_for(config_schema(SystemConfig))


def test_a_zero_value_keeps_the_default_of_kubeai_local(tmp_path):
    from kubeai.api.config.system import load_config

    file = tmp_path / "c.yaml"
    file.write_text("modelAutoscaling: {interval: 0s, timeWindow:}\nmetricsAddr: ''\n")
    defaults = {
        "metricsAddr": "127.0.0.1:0",
        "modelAutoscaling": {"interval": "1s", "timeWindow": "10s"},
    }
    config = load_config(file, defaults=defaults)
    assert config.metrics_addr == "127.0.0.1:0"
    assert config.model_autoscaling.interval_s == 1
    assert config.model_autoscaling.time_window_s == 10


# A config as a Go program writes it for an integration test: images for one engine only, other
# Secret names, no cache, no messages, fast leader election, itself as its own peer.
FROM_GO = {
    "secretNames": {"alibaba": "a", "aws": "b", "gcp": "c", "huggingface": "d"},
    "modelServers": {
        "OLlama": {"images": None},
        "VLLM": {"images": {"default": "vllm-image:v1", "cpu-only": "vllm-cpu-image:v1"}},
        "FasterWhisper": {"images": None},
        "Infinity": {"images": None},
    },
    "modelLoading": {"image": "loader"},
    "resourceProfiles": {
        "cpu": {
            "imageName": "cpu-only",
            "requests": {"cpu": "1", "memory": "2Gi"},
            "limits": {"memory": "4Gi"},
            "nodeSelector": {"compute-type": "cpu"},
            "tolerations": [{"key": "k", "operator": "Exists", "effect": "NoSchedule"}],
            "schedulerName": "scheduler",
            "runtimeClassName": "runtime",
        },
        "nvidia-gpu-l4": {"imageName": "", "limits": {"nvidia.com/gpu": "1"}},
    },
    "cacheProfiles": None,
    "messaging": {"errorMaxBackoff": "0s", "streams": None},
    "metricsAddr": "127.0.0.1:8080",
    "healthAddress": "127.0.0.1:0",
    "modelAutoscaling": {"interval": "0s", "timeWindow": "0s", "stateConfigMapName": "state"},
    "modelServerPods": {
        "serviceAccountName": "account",
        "podSecurityContext": {"runAsNonRoot": True},
        "securityContext": {"allowPrivilegeEscalation": False},
        "imagePullSecrets": [{"name": "one"}, {}],
    },
    "modelRollouts": {"surge": 0},
    "leaderElection": {"leaseDuration": "1s", "renewDeadline": "500ms", "retryPeriod": "100ms"},
    "allowPodAddressOverride": True,
    "fixedSelfMetricAddrs": ["127.0.0.1:8080"],
}


def test_a_config_that_a_go_program_writes_is_read():
    config = parse(FROM_GO)
    default = SystemConfig()
    assert config.model_servers.images("OLlama") == default.model_servers.images("OLlama")
    assert config.model_servers.images("VLLM")["cpu-only"] == "vllm-cpu-image:v1"
    assert set(config.resource_profiles) == {"cpu", "nvidia-gpu-l4"}
    assert config.messaging == default.messaging
    assert config.model_autoscaling.interval_s == default.model_autoscaling.interval_s
    assert config.model_autoscaling.state_config_map_name == "state"
    assert config.model_rollouts.surge == 0
    assert config.leader_election.retry_period_s == 0.1
    assert msgspec.to_builtins(config.cache_profiles) == {}
