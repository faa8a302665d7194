"""Requests by message, through the real processes, with a broker that needs only Python."""

import contextlib
import json
import os
import signal
import sys
from pathlib import Path

import aiohttp
import pytest
from fakes import tcp_broker
from fakes.broker import MemoryBroker
from fakes.fleet import Fleet
from fakes.tcp_broker import Server
from harness import chat, model, replicas, running, scrape, until

from kubeai.api.config.system import MessageStream, Messaging
from kubeai.brokers import urls
from kubeai.processes import spawn_by_exec
from kubeai.supervisor import worker_process

SITE = str(Path(__file__).parents[1] / "fakes" / "broker_site")
SLOW = ("--decode-tokens-per-second=20", "--max-batch=64")
HANDLERS = 8


class Scene:
    """A broker, and `kubeai local` with a stream between two of its queues."""

    def __init__(self, broker, server, local, kube):
        self.broker, self.server, self.local, self.kube = broker, server, local, kube

    def ask(self, name, number=0, **fields):
        body = {"model": name, "prompt": f"hello {number}", "max_tokens": 3, **fields}
        message = {"metadata": {"number": number}, "body": body}
        return self.broker.put("requests", json.dumps(message).encode())

    @property
    def responses(self):
        """The responses, by the IDs of their requests."""
        published = self.broker.queue("responses").published
        return {each.attributes["request_message_id"]: json.loads(each.body) for each in published}

    async def done(self, count, within_s=30):
        await until(
            f"{count} messages were answered and acknowledged",
            lambda: len(self.responses) == count and self.broker.is_empty("requests"),
            within_s,
        )

    async def metric(self, name, **labels):
        """The sum of a metric's series that have these labels."""
        samples = await scrape(self.local.metrics)
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        return sum(
            value
            for series, value in samples.items()
            if series.partition("{")[0] == name and all(each in series for each in wanted)
        )

    async def active(self):
        return await self.metric("kubeai_inference_requests_active", request_type="message")

    async def nothing_in_flight(self):
        async def nothing():
            return not await self.metric("kubeai_inference_requests_active")

        await until("every counter is 0", nothing)

    @property
    def messengers(self):
        return [pid for pid, cmd in self.local.processes().items() if "kubeai.messenger" in cmd]

    async def readyz(self):
        url = self.local.metrics.replace("/metrics", "/readyz?verbose")
        async with aiohttp.ClientSession() as session, session.get(url) as response:
            return response.status, await response.text()


def environment():
    return {"PYTHONPATH": os.pathsep.join(filter(None, [SITE, os.environ.get("PYTHONPATH")]))}


@contextlib.asynccontextmanager
async def messaging(tmp_path, *models):
    broker = MemoryBroker(ack_deadline_s=30)
    async with Server(broker).running() as server:
        stream = {
            "requestsURL": server.url("requests"),
            "responsesURL": server.url("responses"),
            "maxHandlers": HANDLERS,
        }
        config = {"messaging": {"errorMaxBackoff": "500ms", "streams": [stream]}}
        async with (
            running(tmp_path, *models, config=config, env=environment()) as local,
            local.kube() as kube,
        ):
            yield Scene(broker, server, local, kube)


async def test_a_message_scales_its_model_from_zero(tmp_path):
    """Upstream's cases: 0 → 1 on a message, several handlers, an unknown model as JSON."""
    async with messaging(tmp_path, model("chat", minReplicas=0, maxReplicas=1)) as scene:
        assert await replicas(scene.kube, "chat") == (0, 0, 0)
        asked = {scene.ask("chat", number): number for number in range(HANDLERS * 3)}
        unknown = scene.ask("nope", -1)
        malformed = scene.broker.put("requests", b'{"metadata":{"number":-2},"path":"/v1/nope"}')
        await scene.done(len(asked) + 2)
        for message, number in asked.items():
            response = scene.responses[message]
            assert response["status_code"] == 200
            assert response["metadata"] == {"number": number}
            assert response["body"]["object"] == "text_completion"
        assert scene.responses[unknown]["status_code"] == 404
        assert scene.responses[unknown]["metadata"] == {"number": -1}
        assert scene.responses[unknown]["body"]["error"]["code"] == "model_not_found"
        assert scene.responses[malformed]["status_code"] == 404
        await scene.nothing_in_flight()


@pytest.mark.slow
async def test_the_autoscaler_counts_messages(tmp_path):
    scaled = model("chat", minReplicas=0, maxReplicas=3, targetRequests=3, args=SLOW)
    async with messaging(tmp_path, scaled) as scene:
        for number in range(HANDLERS * 4):
            scene.ask("chat", number, max_tokens=60)

        await until("messages are counted by their type", scene.active)

        async def three_wanted():
            return (await replicas(scene.kube, "chat"))[0] == 3

        # At least 8 messages are served, and 3 are the target of a replica.
        await until("the autoscaler counts them", three_wanted, 30)
        await scene.done(HANDLERS * 4, 60)


async def test_nothing_is_lost_and_http_is_undisturbed(tmp_path):
    """The messenger is killed, the broker goes away and comes back, then everything is drained."""
    warm = model("chat", minReplicas=1, maxReplicas=1, args=SLOW)
    async with messaging(tmp_path, warm) as scene:
        for number in range(HANDLERS * 3):
            scene.ask("chat", number, max_tokens=10)
        await until("some are answered", lambda: len(scene.responses) >= 3)
        counted = await scene.metric("kubeai_messages_received_total")
        (messenger,) = scene.messengers
        async with aiohttp.ClientSession() as session:
            served = chat(session, scene.local.endpoint, "chat", "hello", max_tokens=20)
            os.kill(messenger, signal.SIGKILL)
            left = HANDLERS * 3 - len(scene.responses)
            assert (await scene.readyz())[0] == 200
            assert (await served).whole
        await scene.done(HANDLERS * 3)
        assert set(scene.messengers) != {messenger}

        async def all_counted():
            return await scene.metric("kubeai_messages_received_total") >= counted + left

        await until("the counts outlive the messenger", all_counted)
        await scene.nothing_in_flight()

        await scene.server.stop()

        async def disconnected():
            return not await scene.metric("kubeai_message_stream_connected", side="requests")

        await until("the metrics say that the broker is away", disconnected)

        async def reason():
            status, text = await scene.readyz()
            assert status == 200
            return "requests: cannot connect" in text

        await until("so does /readyz, with the reason", reason)
        before = len(scene.responses)
        scene.ask("chat", before)
        await scene.server.start()
        await scene.done(before + 1)

        for number in range(HANDLERS + 5):
            scene.ask("chat", number, max_tokens=40)

        async def all_handlers_are_busy():
            return await scene.active() == HANDLERS

        await until("as many are served as there are handlers", all_handlers_are_busy)
        await scene.local.stop()
        assert len(scene.responses) >= before + 1 + HANDLERS
        queue = scene.broker.queue("requests")
        assert len(scene.responses) + len(queue.waiting) == before + 1 + HANDLERS + 5
        assert not queue.unacknowledged


@pytest.mark.slow
async def test_a_messenger_that_hangs_is_replaced(monkeypatch):
    """Its rows of the load table could not be reused otherwise."""
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    monkeypatch.setitem(sys.modules, "kubeai.brokers.test", tcp_broker)
    implementation = urls.Implementation("test", "Client", "asyncio", "test")
    monkeypatch.setitem(urls.IMPLEMENTATIONS, "test", implementation)
    monkeypatch.setattr(worker_process, "SILENCE_MAX_S", 8.0)  # of the worker, too
    broker = MemoryBroker()
    async with Server(broker).running() as server:
        stream = MessageStream(
            requests_url=server.url("requests"), responses_url=server.url("responses")
        )
        # By exec: a fork would not read the environment's site customization.
        fleet = await Fleet.start(
            [], workers=1, messaging=Messaging(streams=(stream,)), spawn=spawn_by_exec
        )
        try:
            hanging = await until("there is a messenger", lambda: fleet.messenger)
            os.kill(hanging, signal.SIGSTOP)
            await until("it was replaced", lambda: fleet.messenger not in (0, hanging), 30)
            await until("requests are served", lambda: fleet.ready)
            broker.put("requests", b"malformed")
            await until("its successor answers", lambda: broker.queue("responses").published)
        finally:
            await fleet.close()
