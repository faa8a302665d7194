"""NATS, without and with JetStream, against a real server."""

import asyncio
import contextlib
import gc
import ipaddress
import itertools
from pathlib import Path
from typing import Any, ClassVar

import nats
import pytest
from brokers.conformance import ABSENCE_S, PASSWORD, RECEIVES_MANY, Conformance, Pair, numbered
from brokers.servers import free_port
from brokers.servers.nats import MAX_PAYLOAD_BYTES, NatsServer
from brokers.subscriptions import CONFIG_PATH, receive, subscribed, topic_of
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from harness import until
from nats.js.api import AckPolicy

from kubeai.brokers import inbox
from kubeai.brokers.base import (
    REQUEST_MESSAGE_ID,
    TIMEOUT_S,
    BrokerUnavailable,
    MessageTooLarge,
)
from kubeai.brokers.nats import core as nats_core
from kubeai.brokers.nats.jetstream import (
    CREATED_ACK_WAIT_S,
    HEARTBEAT_S,
    JetStreamSubscription,
)
from kubeai.brokers.urls import open_broker
from kubeai.local import certificates

# Encoded by Go 1.26's encoding/gob, as the Go CDK does.
GO_MESSAGE = bytes.fromhex(
    "0d7f040102ff8000010c010c000019ff80000112726571756573745f6d6573736167655f69640131"
    "1e0a001b7b2270617468223a20222f76312f636f6d706c6574696f6e73227d"
)
ACK_WAIT_S, LONG_ACK_WAIT_S = 2.0, 20.0  # the second for RECEIVES_MANY
_numbers = itertools.count()
pytestmark = [pytest.mark.broker, pytest.mark.timeout(240)]


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

    @pytest.fixture
    async def pair(self, server, request):
        many = request.function.__name__ in RECEIVES_MANY
        return await self.make(server, LONG_ACK_WAIT_S if many else ACK_WAIT_S)

    async def make(self, server, ack_wait_s=ACK_WAIT_S):
        number = next(_numbers)
        client = await nats.connect(server.environment["NATS_SERVER_URL"])
        js = client.jetstream()
        await js.add_stream(name=f"STREAM-{number}", subjects=[f"requests.{number}"])
        await js.add_consumer(f"STREAM-{number}", durable_name="workers", ack_wait=ack_wait_s)
        await client.close()
        url = f"nats://requests.{number}?jetstream"
        return Pair(url, f"{url}&queue=workers")


@contextlib.asynccontextmanager
async def stream_of(server, **options):
    """A new stream; yields its name, its subject and JetStream."""
    number = next(_numbers)
    name, subject = f"STREAM-{number}", f"requests.{number}"
    client = await nats.connect(server.environment["NATS_SERVER_URL"], allow_reconnect=False)
    try:
        js = client.jetstream()
        await js.add_stream(name=name, subjects=[subject], **options)
        yield name, subject, js
    finally:
        await client.close()


class TestJetStreamOptions:
    async def test_missing_consumer_is_created_and_shared(self, server):
        async with stream_of(server) as (name, subject, js):
            url, environment = f"nats://{subject}?jetstream", server.environment
            async with (
                subscribed(url, environment) as one,
                subscribed(f"{url}&stream={name}&queue=kubeai", environment) as two,
                topic_of(url, environment) as topic,
            ):
                assert one.ack_deadline_s == two.ack_deadline_s == CREATED_ACK_WAIT_S
                await topic.publish(b"1", {})
                await topic.publish(b"2", {})
                first, second = await receive(one, 1), await receive(two, 1)
                assert {first[0].body, second[0].body} == {b"1", b"2"}
            info = await js.consumer_info(name, "kubeai")
            assert info.config.max_deliver == -1

    @pytest.mark.parametrize("option", ["", "&stream=NONE"])
    async def test_missing_stream_is_named(self, server, option):
        url = f"nats://no.such.subject?jetstream{option}"
        with pytest.raises(BrokerUnavailable, match=r"no stream .*(NONE|no\.such\.subject)"):
            await open_broker(url, CONFIG_PATH, server.environment).subscribe()
        async with topic_of(url, server.environment) as topic:
            with pytest.raises(BrokerUnavailable, match=r"no stream .*no\.such\.subject"):
                await topic.publish(b"{}", {})

    @pytest.mark.parametrize(
        ("config", "part"),
        [
            ({"ack_policy": AckPolicy.NONE}, "explicit acknowledgements"),
            ({"deliver_subject": "inbox"}, "push consumer"),
        ],
    )
    async def test_unfit_consumer_is_refused(self, server, config, part):
        async with stream_of(server) as (name, subject, js):
            await js.add_consumer(name, durable_name="kubeai", **config)
            broker = open_broker(f"nats://{subject}?jetstream", CONFIG_PATH, server.environment)
            with pytest.raises(BrokerUnavailable, match=part):
                await broker.subscribe()

    async def test_deleted_consumer_ends_the_subscription(self, server):
        async with (
            stream_of(server) as (name, subject, js),
            subscribed(f"nats://{subject}?jetstream", server.environment) as one,
        ):
            waiting = asyncio.create_task(one.receive(1))
            await until("the request waits", pulls_of(js, name))
            await js.delete_consumer(name, "kubeai")
            with pytest.raises(BrokerUnavailable, match="Consumer Deleted"):
                await waiting

    async def test_end_during_a_request_is_noticed_at_once(self, server):
        """Not when a heartbeat is missing."""
        async with stream_of(server) as (_, subject, _js):
            url = f"nats://{subject}?jetstream"
            async with subscribed(url, server.environment) as subscription:
                server.kill()
                try:
                    with pytest.raises(BrokerUnavailable, match=r"(?i)connection"):
                        async with asyncio.timeout(2 * HEARTBEAT_S):
                            await subscription.receive(1)
                finally:
                    server.start()

    async def test_a_connection_that_the_library_fails_to_close_leaves_no_task(self, server):
        """It fails if the connection is reset while it writes what was not sent yet."""

        async def fails():
            raise ConnectionResetError

        problems = []
        asyncio.get_running_loop().set_exception_handler(lambda _, what: problems.append(what))
        async with stream_of(server) as (_, subject, _js):
            url = f"nats://{subject}?jetstream"
            before = asyncio.all_tasks()
            async with subscribed(url, server.environment) as subscription:
                assert isinstance(subscription, JetStreamSubscription)
                client = subscription.connection.client
                await client.publish("unread", b"1")
                client._transport.drain = fails
            await until("its tasks have ended", lambda: asyncio.all_tasks() <= before)
            del subscription, client
            gc.collect()
            assert not problems, "nothing is reported to the event loop"

    async def test_response_that_is_published_again_is_dropped_by_the_stream(self, server):
        async with stream_of(server) as (name, subject, js):
            async with topic_of(f"nats://{subject}?jetstream", server.environment) as topic:
                for request, body in (("a", b"1"), ("a", b"1"), ("a", b"2"), ("b", b"1")):
                    await topic.publish(body, {REQUEST_MESSAGE_ID: request})
            assert (await js.stream_info(name)).state.messages == 3

    @pytest.mark.parametrize("unclaimed_s", [0.1, 60])
    async def test_what_was_requested_and_is_not_received_is_given_back(
        self, server, monkeypatch, unclaimed_s
    ):
        """Soon, or when the subscription is closed; not after the deadline of a minute."""
        monkeypatch.setattr(inbox, "UNCLAIMED_S", unclaimed_s)
        async with stream_of(server) as (_name, subject, _js):
            url = f"nats://{subject}?jetstream"
            async with topic_of(url, server.environment) as topic:
                one = await open_broker(url, CONFIG_PATH, server.environment).subscribe()
                try:
                    inner: Any = one
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(ABSENCE_S):
                            await one.receive(5)
                    await asyncio.gather(*(topic.publish(body, {}) for body in numbered(5)))
                    if unclaimed_s == 60:
                        await until("it has arrived", lambda: len(inner._inbox) == 5)
                        await one.close()
                    async with subscribed(url, server.environment) as two:
                        deliveries = await receive(two, 5)
                finally:
                    await one.close()
            assert {delivery.body for delivery in deliveries} == set(numbered(5))

    async def test_headers_count_towards_the_limit_of_the_server(self, server):
        """It ends the connection of a client that exceeds it, and so of other messages."""
        async with (
            stream_of(server) as (_, subject, _js),
            topic_of(f"nats://{subject}?jetstream", server.environment) as topic,
        ):
            for spare in range(0, 120, 10):
                body = b"x" * (MAX_PAYLOAD_BYTES - spare)
                with pytest.raises(MessageTooLarge, match="max_payload"):
                    await topic.publish(body, {REQUEST_MESSAGE_ID: "a" * 30})
            await topic.publish(b"x" * (MAX_PAYLOAD_BYTES - 200), {REQUEST_MESSAGE_ID: "a" * 30})

    async def test_limit_of_the_stream_is_a_limit(self, server):
        async with (
            stream_of(server, max_msg_size=1000) as (_, subject, _js),
            topic_of(f"nats://{subject}?jetstream", server.environment) as topic,
        ):
            with pytest.raises(MessageTooLarge, match="max_msg_size"):
                await topic.publish(b"x" * 1001, {})
            await topic.publish(b"x", {})

    async def test_stream_that_begins_again_gives_new_ids(self, server):
        async with stream_of(server) as (name, subject, js):
            url, ids = f"nats://{subject}?jetstream", []
            for _ in range(2):
                async with (
                    subscribed(url, server.environment) as subscription,
                    topic_of(url, server.environment) as topic,
                ):
                    await topic.publish(b"{}", {})
                    (delivery,) = await receive(subscription, 1)
                    ids.append(delivery.id)
                    await delivery.acknowledge()
                await js.delete_stream(name)
                await js.add_stream(name=name, subjects=[subject])
            assert ids[0] != ids[1]
            assert {delivery_id.split(".")[1] for delivery_id in ids} == {"1"}


def pulls_of(js, stream):
    async def check() -> bool:
        return (await js.consumer_info(stream, "kubeai")).num_waiting == 1

    return check


class TestCoreOptions:
    async def test_closed_subscription_hands_over_what_it_has_not_handled(self, server):
        url, bodies = f"nats://subject.{next(_numbers)}?queue=q", set(numbered(100))
        async with (
            topic_of(url.partition("?")[0], server.environment) as topic,
            subscribed(url, server.environment) as one,
        ):
            for body in bodies:
                await topic.publish(body, {"a": "b"})
            in_hand = await receive(one, 1)
            async with subscribed(url, server.environment) as two:
                await in_hand[0].release()  # to either of them
                await one.close()
                deliveries = await receive(two, len(bodies))
        assert {delivery.body for delivery in deliveries} == bodies
        assert {delivery.attributes["a"] for delivery in deliveries} == {"b"}

    async def test_flood_is_bounded_and_reported(self, server, monkeypatch, caplog):
        monkeypatch.setattr(nats_core, "PENDING_MAX_COUNT", 100)
        warnings = []
        monkeypatch.setattr(nats_core.log, "warning", lambda *_, **fields: warnings.append(fields))
        url = f"nats://subject.{next(_numbers)}"
        async with (
            topic_of(url, server.environment) as topic,
            subscribed(url, server.environment) as subscription,
        ):
            await asyncio.gather(*(topic.publish(body, {}) for body in numbered(1000)))
            inner: Any = subscription
            backlog = inner._backlog
            await until(
                "all have arrived", lambda: len(backlog.messages) + backlog._dropped == 1000
            )
            kept = 0
            with contextlib.suppress(TimeoutError):
                while True:
                    async with asyncio.timeout(ABSENCE_S):
                        kept += len(await subscription.receive(50))
            assert kept == 100
            assert sum(fields["count"] for fields in warnings) == 900

    async def test_what_has_arrived_outlives_the_connection(self, server):
        url = f"nats://subject.{next(_numbers)}?queue=q"
        broker = open_broker(url, CONFIG_PATH, server.environment)
        one = await broker.subscribe()
        async with topic_of(url.partition("?")[0], server.environment) as topic:
            await asyncio.gather(*(topic.publish(body, {}) for body in numbered(500)))
        inner: Any = one
        await until("all have arrived", lambda: len(inner._backlog.messages) == 500)
        (in_hand,) = await one.receive(1)
        server.restart()
        await until("the end is noticed", lambda: inner.connection.lifetime._reason)
        with pytest.raises(BrokerUnavailable):
            await in_hand.acknowledge()
        await one.close()
        two = await broker.subscribe()
        try:
            rest = await receive(two, 499)
        finally:
            await two.close()
        assert {in_hand.body, *(delivery.body for delivery in rest)} == set(numbered(500))

    async def test_message_of_go_that_is_released_is_still_decoded(self, server):
        subject = f"subject.{next(_numbers)}"
        async with subscribed(f"nats://{subject}?queue=q", server.environment) as subscription:
            client = await nats.connect(server.environment["NATS_SERVER_URL"])
            await client.publish(subject, GO_MESSAGE)
            await client.close()
            (first,) = await receive(subscription, 1)
            await first.release()
            (again,) = await receive(subscription, 1)
        assert again.id == first.id
        assert again.body == first.body == b'{"path": "/v1/completions"}'
        assert again.attributes["request_message_id"] == "1"

    async def test_message_of_go_without_natsv2_is_decoded(self, server):
        subject = f"subject.{next(_numbers)}"
        async with subscribed(f"nats://{subject}", server.environment) as subscription:
            client = await nats.connect(server.environment["NATS_SERVER_URL"])
            await client.publish(subject, GO_MESSAGE)
            await client.close()
            (delivery,) = await receive(subscription, 1)
        assert delivery.attributes == {"request_message_id": "1"}
        assert delivery.body == b'{"path": "/v1/completions"}'


# -- authentication and TLS ------------------------------------------------------------------------


def server_certificate(folder: Path) -> tuple[Path, Path]:
    """Files of a self-signed certificate for 127.0.0.1, and of its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = certificates.name("nats")
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    signed = (
        certificates.builder(name, name, key.public_key())
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .sign(key, hashes.SHA256())
    )
    (folder / "tls.crt").write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    (folder / "tls.key").write_bytes(certificates.pem_of(key))
    return folder / "tls.crt", folder / "tls.key"


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """A server with TLS; its user may neither publish to nor subscribe to "forbidden"."""
    folder = tmp_path_factory.mktemp("guarded")
    certificate, key = server_certificate(folder)
    allowed = {"deny": ["forbidden"]}
    user = {
        "user": "us@er",
        "password": PASSWORD,
        "permissions": {"publish": allowed, "subscribe": allowed},
    }
    server = NatsServer(
        folder,
        scheme="tls",
        login=f"us%40er:{PASSWORD}@",
        authorization={"users": [user]},
        tls={"cert_file": str(certificate), "key_file": str(key)},
    )
    server.environment["NATS_CA"] = str(certificate)
    server.start()
    yield server
    server.kill()


class TestAuthentication:
    async def test_user_and_authority_are_taken_from_the_environment(self, guarded):
        async with (
            subscribed("nats://allowed", guarded.environment) as subscription,
            topic_of("nats://allowed", guarded.environment) as topic,
        ):
            await topic.publish(b"{}", {})
            assert (await receive(subscription, 1))[0].body == b"{}"

    async def test_forbidden_subject_is_unavailable(self, guarded):
        with pytest.raises(BrokerUnavailable, match=r"(?i)permissions violation.*forbidden"):
            await open_broker("nats://forbidden", CONFIG_PATH, guarded.environment).subscribe()
        for url in ("nats://forbidden", "nats://forbidden?jetstream"):
            async with topic_of(url, guarded.environment) as topic, asyncio.timeout(TIMEOUT_S / 2):
                refusal = r"(?i)permissions violation.*forbidden"
                with pytest.raises(BrokerUnavailable, match=refusal):
                    await topic.publish(b"{}", {})

    @pytest.mark.parametrize(
        ("changes", "part"),
        [
            ({"NATS_SERVER_URL": "tls://us%40er:{other}@127.0.0.1:{port}"}, "uthorization"),
            ({"NATS_CA": ""}, "certificate verify failed"),
            ({"NATS_CA": "/no/such/file"}, "No such file"),
        ],
    )
    async def test_refused_connection_is_unavailable_without_credentials(
        self, guarded, changes, part
    ):
        changes = {
            name: text.format(other=f"{PASSWORD}-other", port=guarded.port)
            for name, text in changes.items()
        }
        broker = open_broker("nats://allowed", CONFIG_PATH, guarded.environment | changes)
        with pytest.raises(BrokerUnavailable, match=part) as raised:
            await broker.subscribe()
        assert PASSWORD not in str(raised.value)

    async def test_tls_is_not_given_up(self, server):
        """The server has no TLS, so nothing may be sent to it."""
        environment = {"NATS_SERVER_URL": f"tls://user:{PASSWORD}@127.0.0.1:{server.port}"}
        with pytest.raises(BrokerUnavailable, match="does not support TLS"):
            await open_broker("nats://allowed", CONFIG_PATH, environment).subscribe()
