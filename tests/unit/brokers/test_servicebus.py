"""Service Bus: what the URL and the environment say. tests/brokers has the tests with a peer."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import pytest

from kubeai.brokers.base import BrokerUnavailable
from kubeai.brokers.servicebus import LISTENER_TIMEOUT_S, Link, ServiceBus
from kubeai.brokers.urls import parse_broker_url
from kubeai.errors import ConfigError

PATH = "messaging.streams[0].requestsURL"
STRING = "Endpoint=sb://a.servicebus.windows.net/;SharedAccessKeyName=name;SharedAccessKey=secret"


def servicebus(url: str, **environment: str) -> ServiceBus:
    return ServiceBus(parse_broker_url(url, PATH, environment))


@pytest.mark.parametrize(
    ("url", "entity", "subscription"),
    [
        ("azuresb://requests", "requests", ""),
        ("azuresb://requests?subscription=kubeai", "requests", "kubeai"),
        ("azuresb://team/requests/?subscription=kubeai", "team/requests", "kubeai"),
    ],
)
def test_host_and_path_are_the_entity(url, entity, subscription):
    broker = servicebus(url, SERVICEBUS_CONNECTION_STRING=STRING)
    assert (broker._entity, broker._subscription) == (entity, subscription)
    assert broker._poll_s == LISTENER_TIMEOUT_S


def test_options_of_the_go_cdk_are_read():
    url = "azuresb://t?subscription=s&listener_timeout=1m&max_recv_batch_size=5"
    with pytest.raises(ConfigError, match="up to 30s"):
        servicebus(url, SERVICEBUS_CONNECTION_STRING=STRING)
    broker = servicebus(url.replace("1m", "500ms"), SERVICEBUS_CONNECTION_STRING=STRING)
    assert (broker._poll_s, broker._batch_max_count) == (0.5, 5)


def test_namespace_is_required():
    with pytest.raises(ConfigError) as raised:
        servicebus("azuresb://requests")
    assert raised.value.path == PATH
    assert "SERVICEBUS_CONNECTION_STRING or AZURE_SERVICEBUS_HOSTNAME" in str(raised.value)


@pytest.mark.parametrize("text", ["secret", STRING.replace("Endpoint", "Point"), STRING[:-15]])
def test_invalid_connection_string_is_reported_without_its_key(text):
    with pytest.raises(ConfigError, match="valid SERVICEBUS_CONNECTION_STRING") as raised:
        servicebus("azuresb://requests", SERVICEBUS_CONNECTION_STRING=text)
    assert "secret" not in str(raised.value)


async def test_host_name_needs_no_connection_string():
    broker = servicebus("azuresb://requests", AZURE_SERVICEBUS_HOSTNAME="a.servicebus.windows.net")
    client, credential = broker._client()
    assert client.fully_qualified_namespace == "a.servicebus.windows.net"
    await client.close()
    await credential.close()


async def test_connection_string_comes_before_the_host_name():
    environment = {"SERVICEBUS_CONNECTION_STRING": STRING, "AZURE_SERVICEBUS_HOSTNAME": "b"}
    client, credential = servicebus("azuresb://requests", **environment)._client()
    assert client.fully_qualified_namespace == "a.servicebus.windows.net"
    assert credential is None
    await client.close()


def test_missing_azure_identity_is_reported_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "azure.identity.aio", None)
    with pytest.raises(ConfigError, match=r"azure-identity .*pip install 'kubeai-gateway\[serv"):
        servicebus("azuresb://requests", AZURE_SERVICEBUS_HOSTNAME="a.servicebus.windows.net")


async def test_subscription_takes_no_messages():
    broker = servicebus("azuresb://t?subscription=s", SERVICEBUS_CONNECTION_STRING=STRING)
    with pytest.raises(ConfigError, match="takes no messages"):
        await broker.open_topic()


async def test_refused_connection_is_unavailable():
    string = "Endpoint=sb://127.0.0.1:9;SharedAccessKeyName=name;SharedAccessKey=secret"
    broker = servicebus(
        "azuresb://requests",
        SERVICEBUS_CONNECTION_STRING=f"{string};UseDevelopmentEmulator=true",
    )
    for connect in (broker.subscribe, broker.open_topic):
        with pytest.raises(BrokerUnavailable, match="Service Bus: requests: ") as raised:
            await connect()
        assert "secret" not in str(raised.value)


async def test_operation_that_the_library_cancels_ends_the_connection():
    async def cancelled() -> None:
        raise asyncio.CancelledError

    handler: Any = None
    link = Link("requests", handler)
    for _ in range(2):
        with pytest.raises(BrokerUnavailable, match="Service Bus: requests: CancelledError"):
            await link.run(cancelled)
    await link.close()
