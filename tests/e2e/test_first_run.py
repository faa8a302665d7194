"""`make run` in a clean checkout, as a new user: to the console and a first answer in one go."""

import re
import time

import aiohttp
import pytest
from checkouts import check_out
from fakes.terminal import PtyProcess
from harness import chat, until

BUILD_MAX_S = 1500
pytestmark = [pytest.mark.package, pytest.mark.timeout(BUILD_MAX_S + 300)]


async def test_make_run_leads_to_the_console_and_a_first_answer(tmp_path):
    checkout, home = tmp_path / "kubeai", tmp_path / "home"
    check_out(checkout)
    home.mkdir()
    began_s = time.monotonic()
    command = ("make", "-C", str(checkout), "run", "PORT=0")
    async with (
        PtyProcess(*command, columns=160, rows=40, HOME=str(home)) as ran,
        aiohttp.ClientSession() as session,
    ):

        def address():
            assert ran.process.returncode is None, "make has ended"
            return re.search(r"console +(http://\S+)", ran.terminal.seen())

        console = (await until("the addresses", address, BUILD_MAX_S))[1]
        async with session.get(console) as response:
            assert response.status == 200
            assert "<title>KubeAI</title>" in await response.text()
        shown_s = time.monotonic() - began_s
        answer = await chat(session, f"{console}openai/v1", "chat", "Hello!")
        assert answer.whole
        print(f"console after {shown_s:.0f} s, answer after {time.monotonic() - began_s:.0f} s")
        assert re.search(rb"compiled [1-9]\d* of \d+ modules", ran.raw), "the build shows progress"
        assert "compiled" not in ran.terminal.seen(), "the progress is removed"
        ran.type("\x03")
        await ran.end(30)
        assert ran.sees("stopping")
