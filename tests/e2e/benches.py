"""`kubeai bench` as a program, and mock engines for it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
from fakes.mock_engine import serving
from harness import until

RUN_TIMEOUT_S = 40
FAST = ("--prefill-tokens-per-second=0", "--decode-tokens-per-second=0")
SLOW = ("--prefill-tokens-per-second=0", "--decode-tokens-per-second=50")
SMALL = ("--turns", "2", "--prompt-tokens", "60", "--turn-tokens", "20", "--reply-tokens", "8")


class Ran:
    """What a `kubeai bench` ended with."""

    def __init__(self, code: int, out: str, said: str) -> None:
        self.code, self.out, self.said = code, out, said

    def fails(self) -> str:
        """The single line of error output."""
        assert (self.code, self.out) == (2, "")
        assert "Traceback" not in self.said
        (line,) = self.said.splitlines()
        assert line.startswith("error: ")
        return line


class Bench:
    """`kubeai bench` in a folder of its own, where its results go."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.json = folder / "results.json"
        self.env = {k: v for k, v in os.environ.items() if k != "OPENAI_API_KEY"}

    async def start(self, *arguments: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "kubeai", "bench", *arguments),
            env=self.env,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )

    async def ended(self, process: asyncio.subprocess.Process) -> Ran:
        async with asyncio.timeout(RUN_TIMEOUT_S):
            out, said = await process.communicate()
        print(out.decode(), said.decode())
        return Ran(process.returncode, out.decode(), said.decode())

    async def run(self, url: str, *arguments: str) -> Ran:
        process = await self.start("run", url, *arguments, "--json", str(self.json))
        return await self.ended(process)

    def found(self) -> dict[str, Any]:
        (found,) = json.loads(self.json.read_bytes())["runs"]
        return found


class Engine:
    """A mock engine, its process if it has one, and its requests so far."""

    def __init__(
        self,
        address: str,
        process: asyncio.subprocess.Process | subprocess.Popen[str] | None = None,
    ) -> None:
        self.process, self.address, self.url = process, address, f"http://{address}/v1"

    async def received(self) -> dict[str, Any]:
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"http://{self.address}/mock/requests") as response,
        ):
            return await response.json()

    async def has_received(self, count: int) -> None:
        async def enough() -> bool:
            return (await self.received())["total"] >= count

        await until(f"{count} requests have come", enough)


def _command(*flags: str) -> list[str]:
    command = [sys.executable, "-m", "kubeai", "mock-engine"]
    return [*command, "--host", "127.0.0.1", "--port", "0", "--model", "m", *flags]


@contextlib.asynccontextmanager
async def engine(*flags: str) -> AsyncIterator[Engine]:
    """An engine in this process, which starts at once."""
    async with serving(*flags) as served:
        yield Engine(served.url.removeprefix("http://"))
