"""The broker of fakes/broker.py for other processes: a server in the test, and its client.

URLs are ``test://host:port/queue``. Messages between the two are JSON lines. The client ends a
connection at the first error, like those of the real brokers.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

from kubeai.brokers.base import (
    TIMEOUT_S,
    Broker,
    BrokerUnavailable,
    Delivery,
    MessageTooLarge,
    Subscription,
    Topic,
)
from kubeai.brokers.urls import BrokerUrl

LINE_MAX_BYTES = 16 << 20


class Server:
    """Serves a MemoryBroker on a port of 127.0.0.1. ``cut`` ends its connections."""

    def __init__(self, broker: Any) -> None:
        self.broker = broker
        self.port = 0
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    def url(self, queue: str) -> str:
        return f"test://127.0.0.1:{self.port}/{queue}"

    async def start(self) -> None:
        self._server = await asyncio.start_server(
            self._serve, "127.0.0.1", self.port, limit=LINE_MAX_BYTES
        )
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Stop listening, and end all connections; the messages are kept."""
        assert self._server is not None
        self._server.close()
        self.cut()
        await self._server.wait_closed()

    def cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Server]:
        await self.start()
        try:
            yield self
        finally:
            await self.stop()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        session = _Session(self.broker)
        tasks: set[asyncio.Task[None]] = set()
        try:
            while line := await reader.readline():
                call = json.loads(line)
                task = asyncio.create_task(session.answer(call, writer))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
        except ConnectionError:
            pass
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await session.close()
            self._writers.discard(writer)
            writer.close()


class _Session:
    """One connection's subscription or topic."""

    def __init__(self, broker: Any) -> None:
        self._broker = broker
        self._connection: Any = None
        self._deliveries: dict[int, Delivery] = {}
        self._receiving: asyncio.Task[None] | None = None

    async def close(self) -> None:
        if self._connection is not None:
            await self._connection.close()

    async def answer(self, call: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        try:
            result = await self._do(call)
        except MessageTooLarge as error:
            result = {"too_large": str(error)}
        except BrokerUnavailable as error:
            result = {"error": str(error)}
        result["call"] = call["call"]
        writer.write(json.dumps(result).encode() + b"\n")
        with contextlib.suppress(ConnectionError):
            await writer.drain()

    async def _do(self, call: dict[str, Any]) -> dict[str, Any]:
        what = call["do"]
        if what == "subscribe":
            self._connection = await self._broker.client(call["queue"]).subscribe()
            return {"ack_deadline_s": self._connection.ack_deadline_s}
        if what == "open_topic":
            self._connection = await self._broker.client(call["queue"]).open_topic()
        elif what == "publish":
            await self._connection.publish(base64.b64decode(call["body"]), call["attributes"])
        elif what == "lag":
            return {"lag": await self._connection.lag()}
        elif what == "receive":
            deliveries = await self._connection.receive(call["count_max"])
            return {"deliveries": [self._keep(delivery) for delivery in deliveries]}
        else:
            delivery = self._deliveries[call["delivery"]]
            await getattr(delivery, what)()
        return {}

    def _keep(self, delivery: Delivery) -> dict[str, Any]:
        number = len(self._deliveries)
        self._deliveries[number] = delivery
        return {
            "delivery": number,
            "id": delivery.id,
            "body": base64.b64encode(delivery.body).decode(),
            "attributes": delivery.attributes,
            "deliveries": delivery.deliveries,
        }


class Client(Broker):
    """What ``open_broker`` makes of a ``test://`` URL."""

    def __init__(self, url: BrokerUrl) -> None:
        url.check_options()
        self._host, self._port = url.parts.hostname, url.parts.port
        if not self._port:
            raise url.error("has no port")
        self._queue = url.parts.path.strip("/")

    async def _connect(self, what: str) -> tuple[_Wire, dict[str, Any]]:
        try:
            async with asyncio.timeout(TIMEOUT_S):
                reader, writer = await asyncio.open_connection(
                    self._host, self._port, limit=LINE_MAX_BYTES
                )
        except (OSError, TimeoutError) as error:
            raise BrokerUnavailable(f"cannot connect: {error}") from None
        wire = _Wire(reader, writer)
        return wire, await wire.call(what, queue=self._queue)

    async def subscribe(self) -> Subscription:
        wire, answer = await self._connect("subscribe")
        return _Subscription(wire, answer["ack_deadline_s"])

    async def open_topic(self) -> Topic:
        wire, _ = await self._connect("open_topic")
        return _Topic(wire)


class _Wire:
    """A connection to the server: calls in parallel, answered in any order."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self._calls: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._number = 0
        self._ended = False
        self._reading = asyncio.create_task(self._read(reader))

    async def _read(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while line := await reader.readline():
                answer = json.loads(line)
                call = self._calls.pop(answer["call"], None)
                if call is not None and not call.done():
                    call.set_result(answer)
        self._end()

    def _end(self) -> None:
        self._ended = True
        for call in self._calls.values():
            if not call.done():
                call.set_exception(BrokerUnavailable("the connection was lost"))
        self._calls.clear()

    async def call(self, what: str, *, patient: bool = False, **arguments: Any) -> dict[str, Any]:
        if self._ended:
            raise BrokerUnavailable("the connection has ended")
        self._number += 1
        number = self._number
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._calls[number] = future
        self._writer.write(json.dumps({"do": what, "call": number, **arguments}).encode() + b"\n")
        try:
            async with asyncio.timeout(None if patient else TIMEOUT_S):
                answer = await future
        except TimeoutError:
            raise BrokerUnavailable("no answer in time") from None
        if "too_large" in answer:
            raise MessageTooLarge(answer["too_large"])
        if "error" in answer:
            raise BrokerUnavailable(answer["error"])
        return answer

    async def close(self) -> None:
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)
        self._end()
        self._writer.close()


class _Delivery(Delivery):
    def __init__(self, wire: _Wire, fields: dict[str, Any]) -> None:
        self._wire, self._number = wire, fields["delivery"]
        self.id, self.attributes = fields["id"], fields["attributes"]
        self.deliveries, self.body = fields["deliveries"], base64.b64decode(fields["body"])

    async def acknowledge(self) -> None:
        await self._wire.call("acknowledge", delivery=self._number)

    async def release(self) -> None:
        await self._wire.call("release", delivery=self._number)

    async def extend(self) -> None:
        await self._wire.call("extend", delivery=self._number)


class _Subscription(Subscription):
    def __init__(self, wire: _Wire, ack_deadline_s: float | None) -> None:
        self._wire, self.ack_deadline_s = wire, ack_deadline_s
        self._receiving: asyncio.Task[dict[str, Any]] | None = None

    async def receive(self, count_max: int) -> list[Delivery]:
        # The call of a cancelled receive goes on, and the next one gets its messages.
        if self._receiving is None:
            call = self._wire.call("receive", patient=True, count_max=count_max)
            self._receiving = asyncio.create_task(call)
        answer = await asyncio.shield(self._receiving)
        self._receiving = None
        return [_Delivery(self._wire, fields) for fields in answer["deliveries"]]

    async def lag(self) -> int | None:
        return (await self._wire.call("lag"))["lag"]

    async def close(self) -> None:
        if self._receiving is not None:
            self._receiving.cancel()
            await asyncio.gather(self._receiving, return_exceptions=True)
        await self._wire.close()


class _Topic(Topic):
    def __init__(self, wire: _Wire) -> None:
        self._wire = wire

    async def publish(self, body: bytes, attributes: Mapping[str, str]) -> None:
        encoded = base64.b64encode(body).decode()
        await self._wire.call("publish", body=encoded, attributes=dict(attributes))

    async def close(self) -> None:
        await self._wire.close()
