"""The section of docs/explain/performance.md about requests by message, from ``messages.json``."""

from __future__ import annotations

import os
from typing import Any

from bars import table

HEADING = "## Requests by message"
INTRODUCTION = """`BROKERS=$(tests/brokers/build.sh) python bench/messages.py`: non-streamed
chats of 16 tokens, 32 at a time, on two mock engines that take no time; the same over HTTP and by
message. KubeAI, the broker, the engines and the load generator share {cores} cores, so the requests
per second are those of all of them together. The CPU is KubeAI's alone. A broker that writes each
message to the disk before it confirms it (NATS JetStream and Kafka, as they are configured here)
has the disk's latency twice in each request. The servers for SQS, Pub/Sub and Service Bus are for
tests, and slower than the services: Google's fake answers a pull that finds nothing only after
0.5 s. Azure's library waits 0.2 s for a batch to fill.

"""
TITLES = {
    "HTTP": "HTTP",
    "nats": "NATS",
    "jetstream": "NATS JetStream",
    "kafka": "Kafka",
    "rabbitmq": "RabbitMQ",
    "sqs": "SQS (moto)",
    "pubsub": "Pub/Sub (Google's fake)",
    "servicebus": "Service Bus (a peer for tests)",
}


def section(found: dict[str, Any]) -> str:
    """The section; "" if nothing was measured."""
    if not found:
        return ""
    head = ("", "requests/s", "p50, ms", "p99, ms", "CPU per request, µs", "of the messenger")
    rows = [
        (
            TITLES[name],
            f"{each['requests_per_s']:.0f}",
            f"{each['p50_ms']:.1f}",
            f"{each['p99_ms']:.1f}",
            f"{sum(each['cpu_us'].values()):.0f}",
            f"{each['cpu_us']['messenger']:.0f}" if name != "HTTP" else "",
        )
        for name, each in found.items()
    ]
    introduction = INTRODUCTION.format(cores=os.cpu_count())
    return f"{HEADING}\n\n{introduction}{table(head, rows)}"
