"""Service Bus against an AMQP 1.0 peer. `servers/amqp_peer.py` says what that does not prove."""

from __future__ import annotations

import itertools

import pytest

from brokers.conformance import PASSWORD, Conformance, Pair
from brokers.servers.servicebus import ServiceBusServer

numbers = itertools.count()
LOCK_S = 4


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    short = [f"short-{number},lock_s={LOCK_S}" for number in range(40)]
    server = ServiceBusServer(tmp_path_factory.mktemp("servicebus"), *short)
    server.start()
    yield server
    server.end()


RECEIVES_MANY = {
    "test_concurrent_publishing_loses_nothing",
    "test_count_max_leaves_the_rest_to_others",
    "test_competing_subscriptions_share_without_loss",
}


class TestServiceBus(Conformance):
    cannot = {
        "lag_counts_waiting_messages": "the service tells only clients that may manage the entity",
        "deliveries_are_counted": "it counts failed deliveries; see below",
    }
    too_large_bytes = (1 << 20) + 1
    redelivery_s = LOCK_S + 3
    bad_urls = {
        "azuresb://": "names no topic",
        "azuresb://topic?subscription=": "empty option subscription",
        "azuresb://topic?session=a": "unknown option session",
        "azuresb://topic?subscription=a&listener_timeout=2": "listener_timeout",
        "azuresb://topic?subscription=a&listener_timeout=0s": "listener_timeout",
        "azuresb://topic?subscription=a&max_recv_batch_size=0": "max_recv_batch_size",
    }
    variables = ("SERVICEBUS_CONNECTION_STRING",)
    unreachable = {
        "SERVICEBUS_CONNECTION_STRING": "Endpoint=sb://127.0.0.1:9;SharedAccessKeyName=a;"
        f"SharedAccessKey={PASSWORD};UseDevelopmentEmulator=true"
    }

    @pytest.fixture
    def pair(self, server, request):
        kind = "long" if request.function.__name__ in RECEIVES_MANY else "short"
        url = f"azuresb://{kind}-{next(numbers)}"
        return Pair(url, url)
