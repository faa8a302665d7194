"""`kubeai local` as a person sees it, on a pseudo-terminal; and as a program does, without one."""

import asyncio
import json
import os
import re
import signal

import aiohttp
from fakes.terminal import PtyProcess
from harness import Local, chat, model, running, until

SLOW = ("--decode-tokens-per-second=1",)


def rows(ran):
    """The table: Model → its cells."""
    lines = ran.terminal.seen().splitlines()
    heads = [n for n, line in enumerate(lines) if line.startswith("MODEL ")]
    return {line.split()[0]: line for line in lines[heads[-1] + 1 :]} if heads else {}


async def test_the_table_follows_the_models_and_ctrl_c_says_how_long_it_drains(tmp_path):
    local = Local(tmp_path, model("story", args=SLOW), config={"gateway": {"drainTimeout": "60s"}})
    async with (
        PtyProcess(*local.command, columns=160, rows=40) as ran,
        aiohttp.ClientSession() as session,
    ):
        await until("the addresses", lambda: ran.sees("export KUBECONFIG="), 40)
        assert not ran.sees('{"')
        endpoint = re.search(r"endpoint +(\S+)", ran.terminal.seen())[1]
        await until("the table", lambda: "Scaled to zero" in rows(ran).get("story", ""))
        request = asyncio.create_task(
            chat(session, endpoint, "story", "Once upon a time", max_tokens=500)
        )
        await until(
            "the replica is ready and the request in flight",
            lambda: re.match(r"story +Ready +1/1 +1 ", rows(ran).get("story", "")),
            40,
        )
        ran.resize(90, 30)
        ran.type("\x03")
        await until("the drain is announced", lambda: ran.sees("waiting up to 60 s for requests"))
        assert ran.sees("Ctrl-C or SIGTERM again ends them now")
        ran.type("\x03")
        assert await ran.end(30) == 0
        await request
        seen = ran.terminal.seen()
        assert "stopping now: requests in flight are cut off" in seen
        assert "MODEL" not in seen
        assert "Traceback" not in seen
        assert ran.terminal.cursor_shown
    assert not local.processes()


async def test_without_a_terminal_the_log_is_json_lines_and_stdout_is_empty(tmp_path):
    async with running(tmp_path, model("chat")) as local:
        (worker,) = local.workers()
        os.kill(worker, signal.SIGKILL)
        await until("the death is logged", lambda: local.said("process died", pid=worker))
        assert local.said("manifest applied", name="chat", outcome="created")
        await local.stop()
        (said,) = local.said("stopping")
        assert said["drain_max_s"] == 5.0
    assert local.out == []
    assert [json.loads(line) for line in local.log] == local.events
