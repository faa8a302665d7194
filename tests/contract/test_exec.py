"""Commands in the containers of the process kubelet, through both APIs: kubectl exec, Kube.exec."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pty
import ssl
import subprocess
from collections.abc import AsyncIterator, Iterator

import aiohttp
import pytest
from kubectls import Kubectl
from kubelets import DEADLINE_S, PYTHON, Kubelet, Pods, is_alive, until
from servers import ApiServer

from kubeai.kube.client import Kube
from kubeai.kube.errors import ApiError

SLEEP = [*PYTHON, "import time; time.sleep(600)"]


@pytest.fixture
def pods(api_server: ApiServer, namespace: str, kube_api: str, tmp_path) -> Iterator[Pods]:
    """A running pod ``p`` on a kubelet of its own; its one container sees a volume."""
    kubelet = Kubelet(api_server, kube_api, tmp_path / "kubelet", namespace, bind=False)
    kubelet.start()
    pods = Pods(api_server, namespace)
    container = {
        "name": "server",
        "image": "engine",
        "command": SLEEP,
        "env": [{"name": "GREETING", "value": "hello"}],
        "workingDir": "/kubeai-volume",
        "volumeMounts": [{"name": "v", "mountPath": "/kubeai-volume"}],
    }
    volumes = [{"name": "v", "emptyDir": {}}]
    try:
        pods.create(node=kubelet.node, containers=[container], volumes=volumes)
        pods.until_ready()
        yield pods
    finally:
        kubelet.clean_up()


@pytest.fixture
async def kube(kube_api: str) -> AsyncIterator[Kube]:
    kube = await Kube.connect(kube_api)
    yield kube
    await kube.close()


async def run(kube: Kube, *command: str, pod: str = "p", container: str = "server"):
    return await kube.exec(pod, command, container=container, timeout_s=DEADLINE_S)


# -- kubectl -------------------------------------------------------------------------------------


@pytest.mark.kubectl
def test_exec_runs_a_command_in_the_containers_view(kubectl: Kubectl, pods):
    said = kubectl("exec", "p", "--", "sh", "-c", "echo $GREETING; pwd; touch made; ls")
    assert said == "hello\n/kubeai-volume\nmade\n"


@pytest.mark.kubectl
def test_exec_ends_with_the_commands_exit_code(kubectl: Kubectl, pods):
    said = kubectl("exec", "p", "--", "sh", "-c", "echo wrong >&2; exit 7", code=7)
    assert said.splitlines()[0] == "wrong"
    assert "command terminated with exit code 7" in said


@pytest.mark.kubectl
def test_exec_gives_the_command_what_is_piped_into_it(kubectl: Kubectl, pods):
    sent = "".join(f"line {n}\n" for n in range(100_000))
    assert kubectl("exec", "-i", "p", "--", "cat", given=sent) == sent


@pytest.mark.kubectl
def test_a_file_can_be_copied_in_and_out(kubectl: Kubectl, pods, tmp_path):
    (tmp_path / "in").write_bytes(os.urandom(300_000))
    kubectl("cp", str(tmp_path / "in"), "p:/kubeai-volume/file")
    kubectl("cp", "p:/kubeai-volume/file", str(tmp_path / "out"))
    assert (tmp_path / "out").read_bytes() == (tmp_path / "in").read_bytes()


@pytest.mark.kubectl
def test_exec_without_a_program_or_a_pod_says_so(kubectl: Kubectl, pods):
    said = kubectl("exec", "p", "--", "no-such-program", code=1)
    assert "no-such-program is not installed on this machine" in said
    assert "NotFound" in kubectl("exec", "q", "--", "ls", code=1)
    assert "container c is not valid for pod p" in kubectl(
        "exec", "p", "-c", "c", "--", "ls", code=1
    )


@pytest.mark.kubectl
def test_terminal_request_is_rejected_with_a_clear_message(kubectl: Kubectl, pods):
    ours, theirs = pty.openpty()
    try:
        done = subprocess.run(
            [kubectl.program, "exec", "-it", "p", "--", "sh"],
            env=kubectl.environment,
            stdin=theirs,
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )
    finally:
        os.close(ours)
        os.close(theirs)
    assert done.returncode == 1
    assert "tty is not supported" in done.stderr


@pytest.mark.kubectl
def test_kubectl_without_websockets_gets_a_clear_error(kubectl: Kubectl, pods):
    kubectl.environment["KUBECTL_REMOTE_COMMAND_WEBSOCKETS"] = "false"
    said = kubectl("exec", "p", "--", "ls", code=1)
    assert "exec requires a WebSocket upgrade" in said


@pytest.mark.kubectl
def test_a_kubectl_that_is_killed_takes_its_command_with_it(kubectl: Kubectl, pods):
    code = "import os, time; os.fork(); os.write(1, b'%d\\n' % os.getpid()); time.sleep(600)"
    with kubectl.following("exec", "p", "--", *PYTHON, code) as lines:
        pids = [int(lines.next()), int(lines.next())]
        assert all(map(is_alive, pids))
    until(lambda: not any(map(is_alive, pids)))


# -- Kube.exec -----------------------------------------------------------------------------------


async def test_a_program_runs_commands_too(kube, pods):
    assert await run(kube, "sh", "-c", "echo $GREETING; echo wrong >&2; exit 3") in (
        (3, "hello\nwrong\n"),
        (3, "wrong\nhello\n"),
    )
    long = "x" * 20_000
    assert await run(kube, "printf", long) == (0, long)


async def test_a_command_that_cannot_run_is_an_api_error(kube, pods):
    with pytest.raises(ApiError, match="no-such-program is not installed") as caught:
        await run(kube, "no-such-program")
    assert (caught.value.status, caught.value.reason) == (500, "InternalError")
    with pytest.raises(ApiError, match='pods "q" not found') as caught:
        await run(kube, "ls", pod="q")
    assert (caught.value.status, caught.value.reason) == (404, "NotFound")
    with pytest.raises(ApiError, match="container c is not valid for pod p") as caught:
        await run(kube, "ls", container="c")
    assert (caught.value.status, caught.value.reason) == (400, "BadRequest")


async def test_a_command_that_is_too_slow_is_killed(kube, pods):
    command = ["sh", "-c", "echo $$ >pid; exec sleep 600"]
    with pytest.raises(ApiError) as caught:
        await kube.exec("p", command, container="server", timeout_s=3.0)
    assert (caught.value.status, caught.value.reason) == (0, "Timeout")
    result = await run(kube, "cat", "pid")
    await asyncio.to_thread(until, lambda: not is_alive(int(result.output)))


# -- other WebSocket clients ---------------------------------------------------------------------


@contextlib.asynccontextmanager
async def upgraded(api_server, namespace, command, **streams):
    """The upgrade that websocket-client makes for Python's Kubernetes client."""
    url = f"{api_server.url}/api/v1/namespaces/{namespace}/pods/p/exec"
    query = [("command", word) for word in command]
    query += [(stream, str(wanted)) for stream, wanted in streams.items()]
    headers = {"Authorization": f"Bearer {api_server.token}", "Origin": api_server.url}
    tls = ssl.create_default_context(cafile=api_server.ca_file)
    protocols = ("v5.channel.k8s.io", "v4.channel.k8s.io")
    async with (
        asyncio.timeout(DEADLINE_S),
        aiohttp.ClientSession() as session,
        session.ws_connect(
            url, params=query, headers=headers, ssl=tls, protocols=protocols
        ) as socket,
    ):
        yield socket


async def test_a_client_that_names_the_apis_origin_runs_commands(api_server, namespace, pods):
    streams = {"stdin": False, "stdout": True, "stderr": True, "tty": False}
    async with upgraded(api_server, namespace, ["echo", "hi"], **streams) as socket:
        said = [message.data async for message in socket]
    assert b"\x01hi\n" in said
    assert b'"Success"' in said[-1]


async def test_a_client_may_send_input_as_text(api_server, namespace, pods):
    """As that client does with a str."""
    streams = {"stdin": True, "stdout": True}
    async with upgraded(api_server, namespace, ["head", "-n2"], **streams) as socket:
        await socket.send_str("\x00one é\n")
        await socket.send_bytes(b"\x00two\n")
        said = [message.data async for message in socket]
    output = b"".join(data[1:] for data in said if data[:1] == b"\x01")
    assert output.decode() == "one é\ntwo\n"
