"""Which pods fit on the Node."""

import pytest

from kubeai.local.kubelet.capacity import (
    allocatable,
    insufficient,
    requests_of,
    why_insufficient,
)
from kubeai.local.kubelet.pods.pod import decode_pod

GPU = "nvidia.com/gpu"
NODE = allocatable({"cpu": "2", "memory": "8Gi", "pods": "1000", GPU: "2"})


def requests(*containers, init=()):
    spec = {
        "containers": [{"name": f"c{i}", "resources": r} for i, r in enumerate(containers)],
        "initContainers": [
            {"name": f"i{i}", "resources": r, "restartPolicy": policy}
            for i, (r, policy) in enumerate(init)
        ],
    }
    meta = {"name": "p", "namespace": "default", "uid": "u"}
    return requests_of(decode_pod({"metadata": meta, "spec": spec}))


def lacking(wanted, *used):
    return insufficient(wanted, used, NODE)


def gpus(count):
    return requests({"limits": {GPU: count}})


def test_pods_fit_until_the_gpus_are_used_up():
    assert lacking(gpus(2)) == []
    assert lacking(gpus(1), gpus(1)) == []
    assert lacking(gpus(1), gpus(2)) == [GPU]


def test_memory_is_counted_and_cpus_are_not():
    wanted = requests({"requests": {"cpu": "64", "memory": "5Gi"}})
    assert lacking(wanted) == []
    assert lacking(wanted, wanted) == ["memory"]


def test_a_limit_without_a_request_is_one():
    wanted = requests({"limits": {"memory": "6Gi"}, "requests": {}})
    assert lacking(wanted, wanted) == ["memory"]
    assert requests({"limits": {"memory": "6Gi"}, "requests": {"memory": "1Gi"}}) == {
        "memory": 2**30 * 10**9
    }


def test_a_resource_that_the_node_does_not_have_is_insufficient():
    assert lacking(requests({"limits": {"amd.com/gpu": 1}})) == ["amd.com/gpu"]
    assert lacking(requests({})) == []


@pytest.mark.parametrize(
    ("containers", "init", "gib"),
    [
        ((1, 2), (), 3),
        ((1,), ((5, None), (4, None)), 5),
        ((1,), ((2, "Always"), (3, None)), 5),
        ((4,), ((3, None), (2, "Always")), 6),
    ],
)
def test_a_pods_requests_are_summed_up_as_in_kubernetes(containers, init, gib):
    def memory(amount):
        return {"requests": {"memory": f"{amount}Gi"}}

    wanted = requests(*map(memory, containers), init=[(memory(m), p) for m, p in init])
    assert wanted == {"memory": gib * 2**30 * 10**9}


def test_the_reason_is_kube_schedulers():
    wanted = requests({"limits": {GPU: 1, "memory": "2Gi"}})
    assert why_insufficient(["memory", GPU], wanted, NODE) == (
        "0/1 nodes are available: 1 Insufficient memory, 1 Insufficient nvidia.com/gpu."
    )


def test_a_pod_that_can_never_fit_is_told_apart():
    wanted = requests({"limits": {GPU: 4, "memory": "16Gi"}})
    assert why_insufficient(["memory", GPU], wanted, NODE) == (
        "0/1 nodes are available: 1 Insufficient memory, 1 Insufficient nvidia.com/gpu. "
        "The pod requests 16Gi memory, and the node has 8Gi in all. "
        "The pod requests 4 nvidia.com/gpu, and the node has 2 in all."
    )
