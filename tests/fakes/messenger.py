"""A gateway without HTTP, for the tests of streams, and a stream between it and a broker."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from fakes.broker import MemoryBroker
from kubeai.messenger.message import Answer, Request
from kubeai.messenger.relay_client import Gate
from kubeai.messenger.stream import Stream, StreamSettings

JSON = {"content-type": "application/json"}
Serve = Callable[[dict[str, Any], Gate], Awaitable[Answer]]


def ok(**fields: Any) -> Answer:
    return Answer(200, JSON, json.dumps(fields).encode())


def error(status: int, **headers: str) -> Answer:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Answer(status, {**JSON, **named}, b'{"error":{"message":"no"}}')


class FakeGateway:
    """``serves[model]`` is how requests for it are served; by default in one second, with 200.

    A model in ``cold`` has no endpoint until its event is set: requests are held.
    """

    def __init__(self) -> None:
        self.serves: dict[str, Serve] = {}
        self.cold: dict[str, asyncio.Event] = {}
        self.requests: list[dict[str, Any]] = []  # bodies, as they were sent
        self.headers: list[dict[str, str]] = []
        self.ids: list[str] = []
        self.serving = 0
        self.serving_max = 0
        self.served: Counter[str] = Counter()  # by prompt

    async def send(self, request_id: str, request: Request, gate: Gate) -> Answer:
        body = json.loads(request.body)
        self.requests.append(body)
        self.headers.append(request.headers)
        self.ids.append(request_id)
        await asyncio.sleep(0)
        cold = self.cold.get(body["model"])
        if cold is not None and not cold.is_set():
            gate.on_hold()
            await cold.wait()
            await gate.on_endpoint()
        self.serving += 1
        self.serving_max = max(self.serving_max, self.serving)
        try:
            if serve := self.serves.get(body["model"]):
                return await serve(body, gate)
            await asyncio.sleep(1)
            self.served[str(body.get("prompt"))] += 1
            return ok(prompt=body.get("prompt"))
        finally:
            self.serving -= 1


class Scene:
    """A stream between a broker's queues ``requests`` and ``responses``, and a fake gateway."""

    def __init__(
        self,
        broker: MemoryBroker,
        *,
        handlers: int = 4,
        backoff_max_s: float = 30.0,
        in_hand_max_bytes: int = 64 << 20,
    ):
        self.broker = broker
        self.gateway = FakeGateway()
        self.settings = StreamSettings(
            "memory://requests",
            broker.client("requests"),
            broker.client("responses"),
            handlers,
            backoff_max_s,
            in_hand_max_bytes,
        )
        self.stream = Stream(self.settings, self.gateway.send)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Scene]:
        task = asyncio.create_task(self.stream.run())
        try:
            yield self
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert task.cancelled() or task.exception() is None, task.exception()

    def ask(self, model: str = "m", prompt: object = "", **fields: Any) -> str:
        body = {"model": model, "prompt": prompt}
        message = {"metadata": {"prompt": prompt}, "body": body, **fields}
        return self.broker.put("requests", json.dumps(message).encode())

    @property
    def answers(self) -> list[dict[str, Any]]:
        return [json.loads(stored.body) for stored in self.broker.queue("responses").published]

    @property
    def answered(self) -> Counter[str]:
        """How often each message ID was answered."""
        published = self.broker.queue("responses").published
        return Counter(stored.attributes["request_message_id"] for stored in published)

    async def until(self, what: str, holds: Callable[[], object], within_s: float = 1e5) -> None:
        """Wait for a state, on virtual time. Looks less often the longer that takes."""
        clock = asyncio.get_running_loop().time
        began_s = clock()
        try:
            async with asyncio.timeout(within_s):
                while not holds():  # noqa: ASYNC110 (there is no event)
                    await asyncio.sleep(0.1 + (clock() - began_s) / 100)
        except TimeoutError:
            raise AssertionError(f"not within {within_s} s: {what}") from None

    async def done(self, count: int, within_s: float = 1e5) -> None:
        """Wait until that many messages were answered and everything was acknowledged."""
        await self.until(
            f"{count} answers, everything acknowledged",
            lambda: len(self.answered) == count and self.broker.is_empty("requests"),
            within_s,
        )
