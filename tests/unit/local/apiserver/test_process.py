"""The embedded API as a process: access, durability, shutdown."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import ssl
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest
import yaml
from fakes import forked

TIMEOUT_S = 20.0
OUTPUT_MAX_BYTES = 1 << 20  # that are read


class Api:
    """One process on one data directory."""

    def __init__(self, directory: Path, *arguments: str) -> None:
        self.directory = directory
        read, write = os.pipe()
        command = [sys.executable, "-m", "kubeai.local.apiserver", "--data-dir", str(directory)]
        self._output: int | None = os.memfd_create("output")
        self.process = forked.Forked(
            [*command, "--ready-fd", str(write), *arguments],
            pass_fds=(write,),
            output=self._output,
        )
        os.close(write)
        with os.fdopen(read) as pipe:
            line = pipe.readline().split()
        self.port = int(line[1]) if line[:1] == ["ready"] else 0

    def ask(self, method: str, path: str, body: object = None, **headers: str):
        """Return the status code and the body; ``headers`` replace a client's defaults."""
        token = (self.directory / "token").read_text()
        tls = ssl.create_default_context(cafile=str(self.directory / "ca.crt"))
        connection = http.client.HTTPSConnection("127.0.0.1", self.port, context=tls, timeout=10)
        known = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        data = body if isinstance(body, bytes) else None if body is None else orjson.dumps(body)
        with contextlib.closing(connection):
            connection.request(method, path, data, known | headers)
            answer = connection.getresponse()
            text = answer.read()
        is_json = answer.headers["Content-Type"].startswith("application/json")
        if "watch=1" in path:
            return answer.status, [orjson.loads(line) for line in text.splitlines()]
        return answer.status, orjson.loads(text) if is_json else text.decode()

    def said(self) -> str:
        """What the process has printed by its end."""
        self.process.wait(TIMEOUT_S)
        assert self._output is not None, "it has not been closed"
        return os.pread(self._output, OUTPUT_MAX_BYTES, 0).decode()

    def end(self, number: int = signal.SIGTERM) -> None:
        if self.process.poll() is None:
            self.process.send_signal(number)
        self.process.wait(TIMEOUT_S)
        if self._output is not None:
            os.close(self._output)
            self._output = None


CONFIGS = "/api/v1/namespaces/default/configmaps"


@contextlib.contextmanager
def running(directory: Path, *arguments: str) -> Iterator[Api]:
    api = Api(directory, *arguments)
    try:
        assert api.port, api.said()
        yield api
    finally:
        api.end(signal.SIGKILL)


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Iterator[Api]:
    with running(tmp_path_factory.mktemp("api") / "data") as api:
        yield api


def test_its_secret_files_are_readable_by_their_owner_only(shared: Api):
    assert stat.S_IMODE(shared.directory.stat().st_mode) == 0o700
    for name in ("token", "kubeconfig", "tls.key", "objects.db"):
        assert stat.S_IMODE((shared.directory / name).stat().st_mode) == 0o600, name


def test_the_kubeconfig_connects_to_it(shared: Api):
    config = yaml.safe_load((shared.directory / "kubeconfig").read_text())
    cluster = config["clusters"][0]["cluster"]
    assert cluster["server"] == f"https://127.0.0.1:{shared.port}"
    assert Path(cluster["certificate-authority"]).exists()
    assert config["users"][0]["user"]["token"] == (shared.directory / "token").read_text()
    assert config["contexts"][0]["context"]["namespace"] == "default"


def test_the_token_is_required(shared: Api):
    for given in ("", "Bearer ", "Bearer wrong", "Basic abc"):
        code, answer = shared.ask("GET", CONFIGS, Authorization=given)
        assert (code, answer["reason"]) == (401, "Unauthorized")
    for path in ("/healthz", "/readyz", "/livez"):
        assert shared.ask("GET", path, Authorization="") == (200, "ok")


def test_only_loopback_host_names_are_accepted(shared: Api):
    for host in (f"evil.example:{shared.port}", "127.0.0.1:1", "127.0.0.1", "localhost"):
        code, answer = shared.ask("GET", CONFIGS, Host=host)
        assert (code, answer["reason"]) == (403, "Forbidden"), host
    for host in (f"localhost:{shared.port}", f"127.0.0.1:{shared.port}", f"[::1]:{shared.port}"):
        assert shared.ask("GET", CONFIGS, Host=host)[0] == 200


def test_requests_from_web_pages_are_rejected(shared: Api):
    for origin in (
        "https://evil.example",
        f"https://evil.example:{shared.port}",
        "http://127.0.0.1:1",
        f"http://localhost:{shared.port}",
        f"https://localhost:{shared.port}",
        "https://127.0.0.1:1",
        "https://127.0.0.1",
        "null",
        "",
    ):
        assert shared.ask("GET", CONFIGS, Origin=origin)[0] == 403, origin


def test_dns_rebinding_is_rejected(shared: Api):
    name = f"evil.example:{shared.port}"
    assert shared.ask("GET", CONFIGS, Host=name, Origin=f"https://{name}")[0] == 403


def test_clients_may_send_the_apis_own_origin(shared: Api):
    for host in (f"127.0.0.1:{shared.port}", f"localhost:{shared.port}"):
        assert shared.ask("GET", CONFIGS, Host=host, Origin=f"https://{host}")[0] == 200
    # Older releases of Python's websocket-client send http for TLS, too.
    assert shared.ask("GET", CONFIGS, Origin=f"http://127.0.0.1:{shared.port}")[0] == 200
    # Under that name another program may serve pages on the same port of ::1.
    for host in (f"localhost:{shared.port}", f"[::1]:{shared.port}"):
        assert shared.ask("GET", CONFIGS, Host=host, Origin=f"http://{host}")[0] == 403


def test_json_is_the_default_content_type(shared: Api):
    for path in ("/version", "/apis", CONFIGS):
        for accept in ("", "*/*", "text/html, application/json;q=0.9"):
            assert shared.ask("GET", path, Accept=accept)[0] == 200, (path, accept)


def test_a_body_over_the_limit_is_rejected(shared: Api):
    body = {"metadata": {"name": "big"}, "data": {"a": "x" * (4 << 20)}}
    code, answer = shared.ask("POST", CONFIGS, body)
    assert (code, answer["reason"]) == (413, "RequestEntityTooLarge")
    assert shared.ask("GET", CONFIGS)[0] == 200


@pytest.mark.parametrize("body", [b"", b"{", b"nonsense", b"\xff", b"[" * 100_000, b"null"])
def test_a_body_that_is_not_an_object_is_a_bad_request(shared: Api, body: bytes):
    code, answer = shared.ask("POST", CONFIGS, body)
    assert (code, answer["reason"]) == (400, "BadRequest")


@pytest.mark.parametrize(
    "path",
    ["/", "/nope", "/api/v2", "/apis/none", "/api/v1/none", "/api/v1/pods/x",
     f"{CONFIGS}/a/b/c/d", "/apis/batch/v1/namespaces/default/jobs/x/scale", "//", "/api//v1"],
)  # fmt: skip
def test_odd_paths_get_a_response(shared: Api, path: str):
    assert shared.ask("GET", path)[0] in (200, 404)


def test_unavailable_logs_give_the_reason(shared: Api):
    def pod(name: str, node: str = "", containers: int = 1) -> str:
        spec = {"containers": [{"name": f"c{i}", "image": "i"} for i in range(containers)]}
        spec |= {"nodeName": node} if node else {}
        body = {"metadata": {"name": name}, "spec": spec}
        assert shared.ask("POST", "/api/v1/namespaces/default/pods", body)[0] == 201
        return f"/api/v1/namespaces/default/pods/{name}/log"

    port = _closed_port()
    address = {"addresses": [{"type": "InternalIP", "address": "127.0.0.1"}]}
    down = {**address, "daemonEndpoints": {"kubeletEndpoint": {"Port": port}}}
    for name, status in (("silent", {}), ("down", down)):
        code, _ = shared.ask(
            "POST", "/api/v1/nodes", {"metadata": {"name": name}, "status": status}
        )
        assert code == 201
    for path, code, words in (
        ("/api/v1/namespaces/default/pods/none/log", 404, 'pods "none" not found'),
        (pod("waiting"), 400, "does not have a host assigned"),
        (pod("lost", "gone"), 404, 'nodes "gone" not found'),
        (pod("quiet", "silent"), 400, "reports no kubelet address"),
        (pod("late", "down"), 502, "the kubelet of node down is unreachable"),
        (pod("two", "down", 2), 400, "choose one of: [c0 c1]"),
        ("/api/v1/namespaces/default/pods/two/log?container=x", 400, "container x is not valid"),
    ):
        got, answer = shared.ask("GET", path)
        assert got == code, answer
        assert words in answer["message"]


def _closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_acknowledged_writes_survive_a_kill(tmp_path: Path):
    made = {}
    with running(tmp_path) as api:
        for index in range(20):
            code, answer = api.ask("POST", CONFIGS, {"metadata": {"name": f"c{index}"}})
            assert code == 201
            made[answer["metadata"]["name"]] = answer
        assert api.ask("DELETE", f"{CONFIGS}/c0")[0] == 200
        port, last = api.port, int(api.ask("GET", CONFIGS)[1]["metadata"]["resourceVersion"])
        api.end(signal.SIGKILL)
    del made["c0"]
    with running(tmp_path, "--port", str(port)) as api:
        assert api.port == port
        listed = api.ask("GET", CONFIGS)[1]
        assert {item["metadata"]["name"]: item for item in listed["items"]} == made
        assert int(listed["metadata"]["resourceVersion"]) >= last
        _, answer = api.ask("POST", CONFIGS, {"metadata": {"name": "new"}})
        assert int(answer["metadata"]["resourceVersion"]) > last
        api.end()
        assert api.process.returncode == 0


def test_a_kill_during_writes_loses_no_acknowledged_write(tmp_path: Path):
    acknowledged: list[str] = []
    enough = threading.Event()

    def write(api: Api, writer: int) -> None:
        with contextlib.suppress(OSError, http.client.HTTPException):
            for index in range(10_000):
                name = f"w{writer}-{index}"
                code, _ = api.ask("POST", CONFIGS, {"metadata": {"name": name}})
                assert code == 201
                acknowledged.append(name)
                if len(acknowledged) > 40:
                    enough.set()

    with running(tmp_path) as api:
        writers = [threading.Thread(target=write, args=(api, n)) for n in range(3)]
        for writer in writers:
            writer.start()
        assert enough.wait(TIMEOUT_S)
        api.end(signal.SIGKILL)
        for writer in writers:
            writer.join(TIMEOUT_S)
    with running(tmp_path) as api:
        items = api.ask("GET", CONFIGS)[1]["items"]
        assert set(acknowledged) <= {item["metadata"]["name"] for item in items}
        versions = [item["metadata"]["resourceVersion"] for item in items]
        assert len(set(versions)) == len(versions)


def test_after_a_restart_a_watch_resumes_or_gets_410_gone(tmp_path: Path):
    with running(tmp_path) as api:
        for name in ("a", "b"):
            assert api.ask("POST", CONFIGS, {"metadata": {"name": name}})[0] == 201
        last = int(api.ask("GET", CONFIGS)[1]["metadata"]["resourceVersion"])
        api.end(signal.SIGKILL)
    with running(tmp_path) as api:
        query = f"{CONFIGS}?watch=1&timeoutSeconds=1&resourceVersion="
        assert api.ask("GET", f"{query}{last}") == (200, [])
        ((kind, status),) = [
            (e["type"], e["object"]) for e in api.ask("GET", f"{query}{last - 1}")[1]
        ]
        assert (kind, status["code"], status["reason"]) == ("ERROR", 410, "Expired")


def test_a_watch_ends_with_the_server(tmp_path: Path):
    with running(tmp_path) as api:
        token = (api.directory / "token").read_text()
        tls = ssl.create_default_context(cafile=str(api.directory / "ca.crt"))
        connection = http.client.HTTPSConnection("127.0.0.1", api.port, context=tls, timeout=10)
        with contextlib.closing(connection):
            headers = {"Authorization": f"Bearer {token}"}
            connection.request("GET", f"{CONFIGS}?watch=1&resourceVersion=1", headers=headers)
            answer = connection.getresponse()
            assert answer.status == 200
            started = time.monotonic()
            api.process.send_signal(signal.SIGTERM)
            assert answer.read() == b""
            api.end()
            assert time.monotonic() - started < 5


def test_a_data_directory_is_used_by_one_server_only(tmp_path: Path):
    with running(tmp_path):
        second = Api(tmp_path)
        said = second.said()
        assert second.port == 0
        assert said.splitlines()[-1].startswith("the Kubernetes API cannot start: ")
        assert "Traceback" not in said


def test_a_port_in_use_is_reported_in_one_line(tmp_path: Path):
    with running(tmp_path / "a") as first:
        second = Api(tmp_path / "b", "--port", str(first.port))
        said = second.said()
        assert second.port == 0
        assert str(first.port) in said
        assert "Traceback" not in said


def test_a_kubeconfig_stays_valid_across_restarts(tmp_path: Path):
    def kept() -> list[bytes]:
        return [(tmp_path / name).read_bytes() for name in ("kubeconfig", "token", "ca.crt")]

    with running(tmp_path) as api:
        port, before = api.port, kept()
        api.end()
    for number in (signal.SIGKILL, signal.SIGTERM):
        with running(tmp_path) as api:
            assert (api.port, kept()) == (port, before)
            assert api.ask("GET", CONFIGS)[0] == 200
            api.end(number)
    with running(tmp_path / "other") as other:
        moved = other.port  # which it chose outside of the ephemeral range
    with running(tmp_path, "--port", str(moved)) as api:
        assert api.port == moved
        api.end()
    with running(tmp_path) as api:
        assert api.port == moved


def test_the_saved_port_is_outside_the_ephemeral_range(tmp_path: Path):
    """Else it would be taken at the next start by whatever the machine connects to."""
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    with running(tmp_path) as api:
        assert api.port < lowest


def test_another_port_is_chosen_if_the_saved_one_is_taken(tmp_path: Path):
    with running(tmp_path) as api:
        port = api.port
        api.end()
    with socket.create_server(("127.0.0.1", port)), running(tmp_path) as api:
        other = api.port
        assert other != port
        assert f":{other}\n" in (tmp_path / "kubeconfig").read_text()
        api.end()
    with running(tmp_path) as api:
        assert api.port == other


def test_a_broken_kubeconfig_is_replaced(tmp_path: Path):
    (tmp_path / "kubeconfig").write_bytes(b"[\xff")
    with running(tmp_path) as api:
        assert f":{api.port}\n" in (tmp_path / "kubeconfig").read_text()


def test_it_exits_with_its_parent(tmp_path: Path):
    program = (
        "import os, subprocess, sys, time\n"
        "read, write = os.pipe()\n"
        "child = subprocess.Popen([sys.executable, '-m', 'kubeai.local.apiserver', '--data-dir',"
        " sys.argv[1], '--ready-fd', str(write)], pass_fds=(write,))\n"
        "print(child.pid, os.read(read, 99).decode(), flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    pid, ready, _ = parent.stdout.readline().split()
    assert ready == "ready"
    parent.kill()
    parent.communicate(timeout=TIMEOUT_S)
    deadline = time.monotonic() + TIMEOUT_S
    while _is_alive(int(pid)):
        assert time.monotonic() < deadline, "the server outlived its parent"
        time.sleep(0.02)


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
