"""Which pods are bound to the node, and why the others wait."""

import asyncio

import pytest
from fakes.kube import FakeKube
from fakes.time import FAKE_TIME

from kubeai.kube.resources import NODES, PODS
from kubeai.local.kubelet.binder import TAINT, Binder, tolerates_cordon
from kubeai.local.kubelet.capacity import allocatable, requests_of
from kubeai.local.kubelet.pods.pod import decode_pod

GPU = "nvidia.com/gpu"


@pytest.mark.parametrize(
    ("toleration", "tolerates"),
    [
        ({"key": TAINT, "operator": "Exists"}, True),
        ({"key": TAINT, "operator": "Exists", "effect": "NoSchedule"}, True),
        ({"key": TAINT}, True),
        ({"key": TAINT, "operator": "Equal", "value": ""}, True),
        ({"operator": "Exists"}, True),
        ({"key": TAINT, "operator": "Exists", "effect": "NoExecute"}, False),
        ({"key": TAINT, "operator": "Equal", "value": "x"}, False),
        ({"key": "nvidia.com/gpu", "operator": "Exists"}, False),
        ({"operator": "Equal"}, False),
    ],
)
def test_a_toleration_matches_the_cordon_taint(toleration, tolerates):
    assert tolerates_cordon({"spec": {"tolerations": [toleration]}}) is tolerates


@pytest.mark.parametrize("spec", [{}, {"tolerations": None}, {"tolerations": []}])
def test_a_pod_without_tolerations_does_not_tolerate_a_cordon(spec):
    assert not tolerates_cordon({"spec": spec})


class Node:
    """A node with two GPUs, the binder, and the part of the agent that the binder knows."""

    def __init__(self):
        self.kube = FakeKube()
        self.kube._keep(NODES, {"metadata": {"name": "n"}}, "ADDED")
        self.kube.listeners.append(self._event)
        self.placed = {}  # uid → requests
        capacity = allocatable({GPU: "2", "memory": "8Gi"})
        self.binder = Binder(self.kube, "n", capacity, lambda: self.placed.values())
        self.kube.create = self._create

    async def _create(self, r, obj, namespace=""):
        await asyncio.sleep(0.002)
        if r.kind == "Binding":
            name = obj["metadata"]["name"]
            old = self.kube.objects["pods", name]
            self.kube._keep(PODS, old | {"spec": old["spec"] | {"nodeName": "n"}}, "MODIFIED")

    def _event(self, plural, kind, obj):
        if plural != "pods":
            return
        uid = obj["metadata"]["uid"]
        if kind == "DELETED":
            self.binder.withdraw(uid)
            self.placed.pop(uid, None)
            self.binder.room_changed()
        elif obj["spec"].get("nodeName"):
            self.binder.bound(uid)
            self.placed[uid] = requests_of(decode_pod(obj))
        else:
            self.binder.offer(obj)

    def pod(self, name, gpus):
        server = {"name": "server", "resources": {"limits": {GPU: gpus}}}
        meta = {"name": name, "namespace": "default", "uid": f"u-{name}"}
        self.kube._keep(PODS, {"metadata": meta, "spec": {"containers": [server]}}, "ADDED")

    def delete(self, name):
        self.kube._keep(PODS, self.kube.objects["pods", name], "DELETED")

    def bound(self):
        pods = [obj for (plural, _), obj in self.kube.objects.items() if plural == "pods"]
        return {obj["metadata"]["name"] for obj in pods if obj["spec"].get("nodeName")}

    def why(self, name):
        status = self.kube.objects["pods", name].get("status", {})
        return [(c["reason"], c["message"]) for c in status.get("conditions", ())]


@FAKE_TIME
async def test_pods_are_bound_until_the_gpus_are_used_up_and_the_others_wait_for_room():
    node = Node()
    for name in ("a", "b", "c"):
        node.pod(name, 1)
    await asyncio.sleep(5)
    assert node.bound() == {"a", "b"}
    insufficient = "0/1 nodes are available: 1 Insufficient nvidia.com/gpu."
    assert node.why("c") == [("Unschedulable", insufficient)]
    node.delete("a")
    await asyncio.sleep(5)
    assert node.bound() == {"b", "c"}
    node.binder.stop()


@FAKE_TIME
async def test_a_pod_that_needs_more_than_is_left_does_not_block_a_smaller_one():
    node = Node()
    node.pod("a", 1)
    await asyncio.sleep(1)
    node.pod("big", 2)
    node.pod("huge", 3)
    node.pod("small", 1)
    await asyncio.sleep(5)
    assert node.bound() == {"a", "small"}
    assert "the node has 2 in all" not in node.why("big")[0][1]
    assert "The pod requests 3 nvidia.com/gpu, and the node has 2" in node.why("huge")[0][1]
    node.binder.stop()
    await asyncio.sleep(0.1)


@FAKE_TIME
async def test_a_pod_that_is_deleted_while_it_waits_is_forgotten():
    node = Node()
    node.pod("a", 2)
    await asyncio.sleep(1)
    node.pod("b", 2)
    await asyncio.sleep(1)
    node.delete("b")
    node.delete("a")
    node.pod("c", 2)
    await asyncio.sleep(5)
    assert node.bound() == {"c"}
