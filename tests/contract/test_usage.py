"""The usage of keys in the ConfigMaps of both Kubernetes APIs, written by two replicas."""

import asyncio

import pytest

from kubeai.api.usage import grouped
from kubeai.client.usage import read_usage
from kubeai.kube.resources import CONFIGMAPS
from kubeai.routing.usage import UsageReport, UsageRow
from kubeai.supervisor.usage.book import UsageBook


@pytest.fixture
def kube(world):
    """A client with the permissions of the chart's Role."""
    return world.operator_kube


def book(kube, name: str) -> UsageBook:
    return UsageBook(
        kube, kube.namespace, name, keys=lambda: {"a", "key.with.dots"}, models=lambda: ["m"]
    )


async def test_two_replicas_add_to_what_is_stored_and_kubeai_usage_reads_it(kube):
    rows = [
        UsageRow("a", 'tenant "with" quotes\n', "m", 1, 0, 10, 2, 5),
        UsageRow("key.with.dots", "t", "m", 1, 1, 10, 2, 5),
        UsageRow("x" * 253, "t", "m", 1, 0, 1, 0, 1),
    ]
    replicas = [book(kube, name) for name in ("kubeai-0", "kubeai-1", "kubeai-2")]
    for _ in range(3):
        for replica in replicas:
            replica.add(UsageReport(tuple(rows)))
        await asyncio.gather(*(replica.close() for replica in replicas))
    total = await read_usage(kube, kube.namespace)
    found = {usage.names["key"]: usage for usage in grouped(total, "key")}
    assert {key: usage.counts.requests for key, usage in found.items()} == {
        "a": 9,
        "key.with.dots": 9,
        "x" * 253: 9,
    }
    assert found["a"].names["tenant"] == 'tenant "with" quotes\n'
    assert found["key.with.dots"].counts.estimated_requests == 9


async def test_usage_of_keys_that_are_gone_is_removed(kube):
    old = UsageBook(
        kube,
        kube.namespace,
        "kubeai-0",
        keys=lambda: {"a"},
        models=lambda: ["m"],
        clock=lambda: 1_000_000_000.0,
    )
    old.add(UsageReport((UsageRow("gone", "t", "m", 1, 0, 1, 0, 1),)))
    old.add(UsageReport((UsageRow("a", "t", "m", 1, 0, 1, 0, 1),)))
    await old.close()
    new = book(kube, "kubeai-1")
    await new._store.tidy({"a"}, {"m"})
    found, _ = await kube.list(CONFIGMAPS, kube.namespace, labels="kubeai.org/usage=true")
    assert [set(stored["data"]) for stored in found] == [{"a"}]
