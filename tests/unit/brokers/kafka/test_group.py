"""A member of a group, with the library's consumer and admin client replaced."""

import asyncio
from types import SimpleNamespace

import pytest
from aiokafka import TopicPartition
from aiokafka.errors import CommitFailedError, KafkaConnectionError
from aiokafka.structs import ConsumerRecord, OffsetAndMetadata

from kubeai.brokers.base import BrokerUnavailable
from kubeai.brokers.kafka.client import CLOSE_TIMEOUT_S
from kubeai.brokers.kafka.group import UNREACHABLE_S, GroupSubscription

ONE, TWO = TopicPartition("requests", 0), TopicPartition("requests", 1)


class Kafka:
    """The broker's state, the consumer and the admin client in one."""

    def __init__(self, counts: dict[TopicPartition, int]) -> None:
        self.counts = counts  # messages in each partition
        self.stored: dict[TopicPartition, tuple[int, str]] = {}
        self.positions: dict[TopicPartition, int] = {}
        self.commits = 0
        self.failures: list[Exception] = []  # of the next commits
        self.reachable = True
        # The tasks of the library that are looked after.
        self._fetcher = SimpleNamespace(error_future=asyncio.Future())
        self._coordinator = SimpleNamespace(_coordination_task=asyncio.Future())

    def seek(self, key, offset):
        self.positions[key] = offset

    def pause(self, *keys):
        pass

    resume = pause

    async def getmany(self, timeout_ms, max_records):
        for key, position in self.positions.items():
            records = range(position, self.counts[key])[:max_records]
            if records:
                self.positions[key] = records[-1] + 1
                return {key: [record(key, offset) for offset in records]}
        await asyncio.sleep(timeout_ms / 1000)
        return {}

    async def commit(self, offsets):
        await asyncio.sleep(0)
        if self.failures:
            raise self.failures.pop(0)
        self.commits += 1
        self.stored |= offsets

    async def list_consumer_group_offsets(self, group, partitions):
        if not self.reachable:
            raise KafkaConnectionError("connection refused")
        return {key: OffsetAndMetadata(*self.stored.get(key, (-1, ""))) for key in partitions}

    async def end_offsets(self, keys):
        return {key: self.counts[key] for key in keys}

    async def beginning_offsets(self, keys):
        return dict.fromkeys(keys, 0)

    def partitions_for_topic(self, topic):
        return {key.partition for key in self.counts}

    async def stop(self):
        pass

    close = start = stop


def record(key, offset):
    return ConsumerRecord(
        key.topic, key.partition, offset, 0, 0, None, b"{}", None, -1, 2, (("a", b"b"), ("c", None))
    )


@pytest.fixture
async def kafka():
    return Kafka({ONE: 10, TWO: 10})


@pytest.fixture
async def member(kafka):
    """A member that owns both partitions."""
    member = GroupSubscription({}, "group", ["requests"], "oldest")
    await member._admin.close()
    await member._consumer.stop()
    member._admin = member._consumer = kafka
    member._tasks = [asyncio.create_task(member._commit_changes())]
    await member.on_partitions_revoked([])
    await member.on_partitions_assigned([ONE, TWO])
    yield member
    await member.close()


async def rebalance(member, keys):
    await member.on_partitions_revoked(list(member._partitions))
    await member.on_partitions_assigned(keys)


async def test_received_messages_are_counted_before_they_are_returned(kafka, member):
    (first,) = await member.receive(1)
    assert (first.id, first.deliveries) == ("requests/0/0", 1)
    assert first.attributes == {"a": "b", "c": ""}
    assert kafka.stored[ONE] == (0, "kubeai:1")


async def test_messages_in_hand_stay_ours_if_the_partition_comes_back_unchanged(kafka, member):
    deliveries = await member.receive(3)
    await deliveries[1].acknowledge()
    await rebalance(member, [ONE])
    assert kafka.positions[ONE] == 3  # nothing is read twice
    await deliveries[0].acknowledge()
    assert kafka.stored[ONE] == (2, "kubeai:1")


async def test_messages_in_hand_are_lost_if_another_member_has_committed(kafka, member):
    deliveries = await member.receive(3)
    await member.on_partitions_revoked([ONE, TWO])
    kafka.stored[ONE] = (2, "")
    await member.on_partitions_assigned([ONE, TWO])
    for delivery in deliveries:
        await delivery.acknowledge()
    assert kafka.stored[ONE] == (2, "")
    assert (await member.receive(1))[0].id == "requests/0/2"


async def test_acknowledgement_after_the_partition_has_moved_has_no_effect(kafka, member):
    (delivery,) = await member.receive(1)
    await rebalance(member, [TWO])
    before = dict(kafka.stored)
    await delivery.acknowledge()
    await delivery.release()
    assert kafka.stored == before
    assert (await member.receive(1))[0].id == "requests/1/0"


async def test_acknowledgement_during_a_rebalance_waits_for_its_end(kafka, member):
    (delivery,) = await member.receive(1)
    await member.on_partitions_revoked([ONE, TWO])
    acknowledging = asyncio.create_task(delivery.acknowledge())
    for _ in range(10):
        await asyncio.sleep(0)
    assert not acknowledging.done()
    assert kafka.stored[ONE] == (0, "kubeai:1")
    await member.on_partitions_assigned([ONE, TWO])
    await acknowledging
    assert kafka.stored[ONE] == (1, "")


@pytest.mark.looptime
async def test_commit_that_a_rebalance_refuses_is_repeated(kafka, member):
    (delivery,) = await member.receive(1)
    kafka.failures.append(CommitFailedError("the group has rebalanced"))
    await delivery.acknowledge()
    assert kafka.stored[ONE] == (1, "")


async def test_commit_that_is_refused_for_good_ends_the_subscription(kafka, member):
    (delivery,) = await member.receive(1)
    kafka.failures.append(KafkaConnectionError("not authorized"))
    with pytest.raises(BrokerUnavailable, match="cannot commit an offset"):
        await delivery.acknowledge()
    with pytest.raises(BrokerUnavailable):
        await member.receive(1)


async def test_acknowledgements_at_once_share_commits(kafka, member):
    deliveries = await member.receive(10)
    before = kafka.commits
    await asyncio.gather(*(delivery.acknowledge() for delivery in deliveries))
    assert kafka.stored[ONE] == (10, "")
    assert kafka.commits - before <= 2


async def test_released_message_is_received_again_and_counted(kafka, member):
    deliveries = await member.receive(2)
    await deliveries[0].release()
    (again,) = await member.receive(1)
    assert (again.id, again.deliveries) == (deliveries[0].id, 2)


async def test_cancelled_receive_returns_its_messages_next_time(kafka, member):
    receiving = asyncio.create_task(member.receive(2))
    for _ in range(3):  # the messages have been fetched, and are not counted so far
        await asyncio.sleep(0)
    assert kafka.positions[ONE] == 2
    assert not receiving.done()
    receiving.cancel()
    await asyncio.gather(receiving, return_exceptions=True)
    deliveries = await member.receive(2)
    assert [each.id for each in deliveries] == ["requests/0/0", "requests/0/1"]
    assert {each.deliveries for each in deliveries} == {1}


async def test_lag_counts_what_waits_here_and_in_partitions_of_others(kafka, member):
    await member.receive(4)
    await rebalance(member, [ONE])
    kafka.stored[TWO] = (5, "kubeai:1+")
    assert await member.lag() == 6 + 3


async def test_partition_whose_log_begins_again_is_read_from_its_beginning(kafka, member):
    deliveries = await member.receive(10)
    kafka.seek(ONE, 0)  # as the library does when the offset is out of range
    again = await member.receive(10)
    assert [each.id for each in again] == [each.id for each in deliveries]
    await again[0].acknowledge()
    assert kafka.stored[ONE] == (1, "kubeai:" + "1" * 9)


@pytest.mark.looptime
async def test_subscription_ends_when_the_coordinator_has_not_answered_for_long(kafka, member):
    watching = asyncio.create_task(member._watch())
    await asyncio.sleep(10 * UNREACHABLE_S)
    await member.lag()
    kafka.reachable = False
    await watching
    with pytest.raises(BrokerUnavailable, match="no answer of its coordinator"):
        await member.receive(1)


@pytest.mark.looptime
async def test_subscription_ends_when_a_rebalance_never_ends(kafka, member):
    watching = asyncio.create_task(member._watch())
    await member.on_partitions_revoked([ONE, TWO])
    with pytest.raises(BrokerUnavailable, match="in a rebalance"):
        await member.receive(1)
    await watching


@pytest.mark.looptime
async def test_subscription_ends_when_the_library_has_failed(kafka, member):
    watching = asyncio.create_task(member._watch())
    kafka._fetcher.error_future.set_result(None)
    await watching
    with pytest.raises(BrokerUnavailable, match="the client has failed"):
        await member.receive(1)


@pytest.mark.looptime
async def test_closing_does_not_wait_for_a_broker_that_does_not_answer(kafka, member):
    async def stop():
        await asyncio.sleep(1000)

    kafka.stop = kafka.close = stop
    kafka._coordinator = kafka._fetcher = None
    kafka._client = kafka
    loop = asyncio.get_running_loop()
    before = loop.time()
    await member.close()
    assert loop.time() - before <= 3 * CLOSE_TIMEOUT_S


async def test_closing_survives_a_library_that_is_cancelled_by_itself(kafka, member):
    closed = []

    async def stop():
        raise asyncio.CancelledError  # of one of its tasks

    async def close():
        closed.append(True)

    kafka.stop, kafka.close = stop, close
    kafka._coordinator = kafka._fetcher = None
    kafka._client = kafka
    await member.close()
    assert len(closed) == 2  # the consumer's connections, and the admin client
