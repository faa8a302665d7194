"""The brokers of the chaos test, each with two topics, and the URLs of their four ends."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from pathlib import Path

from brokers.servers import BrokerServer
from brokers.servers.kafka import KafkaServer
from brokers.servers.nats import NatsServer
from brokers.servers.pstest import PstestServer
from brokers.servers.rabbitmq import RabbitServer
from brokers.servers.servicebus import ServiceBusServer
from brokers.servers.sqs import SqsServer

PARTITIONS = 4
# After which a broker delivers the messages of a killed messenger again, where that is a time.
REDELIVERY_S = 15


class BrokerUnderTest(ABC):
    """A broker that has not started. The URLs are KubeAI's, and those of its users."""

    requests_topic: str  # where users publish
    requests: str  # what KubeAI receives
    responses_topic: str  # where KubeAI publishes
    responses: str  # what users receive
    server: BrokerServer

    @abstractmethod
    def __init__(self, folder: Path) -> None:
        """``folder``: for the server's data."""

    @abstractmethod
    async def create_topics(self) -> None:
        """Create what the URLs name, on the server that has started."""

    def go_down(self) -> None:
        """Begin an outage, without losing messages."""
        self.server.kill()

    def come_up(self) -> None:
        """End the outage."""
        self.server.start()

    def end(self) -> None:
        """End the server."""
        self.server.kill()

    @property
    def proxied_port(self) -> int:
        """Where the proxy connects to."""
        return self.server.port

    def advertise(self, port: int) -> None:  # noqa: B027
        """Before the start: the proxy's port, for a broker that must know it."""

    def proxied_environment(self, port: int) -> dict[str, str]:
        """The environment of a client that uses the proxy."""
        direct, proxied = f":{self.server.port}", f":{port}"
        return {
            name: value.replace(direct, proxied) for name, value in self.server.environment.items()
        }


class Nats(BrokerUnderTest):
    """NATS without JetStream: nothing is stored."""

    requests_topic, requests = "nats://requests", "nats://requests?queue=kubeai"
    responses_topic, responses = "nats://responses", "nats://responses?queue=reader"

    def __init__(self, folder: Path) -> None:
        self.server = NatsServer(folder)

    async def create_topics(self) -> None:
        """There is nothing to create."""


class JetStream(Nats):
    requests_topic = "nats://requests?jetstream"
    requests = f"{requests_topic}&queue=kubeai"
    responses_topic = "nats://responses?jetstream"
    responses = f"{responses_topic}&queue=reader"

    async def create_topics(self) -> None:
        import nats

        client = await nats.connect(self.server.environment["NATS_SERVER_URL"])
        stream = client.jetstream()
        for name in ("requests", "responses"):
            await stream.add_stream(name=name, subjects=[name])
        await stream.add_consumer("requests", durable_name="kubeai", ack_wait=REDELIVERY_S)
        await client.close()


class Kafka(BrokerUnderTest):
    requests_topic, requests = "kafka://requests", "kafka://kubeai?topic=requests"
    responses_topic, responses = "kafka://responses", "kafka://reader?topic=responses"

    def __init__(self, folder: Path) -> None:
        self.server: KafkaServer = KafkaServer(folder)

    async def create_topics(self) -> None:
        from aiokafka.admin import AIOKafkaAdminClient, NewTopic

        admin = AIOKafkaAdminClient(bootstrap_servers=self.server.environment["KAFKA_BROKERS"])
        await admin.start()
        topics = [NewTopic(name, PARTITIONS, 1) for name in ("requests", "responses")]
        await admin.create_topics(topics)
        await admin.close()

    @property
    def proxied_port(self) -> int:
        return self.server.proxied_port

    def advertise(self, port: int) -> None:
        self.server.advertise(port)

    def proxied_environment(self, port: int) -> dict[str, str]:
        return self.server.proxied_environment


class RabbitMQ(BrokerUnderTest):
    requests_topic, requests = "rabbit://requests", "rabbit://requests"
    responses_topic, responses = "rabbit://responses", "rabbit://responses"

    def __init__(self, folder: Path) -> None:
        self.server = RabbitServer(folder)

    async def create_topics(self) -> None:
        import aio_pika

        connection = await aio_pika.connect(self.server.environment["RABBIT_SERVER_URL"])
        channel = await connection.channel()
        for name in ("requests", "responses"):
            exchange = await channel.declare_exchange(name, "fanout", durable=True)
            queue = await channel.declare_queue(name, durable=True)
            await queue.bind(exchange)
        await connection.close()


class SQS(BrokerUnderTest):
    def __init__(self, folder: Path) -> None:
        self.server: SqsServer = SqsServer(
            folder, f"requests,VisibilityTimeout={REDELIVERY_S}", "responses"
        )
        self.requests_topic = self.requests = self.server.url("requests")
        self.responses_topic = self.responses = self.server.url("responses")

    async def create_topics(self) -> None:
        """The server has them from its start."""

    def end(self) -> None:
        self.server.end()


class PubSub(BrokerUnderTest):
    """The fake keeps everything in memory, so it is suspended rather than killed."""

    requests_topic = "gcppubsub://projects/chaos/topics/requests"
    requests = "gcppubsub://projects/chaos/subscriptions/requests"
    responses_topic = "gcppubsub://projects/chaos/topics/responses"
    responses = "gcppubsub://projects/chaos/subscriptions/responses"

    def __init__(self, folder: Path) -> None:
        self.server = PstestServer(folder)

    async def create_topics(self) -> None:
        import grpc
        from google.pubsub_v1 import PublisherAsyncClient, SubscriberAsyncClient
        from google.pubsub_v1.services.publisher.transports import PublisherGrpcAsyncIOTransport
        from google.pubsub_v1.services.subscriber.transports import SubscriberGrpcAsyncIOTransport

        address = self.server.environment["PUBSUB_EMULATOR_HOST"]
        async with grpc.aio.insecure_channel(address) as channel:
            publisher = PublisherAsyncClient(
                transport=PublisherGrpcAsyncIOTransport(channel=channel)
            )
            subscriber = SubscriberAsyncClient(
                transport=SubscriberGrpcAsyncIOTransport(channel=channel)
            )
            for name in ("requests", "responses"):
                topic = f"projects/chaos/topics/{name}"
                await publisher.create_topic(request={"name": topic})
                subscription = {
                    "name": f"projects/chaos/subscriptions/{name}",
                    "topic": topic,
                    "ack_deadline_seconds": REDELIVERY_S,
                }
                await subscriber.create_subscription(request=subscription)

    def go_down(self) -> None:
        self.server.suspend()

    def come_up(self) -> None:
        self.server.resume()


class ServiceBus(BrokerUnderTest):
    requests_topic = requests = "azuresb://requests"
    responses_topic = responses = "azuresb://responses"

    def __init__(self, folder: Path) -> None:
        self.server: ServiceBusServer = ServiceBusServer(
            folder, f"requests,lock_s={REDELIVERY_S}", "responses"
        )

    async def create_topics(self) -> None:
        """The server has them from its start."""

    def end(self) -> None:
        self.server.end()


BROKERS: dict[str, type[BrokerUnderTest]] = {
    "nats": Nats,
    "jetstream": JetStream,
    "kafka": Kafka,
    "rabbitmq": RabbitMQ,
    "sqs": SQS,
    "pubsub": PubSub,
    "servicebus": ServiceBus,
}
# Without NATS's own, which stores nothing.
DURABLE = tuple(name for name in BROKERS if name != "nats")


def client_environment(under: BrokerUnderTest) -> dict[str, str]:
    """The environment of a client that uses the broker directly."""
    return os.environ | under.server.environment
