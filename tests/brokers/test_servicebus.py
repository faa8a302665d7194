"""Service Bus against an AMQP 1.0 peer. `servers/amqp_peer.py` says what that does not prove."""

from __future__ import annotations

import itertools
from typing import ClassVar

import pytest
from brokers.conformance import PASSWORD, Conformance, Pair
from brokers.servers.servicebus import ServiceBusServer

numbers = itertools.count()
LOCK_S, EXTENDED_LOCK_S = 3, 6  # the client extends each 5 s / 3


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    queues = [f"short-{number},lock_s={LOCK_S}" for number in range(40)]
    queues.append(f"extended,lock_s={EXTENDED_LOCK_S}")
    server = ServiceBusServer(tmp_path_factory.mktemp("servicebus"), *queues)
    server.start()
    yield server
    server.end()


RECEIVES_MANY = {
    "test_concurrent_publishing_loses_nothing",
    "test_count_max_leaves_the_rest_to_others",
    "test_competing_subscriptions_share_without_loss",
}


class TestServiceBus(Conformance):
    cannot: ClassVar = {
        "lag_counts_waiting_messages": "the service tells only clients that may manage the entity",
    }
    too_large_bytes = (1 << 20) + 1
    redelivery_s = LOCK_S + 2
    bad_urls: ClassVar = {
        "azuresb://": "names no topic",
        "azuresb://topic?subscription=": "empty option subscription",
        "azuresb://topic?session=a": "unknown option session",
        "azuresb://topic?subscription=a&listener_timeout=2": "listener_timeout",
        "azuresb://topic?subscription=a&listener_timeout=0s": "listener_timeout",
        "azuresb://topic?subscription=a&max_recv_batch_size=0": "max_recv_batch_size",
    }
    variables = ("SERVICEBUS_CONNECTION_STRING",)
    unreachable: ClassVar = {
        "SERVICEBUS_CONNECTION_STRING": "Endpoint=sb://127.0.0.1:9;SharedAccessKeyName=a;"
        f"SharedAccessKey={PASSWORD};UseDevelopmentEmulator=true"
    }

    @pytest.fixture
    def pair(self, server, request):
        name = request.function.__name__
        if name == "test_extended_message_stays_beyond_the_deadline":
            return Pair("azuresb://extended", "azuresb://extended")
        url = f"azuresb://{'long' if name in RECEIVES_MANY else 'short'}-{next(numbers)}"
        return Pair(url, url)
