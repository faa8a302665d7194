"""The Kubernetes client against a scripted server: verbs and errors."""

from __future__ import annotations

import msgspec
import orjson
import pytest
from fakes.scripted_api import kubeconfig, thing

from kubeai.errors import KubeAIError
from kubeai.kube.client import Kube
from kubeai.kube.errors import ApiError
from kubeai.kube.resources import CONFIGMAPS, LEASES, MODELS, NODES, PODS


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


async def test_server_side_apply_names_its_manager_and_takes_fields_over(kube, server):
    server.answer = 200, orjson.dumps(thing("a", 1)), {}
    await kube.apply(MODELS, {"metadata": {"name": "a"}}, "other", manager="me")
    ((method, path, headers, body),) = server.requests
    base, _, query = path.partition("?")
    assert (method, base) == ("PATCH", "/apis/kubeai.org/v1/namespaces/other/models/a")
    assert set(query.split("&")) == {"fieldManager=me", "force=true", "fieldValidation=Strict"}
    assert headers["Content-Type"] == "application/apply-patch+yaml"
    assert orjson.loads(body)["kind"] == "Model"


async def test_a_log_is_followed_and_its_errors_are_api_errors(kube, server):
    server.answer = 200, b"one\ntwo\n", {}
    async with kube.log("p", container="c", tail_lines=7) as blocks:
        assert b"".join([block async for block in blocks]) == b"one\ntwo\n"
    ((_, path, _, _),) = server.requests
    base, _, query = path.partition("?")
    assert base == "/api/v1/namespaces/ns/pods/p/log"
    assert set(query.split("&")) == {"container=c", "follow=true", "tailLines=7"}
    server.answer = 400, b'{"reason":"BadRequest","message":"c is waiting to start"}', {}
    with pytest.raises(ApiError, match="is waiting to start") as failed:
        async with kube.log("p", container="c", tail_lines=7):
            pass
    assert failed.value.status == 400


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
