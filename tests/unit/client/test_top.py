"""`kubeai top` against a gateway that serves a console's state."""

import asyncio
import json
import sys
from io import StringIO

import pytest
from fakes.gateway import STATE, FakeGateway
from fakes.terminal import PtyProcess
from harness import until

from kubeai.client.gateway import Gateway
from kubeai.client.top import print_once
from kubeai.errors import KubeAIError


@pytest.fixture
async def gateway():
    async with FakeGateway().running() as gateway:
        yield gateway


async def once(gateway, *, as_json=False):
    out = StringIO()
    await print_once(Gateway(gateway.base_url), as_json=as_json, out=out)
    return out.getvalue()


async def test_once_prints_a_plain_table(gateway):
    head, chat, embed = (await once(gateway)).splitlines()
    titles = ("MODEL", "STATE", "READY", "IN FLIGHT", "HELD", "REQ/S", "TOKENS/S", "TTFT", "P99")
    assert head.split() == " ".join((*titles, "WHY")).split()
    assert " ".join(chat.split()) == "chat Ready 1/2 3 0 1.2 55.0 200 ms 1.1 s"
    assert embed.split()[:2] == ["embed", "Starting"]
    assert embed.endswith("pulling image, 1 of 3")


async def test_message_streams_that_are_not_connected_are_named(gateway):
    gateway.state = STATE | {"stream_problems": ["nats://jobs: requests: [Errno 111] refused"]}
    first, *table = (await once(gateway)).splitlines()
    assert first == "message stream not connected: nats://jobs: requests: [Errno 111] refused"
    assert len(table) == 3


async def test_json_is_the_state(gateway):
    assert json.loads(await once(gateway, as_json=True)) == STATE


async def test_a_gateway_without_a_console_is_an_error_that_names_the_setting(gateway):
    gateway.state = None
    with pytest.raises(KubeAIError, match=r"gateway\.ui\.enabled"):
        await once(gateway)


async def test_without_a_terminal_one_table_is_printed(gateway):
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "kubeai", "top", "--base-url", gateway.base_url),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert (process.returncode, err) == (0, b"")
    assert out.decode() == await once(gateway)


async def test_on_a_terminal_the_table_is_live_and_says_when_the_gateway_is_away(gateway):
    command = (sys.executable, "-m", "kubeai", "top", "--interval", "0.2")
    async with PtyProcess(*command, "--base-url", gateway.base_url) as ran:
        await until("the table", lambda: b"pulling image" in ran.raw)
        gateway.state = STATE | {"models": [STATE["models"][0] | {"state": "Degraded"}]}
        await until("the change", lambda: b"Degraded" in ran.raw)
        gateway.state = None
        await until("the problem", lambda: b"has no console" in ran.raw)
        ran.type("\x03")
        assert await ran.end() == 0
        assert b"Traceback" not in ran.raw
        assert b"\x1b[?1049l" in ran.raw, "the former screen is back"
        assert ran.terminal.cursor_shown
