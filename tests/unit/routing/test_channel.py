"""The hinge: messages arrive whole and in order; the other end's death is noticed."""

import asyncio
import socket

import uvloop

from kubeai.routing.channel import Channel, Delta, Demand, Down, Drain, Ready, Snapshot, Up
from kubeai.routing.routes import Endpoint, Route

LOOP_FACTORIES = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


class End:
    def __init__(self, message):
        self.messages = asyncio.Queue()
        self.closed = asyncio.Event()
        self.channel = Channel(message, self.messages.put_nowait, self.closed.set)


async def pair():
    loop = asyncio.get_running_loop()
    up, down = End(Up), End(Down)
    ours, theirs = socket.socketpair()
    await loop.create_connection(lambda: up.channel, sock=ours)
    await loop.create_connection(lambda: down.channel, sock=theirs)
    return up, down


async def test_messages_of_every_kind_arrive_as_they_were_sent():
    supervisor, worker = await pair()
    route = Route(
        "m", "VLLM", ("TextGeneration",), {"a": "b"}, endpoints=(Endpoint("p", "127.0.0.1:8000"),)
    )
    down = [Snapshot(1, (route,)), Delta(2, "m", None), Drain(1.0, 2.0)]
    for message in down:
        supervisor.channel.send(message)
    assert [await worker.messages.get() for _ in down] == down
    up = [Ready(7), Demand("m")]
    for message in up:
        worker.channel.send(message)
    assert [await supervisor.messages.get() for _ in up] == up
    supervisor.channel.close()
    await worker.closed.wait()


async def test_a_message_split_at_any_byte_is_reassembled():
    end = End(Up)
    other = End(Down)
    written = bytearray()

    class Transport(asyncio.WriteTransport):
        def write(self, data):
            written.extend(data)

    other.channel.connection_made(Transport())
    other.channel.send(Demand("model-a"))
    other.channel.send(Ready(1))
    for byte in written:
        end.channel.data_received(bytes([byte]))
    assert end.messages.get_nowait() == Demand("model-a")
    assert end.messages.get_nowait() == Ready(1)


async def test_the_other_ends_death_is_noticed_and_sends_are_dropped():
    supervisor, worker = await pair()
    worker.channel.close()
    await supervisor.closed.wait()
    supervisor.channel.send(Drain(0, 0))
