"""Which pods fit on this Node: what they request, and what is left. Pure.

Requests are summed up by kube-scheduler's rules. Counted are memory and extended resources, such
as ``nvidia.com/gpu``. CPUs are not: the processes of a machine share them, and a laptop with fewer
CPUs than a manifest for a cluster requests is slow, but it works. Called by the binder
and the agent.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from kubeai.local.kubelet.pods.pod import Pod, quantity_nanos

Amounts = Mapping[str, int]  # resource → billionths
_NOT_COUNTED = ("cpu", "pods", "ephemeral-storage")


def requests_of(pod: Pod) -> dict[str, int]:
    """What a pod needs at the same time, by resource. PodError if a quantity is invalid."""
    return {name: nanos for name, nanos in pod.requests().items() if name not in _NOT_COUNTED}


def allocatable(capacity: Mapping[str, str]) -> dict[str, int]:
    """A Node's resources that are counted, in billionths."""
    counted = (item for item in capacity.items() if item[0] not in _NOT_COUNTED)
    return {name: quantity_nanos(amount) for name, amount in counted}


def insufficient(wanted: Amounts, used: Iterable[Amounts], capacity: Amounts) -> list[str]:
    """The resources of which too little is left for a pod, sorted."""
    left = dict(capacity)
    for amounts in used:
        for name, nanos in amounts.items():
            left[name] = left.get(name, 0) - nanos
    return sorted(name for name, nanos in wanted.items() if nanos > max(0, left.get(name, 0)))


def why_insufficient(resources: Iterable[str], wanted: Amounts, capacity: Amounts) -> str:
    """Why a pod is not bound, in kube-scheduler's words; and what it asks for in vain."""
    counted = ", ".join(f"1 Insufficient {name}" for name in resources)
    text = f"0/1 nodes are available: {counted}."
    for name in resources:
        if wanted[name] > capacity.get(name, 0):
            has, needs = _amount(name, capacity.get(name, 0)), _amount(name, wanted[name])
            text += f" The pod requests {needs} {name}, and the node has {has} in all."
    return text


def _amount(name: str, nanos: int) -> str:
    value = nanos / 10**9
    return f"{value / 2**30:.3g}Gi" if name == "memory" else f"{value:g}"
