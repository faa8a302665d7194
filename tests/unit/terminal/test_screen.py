"""Several processes log to a terminal that one process draws on."""

import asyncio
import os
import re
import signal
import sys

from fakes.terminal import PtyProcess
from harness import until

PROGRAM = """
import os, signal, sys, time
from kubeai.logs import get_logger, setup_logging
from kubeai.terminal.screen import open_screen

def log_lines(name, count):
    setup_logging()
    log = get_logger()
    for n in range(count):
        log.info(f"{name}-{n}", padding="x" * 20)

with open_screen() as screen:
    print("not JSON", file=sys.stderr)
    workers = int(sys.argv[1])
    pids = []
    for n in range(workers):
        pid = os.fork()
        if not pid:
            os.closerange(3, 100)  # as the fork server does
            log_lines(f"worker{n}", int(sys.argv[2]))
            sys.stdin.readline() if sys.argv[3] == "wait" else None
            log_lines(f"last{n}", 1)
            os._exit(0)
        pids.append(pid)
    screen.guard()
    screen.show([{"name": "chat", "state": "Ready"}])
    log_lines(f"main pid={os.getpid()} drawn-by={screen.pid}", 1)
    for pid in pids:
        os.waitpid(pid, 0)
print("after")
"""


def program(tmp_path, *arguments, shell=()):
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return PtyProcess(*shell, sys.executable, str(path), *map(str, arguments), columns=120)


def pid(ran, label):
    return int(re.search(rf"\b{label}=(\d+)", ran.terminal.seen())[1])


async def test_every_line_of_every_process_is_shown_and_the_table_removed(tmp_path):
    count = 500
    async with program(tmp_path, 2, count, "go") as ran:
        assert await ran.end(60) == 0
        seen = ran.terminal.seen()
        lines = seen.splitlines()
        for worker in range(2):
            shown = [line for line in lines if f" worker{worker}-" in line]
            names = [line.split()[1] for line in shown]
            assert names == [f"worker{worker}-{n}" for n in range(count)]
        assert "not JSON" in lines
        assert lines[-1] == "after"
        assert "MODEL" not in seen
        assert b"MODEL" in ran.raw, "the table was shown meanwhile"
        assert ran.terminal.cursor_shown


async def test_when_the_main_process_is_killed_the_others_still_have_a_terminal(tmp_path):
    # The kernel takes the terminal away when the leader of its session ends: that is the shell,
    # which must not write about the killed process.
    code = "import subprocess, sys, time; subprocess.run(sys.argv[1:]); time.sleep(60)"
    shell = (sys.executable, "-c", code)
    async with program(tmp_path, 1, 5, "wait", shell=shell) as ran:
        shown = ("MODEL", "worker0-4", "drawn-by=")
        await until("the table", lambda: all(map(ran.sees, shown)))
        os.kill(pid(ran, "pid"), signal.SIGKILL)
        await until("the table is removed", lambda: not ran.sees("MODEL"))
        assert ran.terminal.cursor_shown
        ran.type("\n")
        await until("the worker's last line", lambda: ran.sees("last0-0"))


async def test_when_the_drawing_process_is_killed_lines_are_shown_all_the_same(tmp_path):
    async with program(tmp_path, 1, 5, "wait") as ran:
        await until("the table", lambda: ran.sees("MODEL") and ran.sees("drawn-by="))
        os.kill(pid(ran, "drawn-by"), signal.SIGKILL)
        await until("the cursor is shown again", lambda: ran.terminal.cursor_shown)
        ran.type("\n")
        assert await ran.end() == 0
        assert '"event": "last0-0"' in ran.terminal.seen()
        assert ran.terminal.seen().endswith("after")


async def test_without_a_terminal_there_is_no_screen(tmp_path):
    program = "from kubeai.terminal.screen import open_screen\nwith open_screen() as s: print(s)"
    for env in ({}, {"TERM": "xterm"}):
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", program),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=os.environ | env,
        )
        assert await process.communicate() == (b"None\n", b"")


async def test_on_a_dumb_terminal_or_with_json_logs_there_is_no_screen():
    code = "from kubeai.terminal.screen import open_screen\nwith open_screen() as s: print('is', s)"
    for env in ({"TERM": "dumb"}, {"KUBEAI_LOG_FORMAT": "json"}):
        async with PtyProcess(sys.executable, "-c", code, **env) as ran:
            assert await ran.end() == 0
            assert ran.terminal.seen() == "is None"
