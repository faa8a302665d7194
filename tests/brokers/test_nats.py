"""NATS, without and with JetStream, against a real server."""

import itertools
from typing import ClassVar

import nats
import pytest
from brokers.conformance import PASSWORD, Conformance, Pair
from brokers.servers import free_port
from brokers.servers.nats import MAX_PAYLOAD_BYTES, NatsServer

ACK_WAIT_S = 2.0
_numbers = itertools.count()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = NatsServer(tmp_path_factory.mktemp("nats"))
    server.start()
    yield server
    server.kill()


def unreachable() -> dict[str, str]:
    return {"NATS_SERVER_URL": f"nats://user:{PASSWORD}@127.0.0.1:{free_port()}"}


class TestCore(Conformance):
    too_large_bytes = MAX_PAYLOAD_BYTES + 1
    variables = ("NATS_SERVER_URL",)
    bad_urls: ClassVar = {
        "nats://subject?quue=q": "unknown option quue",
        "nats://?queue=q": "does not name a subject",
        "nats://subject?natsv2=yes": "true or false",
        "nats://subject?stream=S": "needs the option jetstream",
    }
    unreachable: ClassVar = unreachable()
    cannot: ClassVar = dict.fromkeys(
        [
            "acknowledged_message_never_comes_again",
            "unacknowledged_message_comes_again_with_the_same_id",
            "deliveries_are_counted",
            "extended_message_stays_beyond_the_deadline",
            "message_comes_again_after_its_deadline",
            "count_max_leaves_the_rest_to_others",
            "killed_broker_is_noticed_and_loses_nothing",
            "lag_counts_waiting_messages",
        ],
        "core NATS keeps no messages",
    )

    async def make(self, server):
        subject = f"subject.{next(_numbers)}"
        return Pair(f"nats://{subject}", f"nats://{subject}?queue=workers")


class TestJetStream(Conformance):
    too_large_bytes = MAX_PAYLOAD_BYTES + 1
    redelivery_s = ACK_WAIT_S + 1
    # The server writes a consumer's acknowledgements to its disk a moment after confirming them.
    keeps_acknowledgements = False
    bad_urls: ClassVar = {"nats://subject?jetstream=maybe": "true or false"}
    variables = ("NATS_SERVER_URL",)
    unreachable: ClassVar = unreachable()

    async def make(self, server):
        number = next(_numbers)
        client = await nats.connect(server.environment["NATS_SERVER_URL"])
        js = client.jetstream()
        await js.add_stream(name=f"STREAM-{number}", subjects=[f"requests.{number}"])
        await js.add_consumer(f"STREAM-{number}", durable_name="workers", ack_wait=ACK_WAIT_S)
        await client.close()
        url = f"nats://requests.{number}?jetstream"
        return Pair(url, f"{url}&queue=workers")
