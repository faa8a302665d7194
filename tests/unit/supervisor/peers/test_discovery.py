"""Which replicas are peers: pods of the release, and configured addresses."""

import pytest
from fakes.peers import Kube, Replica
from harness import until

from kubeai.supervisor.peers.discovery import selector


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (
            {
                "app.kubernetes.io/name": "kubeai",
                "app.kubernetes.io/instance": "my-release",
                "helm.sh/chart": "kubeai-1",
                "pod-template-hash": "x",
            },
            "app.kubernetes.io/name=kubeai,app.kubernetes.io/instance=my-release",
        ),
        ({"app": "ai", "tier": "edge", "pod-template-hash": "x"}, "app=ai,tier=edge"),
        ({"pod-template-hash": "x"}, ""),
    ],
)
def test_replicas_are_found_by_the_labels_of_their_release(labels, expected):
    assert selector(labels) == expected


async def test_pods_of_the_release_are_followed_while_they_exist():
    async with Replica("kubeai-1") as one:
        one.route("a")
        one.serve("a", 2)
        port = int(one.address.rpartition(":")[2])
        kube = Kube([("kubeai-1", "127.0.0.1"), ("kubeai-2", "127.0.0.2")])
        async with Replica("kubeai-2", kube=kube, pod="kubeai-2", port=port) as other:
            other.route("a")
            await until("the peer's load is seen", lambda: other.in_flight("a") == 2)
            assert list(other.peers.silences_s()) == [one.address]
            kube.tell("MODIFIED", "kubeai-1", "127.0.0.1", "Failed")
            await until("the pod has ended", lambda: other.in_flight("a") == 0)
            kube.tell("ADDED", "kubeai-1", "127.0.0.1")
            await until("the peer is back", lambda: other.in_flight("a") == 2)
            kube.tell("DELETED", "kubeai-1", "127.0.0.1")
            await until("the peer is gone", lambda: other.in_flight("a") == 0)
            assert other.peers.complete()


async def test_outside_a_cluster_there_are_no_peers_and_the_view_is_complete():
    async with Replica("host-7", pod="host-7") as one:
        await until("it knows its peers", one.peers.complete)
        assert one.peers.silences_s() == {}


async def test_our_own_address_among_the_configured_ones_is_not_counted_twice():
    replica = Replica("one")
    async with replica:
        again = Replica("one", [replica.address])  # the same identity
        async with again:
            replica.route("a"), again.route("a")
            replica.serve("a")
            await until("it knows its peers", again.peers.complete)
            assert again.peers.silences_s() == {}
            assert again.in_flight("a") == 0
