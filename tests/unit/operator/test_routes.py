"""From pods to routes, and which events the store accepts."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from kubeai.api.config.system import GatewayConfig, KeysConfig, QueueConfig
from kubeai.api.model import decode_model
from kubeai.operator.pods import DRAINING_ANNOTATION, HASH_ANNOTATION, PodObject, observe
from kubeai.operator.routes import route_of
from kubeai.operator.store import Store


def make_model(meta=None, **spec):
    return decode_model(
        {
            "metadata": {
                "name": "m",
                "uid": "u1",
                "resourceVersion": "5",
                "labels": {"team": "a"},
                "creationTimestamp": "2026-01-01T00:00:00Z",
                **(meta or {}),
            },
            "spec": {
                "url": "hf://org/name",
                "engine": "VLLM",
                "features": ["TextGeneration"],
                **spec,
            },
        }
    )


def make_pod(name="p", *, meta=None, ready=True, ip="10.0.0.1", uid="u1", spec=None, **status):
    conditions = [{"type": "Ready", "status": str(ready)}]
    owner = {"apiVersion": "kubeai.org/v1", "kind": "Model", "name": "m", "uid": uid}
    pod = {
        "metadata": {
            "name": name,
            "uid": f"uid-{name}",
            "labels": {"model": "m", "adapter.kubeai.org/fin": "h1"},
            "ownerReferences": [owner | {"controller": True}],
            **(meta or {}),
        },
        "spec": spec or {"containers": [{"name": "server"}]},
        "status": {"podIP": ip, "conditions": conditions, **status},
    }
    return msgspec.convert(pod, PodObject)


def endpoints(*pods, model=None, **options):
    observed = [observe(pod, **options) for pod in pods]
    return [(e.name, e.address) for e in route_of(model or make_model(), observed).endpoints]


def test_ready_pods_of_the_model_are_endpoints_ordered_by_name():
    gone = {"deletionTimestamp": "2026-01-01T00:00:00Z"}
    pods = [
        make_pod("c", ip="10.0.0.3"),
        make_pod("a", ip="10.0.0.1"),
        make_pod("unready", ready=False),
        make_pod("of-another", uid="u2"),
        make_pod("no-address", ip=""),
        make_pod("failed", phase="Failed"),
        make_pod("drained", meta={"annotations": {DRAINING_ANNOTATION: "1767225600"}}),
        make_pod("drained-oddly", meta={"annotations": {DRAINING_ANNOTATION: "yes"}}),
        make_pod("gone", meta={"uid": "x", "name": "gone", "labels": {"model": "m"}} | gone),
    ]
    assert endpoints(*pods) == [("a", "10.0.0.1:8000"), ("c", "10.0.0.3:8000")]


def test_draining_and_terminating_pods_are_draining_endpoints_but_failed_ones_are_not():
    gone = {"deletionTimestamp": "2026-01-01T00:00:00Z"}
    pods = [
        make_pod("ready"),
        make_pod("unready", ready=False),
        make_pod("terminating", meta=gone, ready=False),
        make_pod("drained", meta={"annotations": {DRAINING_ANNOTATION: "1767225600"}}),
        make_pod("failed", meta=gone, phase="Failed"),
        make_pod("never-had-an-address", meta=gone, ip=""),
        make_pod("of-another", meta=gone, uid="u2"),
    ]
    route = route_of(make_model(), [observe(pod) for pod in pods])
    assert [endpoint.name for endpoint in route.endpoints] == ["ready"]
    assert route.draining == ("drained", "terminating")


def test_a_model_that_is_being_deleted_has_no_route():
    model = make_model(meta={"deletionTimestamp": "2026-01-01T00:00:00Z"})
    assert route_of(model, [observe(make_pod())]) is None


def test_a_route_has_the_models_routing_settings():
    balancing = {"strategy": "PrefixHash", "prefixHash": {"meanLoadFactor": 150}}
    model = make_model(owner="me", loadBalancing=balancing)
    route = route_of(model, [])
    assert (route.model, route.engine, route.features) == ("m", "VLLM", ("TextGeneration",))
    assert (route.labels, route.owner, route.created_s) == ({"team": "a"}, "me", 1767225600)
    assert (route.strategy, route.mean_load_factor, route.replication) == ("PrefixHash", 150, 20)
    assert route.prefix_char_length == 100
    assert route.form_model == ""
    assert route_of(model, [], form_model="org/x").form_model == "org/x"


def test_the_capacity_is_the_models_or_a_share_of_its_target():
    def capacity(given=None, **gateway):
        balancing = {} if given is None else {"maxRequestsPerReplica": given}
        model = make_model(targetRequests=30, loadBalancing=balancing)
        return route_of(model, [], gateway=GatewayConfig(**gateway)).capacity

    keys = KeysConfig(required=True)
    assert capacity() == 0
    assert capacity(keys=keys) == 60
    assert capacity(keys=keys, queue=QueueConfig(saturation_percent=0)) == 0
    assert capacity(queue=QueueConfig(saturation_percent=150)) == 45
    assert capacity(queue=QueueConfig(saturation_percent=1)) == 1
    assert capacity(7, keys=keys, queue=QueueConfig(saturation_percent=150)) == 7
    assert capacity(0, keys=keys) == 0


def test_only_loaded_and_still_declared_adapters_are_routed():
    adapters = [{"name": "fin", "url": "hf://a/b"}, {"name": "law", "url": "hf://a/c"}]
    loaded = make_model(adapters=adapters)
    route = route_of(loaded, [observe(make_pod())])
    assert route.adapters == ("fin", "law")
    assert route.endpoints[0].adapters == ("fin",)
    assert route_of(make_model(), [observe(make_pod())]).endpoints[0].adapters == ()


@pytest.mark.parametrize(
    ("pod", "override", "address"),
    [
        (make_pod(), False, "10.0.0.1:8000"),
        (make_pod(ip="fd00::1"), False, "[fd00::1]:8000"),
        (
            make_pod(spec={"containers": [{"ports": [{"name": "http", "containerPort": 9}]}]}),
            False,
            "10.0.0.1:9",
        ),
        (
            make_pod(spec={"containers": [{"ports": [{"name": "x", "containerPort": 9}]}]}),
            False,
            "10.0.0.1:8000",
        ),
        (make_pod(meta={"annotations": {"model-pod-ip": "::9"}}), False, "10.0.0.1:8000"),
        (
            make_pod(meta={"annotations": {"model-pod-ip": "1.2.3.4", "model-pod-port": "77"}}),
            True,
            "1.2.3.4:77",
        ),
        (make_pod(meta={"annotations": {"model-pod-port": "77"}}), True, "10.0.0.1:77"),
        (make_pod(meta={"annotations": {"model-pod-port": "no"}}), True, "10.0.0.1:8000"),
    ],
)
def test_an_endpoint_has_the_pods_address_unless_overridden(pod, override, address):
    assert observe(pod, address_override=override).address == address


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        ({"phase": "Failed", "reason": "Evicted"}, "Evicted"),
        (
            {
                "conditions": [
                    {"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}
                ]
            },
            "Unschedulable",
        ),
        (
            {"containerStatuses": [{"state": {"waiting": {"reason": "ErrImagePull"}}}]},
            "ImagePullBackOff",
        ),
        (
            {"containerStatuses": [{"state": {"waiting": {"reason": "CrashLoopBackOff"}}}]},
            "CrashLoopBackOff",
        ),
        (
            {
                "containerStatuses": [
                    {
                        "state": {"waiting": {"reason": "CrashLoopBackOff"}},
                        "lastState": {"terminated": {"reason": "OOMKilled", "exitCode": 137}},
                    }
                ]
            },
            "OOMKilled",
        ),
        (
            {"containerStatuses": [{"state": {"waiting": {"reason": "EngineNotInstalled"}}}]},
            "EngineNotInstalled",
        ),
        (
            {
                "containerStatuses": [
                    {
                        "state": {
                            "waiting": {"reason": "ContainerCreating", "message": "no such claim"}
                        }
                    }
                ]
            },
            "ContainerCreating",
        ),
        ({"containerStatuses": [{"state": {"waiting": {"reason": "ContainerCreating"}}}]}, None),
        ({"containerStatuses": [{"state": {"waiting": {"reason": "PodInitializing"}}}]}, None),
    ],
)
def test_a_pod_in_trouble_has_the_reason(status, reason):
    trouble = observe(make_pod(**({"conditions": []} | status))).trouble
    assert (trouble and trouble.reason) == reason


# -- the store -----------------------------------------------------------------------------------


@pytest.fixture
def store():
    heard: list[str] = []
    store: Any = Store(heard.append)
    store.heard = heard
    store.replace_models([])
    store.replace_pods([])
    return store


def test_an_event_older_than_our_own_write_is_ignored(store):
    store.model_changed("ADDED", make_model(replicas=0))
    store.model_written(make_model(meta={"resourceVersion": "10"}, replicas=1))
    store.heard.clear()
    store.model_changed("MODIFIED", make_model(meta={"resourceVersion": "9"}, replicas=0))
    assert store.models["m"].spec.replicas == 1
    assert store.heard == []


def test_a_list_is_accepted_even_with_older_resource_versions(store):
    store.model_changed("ADDED", make_model(meta={"resourceVersion": "900"}, replicas=1))
    store.replace_models([make_model(meta={"resourceVersion": "3"}, replicas=0)])
    assert store.models["m"].spec.replicas == 0


def test_deleting_a_former_model_does_not_affect_its_successor(store):
    store.model_changed("ADDED", make_model(meta={"uid": "u2"}))
    store.model_changed("DELETED", make_model(meta={"uid": "u1"}))
    assert store.models["m"].metadata.uid == "u2"


def test_objects_missing_from_a_list_are_removed_and_reported(store):
    store.model_changed("ADDED", make_model())
    store.pod_changed("ADDED", make_pod("p"))
    store.heard.clear()
    store.replace_models([])
    store.replace_pods([])
    assert store.heard == ["m", "m"]
    assert not store.models
    assert list(store.observed_pods("m")) == []
    assert store.names() == set()


def test_a_pod_that_changes_its_model_is_removed_from_the_old_one(store):
    store.pod_changed("ADDED", make_pod("p"))
    store.heard.clear()
    store.pod_changed("MODIFIED", make_pod("p", meta={"labels": {"model": "other"}}))
    assert set(store.heard) == {"m", "other"}
    assert list(store.observed_pods("m")) == []
    assert [pod.name for pod in store.observed_pods("other")] == ["p"]


def test_only_our_own_hash_annotation_counts():
    assert observe(make_pod(meta={"labels": {"model": "m", "pod-hash": "x"}})).hash is None
    assert observe(make_pod(meta={"annotations": {HASH_ANNOTATION: "x"}})).hash == "x"
