"""The Kubernetes client against a scripted server: verbs, errors, watches."""

from __future__ import annotations

import asyncio
import time

import msgspec
import orjson
import pytest
from fakes.scripted_api import event, gone, kubeconfig, thing

from kubeai.errors import KubeAIError
from kubeai.kube import exec_channels as channels
from kubeai.kube.backoff import Backoff
from kubeai.kube.client import Kube
from kubeai.kube.errors import ApiError
from kubeai.kube.exec import EXEC_OUTPUT_MAX_BYTES
from kubeai.kube.resources import CONFIGMAPS, LEASES, MODELS, NODES, PODS

DEADLINE_S = 10.0


class View:
    """The state of a follower."""

    def __init__(self):
        self.objects = {}
        self.lists = 0
        self.events = []

    def replaced(self, items):
        self.lists += 1
        self.objects = {item["metadata"]["name"]: item for item in items}

    def changed(self, kind, item):
        name = item["metadata"]["name"]
        self.events.append((kind, name))
        if kind == "DELETED":
            self.objects.pop(name, None)
        else:
            self.objects[name] = item


async def following(kube, server, **options):
    """Follow until the server's script has ended; return the resulting view."""
    view = View()
    follow = kube.follow(CONFIGMAPS, "ns", replaced=view.replaced, changed=view.changed, **options)
    task = asyncio.create_task(follow)
    end = asyncio.create_task(server.again.wait())
    try:
        done, _ = await asyncio.wait(
            {task, end}, timeout=DEADLINE_S, return_when=asyncio.FIRST_COMPLETED
        )
        assert done, "the script did not reach its end"
        if task in done:
            task.result()
    finally:
        task.cancel()
        end.cancel()
        await asyncio.gather(task, end, return_exceptions=True)
    return view


# -- verbs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("resource", "arguments", "path"),
    [
        (PODS, ("ns", "p"), "/api/v1/namespaces/ns/pods/p"),
        (PODS, (), "/api/v1/pods"),
        (NODES, ("ns", "n"), "/api/v1/nodes/n"),
        (LEASES, ("ns",), "/apis/coordination.k8s.io/v1/namespaces/ns/leases"),
        (MODELS, ("ns", "m", "scale"), "/apis/kubeai.org/v1/namespaces/ns/models/m/scale"),
    ],
)
def test_the_path_of_a_resource(resource, arguments, path):
    assert resource.path(*arguments) == path


async def test_verbs_send_the_requests_that_kubernetes_expects(kube, server):
    server.answer = 200, orjson.dumps(thing("a", 1)), {}
    await kube.get(CONFIGMAPS, "a")
    await kube.create(CONFIGMAPS, {"metadata": {"name": "a"}})
    await kube.update(CONFIGMAPS, {"metadata": {"name": "a", "namespace": "other"}})
    await kube.patch(PODS, "a", {"status": {}}, subresource="status", kind="strategic")
    await kube.delete(PODS, "a", uid="u1", grace_s=0, propagation="Background")
    sent = [(m, p, h.get("Content-Type"), b) for m, p, h, b in server.requests]
    base = "/api/v1/namespaces/ns"
    created = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a"}}
    assert sent[0] == ("GET", f"{base}/configmaps/a", None, b"")
    assert sent[1][:2] == ("POST", f"{base}/configmaps")
    assert orjson.loads(sent[1][3]) == created
    assert sent[2][:2] == ("PUT", "/api/v1/namespaces/other/configmaps/a")
    kind = "application/strategic-merge-patch+json"
    assert sent[3] == ("PATCH", f"{base}/pods/a/status", kind, b'{"status":{}}')
    assert orjson.loads(sent[4][3]) == {
        "apiVersion": "v1",
        "kind": "DeleteOptions",
        "preconditions": {"uid": "u1"},
        "gracePeriodSeconds": 0,
        "propagationPolicy": "Background",
    }
    assert {h["Authorization"] for _, _, h, _ in server.requests} == {"Bearer secret"}


async def test_responses_are_decoded_as_the_requested_type(kube, server):
    class Data(msgspec.Struct):
        data: dict[str, str]

    server.answer = 200, orjson.dumps(thing("a", 1, key="value")), {}
    assert (await kube.get(CONFIGMAPS, "a", type=Data)).data == {"key": "value"}
    assert (await kube.get(CONFIGMAPS, "a"))["data"] == {"key": "value"}


async def test_a_long_list_is_read_in_pages(kube, server):
    pages = {"": ([thing("a", 1)], "next"), "next": ([thing("b", 2)], "")}
    server.lists = [(pages, "9")]
    items, version = await kube.list(CONFIGMAPS, "ns", labels="x=y")
    assert [item["metadata"]["name"] for item in items] == ["a", "b"]
    assert version == "9"
    assert all("labelSelector=x%3Dy" in path for _, path, _, _ in server.requests)


@pytest.mark.parametrize(
    ("status", "body", "reason", "message"),
    [
        (409, b'{"reason":"AlreadyExists","message":"a exists"}', "AlreadyExists", "a exists"),
        (503, b"<html>no</html>", "Service Unavailable", "<html>no</html>"),
        (500, b"", "Internal Server Error", "HTTP 500"),
    ],
)
async def test_an_error_response_is_an_api_error(kube, server, status, body, reason, message):
    server.answer = status, body, {"Retry-After": "3"}
    with pytest.raises(ApiError) as caught:
        await kube.get(CONFIGMAPS, "a")
    error = caught.value
    assert (error.status, error.reason, str(error)) == (status, reason, message)
    assert error.retry_after_s == 3.0
    assert isinstance(error, KubeAIError)


async def test_a_missing_or_malformed_response_is_an_api_error(kube, server, tmp_path):
    server.answer = 200, b"[1, 2", {}
    with pytest.raises(ApiError, match="decode"):
        await kube.get(CONFIGMAPS, "a")
    nobody = kubeconfig(tmp_path / "nobody", "http://127.0.0.1:1", {})
    other = await Kube.connect(nobody)
    with pytest.raises(ApiError) as caught:
        await other.get(CONFIGMAPS, "a")
    assert (caught.value.status, caught.value.reason) == (0, "Unreachable")
    await other.close()


async def test_the_environments_proxy_is_not_used_for_a_loopback_api(server, tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    kube = await Kube.connect(kubeconfig(tmp_path / "kubeconfig", server.url, {}))
    server.answer = 200, orjson.dumps(thing("a", 1)), {}
    await kube.get(CONFIGMAPS, "a")
    await kube.close()


# -- exec ----------------------------------------------------------------------------------------


def ended(**status):
    return bytes([channels.ERROR]) + orjson.dumps({"kind": "Status", **status})


def exited(code):
    return bytes([channels.ERROR]) + channels.Ending(code).encode()


async def run(kube, timeout_s=DEADLINE_S):
    return await kube.exec("p", ["ls", "a b"], container="c", timeout_s=timeout_s)


async def test_a_command_returns_its_exit_status_and_output(kube, server):
    server.messages = [b"\x01", b"\x01out ", b"\x02err", b"\x03", exited(0)]
    assert await run(kube) == (0, "out err")
    method, path, headers, _ = server.requests[0]
    query = "command=ls&command=a+b&container=c&stdout=true&stderr=true"
    assert (method, path) == ("GET", f"/api/v1/namespaces/ns/pods/p/exec?{query}")
    assert headers["Authorization"] == "Bearer secret"
    assert headers["Sec-WebSocket-Protocol"] == "v4.channel.k8s.io"


async def test_a_failed_command_is_a_result_not_an_error(kube, server):
    server.messages = [b"\x02no such file", exited(3)]
    assert await run(kube) == (3, "no such file")


async def test_only_the_end_of_a_long_output_is_kept(kube, server):
    server.messages = [b"\x01" + bytes([65 + n]) * 50_000 for n in range(3)] + [exited(0)]
    output = (await run(kube)).output
    assert len(output) == EXEC_OUTPUT_MAX_BYTES
    assert output.endswith("C" * 50_000)
    assert output.startswith("B")


@pytest.mark.parametrize(
    ("message", "status", "reason", "text"),
    [
        (
            ended(status="Failure", code=500, reason="InternalError", message="no such program"),
            500,
            "InternalError",
            "no such program",
        ),
        (ended(status="Failure", message="odd"), 500, "", "odd"),
        (b"\x03{", 0, "Undecodable", "command status"),
        (b"\x01half", 0, "Unreachable", "closed before the command ended"),
    ],
)
async def test_a_command_that_did_not_run_is_an_api_error(
    kube, server, message, status, reason, text
):
    server.messages = [message]
    with pytest.raises(ApiError, match=text) as caught:
        await run(kube)
    assert (caught.value.status, caught.value.reason) == (status, reason)


async def test_a_rejected_upgrade_is_an_api_error_with_the_reason(kube, server):
    server.answer = 404, b'{"reason":"NotFound","message":"pods \\"p\\" not found"}', {}
    with pytest.raises(ApiError, match='pods "p" not found') as caught:
        await run(kube)
    assert (caught.value.status, caught.value.reason) == (404, "NotFound")
    server.answer = 200, b"{}", {}
    with pytest.raises(ApiError, match="Invalid response status") as caught:
        await run(kube)
    assert caught.value.status == 0


async def test_a_command_times_out_and_its_connection_is_closed(kube, server):
    server.messages, server.silent = [b"\x01going on"], True
    with pytest.raises(ApiError) as caught:
        await run(kube, timeout_s=0.2)
    assert (caught.value.status, caught.value.reason) == (0, "Timeout")
    async with asyncio.timeout(DEADLINE_S):
        await server.left.wait()


async def test_a_rejected_exec_is_retried_with_the_rotated_token(server, tmp_path):
    token = tmp_path / "token"
    token.write_text("first")
    path = kubeconfig(tmp_path / "kubeconfig", server.url, {"tokenFile": str(token)})
    kube = await Kube.connect(path)
    token.write_text("second")
    server.tokens = {"Bearer second"}
    server.messages = [exited(0)]
    assert (await run(kube)).exit_code == 0
    server.tokens = {"Bearer third"}
    with pytest.raises(ApiError, match="who are you") as caught:
        await run(kube)
    assert caught.value.status == 401
    await kube.close()


# -- a leader's writes ---------------------------------------------------------------------------


class Fallen(Exception):
    """Raised when the fence has fallen."""


class Fence:
    """Allows a number of writes, then none."""

    def __init__(self, times=0):
        self.times = times

    def __call__(self):
        self.times -= 1
        if self.times < 0:
            raise Fallen


OBJECT = {"metadata": {"name": "a"}}
WRITES = {
    "create": lambda kube: kube.create(CONFIGMAPS, OBJECT),
    "update": lambda kube: kube.update(CONFIGMAPS, OBJECT),
    "patch": lambda kube: kube.patch(CONFIGMAPS, "a", {"data": {}}),
    "delete": lambda kube: kube.delete(CONFIGMAPS, "a"),
    "exec": lambda kube: run(kube),
}


async def sent(kube, server):
    """The requests that the server got up to a read that was sent last."""
    server.answer = 200, orjson.dumps(thing("a", 1)), {}
    await kube.get(CONFIGMAPS, "a")
    *earlier, last = [request[0] for request in server.requests]
    assert last == "GET"
    return earlier


@pytest.mark.parametrize("write", WRITES)
async def test_a_write_is_not_sent_if_its_fence_falls_while_it_waits_for_a_connection(
    kube, server, monkeypatch, write
):
    loop, fence = asyncio.get_running_loop(), Fence(100)
    connect = loop.sock_connect

    async def slowly(*args):
        await connect(*args)
        fence.times = 0

    monkeypatch.setattr(loop, "sock_connect", slowly)
    with pytest.raises(Fallen):
        await WRITES[write](kube.fenced(fence))
    assert await sent(kube, server) == []


@pytest.mark.parametrize("write", WRITES)
async def test_a_write_is_not_sent_on_an_open_connection_if_its_fence_has_fallen(
    kube, server, write
):
    fenced = kube.fenced(Fence())
    assert await sent(fenced, server) == [], "reads pass"
    with pytest.raises(Fallen):
        await WRITES[write](fenced)
    assert await sent(kube, server) == ["GET"]


async def test_a_body_is_not_sent_if_the_fence_falls_after_the_headers(kube, server):
    with pytest.raises(Fallen):
        await WRITES["patch"](kube.fenced(Fence(1)))
    assert await sent(kube, server) == []


async def test_a_write_within_its_fence_is_sent_and_a_resend_is_checked_again(server, tmp_path):
    token = tmp_path / "token"
    token.write_text("first")
    path = kubeconfig(tmp_path / "kubeconfig", server.url, {"tokenFile": str(token)})
    kube = await Kube.connect(path)
    token.write_text("second")
    server.tokens, server.answer = {"Bearer second"}, (200, orjson.dumps(OBJECT), {})
    with pytest.raises(Fallen):
        await WRITES["patch"](kube.fenced(Fence(2)))
    assert [request[0] for request in server.requests] == ["PATCH"], "rejected as unauthorized"
    await WRITES["patch"](kube.fenced(Fence(100)))
    assert [request[0] for request in server.requests] == ["PATCH", "PATCH"]
    await kube.close()


async def test_a_failed_write_within_its_fence_is_an_api_error(tmp_path):
    kube = await Kube.connect(kubeconfig(tmp_path / "nobody", "http://127.0.0.1:1", {}))
    with pytest.raises(ApiError):
        await WRITES["patch"](kube.fenced(Fence(100)))
    with pytest.raises(Fallen):  # regardless of the outcome, its caller writes no more
        await WRITES["patch"](kube.fenced(Fence()))
    await kube.close()


# -- following -----------------------------------------------------------------------------------


async def test_a_follower_applies_events(kube, server):
    server.lists = [([thing("a", 1), thing("b", 2)], "5")]
    server.watches = [
        [
            event("ADDED", thing("c", 6)),
            event("MODIFIED", thing("a", 7, new="1")),
            event("DELETED", thing("b", 8)),
            event("BOOKMARK", {"metadata": {"resourceVersion": "20"}}),
        ]
    ]
    view = await following(kube, server)
    assert view.objects.keys() == {"a", "c"}
    assert view.objects["a"]["data"] == {"new": "1"}
    assert view.events == [("ADDED", "c"), ("MODIFIED", "a"), ("DELETED", "b")]
    assert server.watched_from() == ["5", "20"]  # after the watch ended: from the bookmark
    assert view.lists == 1


async def test_an_expired_resource_version_causes_a_relist(kube, server):
    server.lists = [([thing("a", 1)], "5"), ([thing("b", 30)], "30"), ([thing("c", 40)], "40")]
    server.watches = [[event("ADDED", thing("x", 6)), gone()], 410]
    view = await following(kube, server)
    assert view.lists == 3
    assert view.objects.keys() == {"c"}
    assert server.watched_from() == ["5", "30", "40"]


async def test_an_expired_watch_after_an_outage_relists_without_back_off(kube, server):
    """The back-off was for the outage; if the new list expires as well, it backs off again."""
    server.lists = [([], "5"), ([], "30"), ([], "40")]
    server.watches = [500] * 4 + [410] * 2
    view = await following(kube, server)
    assert view.lists == 3
    expired, again = 5, 7  # a list, four watches, this one, a list, and this one
    assert server.times_s[expired + 1] - server.times_s[expired] < 0.5
    assert server.times_s[again + 1] - server.times_s[again] > 0.5


async def test_a_broken_watch_resumes_where_it_stopped(kube, server):
    half = event("ADDED", thing("b", 7))
    server.watches = [[event("ADDED", thing("a", 6)), half[:20]], 500, [half]]
    view = await following(kube, server)
    assert view.objects.keys() == {"a", "b"}
    assert view.lists == 1
    assert server.watched_from() == ["1", "6", "6", "7"]


async def test_a_watch_without_a_response_is_retried(kube, server, monkeypatch):
    monkeypatch.setattr("kubeai.kube.client.CALL_TIMEOUT_S", 0.2)
    server.watches = [None, [event("ADDED", thing("a", 6))]]
    view = await following(kube, server)
    assert view.objects.keys() == {"a"}


async def test_events_may_arrive_in_pieces_of_any_size(kube, server):
    long = event("ADDED", thing("long", 8, text="x" * 3_000_000))
    stream = event("ADDED", thing("a", 6)) + b"\n" + event("ADDED", thing("b", 7)) + long
    pieces = [stream[i : i + 70_001] for i in range(0, len(stream), 70_001)]
    server.watches = [[stream[:5], stream[5:8], *[]], pieces]
    view = await following(kube, server)
    assert view.objects.keys() == {"a", "b", "long"}
    assert len(view.objects["long"]["data"]["text"]) == 3_000_000


class Typed(msgspec.Struct):
    metadata: dict[str, str]
    data: dict[str, str]

    def __getitem__(self, key):
        return getattr(self, key)


async def test_an_object_that_does_not_decode_is_skipped(kube, server):
    odd = {"metadata": {"name": "odd", "resourceVersion": "3"}, "data": 7}
    server.lists = [([thing("a", 1), odd], "5"), ([], "9")]
    server.watches = [
        [
            event("MODIFIED", odd | {"metadata": {"name": "a", "resourceVersion": "6"}}),
            event("ADDED", thing("b", 7)),
        ]
    ]
    view = await following(kube, server, type=Typed)
    assert view.objects.keys() == {"a", "b"}
    assert view.events == [("ADDED", "b")]


async def test_an_undecodable_delete_event_causes_a_relist(kube, server):
    odd = {"metadata": {"name": "a", "resourceVersion": "6"}, "data": 7}
    server.lists = [([thing("a", 1)], "5"), ([], "9")]
    server.watches = [[event("DELETED", odd)]]
    view = await following(kube, server, type=Typed)
    assert view.objects == {}
    assert view.lists == 2


async def test_failures_are_retried_with_back_off(kube, server):
    server.watches = [500] * 5
    began = time.monotonic()
    await following(kube, server)
    # at least 0.05 + 0.1 + 0.2 + 0.4 + 0.8 s of back-off
    assert 1.5 < time.monotonic() - began < DEADLINE_S


async def test_a_rejected_watch_resumes_with_the_rotated_token(server, tmp_path):
    token = tmp_path / "token"
    token.write_text("first")
    path = kubeconfig(tmp_path / "kubeconfig", server.url, {"tokenFile": str(token)})
    kube = await Kube.connect(path)
    token.write_text("second")
    server.watches = [401]
    view = await following(kube, server)
    used = [h["Authorization"] for _, _, h, _ in server.requests]
    assert used == ["Bearer first", "Bearer first", "Bearer second"]
    assert view.lists == 1
    await kube.close()


def test_the_back_off_grows_to_its_limit_with_jitter():
    low, high = Backoff(1.0, 30.0, lambda: 0.0), Backoff(1.0, 30.0, lambda: 1.0)
    assert [low.next_s() for _ in range(7)] == [0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 15.0]
    assert [high.next_s() for _ in range(7)] == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]
    high.reset()
    assert high.next_s() == 1.0
