"""What runs beside the supervisor of `kubeai local`: processes, restarted when they die, and
tasks."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest
from harness import until

from kubeai.errors import KubeAIError
from kubeai.local.app import _beside
from kubeai.local.child import Child
from kubeai.processes import spawn_by_exec

# Its n-th run does what the n-th word says: become ready, or fail.
PROGRAM = """
import os, pathlib, signal, sys
here = pathlib.Path(sys.argv[1])
lives = len(list(here.glob("life-*")))
(here / f"life-{lives}").write_text(str(os.getpid()))
words = sys.argv[2].split(",")
if words[min(lives, len(words) - 1)] == "fail":
    sys.exit("the port is taken")
os.write(int(sys.argv[-1]), b"ready 7\\n")
signal.pause()
"""


@pytest.fixture
def child(tmp_path, monkeypatch):
    (tmp_path / "helper_program.py").write_text(PROGRAM)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return lambda lives: Child(
        "helper",
        lambda: ["helper_program", str(tmp_path), lives],
        tmp_path / "log",
        spawn_by_exec,
    )


async def test_a_child_that_cannot_start_is_an_error_with_its_last_output(child, tmp_path):
    helper = child("fail")
    with pytest.raises(KubeAIError) as error:
        await helper.start()
    expected = f"the helper did not start: the port is taken (see {tmp_path / 'log'})"
    assert str(error.value) == expected
    await helper.stop()


async def test_a_child_that_dies_is_restarted_even_if_the_restart_fails_at_first(child, tmp_path):
    helper = child("ready,fail,ready")
    await helper.start()
    try:
        os.kill(int((tmp_path / "life-0").read_text()), signal.SIGKILL)
        third = tmp_path / "life-2"
        await until("its third run begins", lambda: third.exists() and third.read_text(), 20)
    finally:
        await helper.stop()
    with pytest.raises(ProcessLookupError):
        os.kill(int(third.read_text()), 0)


async def test_a_failing_side_task_stops_everything_and_is_raised():
    stopped = asyncio.Event()

    async def fails():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        async with asyncio.timeout(5), _beside(stopped.set, asyncio.Event().wait(), fails()):
            await stopped.wait()


async def test_side_tasks_end_with_the_block():
    ended = []

    async def task():
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    started = asyncio.Event()
    async with _beside(lambda: None, task()):
        asyncio.get_running_loop().call_soon(started.set)
        await started.wait()
    assert ended == [True]
