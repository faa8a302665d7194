"""Exec over the kubelet's WebSockets, in a container that is a real process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time

import aiohttp
import pytest

from kubeai.kube.exec import CLOSE, ERROR, PROTOCOL_V4, PROTOCOL_V5, STDERR, STDIN, STDOUT, Ending
from kubeai.local.kubelet.pods.pod import PodError
from kubeai.local.kubelet.runtime.process import Launch, Process
from kubeai.local.kubelet.runtime.process_table import ProcessTable
from kubeai.local.kubelet.server import execs
from kubeai.local.kubelet.server.access import TokenAccess
from kubeai.local.kubelet.server.execs import Refusal
from kubeai.local.kubelet.server.server import KubeletServer

PYTHON = [sys.executable, "-S", "-E", "-u", "-c"]
SLEEP = "import time; time.sleep(600)"
DEADLINE_S = 10.0


class Container:
    """The kubelet's view: one container ``server`` of the pod ``p``."""

    def __init__(self, process):
        self.process = process

    def find_container(self, namespace, pod, container):
        if (namespace, pod) != ("default", "p"):
            raise Refusal(404, f'pod "{pod}" is not on this node')
        if container != "server":
            raise Refusal(400, f"container {container} is not valid for pod {pod}")
        return self

    async def open(self, command):
        if command[0] == "no-program":
            raise PodError("no-program is not installed on this machine")
        return self.process.open(list(command), {"PATH": os.environ["PATH"]})

    def children(self):
        """The commands running beside the main process, and their descendants."""
        below = ProcessTable().below(self.process.shim_pid)
        return [pid for pid in below if pid != self.process.pid]

    async def until_alone(self):
        await until(lambda: not self.children(), "a command is still there")


async def until(true, what):
    """Wait for a state, with a deadline."""
    deadline = time.monotonic() + DEADLINE_S
    while not true():
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.01)


@pytest.fixture
async def container(tmp_path):
    launch = Launch(argv=(*PYTHON, SLEEP), env={}, cwd=str(tmp_path), log=tmp_path / "log" / "0")
    process = await Process.start(launch)
    yield Container(process)
    process.kill()
    await process.wait()


@pytest.fixture
async def connect(container):
    """Open the WebSocket of a command."""
    server = KubeletServer(container, TokenAccess("secret"))
    port = await server.start()
    async with aiohttp.ClientSession(headers={"Authorization": "Bearer secret"}) as session:

        def connect(
            *command, to="default/p/server", protocols=(PROTOCOL_V5,), upgrade=True, **options
        ):
            query = [("command", word) for word in command]
            query += list(({"output": "1", "error": "1"} | options).items())
            url = f"http://127.0.0.1:{port}/exec/{to}"
            if not upgrade:
                return session.get(url, params=query)
            return session.ws_connect(url, params=query, protocols=protocols)

        yield connect
    await server.close()


async def everything(socket):
    """Return the output by channel and the command's ending."""
    got = {STDOUT: b"", STDERR: b"", ERROR: b""}
    async with asyncio.timeout(DEADLINE_S):
        async for message in socket:
            got[message.data[0]] += message.data[1:]
    return got[STDOUT], got[STDERR], Ending.decode(got[ERROR])


@pytest.mark.parametrize("protocol", [PROTOCOL_V4, PROTOCOL_V5])
async def test_a_commands_streams_and_ending_are_sent(connect, protocol):
    code = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(7)"
    async with connect(*PYTHON, code, protocols=(protocol,)) as socket:
        assert socket.protocol == protocol
        assert await everything(socket) == (b"out\n", b"err\n", Ending(7))


async def test_a_command_runs_in_the_containers_directory(connect, tmp_path):
    async with connect("pwd") as socket:
        assert (await everything(socket))[0] == f"{tmp_path}\n".encode()


async def test_a_commands_arguments_are_passed_unchanged_at_any_length(connect):
    word = "a b\n'\"&=" * 2000
    async with connect("printf", "%s", word) as socket:
        assert await everything(socket) == (word.encode(), b"", Ending(0))


async def test_input_reaches_the_command_until_the_client_closes_it(connect):
    async with connect("cat", input="1") as socket:
        for _ in range(20):
            await socket.send_bytes(bytes([STDIN]) + b"x" * 30_000)
        await socket.send_bytes(bytes([CLOSE, STDIN]))
        assert await everything(socket) == (b"x" * 600_000, b"", Ending(0))


async def test_a_command_without_stdin_reads_end_of_file_at_once(connect):
    async with connect("cat") as socket:
        assert await everything(socket) == (b"", b"", Ending(0))


async def test_output_that_was_not_requested_is_dropped(connect):
    code = "import sys; print('x' * 1000000); print('err', file=sys.stderr)"
    async with connect(*PYTHON, code, output="0") as socket:
        assert await everything(socket) == (b"", b"err\n", Ending(0))


async def test_a_command_that_cannot_start_gives_the_reason(connect):
    async with connect("no-program") as socket:
        _, _, ending = await everything(socket)
    assert ending == Ending(
        None, 500, "InternalError", "no-program is not installed on this machine"
    )
    async with connect("/no/such/program") as socket:
        _, _, ending = await everything(socket)
    assert ending.message == "/no/such/program: No such file or directory"


async def test_a_command_is_killed_when_its_client_disconnects(connect, container):
    async with connect(*PYTHON, f"import os; os.fork(); print('up'); {SLEEP}") as socket:
        await socket.receive(DEADLINE_S)
        assert len(container.children()) == 2
    await container.until_alone()


async def test_a_disconnect_with_unread_input_is_noticed(connect, container, monkeypatch):
    monkeypatch.setattr("kubeai.local.sockets.PING_INTERVAL_S", 0.05)
    async with connect(*PYTHON, f"print('up'); {SLEEP}", input="1") as socket:
        await socket.receive(DEADLINE_S)
        for _ in range(100):  # more than the pipe and the command's reader hold
            await socket.send_bytes(bytes([STDIN]) + b"x" * 10_000)
        socket._response.close()  # without a close frame
    await container.until_alone()


async def test_clients_that_disconnect_at_any_time_leave_no_process_behind(connect, container):
    shim = container.process.shim_pid
    before = len(os.listdir(f"/proc/{shim}/fd"))

    async def come_and_go(n):
        async with connect(*PYTHON, f"print('up'); {SLEEP}", input="1") as socket:
            with contextlib.suppress(TimeoutError):
                await socket.receive(0.005 * n)

    await asyncio.gather(*(come_and_go(n) for n in range(1, 33)))
    await container.until_alone()
    assert len(os.listdir(f"/proc/{shim}/fd")) == before


async def test_a_command_ends_with_its_container(connect, container):
    async with connect(*PYTHON, f"print('up'); {SLEEP}") as socket:
        await socket.receive(DEADLINE_S)
        container.process.kill()
        _, _, ending = await everything(socket)
    assert ending in (Ending(137), Ending(None, 500, "InternalError", "the container has ended"))


async def test_a_command_times_out(connect, container, monkeypatch):
    monkeypatch.setattr(execs, "EXEC_TIMEOUT_S", 0.2)
    async with connect(*PYTHON, SLEEP) as socket:
        _, _, ending = await everything(socket)
    assert (ending.status, ending.reason) == (504, "Timeout")
    await container.until_alone()


async def test_the_number_of_simultaneous_commands_is_limited(connect, monkeypatch):
    monkeypatch.setattr(execs, "EXECS_MAX", 1)
    async with connect(*PYTHON, f"print('up'); {SLEEP}") as socket:
        await socket.receive(DEADLINE_S)
        with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
            await connect("true")
    assert caught.value.status == 429


@pytest.mark.parametrize(
    ("command", "options", "status", "text"),
    [
        (["ls"], {"to": "default/q/server"}, 404, 'pod "q" is not on this node'),
        (["ls"], {"to": "default/p/c"}, 400, "container c is not valid for pod p"),
        ([], {}, 400, "no command specified"),
        (["ls"], {"tty": "1"}, 400, "tty is not supported"),
        (["ls"], {"output": "0", "error": "0"}, 400, "at least one of stdin, stdout and stderr"),
        (["ls"], {}, 400, "exec requires a WebSocket upgrade"),
    ],
)
async def test_an_invalid_request_is_rejected_before_the_upgrade(
    connect, command, options, status, text
):
    async with connect(*command, upgrade=False, **options) as answer:
        answered = await answer.json()
        assert (answer.status, answered["code"]) == (status, status)
        assert answered["message"].startswith(text)


async def test_a_websocket_without_a_supported_protocol_is_rejected(connect):
    with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
        await connect("ls", protocols=("channel.k8s.io",))
    assert caught.value.status == 400
