"""How a manifest's strings are resolved: expansion, environments, references."""

import pytest

from kubeai.local.kubelet.pods.environment import (
    container_environment,
    environment_references,
    expand,
)
from kubeai.local.kubelet.pods.pod import (
    PodError,
    decode_pod,
)


def manifest(**container):
    return {
        "metadata": {
            "name": "p",
            "namespace": "default",
            "uid": "u-1",
            "labels": {"app": "model"},
            "creationTimestamp": None,
        },
        "spec": {"nodeName": "local", "containers": [{"name": "server", **container}]},
    }


def environment(container, maps=None, secrets=None, fields=None):
    pod = decode_pod(manifest(**container))
    return container_environment(
        pod, pod.spec.containers[0], fields or {}, maps or {}, secrets or {}
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("$(A)/$(B)", "1/2"),
        ("$(UNKNOWN)", "$(UNKNOWN)"),
        ("$$(A)", "$(A)"),
        ("$$$(A)", "$1"),
        ("$A ${A} $", "$A ${A} $"),
        ("$(A", "$(A"),
        ("$($(A))", "$(1)"),
    ],
)
def test_references_expand_as_in_kubernetes(text, expected):
    assert expand(text, {"A": "1", "B": "2"}) == expected


def test_a_variable_may_refer_only_to_earlier_ones():
    env = environment(
        {
            "env": [
                {"name": "A", "value": "$(B)"},
                {"name": "B", "value": "b"},
                {"name": "C", "value": "$(B)c"},
            ]
        }
    )
    assert env == {"A": "$(B)", "B": "b", "C": "bc"}


def test_env_overrides_env_from_and_later_sources_override_earlier_ones():
    container = {
        "envFrom": [
            {"configMapRef": {"name": "one"}, "prefix": "P_"},
            {"configMapRef": {"name": "two"}},
            {"secretRef": {"name": "none", "optional": True}},
        ],
        "env": [{"name": "X", "value": "from env"}],
    }
    maps = {"one": {"K": b"1"}, "two": {"X": b"from map", "P_K": b"2"}}
    assert environment(container, maps, {"none": None}) == {"P_K": "2", "X": "from env"}


def test_field_refs_read_the_manifest_and_the_status():
    container = {
        "env": [
            {"name": "NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
            {"name": "APP", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['app']"}}},
            {"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
        ]
    }
    env = environment(container, fields={"status.podIP": "127.9.9.9"})
    assert env == {"NAME": "p", "APP": "model", "IP": "127.9.9.9"}


def test_a_missing_optional_secret_omits_its_variable():
    ref = {"secretKeyRef": {"name": "hf", "key": "token", "optional": True}}
    container = {"env": [{"name": "HF_TOKEN", "valueFrom": ref}]}
    assert environment(container, secrets={"hf": None}) == {}
    assert environment(container, secrets={"hf": {"other": b"x"}}) == {}
    assert environment(container, secrets={"hf": {"token": b"x"}}) == {"HF_TOKEN": "x"}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"secretKeyRef": {"name": "hf", "key": "token"}}, "secret 'hf' not found"),
        ({"configMapKeyRef": {"name": "cm", "key": "nope"}}, "couldn't find key nope in configmap"),
        ({"fieldRef": {"fieldPath": "status.nonsense"}}, "'status.nonsense' is not supported"),
        ({"resourceFieldRef": {"resource": "limits.cpu"}}, "container server does not set it"),
    ],
)
def test_a_missing_required_reference_is_reported_by_name(source, message):
    container = {"env": [{"name": "X", "valueFrom": source}]}
    with pytest.raises(PodError, match=message):
        environment(container, maps={"cm": {}}, secrets={"hf": None})


@pytest.mark.parametrize(
    ("ref", "message"),
    [("configMapRef", "configmap 'none' not found"), ("secretRef", "secret 'none' not found")],
)
def test_env_from_requires_its_source_unless_optional(ref, message):
    missing = {"maps": {"none": None}, "secrets": {"none": None}}
    with pytest.raises(PodError, match=message):
        environment({"envFrom": [{ref: {"name": "none"}}]}, **missing)
    optional = {"envFrom": [{ref: {"name": "none", "optional": True}}]}
    assert environment(optional, **missing) == {}


def test_a_resource_field_is_divided_and_rounded_up():
    container = {
        "resources": {"limits": {"memory": "1Gi", "cpu": "1500m"}},
        "env": [
            {
                "name": "MEM",
                "valueFrom": {"resourceFieldRef": {"resource": "limits.memory", "divisor": "1Mi"}},
            },
            {
                "name": "CPU",
                "valueFrom": {"resourceFieldRef": {"resource": "limits.cpu", "divisor": "0"}},
            },
        ],
    }
    assert environment(container) == {"MEM": "1024", "CPU": "2"}


def test_the_objects_referenced_by_an_environment_are_listed():
    pod = decode_pod(
        manifest(
            env=[{"name": "A", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}],
            envFrom=[{"configMapRef": {"name": "c"}}],
        )
    )
    assert environment_references(pod.spec.containers[0]) == ({"c"}, {"s"})


@pytest.mark.parametrize(
    ("container", "message"),
    [
        ({"name": "../../etc"}, "container name '../../etc'"),
        ({"command": "python3"}, r"containers\[0\].command|containers\[...\].command"),
        ({"resources": {"limits": {"memory": "1 potato"}}}, "'1 potato' is not a quantity"),
    ],
)
def test_a_malformed_pod_is_rejected_with_the_path(container, message):
    with pytest.raises(PodError, match=message) as caught:
        decode_pod(manifest(**container))
    assert caught.value.reason == "InvalidPod"
