"""Load shared between replicas: what peers report to each other, and what a bad one cannot do."""

import asyncio
import contextlib
from collections import Counter

import aiohttp
import pytest
from aiohttp import web
from harness import until
from hypothesis import given
from hypothesis import strategies as st

from kubeai._counts import admit
from kubeai._load import LoadTable
from kubeai._pick import Picker
from kubeai._prefix import PrefixIndex
from kubeai._prompt import Prompt
from kubeai._queue_table import QueueTable
from kubeai._ring import Ring
from kubeai.framing import frame, read_frame
from kubeai.kube.errors import ApiError
from kubeai.routing.publisher import Publisher
from kubeai.routing.routes import Endpoint, Route
from kubeai.supervisor.loads import AllLoads
from kubeai.supervisor.metrics import Metrics
from kubeai.supervisor.peers import listener, wire
from kubeai.supervisor.peers.discovery import selector
from kubeai.supervisor.peers.feed import LISTENERS_MAX
from kubeai.supervisor.peers.listener import read_metrics
from kubeai.supervisor.peers.peers import LOADS_PATH, METRICS_HEADERS, Peers
from kubeai.supervisor.peers.view import HOLD_S, NAMES_MAX, STALE_S, View


class Kube:
    """Pods of replicas, as the API would report them."""

    def __init__(self, pods=()):
        self.pods = {name: _pod(name, ip) for name, ip in pods}
        self.followers = []

    async def get(self, resource, name, namespace):
        if name not in self.pods:
            raise ApiError(404, "NotFound", name)
        return self.pods[name]

    async def follow(self, resource, namespace, *, labels, type, replaced, changed):
        import msgspec

        self.labels = labels
        self.followers.append(lambda kind, pod: changed(kind, msgspec.convert(pod, type)))
        replaced([msgspec.convert(pod, type) for pod in self.pods.values()])
        await asyncio.Event().wait()

    def tell(self, kind, name, ip, phase="Running"):
        for follower in self.followers:
            follower(kind, _pod(name, ip, phase))


def _pod(name, ip, phase="Running"):
    labels = {"app.kubernetes.io/name": "kubeai", "app.kubernetes.io/instance": "ai"}
    return {"metadata": {"name": name, "labels": labels}, "status": {"phase": phase, "podIP": ip}}


class Clock:
    def __init__(self):
        self.now_s = 1000.0

    def __call__(self):
        return self.now_s


class Replica:
    """One replica's load table with a worker, its routes, its peers, and its loads route."""

    def __init__(self, name="one", addresses=(), kube=None, pod="", port=None):
        self.clock = Clock()
        self.table = LoadTable.create(64, 1)
        self.worker = LoadTable.attach(self.table.fd, 0)
        self.index = PrefixIndex.create(64, 1024)
        self.queues = QueueTable.create(64, 1)
        self.publisher = Publisher(self.table, self.index, self.queues)
        self.peers = Peers(
            kube or Kube(),
            "ns",
            name,
            self.table,
            self.index,
            self.publisher,
            pod=pod,
            addresses=addresses,
            clock=self.clock,
            queues=self.queues,
        )
        self.port = port
        self.held = []

    async def __aenter__(self):
        app = web.Application()
        app.router.add_get(LOADS_PATH, self.peers.serve)
        app.router.add_get("/metrics", announce)
        self._runner = web.AppRunner(app, shutdown_timeout=1.0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        port = self._runner.addresses[0][1]
        self.address = f"127.0.0.1:{port}"
        self._task = asyncio.create_task(self.peers.run(self.port or port))
        return self

    async def __aexit__(self, *_):
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self.peers.close()
        await self._runner.cleanup()
        self.held.clear()
        self.worker.close()
        self.table.close()
        self.queues.close()

    def route(self, *pods, model="m", capacity=0):
        """Set the model's endpoints."""
        endpoints = tuple(Endpoint(pod, "10.0.0.1:8000") for pod in pods)
        route = Route(model, "VLLM", endpoints=endpoints, capacity=capacity)
        self.publisher.update(model, route)
        self.peers.rerouted(model)
        self.worker.acknowledge(self.publisher.version)
        return self.publisher.route(model)

    def ring(self, model="m"):
        route = self.publisher.route(model)
        ring = Ring(self.worker, route.row, route.generation)
        for endpoint in route.endpoints:
            ring.set(endpoint.name, endpoint.row, endpoint.generation)
        return ring

    def picker(self, model="m"):
        queues = QueueTable.attach(self.queues.fd, 0, self.queues.wake_fds)
        picker = Picker(self.ring(model))
        picker.limit(self.publisher.route(model).capacity, queues)
        return picker

    def serve(self, pod, count=1, model="m"):
        """Start ``count`` requests of this replica to an endpoint."""
        route = self.publisher.route(model)
        (endpoint,) = (e for e in route.endpoints if e.name == pod)
        ring = Ring(self.worker, route.row, route.generation)
        ring.set(pod, endpoint.row, endpoint.generation)
        self.held += [ring.pick_least() for _ in range(count)]

    def in_flight(self, pod, model="m"):
        return self.table.in_flight(self.publisher.endpoint_rows(model)[pod])

    def reclaim(self):
        self.peers.freed(self.publisher.reclaim([self.worker.acknowledged(0)]))


@contextlib.asynccontextmanager
async def two():
    """Two replicas; the second listens to the first."""
    async with Replica("one") as one, Replica("two", [one.address]) as two:
        yield one, two


async def announce(request):
    """``/metrics`` of a replica that serves its loads too."""
    return web.Response(text="kubeai_build 1\n", headers=METRICS_HEADERS)


@contextlib.asynccontextmanager
async def page(handler, path=LOADS_PATH):
    """Another program's responses at the address of a peer, for the loads and for ``/metrics``."""
    app = web.Application()
    app.router.add_get(path, handler)
    if path == LOADS_PATH:
        app.router.add_get("/metrics", announce)
    async with site(app) as address:
        yield address


@contextlib.asynccontextmanager
async def site(app):
    runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


# -- shared loads ----------------------------------------------------------------------------------


async def test_a_pick_includes_the_in_flight_requests_of_other_replicas():
    async with two() as (one, other):
        one.route("a", "b"), other.route("a", "b")
        one.serve("a", 3)
        await until("the peer's load is seen", lambda: other.in_flight("a") == 3)
        row = other.publisher.row("m")
        assert other.table.in_flight(row) == 3
        ring = other.ring()
        picks = [ring.pick_least() for _ in range(3)]
        assert [pick.name for pick in picks] == ["b"] * 3
        del picks
        one.held.clear()
        await until("the request has ended", lambda: other.in_flight("a") == 0)
        assert other.table.in_flight(row) == 0


async def test_a_hashed_pick_is_bounded_by_the_load_of_all_replicas():
    async with two() as (one, other):
        one.route("a", "b"), other.route("a", "b")
        ring = other.ring()
        key = next(k << 54 for k in range(1024) if ring.lookup(k << 54) == "a")
        one.serve("a", 8)
        await until("the peer's load is seen", lambda: other.in_flight("a") == 8)
        pick = ring.pick_hashed(key)
        assert (pick.first, pick.first_load, pick.name) == ("a", 8, "b")
        pick.release()


def waiting(replica, priority, start, model="m"):
    """The first request in the queue of the replica's worker."""
    queue = QueueTable.attach(replica.queues.fd, 0, replica.queues.wake_fds)
    queue.publish(replica.publisher.row(model), priority, start)
    return queue


async def test_a_place_is_left_free_for_a_waiting_request_of_another_replica():
    async with two() as (one, other):
        one.route("a", capacity=2), other.route("a", capacity=2)
        first = waiting(one, 0, 70)
        row = other.publisher.row("m")
        await until("the request is seen", lambda: other.queues.best(row) == 1)
        picker = other.picker()
        pick = picker.pick_new(Prompt())
        assert pick is not None
        assert picker.pick_new(Prompt()) is None, "there is one place"
        assert picker.pick(Prompt()) is not None, "but not for a retry"
        first.withdraw(one.publisher.row("m"))
        await until("nobody waits", lambda: other.queues.best(row) == -1)
        pick.release()
        assert picker.pick_new(Prompt()) is not None
        first.close()


async def test_the_first_of_the_other_replicas_requests_is_recorded():
    async with two() as (one, other), Replica("three", [one.address, other.address]) as three:
        for replica in (one, other, three):
            replica.route("a")
        row = three.publisher.row("m")
        queues = [waiting(one, 0, 70), waiting(other, 0, 50)]
        await until("the earlier one counts", lambda: three.queues.earliest(row, 0) == 50)
        queues.append(waiting(other, 3, 90))
        await until("a higher priority counts", lambda: three.queues.earliest(row, 3) == 90)
        for queue in queues:
            queue.close()


async def test_the_virtual_time_of_another_replica_is_taken_over():
    async with two() as (one, other):
        one.route("a"), other.route("a")
        queue = waiting(one, 0, 500)
        queue.charge(one.publisher.row("m"), 7, 1000, 10)
        row = other.publisher.row("m")
        await until("it is told", lambda: other.queues.round(row) == 1000)
        queue.close()


async def test_a_peer_that_is_gone_waits_for_nothing():
    async with two() as (one, other):
        one.route("a"), other.route("a")
        queue = waiting(one, 5, 70)
        row = other.publisher.row("m")
        await until("the request is seen", lambda: other.queues.best(row) == 1)
        other.peers._view.leave(one.address)
        assert other.queues.best(row) == -1
        queue.close()


async def test_active_and_completed_requests_are_reported_per_model():
    async with two() as (one, other):
        route = one.route("a")
        early = admit(one.worker, route.row, route.generation)
        early.count("2xx")
        early.close()
        admissions = [admit(one.worker, route.row, route.generation) for _ in range(4)]
        await until("the requests are seen", lambda: other.peers.active("m") == 4)
        assert other.peers.ended("m") == 0, "completions from before the connection do not count"
        for admission in admissions[:3]:
            admission.count("5xx")
            admission.close()
        await until("completions are seen", lambda: other.peers.ended("m") == 3)
        assert other.peers.active("m") == 1
        admissions[3].close()


async def test_the_operator_sees_the_loads_of_all_replicas():
    async with two() as (one, other):
        loads = AllLoads(other.table, other.publisher, other.peers)
        for replica in (one, other):
            route = replica.route("a")
            replica.held.append(admit(replica.worker, route.row, route.generation))
            replica.serve("a")
        await until("both are counted", lambda: loads.active("m") == 2)
        assert loads.held("m") == 0
        await until("both have begun", lambda: loads.in_flight("m", "a") == 2)
        assert loads.complete()
        for outcomes in (["2xx"], ["retried", "retried", "5xx"], ["left"]):
            for replica in (one, other):
                route = replica.publisher.route("m")
                admission = admit(replica.worker, route.row, route.generation)
                for outcome in outcomes:
                    admission.count(outcome)
                admission.close()
        await until("completions are counted once each", lambda: loads.ended("m") == 6)
        other.held.clear()
        other.route()
        other.reclaim()
        assert loads.in_use("m", "a"), "the other replica routes to it"
        one.held.clear()
        one.route()
        one.reclaim()
        await until("no replica uses it", lambda: not loads.in_use("m", "a"))
        other.clock.now_s += STALE_S + 0.1
        assert loads.in_use("m", "a"), "unknown, so it counts as in use"


async def test_metrics_separate_this_replicas_load_from_that_of_its_peers():
    async with two() as (one, other):
        one.route("a"), other.route("a")
        one.serve("a", 2)
        await until("the peer's load is seen", lambda: other.in_flight("a") == 2)
        metrics = Metrics(other.table, other.publisher, other.peers.silences_s)
        text = metrics.render("")[0].decode()
        series = '{endpoint="a",request_model="m"}'
        assert f"kubeai_endpoint_requests_in_flight{series} 0.0" in text
        assert f"kubeai_endpoint_peers_requests_in_flight{series} 2.0" in text
        assert f'kubeai_peer_silence_seconds{{peer="{one.address}"}} 0.0' in text


async def test_an_endpoint_is_in_use_until_no_worker_can_send_it_anything():
    async with two() as (one, other):
        one.route("a", "b")
        await until("both have a route", lambda: other.peers.routes("a"))
        one.serve("a")
        one.route("b")
        one.reclaim()
        await until("its load is reported", lambda: other.peers.in_flight("a") == 1)
        assert other.peers.routes("a"), "a request is still in flight there"
        one.held.clear()
        one.reclaim()
        await until("it is not in use", lambda: not other.peers.routes("a"))
        assert other.peers.routes("b")


async def test_an_endpoint_that_was_removed_and_added_again_counts_with_both_its_rows():
    async with two() as (one, other):
        one.route("a")
        one.serve("a", 2)
        one.route()
        one.route("a")
        one.serve("a", 1)
        await until("all three are reported", lambda: other.peers.in_flight("a") == 3)
        del one.held[:2]
        one.reclaim()
        await until("the first two have ended", lambda: other.peers.in_flight("a") == 1)
        assert other.peers.routes("a")


async def test_a_reused_row_has_no_peer_load_of_its_former_endpoint():
    async with two() as (one, other):
        one.route("a"), other.route("a")
        one.serve("a", 5)
        await until("the peer's load is seen", lambda: other.in_flight("a") == 5)
        row = other.publisher.endpoint_rows("m")["a"]
        other.route()
        assert other.table.in_flight(row) == 0
        assert other.table.in_flight(other.publisher.row("m")) == 0
        other.reclaim()
        other.route("b")
        assert other.publisher.endpoint_rows("m") == {"b": row}
        one.serve("a")
        await until("the new load is reported", lambda: other.peers.in_flight("a") == 6)
        assert other.in_flight("b") == 0


async def test_an_endpoint_added_later_has_its_peer_load_at_once():
    async with two() as (one, other):
        one.route("a")
        one.serve("a", 5)
        await until("the load is reported", lambda: other.peers.in_flight("a") == 5)
        other.route("a")
        assert other.in_flight("a") == 5


async def test_an_endpoint_shared_by_two_models_has_its_load_for_both():
    async with two() as (one, other):
        one.route("a")
        one.serve("a", 5)
        other.route("a", model="first")
        other.route("a", model="m")
        await until("the load is reported to one", lambda: other.in_flight("a", "m") == 5)
        assert other.in_flight("a", "first") == 5
        other.route(model="m")
        one.serve("a")
        await until("the new load is reported", lambda: other.in_flight("a", "first") == 6)
        other.route(model="first")


async def test_the_load_of_a_deleted_model_is_dropped():
    async with two() as (one, other):
        one.route("a", model="gone")
        await until("the model is known", lambda: other.peers.routes("a"))
        one.publisher.update("gone", None)
        one.peers.rerouted("gone")
        one.worker.acknowledge(one.publisher.version)
        one.reclaim()
        await until("the model is dropped", lambda: not other.peers.routes("a"))
        (peer,) = other.peers._view.peers.values()
        await until("nothing is left", lambda: not peer.models)


# -- discovery -------------------------------------------------------------------------------------


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


# -- slow, hung, lost and misbehaving peers --------------------------------------------------------


async def test_the_last_report_of_a_silent_peer_expires():
    async def hung(request):
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(wire.encode(wire.Hello("hung")))
        await response.write(wire.encode(wire.Loads({"m": (7, 0)}, {"a": 4})))
        await asyncio.Event().wait()

    async with page(hung) as address, Replica("two", [address]) as other:
        other.route("a")
        assert not other.peers.complete(), "no peer has reported yet"
        await until("the peer's load is seen", lambda: other.in_flight("a") == 4)
        assert other.peers.complete()
        other.clock.now_s += STALE_S + 0.1
        assert not other.peers.complete()
        assert (other.in_flight("a"), other.peers.active("m")) == (4, 7), (
            "missing data does not mean zero"
        )
        other.clock.now_s += HOLD_S
        await until("its load is dropped", lambda: other.in_flight("a") == 0)
        assert other.peers.active("m") == 0
        assert other.peers.complete(), "it is not waited for any longer"


async def test_a_peer_that_never_responds_is_waited_for_only_for_a_time():
    async def never(request):
        await asyncio.Event().wait()

    async with page(never) as address, Replica("two", [address]) as other:
        assert not other.peers.complete()
        other.clock.now_s += HOLD_S + 0.1
        assert other.peers.complete()


async def test_a_hung_peer_does_not_delay_the_others():
    async def never(request):
        await asyncio.Event().wait()

    async with (
        page(never) as hung,
        Replica("one") as one,
        Replica("two", [hung, one.address]) as other,
    ):
        one.route("a"), other.route("a")
        one.serve("a", 2)
        await until("the good one is seen", lambda: other.in_flight("a") == 2, 2.0)


BAD = {
    "a number below 0": wire.encode(wire.Loads({}, {"a": -2})),
    "too large a number": wire.encode(wire.Loads({}, {"a": wire.COUNT_MAX + 1})),
    "active below 0": wire.encode(wire.Loads({"m": (-1, 0)})),
    "another type": frame(b"\x93abc"[:3]),
    "no msgpack": frame(b"\xc1"),
    "a frame too long": (wire.FRAME_MAX_BYTES + 1).to_bytes(4, "big"),
    "too many names": wire.encode(wire.Loads({}, {str(n): 0 for n in range(NAMES_MAX + 1)})),
    "the end": b"",
}


@pytest.mark.parametrize("frame", BAD.values(), ids=BAD.keys())
async def test_an_invalid_frame_disconnects_the_peer(frame):
    calls = 0

    async def lying(request):
        nonlocal calls
        calls += 1
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(wire.encode(wire.Hello("liar")) + frame)
        return response

    async with page(lying) as address, Replica("two", [address]) as other:
        other.route("a")
        await until("the connection was retried", lambda: calls >= 2)
        assert other.in_flight("a") == 0
        assert other.peers.active("m") == 0


async def test_a_reconnected_peer_sends_its_complete_state():
    words = [wire.Loads({"m": (1, 9)}, {"a": 4, "b": 1}), wire.Loads({}, {"b": 2})]

    async def restarting(request):
        response = web.StreamResponse()
        await response.prepare(request)
        word = words.pop(0)
        await response.write(wire.encode(wire.Hello("one")) + wire.encode(word))
        if not words:
            await asyncio.Event().wait()
        return response  # it dies

    async with page(restarting) as address, Replica("two", [address]) as other:
        other.route("a", "b")
        await until(
            "the peer is back", lambda: (other.in_flight("a"), other.in_flight("b")) == (0, 2)
        )
        assert other.peers.active("m") == 0
        assert not other.peers.routes("a")


async def test_frames_are_merged_for_a_slow_listener():
    async with Replica("one") as one, aiohttp.ClientSession() as session:
        pods = [f"pod-{n:04}-{'x' * 200}" for n in range(50)]
        one.route(*pods)
        async with session.get(f"http://{one.address}{LOADS_PATH}") as response:
            stream = response.content
            await frame_of(stream)
            whole = await frame_of(stream)
            assert set(whole.endpoints) == set(pods)
            for _ in range(200):  # 50 names of 200 letters each: 2 MB if all were queued
                one.serve(pods[0])
                one.held.pop()
                one.serve(pods[1])
                one.peers._feed.read()
            told = await frame_of(stream)
            assert told.endpoints[pods[1]] == 200


async def frame_of(stream):
    return wire.decode(await read_frame(stream, wire.FRAME_MAX_BYTES))


async def test_the_number_of_listeners_is_limited():
    async with Replica("one") as one, aiohttp.ClientSession() as session:
        url = f"http://{one.address}{LOADS_PATH}"
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(LISTENERS_MAX):
                await stack.enter_async_context(session.get(url))
            async with session.get(url) as response:
                assert response.status == 503
                assert str(LISTENERS_MAX) in await response.text()


# -- peers that only serve metrics -----------------------------------------------------------------

OLD = """\
# HELP kubeai_inference_requests_active The number of active requests by model
# TYPE kubeai_inference_requests_active gauge
kubeai_inference_requests_active{otel_scope_name="k",request_model="m",request_type="http"} 3
kubeai_inference_requests_active{otel_scope_name="k",request_model="m",request_type="message"} 2
kubeai_inference_requests_active{request_model="other",request_type="http"} 1
go_goroutines 60
"""


async def test_a_peer_with_only_metrics_is_counted():
    async def metrics(request):
        return web.Response(text=OLD)

    async with page(metrics, "/metrics") as address, Replica("two", [address]) as other:
        await until("the peer's load is seen", lambda: other.peers.active("m") == 5)
        assert other.peers.active("other") == 1
        assert other.peers.complete()


async def test_a_model_that_disappears_from_its_metrics_is_dropped(monkeypatch):
    monkeypatch.setattr(listener, "POLL_S", 0.01)
    pages = [OLD]

    async def metrics(request):
        return web.Response(text=pages[-1])

    async with page(metrics, "/metrics") as address, Replica("two", [address]) as other:
        await until("the peer's load is seen", lambda: other.peers.active("other") == 1)
        pages.append("\n".join(line for line in OLD.splitlines() if '"other"' not in line) + "\n")
        await until("the peer is gone", lambda: other.peers.active("other") == 0, 3.0)
        assert other.peers.active("m") == 5


class Requests:
    """A server that serves ``/metrics`` alone, like KubeAI in Go, and records every request."""

    def __init__(self, text=OLD):
        self.text = text
        self.headers = {}
        self.paths = []
        self.loads = wire.Loads({"m": (7, 0)}, {"a": 4})
        self.app = web.Application()
        self.app.router.add_get("/{path:.*}", self.serve)

    async def serve(self, request):
        self.paths.append(request.path)
        if request.path == "/metrics":
            return web.Response(text=self.text, headers=self.headers)
        if request.path != LOADS_PATH or not self.headers:
            raise web.HTTPNotFound
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(wire.encode(wire.Hello("new")) + wire.encode(self.loads))
        await asyncio.Event().wait()
        return response


async def test_a_configured_address_that_has_only_metrics_gets_no_other_request(monkeypatch):
    monkeypatch.setattr(listener, "POLL_S", 0.01)
    server = Requests()
    async with site(server.app) as address, Replica("two", [address]) as other:
        await until("the peer is polled", lambda: len(server.paths) >= 3)
        assert other.peers.active("m") == 5
    assert set(server.paths) == {"/metrics"}


async def test_a_configured_address_that_announces_its_loads_is_followed_on_that_route(monkeypatch):
    monkeypatch.setattr(listener, "POLL_S", 0.01)
    server = Requests()
    async with site(server.app) as address, Replica("two", [address]) as other:
        other.route("a")
        await until("the peer is polled", lambda: other.peers.active("m") == 5)
        server.headers = METRICS_HEADERS  # a newer version has replaced it
        await until("the peer's loads are known", lambda: other.in_flight("a") == 4)
        assert other.peers.active("m") == 7
        assert other.peers.active("other") == 0


async def test_a_pod_of_the_release_without_loads_is_polled_too(monkeypatch):
    monkeypatch.setattr(listener, "POLL_S", 0.01)
    server = Requests()
    async with site(server.app) as address:
        port = int(address.rpartition(":")[2])
        kube = Kube([("one", "10.0.0.9"), ("two", "127.0.0.1")])
        async with Replica("one", kube=kube, pod="one", port=port) as replica:
            await until("the peer's load is seen", lambda: replica.peers.active("m") == 5)
    assert server.paths[0] == LOADS_PATH


@pytest.mark.parametrize(
    "text",
    [
        'kubeai_inference_requests_active{request_model="m"} NaN',
        'kubeai_inference_requests_active{request_model="m"} -1',
        'kubeai_inference_requests_active{request_model="m"} 1e18',
        'kubeai_inference_requests_active{request_model="m"',
    ],
)
def test_malformed_metrics_are_rejected(text):
    with pytest.raises(wire.BadFrame):
        read_metrics(text)


# -- the sums --------------------------------------------------------------------------------------

NAMES = st.sampled_from("abcd")
LOADS = st.builds(
    wire.Loads,
    st.dictionaries(NAMES, st.none() | st.tuples(st.integers(0, 9), st.integers(0, 9))),
    st.dictionaries(NAMES, st.integers(-1, 9)),
)
STEPS = st.lists(
    st.tuples(st.sampled_from("123"), LOADS, st.booleans())
    | st.sampled_from("123").map(lambda address: (address, None, False)),
    max_size=30,
)


@given(STEPS)
def test_the_sums_equal_those_of_each_peers_last_report(steps):
    touched = set()
    view = View(touched.update)
    expected: dict[str, tuple[dict, dict]] = {}
    for address, loads, whole in steps:
        before = Counter({name: view.in_flight(name) for name in "abcd"})
        touched.clear()
        if loads is None:
            view.leave(address)
            expected.pop(address, None)
        else:
            peer = view.peers.get(address) or view.join(address, 0.0)
            view.take(peer, loads, 0.0, whole)
            models, endpoints = ({}, {}) if whole else expected.get(address, ({}, {}))
            models, endpoints = models | loads.models, endpoints | loads.endpoints
            expected[address] = (
                {name: counts for name, counts in models.items() if counts is not None},
                {name: count for name, count in endpoints.items() if count != wire.GONE},
            )
        for name in "abcd":
            sums = [endpoints.get(name, 0) for _, endpoints in expected.values()]
            assert view.in_flight(name) == sum(sums)
            assert (name in touched) == (view.in_flight(name) != before[name])
            assert view.routes(name) == any(name in e for _, e in expected.values())
            assert view.active(name) == sum(m.get(name, (0, 0))[0] for m, _ in expected.values())
