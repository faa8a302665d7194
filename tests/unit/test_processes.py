"""Processes forked by the fork server: what they inherit, and how they end."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

# Runs ``body`` (a coroutine that is given a ForkServer) in a process that has no thread yet.
PROGRAM = """
import asyncio, json, os, signal, sys
from kubeai.processes import Command, ForkServer, spawn_by_exec

{body}

server = ForkServer("reporter")
try:
    asyncio.run(body(server))
finally:
    server.close()
"""
REPORTER = """
import json, os, signal, sys, time, random

def main():
    what, *rest = sys.argv[1:]
    if what == "report":
        print(json.dumps({
            "argv": sys.argv,
            "env": dict(os.environ),
            "fds": sorted(int(fd) for fd in os.listdir("/proc/self/fd")),
            "parent": os.getppid(),
            "session": os.getsid(0) == os.getpid(),
            "sigint": signal.getsignal(signal.SIGINT) is signal.default_int_handler,
            "sigterm": signal.getsignal(signal.SIGTERM) == signal.SIG_DFL,
            "stdin": os.readlink("/proc/self/fd/0"),
            "command": open("/proc/self/cmdline").read().rstrip("\\0"),
            "random": random.random(),
        }))
    elif what == "write":
        os.write(int(rest[0]), b"hello")
    elif what == "exit":
        sys.exit(int(rest[0]) if rest[0].isdigit() else rest[0])
    elif what == "raise":
        raise ValueError("oh")
    elif what == "wait":
        os.write(int(rest[0]), str(os.getpid()).encode())
        signal.pause()

if __name__ == "__main__":
    sys.exit(main())
"""


@pytest.fixture
def run(tmp_path):
    (tmp_path / "reporter.py").write_text(REPORTER)

    def run(body: str) -> str:
        """The stdout of a program with this body."""
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM.format(body=body), str(tmp_path / "out")],
            env={**os.environ, "PYTHONPATH": str(tmp_path), "MARK": "parent"},
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_a_forked_process_is_like_a_started_one(run):
    body = """
async def body(server):
    read, write = os.pipe()
    for spawn in (server.spawn, spawn_by_exec):
        with open(sys.argv[1], "w") as output:
            process = await spawn(Command(
                "reporter", ("report", "a b"), env={**os.environ, "MARK": "child"},
                output=output.fileno(), pass_fds=(write,), new_session=True,
            ))
            assert await process.wait() == process.returncode == 0
            process.kill()  # not an error
        print(json.dumps([os.getpid(), write, json.load(open(sys.argv[1]))]))
"""
    forked, started = map(json.loads, run(body).splitlines())
    parent, passed_fd, report = forked
    assert report["argv"][1:] == ["report", "a b"]
    assert report["env"]["MARK"] == "child"
    assert report["parent"] == parent, "not the fork server"
    assert report["session"]
    assert report["sigint"]
    assert report["sigterm"]
    assert report["stdin"] == os.devnull
    assert {0, 1, 2, passed_fd} <= set(report["fds"])
    assert len(report["fds"]) == 5, "and the one that lists them"
    assert report["command"].split()[1:] == ["-m", "reporter", "report", "a", "b"]
    for key in ("parent", "session", "sigint", "sigterm", "stdin"):
        assert report[key] == started[2][key]
    assert report["random"] != started[2]["random"]


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        ('"exit", "0"', 0, ""),
        ('"exit", "7"', 7, ""),
        ('"exit", "it is broken"', 1, "it is broken\n"),
        ('"raise"', 1, "ValueError: oh\n"),
    ],
)
def test_the_exit_status_is_the_one_of_the_module(run, arguments, status, says):
    body = f"""
async def body(server):
    with open(sys.argv[1], "w") as output:
        command = Command("reporter", ({arguments},), output=output.fileno())
        process = await server.spawn(command)
        print(await process.wait())
    print(open(sys.argv[1]).read(), end="")
"""
    code, _, rest = run(body).partition("\n")
    assert int(code) == status
    assert rest.endswith(says)


def test_a_signal_is_the_exit_status_of_the_process_that_it_ends(run):
    body = """
async def body(server):
    read, write = os.pipe()
    process = await server.spawn(Command("reporter", ("wait", str(write)), pass_fds=(write,)))
    assert os.read(read, 9).decode() == str(process.pid)
    assert process.returncode is None
    process.send_signal(signal.SIGTERM)
    print(await process.wait())
    process.kill()  # it is gone: nothing happens
"""
    assert run(body) == "-15\n"


def test_other_descriptors_of_the_parent_are_not_inherited(run):
    body = """
async def body(server):
    before = os.open("/", os.O_RDONLY)
    os.set_inheritable(before, True)
    with open(sys.argv[1], "w") as output:
        process = await server.spawn(Command("reporter", ("report",), output=output.fileno()))
        assert await process.wait() == 0
    print(json.load(open(sys.argv[1]))["fds"])
"""
    assert run(body) == "[0, 1, 2, 3]\n"


def test_processes_outlive_the_fork_server_and_are_then_started_by_exec(run):
    body = """
async def body(server):
    read, write = os.pipe()
    first = await server.spawn(Command("reporter", ("wait", str(write)), pass_fds=(write,)))
    os.read(read, 9)
    os.kill(server.pid, signal.SIGKILL)
    second = await server.spawn(Command("reporter", ("wait", str(write)), pass_fds=(write,)))
    assert os.read(read, 9).decode() == str(second.pid)
    assert first.returncode is second.returncode is None
    for process in (first, second):
        process.kill()
        print(await process.wait())
"""
    assert run(body).splitlines()[-2:] == ["-9", "-9"]


def test_a_cancelled_start_leaves_no_process_and_no_reply_behind(run):
    body = """
async def body(server):
    read, write = os.pipe()
    starting = asyncio.ensure_future(
        server.spawn(Command("reporter", ("wait", str(write)), pass_fds=(write,)))
    )
    await asyncio.sleep(0)
    await asyncio.sleep(0)  # the request has been sent
    starting.cancel()
    assert isinstance((await asyncio.gather(starting, return_exceptions=True))[0],
                      asyncio.CancelledError)
    process = await server.spawn(Command("reporter", ("exit", "5")))
    print(await process.wait())
    os.close(write)
    os.read(read, 9)  # its ID, if it came so far
    print(os.read(read, 9), "the end: no process has the pipe open")
"""
    assert run(body).splitlines() == ["5", "b'' the end: no process has the pipe open"]


def test_the_fork_server_ends_with_its_parent(run):
    body = """
async def body(server):
    print(server.pid, flush=True)
    os._exit(0)
"""
    stat = Path(f"/proc/{int(run(body))}/stat")
    deadline_s = time.monotonic() + 10
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        while stat.read_text().rpartition(") ")[2][0] != "Z":  # reaped by nobody yet
            assert time.monotonic() < deadline_s
            time.sleep(0.01)


def test_a_module_that_cannot_be_imported_is_an_exit_status(run):
    body = """
async def body(server):
    with open(sys.argv[1], "w") as output:
        process = await server.spawn(Command("missing_module", output=output.fileno()))
        print(await process.wait())
    print(open(sys.argv[1]).read())
"""
    said = run(body)
    assert said.startswith("1\n")
    assert "missing_module" in said
