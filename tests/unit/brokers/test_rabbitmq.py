"""URLs and variables of RabbitMQ; the rest is in tests/brokers."""

import datetime

import pytest
from aio_pika import IncomingMessage
from aiormq.abc import DeliveredMessage
from pamqp.commands import Basic
from pamqp.header import ContentHeader

from kubeai.brokers.rabbitmq import RabbitMQ, _RabbitDelivery
from kubeai.brokers.urls import open_broker, parse_broker_url
from kubeai.errors import ConfigError

PATH = "messaging.streams[0].requestsURL"
SERVER = {"RABBIT_SERVER_URL": "amqp://guest:guest@127.0.0.1"}


@pytest.mark.parametrize(
    ("url", "name"),
    [("rabbit://Requests?prefetch_count=0", "Requests"), ("rabbit://a/b%20c", "a/b c")],
)
def test_host_and_path_are_the_name(url, name):
    assert RabbitMQ(parse_broker_url(url, PATH, SERVER))._name == name


@pytest.mark.parametrize(
    ("url", "part"),
    [
        ("rabbit://", "names neither a queue nor an exchange"),
        ("rabbit://q?prefetch_count=many", "from 0 (no limit) to 65535"),
        ("rabbit://q?prefetch_count=65536", "from 0 (no limit) to 65535"),
        ("rabbit://q?key_name=", "needs a name for the option key_name"),
        ("rabbit://q?qos=1", "unknown option qos"),
    ],
)
def test_invalid_url_is_refused_with_its_path(url, part):
    with pytest.raises(ConfigError) as raised:
        open_broker(url, PATH, SERVER)
    assert str(raised.value).startswith(f"{PATH}: ")
    assert part in str(raised.value)


@pytest.mark.parametrize("server", ["http://one", "amqp://", "amqp://user:secret@one:port", ""])
def test_missing_or_invalid_server_is_named_without_credentials(server):
    with pytest.raises(ConfigError, match="RABBIT_SERVER_URL") as raised:
        open_broker("rabbit://queue", PATH, {"RABBIT_SERVER_URL": server})
    assert "secret" not in str(raised.value)


def delivery_of(body=b"{}", redelivered=False, **properties):
    """A delivery without a broker; aio-pika itself cannot publish without a message_id."""
    header = ContentHeader(body_size=len(body), properties=Basic.Properties(**properties))
    frame = Basic.Deliver("consumer", 1, redelivered, "exchange", "key")
    message = IncomingMessage(DeliveredMessage(frame, header, body, channel=None))
    return _RabbitDelivery(None, message)


def test_id_is_the_message_id_or_else_a_hash_of_the_message():
    now = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    first = delivery_of(headers={"a": "b"}, timestamp=now)
    again = delivery_of(headers={"a": "b", "x-delivery-count": 1}, timestamp=now, redelivered=True)
    others = [
        delivery_of(headers={"a": "c"}, timestamp=now),
        delivery_of(headers={"a": "b"}),
        delivery_of(b"[]", headers={"a": "b"}, timestamp=now),
        delivery_of(headers={"a": "b"}, timestamp=now, correlation_id="1"),
    ]
    assert first.id == again.id
    assert len({first.id, *(other.id for other in others)}) == 5
    assert delivery_of(message_id="mine").id == "mine"
    # Otherwise an equal message would count as a redelivery of one that has been answered.
    assert not first.id_is_unique
    assert delivery_of(message_id="mine").id_is_unique


def test_deliveries_are_known_for_quorum_queues_and_for_the_first_one():
    assert delivery_of().deliveries == 1
    assert delivery_of(redelivered=True).deliveries == 0
    assert delivery_of(redelivered=True, headers={"x-delivery-count": 2}).deliveries == 3
