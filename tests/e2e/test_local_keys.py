"""`kubeai local --require-keys`: keys from their creation to their revocation, while it serves."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import sys
import time

import aiohttp
import pytest
from harness import chat, model, running, until

from kubeai.client import keys
from kubeai.client.keys import NewKey

ARGS = ("--decode-tokens-per-second=40", "--max-batch=8")
REVOKED_MAX_S = 1.0  # docs/reference/keys.md


@pytest.fixture
async def local(tmp_path):
    m = model("m", args=ARGS, minReplicas=1)
    async with running(tmp_path, m, arguments=("--require-keys",), workers=2) as local:
        yield local


async def kubeai(local, *arguments, code=0, **environment):
    """The standard output of a command, or if it fails with ``code``, its standard error."""
    environment = {"KUBECONFIG": local.kubeconfig, **environment}
    kept = {k: v for k, v in os.environ.items() if k not in ("KUBEAI_API_KEY", "OPENAI_API_KEY")}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "kubeai", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=kept | environment,
    )
    out, err = await process.communicate()
    assert process.returncode == code, err.decode()
    return (err if code else out).decode()


async def create(local, name, **fields):
    """A key, as `kubeai key create` makes it, without another process."""
    async with local.kube() as kube:
        return await keys.create(kube, "default", NewKey(name=name, **fields), time.time())


async def status(session, local, key, path="/models"):
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with session.get(local.endpoint + path, headers=headers) as response:
        return response.status


def holds(pid, key):
    """Whether a process has a text in its memory."""
    wanted = key.encode()
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", 0) as memory:
        for line in maps:
            first, last, mode = re.match(r"([0-9a-f]+)-([0-9a-f]+) (\S+)", line).groups()
            if mode.startswith("rw"):
                with contextlib.suppress(OSError, ValueError, OverflowError):
                    memory.seek(int(first, 16))
                    if wanted in memory.read(int(last, 16) - int(first, 16)):
                        return True
    return False


async def test_keys_are_created_used_and_revoked_while_it_serves(local):
    assert local.said("there are no keys yet")
    assert not local.said("no keys are required")
    async with aiohttp.ClientSession() as session:
        assert await status(session, local, "") == 401
        assert "KUBEAI_API_KEY" in await kubeai(
            local, "chat", "m", "Hi", "--base-url", local.endpoint, code=2
        )
        alice = await create(local, "alice", admin=True)
        bob = (await kubeai(local, "key", "create", "bob", "--tenant", "b")).strip()
        for key in (alice, bob):

            async def is_served(key=key):
                return await status(session, local, key) == 200

            await until("the key is known", is_served)
        answer = await chat(session, local.endpoint, "m", "Hi", headers={"x-api-key": bob})
        assert answer.whole, answer
        said = await kubeai(
            local, "chat", "m", "Hi", "--base-url", local.endpoint, KUBEAI_API_KEY=bob
        )
        assert said.strip()

        # Revoked while a stream of 250 s runs.
        bobs = {"Authorization": f"Bearer {bob}"}
        stream = asyncio.create_task(
            chat(session, local.endpoint, "m", "Hi", max_tokens=10_000, headers=bobs)
        )
        other = {"api-key": alice}
        kept = asyncio.create_task(
            chat(session, local.endpoint, "m", "Hi", max_tokens=300, headers=other)
        )
        await asyncio.sleep(0)
        await until("the streams run", lambda: in_flight(session, local, alice, 2))
        await kubeai(local, "key", "revoke", "bob")
        began_s = time.monotonic()
        ended = await asyncio.wait_for(stream, 20)
        if os.getloadavg()[0] < (os.cpu_count() or 1):
            assert time.monotonic() - began_s < REVOKED_MAX_S
        assert not ended.whole
        assert await status(session, local, bob) == 401
        assert (await kept).whole


async def in_flight(session, local, key, count):
    origin = local.endpoint.removesuffix("/openai/v1")
    headers = {"Authorization": f"Bearer {key}"}
    async with session.get(f"{origin}/ui/api/state", headers=headers) as response:
        assert response.status == 200, await response.text()
        return (await response.json())["models"][0]["in_flight"] == count


async def test_an_admin_logs_in_to_the_console_and_keys_are_kept_nowhere(local):
    origin = local.endpoint.removesuffix("/openai/v1")
    alice, bob = await create(local, "alice", admin=True), await create(local, "bob")
    clear = await create(local, "carol", authorino=True)  # which no client sends
    form = {"Accept": "text/html"}
    async with aiohttp.ClientSession(cookie_jar=aiohttp.CookieJar(unsafe=True)) as session:
        async with session.get(f"{origin}/ui/", headers=form) as response:
            assert response.status == 401
            assert 'action="/ui/login"' in await response.text()

        async def post(key):
            async with session.post(
                f"{origin}/ui/login", data={"key": key}, headers={"Origin": origin}
            ) as response:
                return response.status, str(response.url), await response.text()

        async def is_known():
            return (await post(bob))[0] == 403

        await until("the keys are known", is_known)
        code, url, page = await post(alice)
        assert (code, url) == (200, f"{origin}/ui/"), page
        async with session.get(f"{origin}/ui/api/state") as response:
            assert (await response.json())["keys"] is True
        assert await status(session, local, "") == 401, "the cookie is for the console only"
        async with session.post(f"{origin}/ui/logout", headers={"Origin": origin}) as response:
            assert response.status == 401
        async with session.get(f"{origin}/ui/api/state") as response:
            assert response.status == 401
    table = await kubeai(local, "top", "--once", "--base-url", local.endpoint, KUBEAI_API_KEY=alice)
    assert "m" in table.split()

    # The Secret of one has the key itself. It is in no log either, and in no worker's memory.
    for pid in local.workers():
        assert not holds(pid, clear.removeprefix("sk-kubeai-"))
    for path in local.data_dir.rglob("*"):
        if path.is_file():
            assert alice.encode() not in path.read_bytes(), path
    for line in local.log + local.out:
        for key in (alice, bob, clear):
            assert key not in line
