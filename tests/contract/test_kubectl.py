"""Stock kubectl against both APIs, with no flags beyond KUBECONFIG."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import orjson
import pytest
import yaml
from kubectls import MODEL, POD, TIMEOUT_S, Kubectl, rows
from operators import until as until_true
from servers import ApiServer

from kubeai.kube.resources import MODELS, PODS

pytestmark = pytest.mark.kubectl


def test_apply_creates_changes_and_reports_unchanged(kubectl: Kubectl):
    assert kubectl("apply", "-f", "-", given=MODEL) == "model.kubeai.org/tiny created\n"
    assert kubectl("apply", "-f", "-", given=MODEL) == "model.kubeai.org/tiny unchanged\n"
    changed = MODEL.replace("cpu:1", "cpu:2")
    assert kubectl("apply", "-f", "-", given=changed) == "model.kubeai.org/tiny configured\n"
    model = orjson.loads(kubectl("get", "model", "tiny", "-o", "json"))
    assert model["spec"]["resourceProfile"] == "cpu:2"
    assert model["spec"]["targetRequests"] == 100
    removed = changed.replace("  resourceProfile: cpu:2\n", "")
    assert kubectl("apply", "-f", "-", given=removed) == "model.kubeai.org/tiny configured\n"
    model = yaml.safe_load(kubectl("get", "model", "tiny", "-o", "yaml"))
    assert "resourceProfile" not in model["spec"]


def test_apply_of_built_in_objects(kubectl: Kubectl):
    config = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "c"}}
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s"}}
    first = yaml.safe_dump_all(
        [{**config, "data": {"a": "1", "b": "2"}}, {**secret, "stringData": {"token": "x"}}]
    )
    second = yaml.safe_dump_all(
        [{**config, "data": {"a": "3"}}, {**secret, "stringData": {"token": "z"}}]
    )
    said = kubectl("apply", "-f", "-", given=first)
    assert said == "configmap/c created\nsecret/s created\n"
    said = kubectl("apply", "-f", "-", given=second)
    assert said == "configmap/c configured\nsecret/s configured\n"
    assert orjson.loads(kubectl("get", "cm", "c", "-o", "json"))["data"] == {"a": "3"}
    assert kubectl("get", "secret", "s", "-o", "jsonpath={.data.token}") == "eg=="
    assert "unchanged" in kubectl("apply", "-f", "-", given=second)


def test_apply_merges_the_lists_of_a_pod_by_their_keys(kubectl: Kubectl):
    two = orjson.loads(orjson.dumps(POD))
    two["spec"]["containers"].append({"name": "loader", "image": "loader:1"})
    kubectl("apply", "-f", "-", given=yaml.safe_dump(two))
    two["spec"]["containers"][1]["image"] = "loader:2"
    assert kubectl("apply", "-f", "-", given=yaml.safe_dump(two)) == "pod/pod configured\n"
    images = kubectl("get", "pod", "pod", "-o", "jsonpath={.spec.containers[*].image}")
    assert images == "mock:1 loader:2"


def test_apply_names_what_is_wrong(kubectl: Kubectl):
    said = kubectl("apply", "-f", "-", given=MODEL.replace("VLLM", "Torch"), code=1)
    assert 'spec.engine: Unsupported value: "Torch"' in said
    said = kubectl("apply", "-f", "-", given=MODEL + "  replicaz: 2\n", code=1)
    assert 'unknown field "spec.replicaz"' in said
    odd = MODEL + "  replicaz: 2\n"
    said = kubectl("apply", "-f", "-", "--validate=warn", given=odd, errors=True)
    assert 'Warning: unknown field "spec.replicaz"' in said
    said = kubectl("apply", "-f", "-", given=MODEL.replace("hf://", "ftp://"), code=1)
    assert "url must start with" in said


UNSERVED = """
apiVersion: monitoring.example.com/v1
kind: ServiceMonitor
metadata: {name: m}
spec: {selector: {}}
"""


@pytest.mark.parametrize(
    "command",
    [
        ("apply",),
        ("apply", "--server-side"),
        ("create",),
        ("replace",),
        ("delete",),
    ],
    ids=" ".join,
)
def test_a_kind_that_is_not_served_has_no_match(kubectl: Kubectl, command: tuple[str, ...]):
    said = kubectl(*command, "-f", "-", given=UNSERVED, code=1)
    version = "monitoring.example.com/v1"
    assert f'no matches for kind "ServiceMonitor" in version "{version}"' in said
    assert "ensure CRDs are installed first" in said


def test_a_resource_that_is_not_served_is_unknown(kubectl: Kubectl):
    for command in ("get", "explain", "describe"):
        said = kubectl(command, "foos", code=1)
        assert 'the server doesn\'t have a resource type "foos"' in said


def test_a_pod_cannot_be_debugged_where_it_has_no_ephemeral_containers(
    kubectl: Kubectl, api_server: ApiServer
):
    if api_server.kind == "real":
        pytest.skip("a real API has ephemeral containers")
    assert 'pods "pod" not found' in kubectl("debug", "pod", "--image=busybox", code=1)
    kubectl("create", "-f", "-", given=yaml.safe_dump(POD))
    said = kubectl("debug", "pod", "--image=busybox", code=1)
    assert "ephemeral containers are disabled for this cluster" in said


def test_get_shows_the_columns_of_the_definition(kubectl: Kubectl):
    kubectl("apply", "-f", "-", given=MODEL)
    kubectl("scale", "model", "tiny", "--replicas=2")
    header, row = rows(kubectl("get", "models"))
    assert header == ["NAME", "ENGINE", "REPLICAS", "READY", "STATUS", "AGE"]
    assert row[:3] == ["tiny", "VLLM", "2"]
    assert row[-1].endswith("s")
    condition = '{"status":{"conditions":[{"type":"Ready","status":"False","reason":"NoGPU"}]}}'
    kubectl("patch", "model", "tiny", "--subresource=status", "--type=merge", "-p", condition)
    wide = rows(kubectl("get", "models", "-o", "wide"))
    assert wide[0][-2:] == ["PROFILE", "URL"]
    assert wide[1][:2] == ["tiny", "VLLM"]
    assert wide[1][3] == "NoGPU"  # ready is empty
    assert wide[1][-2:] == ["cpu:1", "hf://org/tiny"]
    assert kubectl("get", "models", "-o", "name") == "model.kubeai.org/tiny\n"
    assert "tiny" in kubectl("get", "models.kubeai.org", "tiny")


def test_get_watch_shows_changes_as_they_come(kubectl: Kubectl):
    kubectl("apply", "-f", "-", given=MODEL)
    with kubectl.following("get", "models", "-w") as lines:
        assert lines.next().split()[:2] == ["NAME", "ENGINE"]
        assert lines.next().split()[:2] == ["tiny", "VLLM"]
        kubectl("scale", "model", "tiny", "--replicas=3")
        assert lines.next().split()[:3] == ["tiny", "VLLM", "3"]
        kubectl("apply", "-f", "-", given=MODEL.replace("tiny", "other"))
        assert lines.next().split()[0] == "other"


def test_pods_are_shown_with_status_address_and_node(kubectl: Kubectl, api_server, namespace):
    kubectl("create", "-f", "-", given=yaml.safe_dump(POD))
    path = f"/api/v1/namespaces/{namespace}/pods/pod"
    binding = {
        "apiVersion": "v1", "kind": "Binding", "metadata": {"name": "pod"},
        "target": {"kind": "Node", "name": "local"},
    }  # fmt: skip
    assert api_server.request("POST", path + "/binding", binding)[0] == 201
    running = {
        "phase": "Running",
        "podIP": "127.3.0.1",
        "podIPs": [{"ip": "127.3.0.1"}],
        "conditions": [{"type": "Ready", "status": "True"}],
        "containerStatuses": [
            {
                "name": "server", "ready": True, "restartCount": 1, "image": "mock:1",
                "imageID": "", "state": {"running": {"startedAt": "2026-01-01T00:00:00Z"}},
                "lastState": {},
            }
        ],
    }  # fmt: skip
    merge = "application/merge-patch+json"
    assert api_server.request("PATCH", path + "/status", {"status": running}, merge)[0] == 200
    header, row = rows(kubectl("get", "pods", "-o", "wide"))
    assert header[:7] == ["NAME", "READY", "STATUS", "RESTARTS", "AGE", "IP", "NODE"]
    assert row[:4] == ["pod", "1/1", "Running", "1"]
    assert row[5:7] == ["127.3.0.1", "local"]
    assert "Node:" in kubectl("describe", "pod", "pod")


def test_describe_shows_the_model_and_its_events(kubectl: Kubectl, api_server, namespace):
    kubectl("apply", "-f", "-", given=MODEL)
    model = orjson.loads(kubectl("get", "model", "tiny", "-o", "json"))
    event = {
        "metadata": {"name": "tiny.1"},
        "involvedObject": {
            "kind": "Model", "apiVersion": "kubeai.org/v1", "name": "tiny",
            "namespace": namespace, "uid": model["metadata"]["uid"],
        },
        "reason": "ScaledUp",
        "message": "a replica is wanted",
        "type": "Normal",
        "source": {"component": "kubeai"},
        "firstTimestamp": model["metadata"]["creationTimestamp"],
        "lastTimestamp": model["metadata"]["creationTimestamp"],
        "count": 1,
    }  # fmt: skip
    assert api_server.request("POST", f"/api/v1/namespaces/{namespace}/events", event)[0] == 201
    said = kubectl("describe", "model", "tiny")
    assert "hf://org/tiny" in said
    assert "a replica is wanted" in said
    assert "ScaledUp" in kubectl("get", "events")


async def test_describe_says_why_a_model_does_not_serve(kubectl: Kubectl, world):
    async def describe(*words: str) -> bool:
        said = await asyncio.to_thread(kubectl, "describe", "model", "m")
        return all(word in said for word in words)

    world.nodes.ready = lambda pod: False
    world.start()
    await world.create(minReplicas=1)
    (pod,) = await world.pods_once(1)
    waiting = {"reason": "ImagePullBackOff", "message": "Back-off pulling image"}
    containers = [
        {
            "name": "server",
            "image": "i",
            "imageID": "",
            "ready": False,
            "restartCount": 0,
            "state": {"waiting": waiting},
        }
    ]
    status = {"phase": "Pending", "containerStatuses": containers}
    name = pod["metadata"]["name"]
    await world.kube.patch(PODS, name, {"status": status}, subresource="status")
    why = "the image of container server cannot be pulled"
    await until_true(lambda: describe("ImagePullBackOff", why, "PodsCreated"), "in the conditions")
    await until_true(lambda: describe("Warning", "ImagePullBackOff"), "in the Events")
    await world.kube.patch(MODELS, "m", {"spec": {"resourceProfile": "none:1"}})
    await until_true(
        lambda: describe("InvalidProfile", "no resource profile 'none'"), "the profile"
    )


def test_scale_and_patch(kubectl: Kubectl):
    kubectl("apply", "-f", "-", given=MODEL)
    assert kubectl("scale", "model", "tiny", "--replicas=3") == "model.kubeai.org/tiny scaled\n"
    kubectl("patch", "model", "tiny", "--type=merge", "-p", '{"spec":{"minReplicas":1}}')
    operation = '[{"op":"replace","path":"/spec/targetRequests","value":7}]'
    kubectl("patch", "model", "tiny", "--type=json", "-p", operation)
    spec = orjson.loads(kubectl("get", "model", "tiny", "-o", "json"))["spec"]
    assert (spec["replicas"], spec["minReplicas"], spec["targetRequests"]) == (3, 1, 7)
    said = kubectl("patch", "model", "tiny", "--type=merge", "-p", '{"spec":{"minReplicas":-1}}',
                   code=1)  # fmt: skip
    assert "spec.minReplicas" in said


def test_label_and_annotate(kubectl: Kubectl):
    kubectl("apply", "-f", "-", given=MODEL)
    kubectl("label", "model", "tiny", "team=a")
    kubectl("annotate", "model", "tiny", "model-pod-ip=127.0.0.1")
    assert kubectl("get", "models", "-l", "team=a", "-o", "name") == "model.kubeai.org/tiny\n"
    assert kubectl("get", "models", "-l", "team notin (a)", "-o", "name") == ""
    kubectl("label", "model", "tiny", "team-")
    assert kubectl("get", "models", "-l", "team", "-o", "name") == ""


def test_delete_waits_until_the_object_is_gone(kubectl: Kubectl):
    kubectl("apply", "-f", "-", given=MODEL)
    finalizer = '{"metadata":{"finalizers":["kubeai.org/cache-eviction"]}}'
    kubectl("patch", "model", "tiny", "--type=merge", "-p", finalizer)
    with kubectl.following("delete", "model", "tiny", "--wait") as lines:
        assert lines.next().startswith('model.kubeai.org "tiny" deleted')
        assert kubectl("get", "model", "tiny", "-o", "jsonpath={.metadata.deletionTimestamp}")
        kubectl("patch", "model", "tiny", "--type=merge", "-p", '{"metadata":{"finalizers":null}}')
    deadline = time.monotonic() + TIMEOUT_S
    while kubectl("get", "models", "-o", "name"):
        assert time.monotonic() < deadline
    kubectl("apply", "-f", "-", given=MODEL)
    assert "deleted" in kubectl("delete", "-f", "-", given=MODEL)
    assert "NotFound" in kubectl("get", "model", "tiny", code=1)


def test_api_resources_list_the_models(kubectl: Kubectl):
    found = {row[0]: row for row in rows(kubectl("api-resources", "--no-headers"))}
    assert found["models"][-3:] == ["kubeai.org/v1", "true", "Model"]
    assert found["pods"][:3] == ["pods", "po", "v1"]
    assert "kubeai.org/v1" in kubectl("api-versions").split()


def test_wait_for_a_condition(kubectl: Kubectl):
    said = kubectl("wait", "--for=condition=Established", "crd/models.kubeai.org")
    assert "condition met" in said


def test_created_secrets_and_config_maps(kubectl: Kubectl):
    kubectl("create", "secret", "generic", "hf", "--from-literal=token=abc")
    kubectl("create", "configmap", "c", "--from-literal=a=b")
    assert kubectl("get", "secret", "hf", "-o", "jsonpath={.data.token}") == "YWJj"
    assert kubectl("get", "cm", "c", "-o", "jsonpath={.data.a}") == "b"


# Logs, with a kubelet that the test plays.


class Kubelet:
    """Serves one container's log: two lines, and a third when the test says so."""

    def __init__(self) -> None:
        self.asked: queue.Queue[tuple[str, str | None]] = queue.Queue()
        self.more = threading.Event()
        kubelet = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                kubelet.asked.put((self.path, self.headers["Authorization"]))
                self.send_response(200)
                self.end_headers()
                self.wfile.write(b"first\nsecond\n")
                self.wfile.flush()
                if "follow=true" in self.path:
                    kubelet.more.wait(TIMEOUT_S)
                    self.wfile.write(b"third\n")

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.more.set()
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def kubelet() -> Iterator[Kubelet]:
    kubelet = Kubelet()
    yield kubelet
    kubelet.close()


def _run_pod_on(kubelet: Kubelet, server: ApiServer, namespace: str) -> None:
    node = f"node-{namespace}"
    status = {
        "addresses": [{"type": "InternalIP", "address": "127.0.0.1"}],
        "daemonEndpoints": {"kubeletEndpoint": {"Port": kubelet.port}},
    }
    body = {"metadata": {"name": node}, "status": status}
    assert server.request("POST", "/api/v1/nodes", body)[0] == 201
    pod = {**POD, "spec": {**POD["spec"], "nodeName": node}}
    assert server.request("POST", f"/api/v1/namespaces/{namespace}/pods", pod)[0] == 201


def test_logs_come_from_the_kubelet_as_they_are_written(
    kubectl: Kubectl, kubelet: Kubelet, api_server: ApiServer, namespace: str
):
    if api_server.kind == "real":
        pytest.skip("a real API speaks TLS to its kubelets")
    _run_pod_on(kubelet, api_server, namespace)
    assert kubectl("logs", "pod", "--tail=5") == "first\nsecond\n"
    path, authorization = kubelet.asked.get(timeout=TIMEOUT_S)
    assert path.startswith(f"/containerLogs/{namespace}/pod/server?")
    assert "tailLines=5" in path
    assert authorization == f"Bearer {api_server.token}"
    with kubectl.following("logs", "-f", "pod") as lines:
        assert [lines.next(), lines.next()] == ["first", "second"]
        kubelet.more.set()
        assert lines.next() == "third"
