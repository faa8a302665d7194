"""Peers that announce no loads: their metrics are polled."""

import asyncio

import pytest
from aiohttp import web
from fakes.peers import Kube, Replica, page, site
from harness import until

from kubeai.supervisor.peers import listener, wire
from kubeai.supervisor.peers.listener import read_metrics
from kubeai.supervisor.peers.peers import LOADS_PATH, METRICS_HEADERS

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
