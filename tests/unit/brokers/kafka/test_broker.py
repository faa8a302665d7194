import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from kubeai.brokers.base import BrokerUnavailable
from kubeai.brokers.kafka.broker import _Topic
from kubeai.brokers.urls import open_broker
from kubeai.errors import ConfigError

PATH = "messaging.streams[0].requestsURL"
BROKERS = {"KAFKA_BROKERS": "one:9092, two:9092"}


def opened(url: str, environment: dict[str, str]) -> Any:
    return open_broker(url, PATH, environment)


def refusal(url: str, environment: dict[str, str]) -> str:
    with pytest.raises(ConfigError) as raised:
        open_broker(url, PATH, environment)
    assert raised.value.path == PATH
    return str(raised.value)


def test_brokers_are_separated_by_commas():
    broker = opened("kafka://requests", BROKERS)
    assert broker._client["bootstrap_servers"] == ["one:9092", "two:9092"]


@pytest.mark.parametrize("brokers", ["one:port", ":9092", "one:9092,,two:9092", "one:9092,"])
def test_malformed_brokers_are_refused(brokers):
    assert "KAFKA_BROKERS as host:port" in refusal("kafka://requests", {"KAFKA_BROKERS": brokers})


def test_upper_case_names_are_kept():
    broker = opened("kafka://My-Group?topic=My.Topic&topic=b_2", BROKERS)
    assert (broker._name, broker._topics) == ("My-Group", ["My.Topic", "b_2"])


def test_only_the_topic_may_be_repeated():
    assert "offset twice" in refusal("kafka://g?topic=a&offset=oldest&offset=oldest", BROKERS)


def test_sasl_needs_a_user_and_a_password():
    environment = {**BROKERS, "KAFKA_SECURITY_PROTOCOL": "SASL_PLAINTEXT"}
    assert "KAFKA_SASL_USERNAME" in refusal("kafka://requests", environment)
    environment["KAFKA_SASL_USERNAME"] = "kubeai"
    assert "KAFKA_SASL_PASSWORD" in refusal("kafka://requests", environment)


def test_unknown_protocols_and_mechanisms_are_refused():
    environment = {**BROKERS, "KAFKA_SECURITY_PROTOCOL": "TLS"}
    assert "PLAINTEXT, SSL, SASL_PLAINTEXT, SASL_SSL" in refusal("kafka://requests", environment)
    environment = {
        **BROKERS,
        "KAFKA_SECURITY_PROTOCOL": "SASL_SSL",
        "KAFKA_SASL_MECHANISM": "GSSAPI",
    }
    assert "SCRAM-SHA-512" in refusal("kafka://requests", environment)


def test_missing_ca_file_is_named(tmp_path):
    environment = {
        **BROKERS,
        "KAFKA_SECURITY_PROTOCOL": "SSL",
        "KAFKA_TLS_CA_FILE": str(tmp_path / "ca.crt"),
    }
    assert f"{tmp_path}/ca.crt" in refusal("kafka://requests", environment)


def test_tls_without_files_trusts_the_systems_authorities():
    broker = opened("kafka://requests", {**BROKERS, "KAFKA_SECURITY_PROTOCOL": "SSL"})
    assert broker._client["ssl_context"].check_hostname


class Producer:
    """A producer whose broker answers nothing."""

    _sender = SimpleNamespace(sender_task=None)

    def __init__(self) -> None:
        self.client = self

    async def send_and_wait(self, topic, value, key, headers):
        await asyncio.Event().wait()

    async def close(self):
        pass


@pytest.fixture
async def topic():
    topic = _Topic({}, "responses", None)
    await topic._producer.stop()
    topic._producer = Producer()
    yield topic
    await topic.close()


@pytest.mark.looptime
async def test_topic_can_be_closed_when_several_messages_have_failed_at_once(topic):
    async def publish() -> None:
        with pytest.raises(BrokerUnavailable, match="no answer within 15 s"):
            await topic.publish(b"{}", {})
        await topic.close()

    await asyncio.gather(publish(), publish())


@pytest.mark.looptime
async def test_closing_fails_messages_that_are_not_confirmed(topic):
    loop = asyncio.get_running_loop()
    before = loop.time()
    publishing = asyncio.create_task(topic.publish(b"{}", {}))
    await asyncio.sleep(1)
    await topic.close()
    with pytest.raises(BrokerUnavailable, match="it is closed"):
        await publishing
    assert loop.time() - before < 2


async def test_message_that_the_library_cancels_is_a_failed_one(topic, monkeypatch):
    async def cancelled(*args: Any, **kwargs: Any) -> None:
        raise asyncio.CancelledError

    monkeypatch.setattr(topic._producer, "send_and_wait", cancelled)
    with pytest.raises(BrokerUnavailable, match="CancelledError"):
        await topic.publish(b"{}", {})
