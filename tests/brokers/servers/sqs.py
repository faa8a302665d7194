"""An SQS server: ``moto_sqs.py`` in a process of its own. It needs only Python.

It starts in less than a second on an idle machine. What it proves is in ``moto_sqs.py``.
"""

from __future__ import annotations

from pathlib import Path

from brokers.servers import QueueServer

ACCOUNT, REGION = "123456789012", "us-east-1"  # of moto_sqs.py


class SqsServer(QueueServer):
    """The server, with queues: ``"requests"``, or ``"requests,VisibilityTimeout=5"``."""

    script = Path(__file__).with_name("moto_sqs.py")

    def __init__(self, folder: Path, *queues: str) -> None:
        super().__init__(folder, *queues)
        self.environment = {
            "AWS_ENDPOINT_URL_SQS": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def url(self, queue: str, options: str = "waittime=1s") -> str:
        """The URL of a queue, for requests and for responses."""
        return f"awssqs://sqs.{REGION}.amazonaws.com/{ACCOUNT}/{queue}?region={REGION}&{options}"
