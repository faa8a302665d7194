"""RabbitMQ against a real server, with classic and with quorum queues."""

import itertools
from typing import ClassVar

import aio_pika
import pytest
from brokers.conformance import PASSWORD, Conformance, Pair
from brokers.servers import free_port
from brokers.servers.rabbitmq import MAX_MESSAGE_BYTES, RabbitServer

NO_DEADLINE = "RabbitMQ redelivers only when a connection ends"
_numbers = itertools.count()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = RabbitServer(tmp_path_factory.mktemp("rabbitmq"))
    server.start()
    yield server
    server.kill()


class TestQuorumQueues(Conformance):
    kind: ClassVar = "quorum"
    too_large_bytes = MAX_MESSAGE_BYTES + 1
    variables = ("RABBIT_SERVER_URL",)
    bad_urls: ClassVar = {
        "rabbit://queue?prefetch=1": "unknown option prefetch",
        "rabbit://queue?prefetch_count=-1": "prefetch_count",
        "rabbit://exchange?key_name=": "key_name",
        "rabbit://": "names neither a queue nor an exchange",
    }
    unreachable: ClassVar = {
        "RABBIT_SERVER_URL": f"amqp://user:{PASSWORD}@127.0.0.1:{free_port()}/vhost"
    }
    cannot: ClassVar = {
        "extended_message_stays_beyond_the_deadline": NO_DEADLINE,
        "message_comes_again_after_its_deadline": NO_DEADLINE,
    }

    async def make(self, server):
        name = f"{self.kind}-{next(_numbers)}"
        async with await aio_pika.connect(server.environment["RABBIT_SERVER_URL"]) as connection:
            channel = await connection.channel()
            exchange = await channel.declare_exchange(
                name, aio_pika.ExchangeType.FANOUT, durable=True
            )
            queue = await channel.declare_queue(
                name, durable=True, arguments={"x-queue-type": self.kind}
            )
            await queue.bind(exchange)
        return Pair(f"rabbit://{name}", f"rabbit://{name}")


class TestClassicQueues(TestQuorumQueues):
    kind = "classic"
    keeps_acknowledgements = False  # the server writes them to its disk later
    test_silent_broker_is_noticed = None  # same as with quorum queues
    cannot: ClassVar = TestQuorumQueues.cannot | {
        "deliveries_are_counted": "a classic queue only marks a message as redelivered",
    }
