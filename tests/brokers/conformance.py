"""The behaviours that KubeAI needs from every message broker, as tests against a real one.

A broker's test module subclasses :class:`Conformance` and names how to start the server and how to
make a new pair of URLs::

    class TestJetStream(Conformance):
        @pytest.fixture(scope="class")
        def server(self, tmp_path_factory): ...   # start it, yield it, stop it

        async def make(self, server): ...          # a Pair that no other test uses

The messages that are published to ``Pair.topic`` arrive at ``Pair.subscription``. A behaviour that
the broker cannot have is named in ``cannot``, with the reason.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import time
from typing import Any, ClassVar, NamedTuple

import pytest
from brokers.servers import BrokerServer
from brokers.subscriptions import (
    CONFIG_PATH,
    WAIT_S,
    assert_nothing_arrives,
    receive,
    receive_one,
    subscribed,
    topic_of,
    until_available,
)
from harness import until

from kubeai.brokers.base import (
    REQUEST_MESSAGE_ID,
    TIMEOUT_S,
    BrokerUnavailable,
    Delivery,
    MessageTooLarge,
    Subscription,
)
from kubeai.brokers.urls import open_broker
from kubeai.errors import ConfigError

ABSENCE_S = 1.0  # for something that must not happen, when no deadline of the broker is longer
PASSWORD = "hunter2-do-not-print"  # in the environment for a test that looks for it in errors


class Pair(NamedTuple):
    """URLs of a topic and of the subscription that receives what is published to it."""

    topic: str
    subscription: str


# -- what tests of a broker use --------------------------------------------------------------------


def numbered(count: int) -> list[bytes]:
    """Distinct requests."""
    return [json.dumps({"path": "/v1/completions", "n": n}).encode() for n in range(count)]


def _json_of(size_bytes: int) -> bytes:
    """A JSON text of a size, with characters of one to four bytes in UTF-8."""
    start, end, text = b'{"body": "', b'"}', "aé漢🙂\\u0000\\n".encode()
    rest = size_bytes - len(start) - len(end)
    return start + text * (rest // len(text)) + b"x" * (rest % len(text)) + end


# -- the behaviours --------------------------------------------------------------------------------

# Tests in which a slow machine must not have messages redelivered: their brokers need a deadline
# that is longer than ``redelivery_s``.
RECEIVES_MANY = frozenset(
    {
        "test_concurrent_publishing_loses_nothing",
        "test_count_max_leaves_the_rest_to_others",
        "test_competing_subscriptions_share_without_loss",
        "test_lag_counts_waiting_messages",
    }
)


class Conformance:
    """Tests of a broker. See the module's docstring."""

    pytestmark: ClassVar = [pytest.mark.broker, pytest.mark.timeout(240)]

    # Test (without "test_") → why the broker cannot pass it.
    cannot: ClassVar[dict[str, str]] = {}
    body_bytes: ClassVar[int] = 900_000  # of a message that the broker takes
    too_large_bytes: ClassVar[int | None] = None  # of one that it refuses
    # The longest time until a message comes again after its connection was closed without an
    # acknowledgement. With an ack deadline, make it short (1 to 3 s) in `make`, and this longer.
    redelivery_s: ClassVar[float] = ABSENCE_S
    # Whether an acknowledged message cannot come again after the broker was killed by SIGKILL. If
    # the broker stores acknowledgements late, say so where this is set to False.
    keeps_acknowledgements: ClassVar[bool] = True
    bad_urls: ClassVar[dict[str, str]] = {}  # URL → a part of the error
    variables: ClassVar[tuple[str, ...]] = ()  # that the broker's URLs need
    # An environment in which the broker cannot be reached, with PASSWORD if there can be one.
    unreachable: ClassVar[dict[str, str] | None] = None

    async def make(self, server: Any) -> Pair:
        """URLs of a new topic and its subscription."""
        raise NotImplementedError

    @pytest.fixture(autouse=True)
    def _possible(self, request: pytest.FixtureRequest) -> None:
        unknown = [name for name in self.cannot if not hasattr(self, f"test_{name}")]
        assert not unknown, f"there are no tests {unknown}"
        if reason := self.cannot.get(request.function.__name__.removeprefix("test_")):
            pytest.skip(reason)

    @pytest.fixture
    def environment(self, server: BrokerServer) -> dict[str, str]:
        return server.environment

    @pytest.fixture
    async def pair(self, server: BrokerServer) -> Pair:
        return await self.make(server)

    # Publishing and receiving

    async def test_message_arrives_with_its_body_and_attributes(self, pair, environment):
        attributes = {REQUEST_MESSAGE_ID: "a/b:1 %41+c", "other": "x=y"}
        async with subscribed(pair.subscription, environment) as subscription:
            async with topic_of(pair.topic, environment) as topic:
                await topic.publish(b'{"path": "/v1/completions"}', attributes)
            delivery = await receive_one(subscription)
            assert delivery.body == b'{"path": "/v1/completions"}'
            assert attributes.items() <= delivery.attributes.items()
            assert delivery.id
            assert delivery.deliveries in (0, 1)
            await delivery.acknowledge()

    async def test_message_without_attributes_arrives(self, pair, environment):
        async with subscribed(pair.subscription, environment) as subscription:
            async with topic_of(pair.topic, environment) as topic:
                await topic.publish(b"{}", {})
            delivery = await receive_one(subscription)
            assert delivery.body == b"{}"
            await delivery.acknowledge()

    async def test_large_message_arrives_unchanged(self, pair, environment):
        body = _json_of(self.body_bytes)
        assert len(body) == self.body_bytes
        async with subscribed(pair.subscription, environment) as subscription:
            async with topic_of(pair.topic, environment) as topic:
                await topic.publish(body, {REQUEST_MESSAGE_ID: "1"})
            delivery = await receive_one(subscription)
            assert delivery.body == body
            await delivery.acknowledge()

    async def test_too_large_message_is_refused_and_the_topic_still_works(self, pair, environment):
        assert self.too_large_bytes is not None
        body = _json_of(self.too_large_bytes)
        async with subscribed(pair.subscription, environment) as subscription:
            async with topic_of(pair.topic, environment) as topic:
                with pytest.raises(MessageTooLarge, match=r"\d"):
                    await topic.publish(body, {REQUEST_MESSAGE_ID: "1"})
                await topic.publish(b'{"small": true}', {REQUEST_MESSAGE_ID: "1"})
            delivery = await receive_one(subscription)
            assert delivery.body == b'{"small": true}'
            await delivery.acknowledge()

    async def test_concurrent_publishing_loses_nothing(self, pair, environment):
        bodies = numbered(100)
        async with subscribed(pair.subscription, environment) as subscription:
            async with topic_of(pair.topic, environment) as topic:
                await asyncio.gather(*(topic.publish(body, {}) for body in bodies))
            deliveries = await receive(subscription, len(bodies))
            assert sorted(delivery.body for delivery in deliveries) == sorted(bodies)
            assert len({delivery.id for delivery in deliveries}) == len(bodies)
            await asyncio.gather(*(delivery.acknowledge() for delivery in deliveries))

    # Acknowledging

    async def test_acknowledged_message_never_comes_again(self, pair, environment):
        async with topic_of(pair.topic, environment) as topic:
            async with subscribed(pair.subscription, environment) as subscription:
                await topic.publish(b'{"n": 1}', {})
                await (await receive_one(subscription)).acknowledge()
            async with subscribed(pair.subscription, environment) as subscription:
                await assert_nothing_arrives(subscription, self.redelivery_s + ABSENCE_S)

    async def test_unacknowledged_message_comes_again_with_the_same_id(self, pair, environment):
        async with topic_of(pair.topic, environment) as topic:
            async with subscribed(pair.subscription, environment) as subscription:
                await topic.publish(b'{"n": 1}', {"a": "b"})
                first = await receive_one(subscription)
            with pytest.raises(BrokerUnavailable):
                await first.acknowledge()
            async with subscribed(pair.subscription, environment) as subscription:
                second = await receive_one(subscription)
                assert (second.id, second.body) == (first.id, first.body)
                assert second.attributes["a"] == "b"
                await second.acknowledge()
                await assert_nothing_arrives(subscription, self.redelivery_s + ABSENCE_S)

    async def test_released_message_comes_again_at_once(self, pair, environment):
        async with (
            topic_of(pair.topic, environment) as topic,
            subscribed(pair.subscription, environment) as subscription,
        ):
            await topic.publish(b'{"n": 1}', {"a": "b"})
            first = await receive_one(subscription)
            await first.release()
            second = await receive_one(subscription)
            assert (second.id, second.body) == (first.id, first.body)
            assert second.attributes["a"] == "b"
            await second.acknowledge()
            await assert_nothing_arrives(subscription, self.redelivery_s + ABSENCE_S)

    async def test_deliveries_are_counted(self, pair, environment):
        counts = []
        async with topic_of(pair.topic, environment) as topic:
            await topic.publish(b'{"n": 1}', {})
            for _ in range(3):
                async with subscribed(pair.subscription, environment) as subscription:
                    counts.append((await receive_one(subscription)).deliveries)
        assert counts == [1, 2, 3]

    async def test_extended_message_stays_beyond_the_deadline(self, pair, environment):
        async with (
            topic_of(pair.topic, environment) as topic,
            subscribed(pair.subscription, environment) as subscription,
        ):
            deadline_s = subscription.ack_deadline_s
            assert deadline_s is not None
            await topic.publish(b'{"n": 1}', {})
            delivery = await receive_one(subscription)
            extending = asyncio.create_task(self._extend(delivery, deadline_s / 3))
            try:
                async with subscribed(pair.subscription, environment) as other:
                    await assert_nothing_arrives(other, deadline_s * 2.5)
                    await delivery.acknowledge()
            finally:
                extending.cancel()
                await asyncio.gather(extending, return_exceptions=True)

    @staticmethod
    async def _extend(delivery: Delivery, interval_s: float) -> None:
        while True:
            await asyncio.sleep(interval_s)
            await delivery.extend()

    async def test_message_comes_again_after_its_deadline(self, pair, environment):
        async with (
            topic_of(pair.topic, environment) as topic,
            subscribed(pair.subscription, environment) as subscription,
        ):
            assert subscription.ack_deadline_s is not None
            await topic.publish(b'{"n": 1}', {})
            first = await receive_one(subscription)
            second = await receive_one(subscription)
            assert second.id == first.id
            await second.acknowledge()

    # Sharing

    async def test_count_max_leaves_the_rest_to_others(self, pair, environment):
        async with (
            topic_of(pair.topic, environment) as topic,
            subscribed(pair.subscription, environment) as one,
            subscribed(pair.subscription, environment) as two,
        ):
            await asyncio.gather(*(topic.publish(body, {}) for body in numbered(10)))
            mine = await receive(one, 3)
            others = await receive(two, 7)
            assert {delivery.body for delivery in (*mine, *others)} == set(numbered(10))
            # A second call may ask for more while messages are in hand.
            await topic.publish(b'{"n": "more"}', {})
            mine += await receive(one, 1)
            assert mine[-1].body == b'{"n": "more"}'
            await asyncio.gather(*(delivery.acknowledge() for delivery in (*mine, *others)))

    async def test_competing_subscriptions_share_without_loss(self, pair, environment):
        bodies = numbered(200)
        received: list[bytes] = []

        async def consume(subscription: Subscription) -> None:
            while True:
                for delivery in await subscription.receive(8):
                    received.append(delivery.body)
                    await delivery.acknowledge()

        async with (
            topic_of(pair.topic, environment) as topic,
            subscribed(pair.subscription, environment) as one,
            subscribed(pair.subscription, environment) as two,
        ):
            tasks = [asyncio.create_task(consume(subscription)) for subscription in (one, two)]
            try:
                await asyncio.gather(*(topic.publish(body, {}) for body in bodies))
                await until(
                    "all have arrived",
                    lambda: len(received) >= len(bodies) or any(task.done() for task in tasks),
                    WAIT_S,
                )
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        assert sorted(received) == sorted(bodies)

    async def test_cancelled_receive_loses_nothing(self, pair, environment):
        bodies = numbered(50)
        pauses = random.Random(1)
        left = set(bodies)
        async with (
            topic_of(pair.topic, environment) as topic,
            subscribed(pair.subscription, environment) as subscription,
        ):
            publishing = asyncio.gather(*(topic.publish(body, {}) for body in bodies))
            async with asyncio.timeout(WAIT_S):
                for attempt in itertools.count():
                    try:
                        # The first attempts are too short, so that they end at any point.
                        async with asyncio.timeout(pauses.random() * 0.002 * attempt):
                            deliveries = await subscription.receive(3)
                    except TimeoutError:
                        continue
                    for delivery in deliveries:
                        left.discard(delivery.body)
                        await delivery.acknowledge()
                    if not left:
                        break
            await publishing

    # A broker that goes away

    async def test_killed_broker_is_noticed_and_loses_nothing(self, server, pair, environment):
        bodies = numbered(20)
        subscription = await open_broker(pair.subscription, CONFIG_PATH, environment).subscribe()
        topic = await open_broker(pair.topic, CONFIG_PATH, environment).open_topic()
        await asyncio.gather(*(topic.publish(body, {}) for body in bodies))
        deliveries = await receive(subscription, 10)
        done, in_hand = deliveries[:5], deliveries[5:]
        await asyncio.gather(*(delivery.acknowledge() for delivery in done))
        await subscription.lag()  # a round trip after the acknowledgements, which may have none

        server.kill()
        try:
            started = time.monotonic()
            with pytest.raises(BrokerUnavailable):  # noqa: PT012  # what was on the way may arrive
                async with asyncio.timeout(TIMEOUT_S + 10):
                    while True:
                        await subscription.receive(1)
            with pytest.raises(BrokerUnavailable):
                await topic.publish(b"{}", {})
            with pytest.raises(BrokerUnavailable):
                await in_hand[0].acknowledge()
            assert time.monotonic() - started < 3 * TIMEOUT_S
            await asyncio.gather(subscription.close(), topic.close())
            with pytest.raises(BrokerUnavailable):
                await open_broker(pair.subscription, CONFIG_PATH, environment).subscribe()
        finally:
            server.start()

        forbidden = {delivery.body for delivery in done} if self.keeps_acknowledgements else set()
        left = set(bodies) - {delivery.body for delivery in done}

        async def receive_rest() -> bool:
            async with subscribed(pair.subscription, environment) as subscription:
                while left:
                    for delivery in await subscription.receive(5):
                        assert delivery.body not in forbidden
                        left.discard(delivery.body)
                        await delivery.acknowledge()
            return True

        await until_available(receive_rest)

    async def test_silent_broker_is_noticed(self, server, pair, environment):
        """A broker that answers nothing, as behind a network that has been cut."""
        topic = await open_broker(pair.topic, CONFIG_PATH, environment).open_topic()
        server.suspend()
        try:
            with pytest.raises(BrokerUnavailable):
                async with asyncio.timeout(TIMEOUT_S + 10):
                    await topic.publish(b"{}", {})
            async with asyncio.timeout(TIMEOUT_S + 10):
                await topic.close()
        finally:
            server.resume()
        topic = await until_available(open_broker(pair.topic, CONFIG_PATH, environment).open_topic)
        await topic.close()

    async def test_closing_twice_does_not_raise(self, pair, environment):
        subscription = await open_broker(pair.subscription, CONFIG_PATH, environment).subscribe()
        topic = await open_broker(pair.topic, CONFIG_PATH, environment).open_topic()
        for _ in range(2):
            await subscription.close()
            await topic.close()
        with pytest.raises(BrokerUnavailable):
            await subscription.receive(1)
        with pytest.raises(BrokerUnavailable):
            await topic.publish(b"{}", {})

    async def test_closing_ends_a_waiting_receive(self, pair, environment):
        subscription = await open_broker(pair.subscription, CONFIG_PATH, environment).subscribe()
        waiting = asyncio.create_task(subscription.receive(1))
        await asyncio.sleep(0)
        await subscription.close()
        async with asyncio.timeout(WAIT_S):
            with pytest.raises(BrokerUnavailable):
                await waiting

    # What it reports

    async def test_lag_counts_waiting_messages(self, pair, environment):
        async with (
            topic_of(pair.topic, environment) as topic,
            subscribed(pair.subscription, environment) as subscription,
        ):
            assert await subscription.lag() == 0
            await asyncio.gather(*(topic.publish(body, {}) for body in numbered(5)))

            async def lag_is_five() -> bool:
                return await subscription.lag() == 5

            await until("the lag is 5", lag_is_five, WAIT_S)
            for delivery in await receive(subscription, 5):
                await delivery.acknowledge()

    async def test_unreachable_broker_is_reported_without_credentials(self, pair):
        assert self.unreachable is not None
        for url, method in ((pair.subscription, "subscribe"), (pair.topic, "open_topic")):
            broker = open_broker(url, CONFIG_PATH, self.unreachable)
            async with asyncio.timeout(TIMEOUT_S + 10):
                with pytest.raises(BrokerUnavailable) as raised:
                    await getattr(broker, method)()
            assert PASSWORD not in str(raised.value)

    # Configuration

    def test_bad_urls_are_refused(self, server):
        assert self.bad_urls
        for url, part in self.bad_urls.items():
            with pytest.raises(ConfigError) as raised:
                open_broker(url, CONFIG_PATH, server.environment)
            assert str(raised.value).startswith(f"{CONFIG_PATH}: ")
            assert part in str(raised.value)

    async def test_missing_variables_are_named(self, server, pair):
        for name in self.variables:
            environment = {key: text for key, text in server.environment.items() if key != name}
            with pytest.raises(ConfigError, match=name):
                open_broker(pair.subscription, CONFIG_PATH, environment)
