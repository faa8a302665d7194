"""An SQS server: ``moto_sqs.py`` in a process of its own. It needs only Python.

It starts in less than a second on an idle machine. What it proves is in ``moto_sqs.py``.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from brokers.servers import START_TIMEOUT_S, BrokerServer, accepts, free_port

PROGRAM = Path(__file__).with_name("moto_sqs.py")
ACCOUNT, REGION = "123456789012", "us-east-1"  # of moto_sqs.py


class SqsServer(BrokerServer):
    """The server, with queues: ``"requests"``, or ``"requests,VisibilityTimeout=5"``.

    ``kill`` and ``stop`` only close the port and the connections, because SQS loses no messages in
    an outage. ``end`` ends the process.
    """

    def __init__(self, folder: Path, *queues: str) -> None:
        super().__init__(folder)
        self.port = free_port()
        self._queues = queues
        self.environment = {
            "AWS_ENDPOINT_URL_SQS": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def command(self) -> list[str]:
        return [sys.executable, str(PROGRAM), str(self.port), *self._queues]

    def url(self, queue: str, options: str = "waittime=1s") -> str:
        """The URL of a queue, for requests and for responses."""
        return f"awssqs://sqs.{REGION}.amazonaws.com/{ACCOUNT}/{queue}?region={REGION}&{options}"

    def start(self) -> None:
        """Start the process, or end the outage."""
        if self._process is None:
            super().start()
        else:
            self._signal(signal.SIGUSR2)
            self._until("it serves again", self._serves, START_TIMEOUT_S)

    def kill(self) -> None:
        """Begin an outage."""
        self._signal(signal.SIGUSR1)
        self._until("it serves nobody", lambda: not accepts(self.port), START_TIMEOUT_S)

    def stop(self) -> None:
        """Begin an outage."""
        self.kill()

    def end(self) -> None:
        """End the process. No effect if it does not run."""
        self._end(signal.SIGKILL)


@asynccontextmanager
async def running_sqs(*queues: str) -> AsyncIterator[SqsServer]:
    """A server in a temporary folder."""
    with TemporaryDirectory() as folder:
        server = SqsServer(Path(folder), *queues)
        server.start()
        try:
            yield server
        finally:
            server.end()
