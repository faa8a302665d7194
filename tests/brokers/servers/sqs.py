"""An SQS server in a process of its own. It needs only Python, and starts in less than a second."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

PROGRAM = Path(__file__).with_name("moto_sqs.py")
START_TIMEOUT_S = 40.0
ACCOUNT, REGION = "123456789012", "us-east-1"  # of moto_sqs.py


class SqsServer:
    """The server, with its queues: ``"requests"``, or ``"requests,VisibilityTimeout=5"``."""

    def __init__(self, *queues: str) -> None:
        self._queues = queues
        self._process: asyncio.subprocess.Process | None = None
        self.port = 0  # until it has started

    @property
    def environment(self) -> dict[str, str]:
        """What a client needs beside the URL."""
        return {
            "AWS_ENDPOINT_URL_SQS": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def url(self, queue: str, options: str = "waittime=1s") -> str:
        return f"awssqs://sqs.{REGION}.amazonaws.com/{ACCOUNT}/{queue}?region={REGION}&{options}"

    async def start(self) -> None:
        """Start on the port of before, or on a free one. The queues are empty."""
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, str(PROGRAM), str(self.port), *self._queues),
            stdout=asyncio.subprocess.PIPE,
        )
        assert self._process.stdout is not None
        line = await asyncio.wait_for(self._process.stdout.readline(), START_TIMEOUT_S)
        assert line.startswith(b"serving "), line
        self.port = int(line.split()[1])

    async def stop(self) -> None:
        """Kill it. There is nothing to save."""
        if self._process is not None:
            self._process.kill()
            await self._process.wait()
            self._process = None


@asynccontextmanager
async def running_sqs(*queues: str) -> AsyncIterator[SqsServer]:
    server = SqsServer(*queues)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()
