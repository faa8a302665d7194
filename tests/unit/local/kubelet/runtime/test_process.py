# ruff: noqa: ASYNC240 - a test may wait for a file
"""Container processes: real ones, with real signals. None outlives its container."""

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from kubeai.local.kubelet.runtime.command import ExecResult
from kubeai.local.kubelet.runtime.logs import LogQuery, read_log
from kubeai.local.kubelet.runtime.memory import MemoryGuard
from kubeai.local.kubelet.runtime.process import Launch, Mount, Process, StartError
from kubeai.local.kubelet.runtime.process_table import ProcessTable, kill_leftovers

PYTHON = [sys.executable, "-S", "-E", "-c"]
ENV = {"PATH": os.environ["PATH"]}

# Double-forks into a new session a process that only its pid file leads to.
NASTY = """
import os, signal, sys, time
for n in range(2):
    if os.fork() == 0:
        os.setsid()
        if os.fork():
            os._exit(0)
        os.environ.clear()
        for s in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(s, signal.SIG_IGN)
        with open(f"{sys.argv[1]}/{n}.tmp", "w") as f:
            f.write(str(os.getpid()))
        os.rename(f"{sys.argv[1]}/{n}.tmp", f"{sys.argv[1]}/{n}.pid")
        time.sleep(600)
time.sleep(600)
"""


async def until(condition, timeout_s=10.0):
    """Wait for a state and return it."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, "the state was not reached"
        await asyncio.sleep(0.01)
    return value


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def pids(directory):
    return [int(path.read_text()) for path in directory.glob("*.pid")]


@pytest.fixture
async def start(tmp_path):
    """Starts processes, and ends them with the test."""
    started = []

    async def start(*argv, **options):
        log = tmp_path / "log" / f"{len(started)}.log"
        launch = Launch(argv=argv, env=ENV | options.pop("env", {}), cwd="/", log=log, **options)
        process: Any = await Process.start(launch)
        started.append(process)
        process.log = log
        return process

    yield start
    for process in started:
        process.kill()
        await asyncio.wait_for(process.wait(), 10)


async def text(process, **query):
    return b"".join([b async for b in read_log(process.log, LogQuery(**query))]).decode()


async def test_a_process_has_its_environment_and_its_output_is_logged(start):
    code = "import os,sys; print(os.environ['X']); print('e', file=sys.stderr); sys.exit(3)"
    process = await start(*PYTHON, code, env={"X": "x"})
    end = await process.wait()
    assert (end.code, end.signal) == (3, 0)
    assert sorted((await text(process)).split()) == ["e", "x"]


async def test_a_signal_reaches_the_main_process_and_is_reported(start):
    process = await start(*PYTHON, "import time; time.sleep(600)")
    process.signal(signal.SIGTERM)
    end = await process.wait()
    assert (end.code, end.signal) == (143, 15)


async def test_signals_that_the_shim_ignores_are_not_ignored_by_the_program(start):
    code = "import signal; print(*(signal.getsignal(s) is signal.SIG_DFL for s in (2+13, 1)))"
    process = await start(*PYTHON, code)
    await process.wait()
    assert await text(process) == "True True\n"


@pytest.mark.parametrize(
    ("argv", "cwd", "message"),
    [
        (["/no/such/program"], "/", "/no/such/program: No such file"),
        (["ls"], "/no", "/no: No such"),
    ],
)
async def test_a_process_that_cannot_start_is_reported_by_name(tmp_path, argv, cwd, message):
    launch = Launch(argv=tuple(argv), env=ENV, cwd=cwd, log=tmp_path / "0.log")
    with pytest.raises(StartError, match=message):
        await Process.start(launch)


async def test_nothing_outlives_the_main_process(start, tmp_path):
    process = await start(*PYTHON, NASTY, str(tmp_path))
    await until(lambda: len(pids(tmp_path)) == 2)
    process.signal(signal.SIGTERM)  # ends only the main process
    assert (await process.wait()).signal == signal.SIGTERM
    assert not any(map(is_alive, pids(tmp_path)))


async def test_kill_ends_daemons_that_ignore_every_signal(start, tmp_path):
    process = await start(*PYTHON, NASTY, str(tmp_path))
    await until(lambda: len(pids(tmp_path)) == 2)
    assert all(map(is_alive, pids(tmp_path)))
    process.kill()
    assert (await process.wait()).code == 137
    assert not any(map(is_alive, pids(tmp_path)))


async def test_nothing_outlives_the_kubelet(start, tmp_path):
    process = await start(*PYTHON, NASTY, str(tmp_path))
    await until(lambda: len(pids(tmp_path)) == 2)
    process._writer.close()  # what the kernel does when the kubelet is SIGKILLed
    await until(lambda: not any(map(is_alive, [*pids(tmp_path), process.pid])))


async def test_the_main_process_does_not_outlive_a_killed_shim(start, tmp_path):
    process = await start(*PYTHON, "import time; time.sleep(600)")
    os.kill(process.shim_pid, signal.SIGKILL)
    end = await process.wait()
    assert (end.code, end.message) == (137, "the container's shim was killed")
    await until(lambda: not is_alive(process.pid))


async def test_leftover_processes_are_found_by_the_mark_in_their_environment(start, tmp_path):
    marked = await start(*PYTHON, "import time; time.sleep(600)", env={"MARK": f"{tmp_path}/dir"})
    other = await start(*PYTHON, "import time; time.sleep(600)", env={"MARK": f"{tmp_path}/dir2"})
    assert kill_leftovers(f"MARK={tmp_path}/dir") == 1
    assert (await marked.wait()).signal == signal.SIGKILL
    assert is_alive(other.pid)


async def test_a_command_beside_the_main_process_returns_its_exit_code_and_output(start):
    process = await start(*PYTHON, "import time; time.sleep(600)")
    code = "import os,sys; print(os.environ['X']); print('e', file=sys.stderr, end=''); sys.exit(4)"
    result = await process.open([*PYTHON, code], ENV | {"X": "x"}).result(10)
    assert result.code == 4
    assert sorted(result.output.split()) == ["e", "x"]
    assert (await process.open(["/no/such"], ENV).result(10)).code == -1


async def test_a_command_that_times_out_is_killed_with_its_descendants(start, tmp_path):
    process = await start(*PYTHON, "import time; time.sleep(600)")
    with pytest.raises(TimeoutError):
        await process.open([*PYTHON, "import os,time; os.fork(); time.sleep(600)"], ENV).result(0.3)
    await until(lambda: len(ProcessTable().below(process.shim_pid)) == 1)


async def test_a_command_cannot_flood_the_kubelet(start):
    process = await start(*PYTHON, "import time; time.sleep(600)")
    result = await process.open([*PYTHON, "print('x' * 1000000)"], ENV).result(10)
    assert (result.code, len(result.output)) == (0, 10 << 10)


async def test_a_command_ends_when_the_container_does(start):
    process = await start(*PYTHON, "import time; time.sleep(600)")
    command = asyncio.create_task(
        process.open([*PYTHON, "import time; time.sleep(600)"], ENV).result(60)
    )
    await until(lambda: len(ProcessTable().below(process.shim_pid)) == 2)
    process.kill()
    # 137 if its own end is reported before the container's.
    assert (await asyncio.wait_for(command, 10)).code in (-1, 137)


async def everything(command):
    """All of a command's output."""

    async def read(stream):
        data = b""
        while more := await command.read(stream):
            data += more
        return data

    async with asyncio.timeout(10):
        return await asyncio.gather(read(command.stdout), read(command.stderr))


async def test_a_command_has_its_own_streams(start):
    process = await start(*PYTHON, "import time; time.sleep(600)")
    code = "import sys; print(sys.stdin.read()[::-1], end=''); print('e', file=sys.stderr, end='')"
    command = process.open([*PYTHON, code], ENV)
    await command.write(b"abc")
    command.end_input()
    assert await everything(command) == [b"cba", b"e"]
    assert (await command.ended).code == 0
    command.close()
    process.kill()
    await process.wait()
    assert await text(process) == ""  # a command's output does not go to the container's log


async def test_a_commands_input_and_output_may_exceed_the_pipe_buffer(start):
    process = await start(*PYTHON, "import time; time.sleep(600)")
    command = process.open(["cat"], ENV)
    sent = os.urandom(1 << 20)

    async def send():
        await command.write(sent)
        command.end_input()

    _, (got, _) = await asyncio.gather(send(), everything(command))
    assert got == sent
    command.close()


async def test_input_that_a_command_does_not_read_is_dropped(start):
    process = await start(*PYTHON, "import time; time.sleep(600)")
    command = process.open([*PYTHON, "import os; os.close(0); print('closed')"], ENV)
    async with asyncio.timeout(10):
        await command.write(b"x" * (1 << 20))
    assert await everything(command) == [b"closed\n", b""]
    command.close()


async def test_all_output_of_a_command_is_read_even_if_a_child_keeps_the_pipe_open(start):
    process = await start(*PYTHON, "import time; time.sleep(600)")
    code = "import os,time; os.write(1, b'x' * 60000); os.fork() or time.sleep(600)"
    command = process.open([*PYTHON, code], ENV)
    async with asyncio.timeout(10):
        assert (await asyncio.shield(command.ended)).code == 0
    assert await everything(command) == [b"x" * 60000, b""]
    command.close()
    # The main process, and the command's child, which belongs to the container now.
    assert len(ProcessTable().below(process.shim_pid)) == 2


async def test_closing_a_command_kills_it_with_the_orphans_of_its_session(start):
    process = await start(*PYTHON, "import time; time.sleep(600)")
    code = (
        "import os,time\n"
        "if os.fork() == 0:\n"
        "    os.fork() and os._exit(0)\n"  # an orphan in the command's session
        "    print('orphan', flush=True)\n"
        "time.sleep(600)"
    )
    command = process.open([*PYTHON, code], ENV)
    async with asyncio.timeout(10):
        assert await command.read(command.stdout) == b"orphan\n"
    command.close()
    await until(lambda: ProcessTable().below(process.shim_pid) == [process.pid])


async def test_a_command_in_an_ended_container_ends_at_once(start):
    process = await start(*PYTHON, "")
    await process.wait()
    assert await process.open(["ls"], ENV).result(10) == ExecResult(-1, "the container has ended")


async def test_commands_leave_no_descriptor_open(start):
    process = await start(*PYTHON, "import time; time.sleep(600)")
    before = len(os.listdir("/proc/self/fd")), len(os.listdir(f"/proc/{process.shim_pid}/fd"))
    await asyncio.gather(*(process.open(["true"], ENV).result(10) for _ in range(8)))
    after = len(os.listdir("/proc/self/fd")), len(os.listdir(f"/proc/{process.shim_pid}/fd"))
    assert after == before


async def test_a_long_line_is_reassembled(start):
    process = await start(*PYTHON, "print('a' * 50000); print('b', end='')")
    await process.wait()
    assert await text(process) == "a" * 50000 + "\nb\n"


async def test_a_log_is_rotated_and_limited_in_size(start):
    code = "for i in range(2000): print(f'line {i:06}')"
    process = await start(*PYTHON, code, log_max_bytes=20_000)
    await process.wait()
    files = list(process.log.parent.glob("*.log*"))
    assert len(files) == 2
    assert all(file.stat().st_size <= 20_000 for file in files)
    lines = (await text(process)).splitlines()
    assert lines == [f"line {i:06}" for i in range(2000 - len(lines), 2000)]


async def test_a_process_tree_over_its_memory_limit_is_reported(start):
    code = "import os,time; os.fork(); x = b'x' * (64 << 20); time.sleep(600)"
    process = await start(*PYTHON, code)
    reported = asyncio.get_running_loop().create_future()

    def over(used, limit):
        if not reported.done():
            reported.set_result((used, limit))

    with MemoryGuard(poll_interval_s=0.05).watching(process, 100 << 20, over):
        used, limit = await asyncio.wait_for(reported, 10)
    assert used > limit == 100 << 20


async def test_a_process_tree_under_its_memory_limit_is_left_alone(start):
    process = await start(
        *PYTHON, "print('up'); x = b'x' * (8 << 20); import time; time.sleep(0.5)"
    )
    over = []
    with MemoryGuard(poll_interval_s=0.02).watching(process, 64 << 20, lambda *a: over.append(a)):
        await process.wait()
    assert over == []


# -- mounts --------------------------------------------------------------------------------------


@pytest.fixture(params=["auto", "user"])
def namespace(request):
    return request.param


@pytest.fixture
def volume(tmp_path):
    directory = tmp_path / "volume"
    directory.mkdir()
    (directory / "file").write_text("content")
    return directory


async def test_a_volume_is_mounted_at_a_path_that_does_not_exist_on_the_machine(
    start, volume, namespace, tmp_path
):
    path = "/kubeai-test-no-such/deeper"
    code = f"print(open('{path}/file').read()); open('{path}/new', 'w').write('n')"
    process = await start(
        *PYTHON, code, mounts=(Mount(str(volume), path),), root=tmp_path / "r", namespace=namespace
    )
    assert (await process.wait()).code == 0, await text(process)
    assert await text(process) == "content\n"
    assert (volume / "new").read_text() == "n"
    assert not Path("/kubeai-test-no-such").exists()


async def test_the_rest_of_the_file_system_stays_in_place(start, volume, namespace, tmp_path):
    (tmp_path / "host").write_text("host")
    code = f"import os; print(open('{tmp_path}/host').read(), sorted(os.listdir('/usr')))"
    mounts = (Mount(str(volume), "/usr/kubeai-test/x"),)
    process = await start(*PYTHON, code, mounts=mounts, root=tmp_path / "r", namespace=namespace)
    assert (await process.wait()).code == 0, await text(process)
    expected = sorted([*os.listdir("/usr"), "kubeai-test"])
    assert await text(process) == f"host {expected}\n"


async def test_a_file_replaces_a_file_and_a_read_only_mount_is_read_only(
    start, volume, namespace, tmp_path
):
    code = (
        "print(open('/etc/hostname').read())\n"
        "try: open('/etc/hostname', 'w')\n"
        "except OSError as e: print(e.errno)"
    )
    mounts = (Mount(str(volume / "file"), "/etc/hostname", read_only=True),)
    process = await start(*PYTHON, code, mounts=mounts, root=tmp_path / "r", namespace=namespace)
    await process.wait()
    assert await text(process) == "content\n30\n"
    assert Path("/etc/hostname").read_text() != "content"


async def test_a_mount_inside_a_mount_works(start, volume, namespace, tmp_path):
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "i").write_text("inner")
    mounts = (Mount(str(inner), "/kubeai-a/b"), Mount(str(volume), "/kubeai-a"))
    code = "print(open('/kubeai-a/file').read(), open('/kubeai-a/b/i').read())"
    process = await start(*PYTHON, code, mounts=mounts, root=tmp_path / "r", namespace=namespace)
    await process.wait()
    assert await text(process) == "content inner\n"


async def test_a_command_beside_the_main_process_sees_its_mounts(
    start, volume, namespace, tmp_path
):
    process = await start(
        *PYTHON,
        "import time; time.sleep(600)",
        mounts=(Mount(str(volume), "/kubeai-a"),),
        root=tmp_path / "r",
        namespace=namespace,
    )
    result = await process.open(["cat", "/kubeai-a/file"], ENV).result(10)
    assert (result.code, result.output) == (0, "content")


async def test_a_mount_leaves_nothing_on_the_machine(start, volume, namespace, tmp_path):
    before = mounted()
    process = await start(
        *PYTHON, "", mounts=(Mount(str(volume), "/kubeai-a"),), root=tmp_path / "r",
        namespace=namespace,
    )  # fmt: skip
    await process.wait()
    assert mounted() <= before
    assert list((tmp_path / "r").iterdir()) == []


def mounted():
    """The machine's mounts, except network namespaces, which other tests create meanwhile."""
    lines = Path("/proc/self/mounts").read_text().splitlines()
    return Counter(line for line in lines if line.split()[1].split("/")[2:3] != ["netns"])


async def test_without_namespaces_a_mount_fails_with_the_reason(start, volume, tmp_path):
    with pytest.raises(StartError, match="cannot mount /kubeai-a without root") as caught:
        await start(
            *PYTHON, "", mounts=(Mount(str(volume), "/kubeai-a"),), root=tmp_path / "r",
            namespace="none",
        )  # fmt: skip
    assert caught.value.reason == "MountError"


async def test_without_namespaces_a_directory_can_be_mounted_at_its_own_path(
    start, volume, tmp_path
):
    mounts = (Mount(str(volume), str(volume)),)
    process = await start(
        "cat", str(volume / "file"), mounts=mounts, root=tmp_path / "r", namespace="none"
    )
    await process.wait()
    assert await text(process) == "content\n"


async def test_an_unresponsive_shim_is_killed(start, monkeypatch):
    from kubeai.local.kubelet.runtime import process as module

    monkeypatch.setattr(module, "SHIM_KILL_TIMEOUT_S", 0.2)
    process = await start(*PYTHON, "import time; time.sleep(600)")
    os.kill(process.shim_pid, signal.SIGSTOP)
    process.kill()
    assert (await asyncio.wait_for(process.wait(), 10)).code == 137
    with contextlib.suppress(ProcessLookupError):
        await until(lambda: not is_alive(process.pid))
