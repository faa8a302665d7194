"""The mock engine as a process: signals, exit status and its flags' effect."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sys

import aiohttp
import pytest
from fakes.mock_engine import HELLO

from kubeai.mock_engine import main


@contextlib.asynccontextmanager
async def process(*flags: str, **env: str):
    """Run the engine as a process; yields (process, url, replica)."""
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "kubeai.mock_engine", "--port=0", "--served-model-name=m"),
        *flags,
        stderr=asyncio.subprocess.PIPE,
        env=os.environ | env,
    )
    try:
        async with asyncio.timeout(15):
            log = []
            while not log or "mock engine listens" not in log[-1]:
                line = await child.stderr.readline()
                assert line, f"it exited: {log}"
                log.append(line.decode())
        address = re.search(r'"address": ?"([^"]+)"', log[-1])[1]
        yield child, f"http://{address}", log
    finally:
        if child.returncode is None:
            child.kill()
        await child.wait()


async def accepts(url: str) -> bool:
    """Whether a new connection is still accepted."""
    host, port = url.removeprefix("http://").split(":")
    try:
        _, writer = await asyncio.open_connection(host, int(port))
    except OSError:
        return False
    writer.close()
    return True


async def test_sigterm_finishes_open_streams_and_accepts_no_new_ones():
    async with (
        process("--decode-tokens-per-second=20", POD_NAME="pod-7") as (child, url, _),
        aiohttp.ClientSession() as session,
        session.post(
            f"{url}/v1/chat/completions",
            json={"messages": HELLO, "max_tokens": 20, "stream": True},
        ) as response,
    ):
        assert response.headers["X-Mock-Replica"] == "pod-7"
        first = await response.content.readline()
        child.send_signal(signal.SIGTERM)
        async with asyncio.timeout(10):
            while await accepts(url):
                pass
            rest = await response.content.read()
            assert (first + rest).count(b"data: ") == 22
            assert (first + rest).endswith(b"data: [DONE]\n\n")
            assert await child.wait() == 0


async def test_flags_of_the_imitated_engine_are_ignored_with_a_warning_each():
    async with process(
        *("--max-num-seqs", "64", "--enable-prefix-caching", "--max-model-len=2048", "v2"),
        POD_IP="127.0.0.9",
    ) as (_, url, log):
        assert url.startswith("http://127.0.0.9:")
        ignored = [re.search(r'"flag": ?"([^"]+)"', line)[1] for line in log if '"flag"' in line]
        assert ignored == ["--max-num-seqs 64", "--enable-prefix-caching v2"]
        async with aiohttp.ClientSession() as session:
            models = await (await session.get(f"{url}/v1/models")).json()
        assert models["data"][0]["max_model_len"] == 2048


async def test_it_dies_after_the_configured_number_of_requests():
    async with (
        process("--die-after-requests=1") as (child, url, _),
        aiohttp.ClientSession() as session,
    ):
        body = {"messages": HELLO, "max_tokens": 1}
        async with session.post(f"{url}/v1/chat/completions", json=body) as response:
            assert response.status == 200
        with pytest.raises(aiohttp.ClientError):
            await session.post(f"{url}/v1/chat/completions", json=body)
        assert await asyncio.wait_for(child.wait(), 5) == 70


def test_a_port_in_use_is_reported_in_one_line(capsys):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main([f"--port={port}", "--host=127.0.0.1"]) == 2
    err = capsys.readouterr().err
    assert f"error: cannot listen on 127.0.0.1:{port}" in err
    assert "Traceback" not in err
