"""Requests by message, through the real processes, with a broker that needs only Python."""

import asyncio
import contextlib
import json
import os
import signal
from pathlib import Path

import aiohttp
from fakes.broker import MemoryBroker
from fakes.tcp_broker import Server
from harness import chat, model, replicas, running, scrape, until

SITE = str(Path(__file__).parents[1] / "fakes" / "broker_site")


def environment() -> dict[str, str]:
    return {"PYTHONPATH": os.pathsep.join(filter(None, [SITE, os.environ.get("PYTHONPATH")]))}


def streams(server, *, handlers=4, **messaging):
    stream = {
        "requestsURL": server.url("requests"),
        "responsesURL": server.url("responses"),
        "maxHandlers": handlers,
    }
    return {"messaging": {"errorMaxBackoff": "200ms", "streams": [stream], **messaging}}


def completion(name, number=0, **fields):
    body = {"model": name, "prompt": f"hello {number}", "max_tokens": 3, **fields}
    return json.dumps({"metadata": {"number": number}, "body": body}).encode()


def answers(broker):
    return [json.loads(stored.body) for stored in broker.queue("responses").published]


def messengers(local):
    return [pid for pid, cmd in local.processes().items() if "kubeai.messenger" in cmd]


async def test_a_message_scales_a_model_from_zero_and_is_answered(tmp_path):
    broker = MemoryBroker()
    async with Server(broker).running() as server:
        sent = model("chat", minReplicas=0, maxReplicas=2)
        async with (
            running(tmp_path, sent, config=streams(server), env=environment()) as local,
            local.kube() as kube,
        ):
            assert await replicas(kube, "chat") == (0, 0, 0)
            message = broker.put("requests", completion("chat", 7))
            await until("it is answered", lambda: answers(broker), 30)
            (answer,) = answers(broker)
            assert answer["status_code"] == 200
            assert answer["metadata"] == {"number": 7}
            assert answer["body"]["object"] == "text_completion"
            (stored,) = broker.queue("responses").published
            assert stored.attributes == {"request_message_id": message}
            await until("it is acknowledged", lambda: broker.is_empty("requests"))
