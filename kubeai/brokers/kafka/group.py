"""A member of a Kafka consumer group, as a subscription. See ``broker`` for what it promises."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.coordinator.assignors.sticky.sticky_assignor import StickyPartitionAssignor
from aiokafka.errors import CommitFailedError, IllegalStateError, KafkaError

from kubeai.brokers.base import TIMEOUT_S, BrokerUnavailable, Delivery, Subscription
from kubeai.brokers.kafka.client import (
    REQUEST_TIMEOUT_S,
    attempt,
    check_topics,
    close_consumer,
    is_running,
    milliseconds,
    reason_of,
)
from kubeai.brokers.kafka.progress import Progress, undelivered
from kubeai.logs import get_logger

log = get_logger(__name__)

SESSION_TIMEOUT_S = 10.0  # until the group gives up a member that has vanished
HEARTBEAT_S = 1.0  # members notice a rebalance with their next heartbeat
REBALANCE_TIMEOUT_S = 8.0  # less than the session timeout: no heartbeat is sent meanwhile
PROBE_S = 2.0
UNREACHABLE_S = 15.0  # enough for another broker to become the group's coordinator
RETRY_S = 0.1
FETCH_WAIT_S = 10.0  # for messages, before the wait begins again
POLL_S = 0.25  # for which the broker waits for messages; a resumed partition waits for that as well
FETCH_MAX_BYTES = 16 << 20  # of one response; a single larger message is returned nevertheless
_NEVER_MS = 2**31 - 1


class _Partition:
    """A partition that this member of the group owns, from one assignment on until it moves."""

    def __init__(self, key: TopicPartition, progress: Progress, stored: tuple[int, str] | None):
        self.key = key
        self.progress = progress
        self.stored = stored  # what Kafka has; None: nothing
        self.version = 0 if stored else 1  # of the progress
        self.committed_version = 0
        self.owned = True
        self.paused = False


class _Delivery(Delivery):
    deliveries = 0

    def __init__(self, subscription: GroupSubscription, partition: _Partition, record: Any) -> None:
        self._subscription = subscription
        self.partition = partition
        self.offset: int = record.offset
        self.id = f"{record.topic}/{record.partition}/{record.offset}"
        self.body = record.value or b""
        self.attributes = {
            name: (value or b"").decode(errors="replace") for name, value in record.headers
        }

    async def acknowledge(self) -> None:
        await self._subscription.acknowledge(self)

    async def release(self) -> None:
        self._subscription.release(self)

    async def extend(self) -> None:
        pass


class GroupSubscription(Subscription, ConsumerRebalanceListener):  # type: ignore[misc]
    """A member of ``group``, which receives messages of ``topics``.

    ``offset``: where a group begins that has no committed offset, ``oldest`` or ``newest``.
    """

    def __init__(
        self, client: Mapping[str, Any], group: str, topics: list[str], offset: str
    ) -> None:
        self._group = group
        self._topics = topics
        self._from_oldest = offset == "oldest"
        common = {**client, "request_timeout_ms": milliseconds(REQUEST_TIMEOUT_S)}
        self._admin = AIOKafkaAdminClient(**common)
        self._consumer = AIOKafkaConsumer(
            **common,
            group_id=group,
            enable_auto_commit=False,
            auto_offset_reset="earliest",  # after Kafka has deleted messages; not at the beginning
            session_timeout_ms=milliseconds(SESSION_TIMEOUT_S),
            heartbeat_interval_ms=milliseconds(HEARTBEAT_S),
            max_poll_interval_ms=_NEVER_MS,  # a message may be in hand for as long as it takes
            fetch_max_wait_ms=milliseconds(POLL_S),
            fetch_max_bytes=FETCH_MAX_BYTES,
            # The library keeps an assignor's state in its class.
            partition_assignment_strategy=[type("_Sticky", (StickyPartitionAssignor,), {})],
        )
        self._partitions: dict[TopicPartition, _Partition] = {}
        self._waiting: deque[_Delivery] = deque()  # fetched or released; in `receive` next
        self._settled = asyncio.Event()  # the assignment is known, and no rebalance is going on
        self._changed = asyncio.Event()  # there may be something to receive
        self._uncommitted = asyncio.Event()
        self._round = asyncio.get_running_loop().create_future()  # done after the next commit
        self._committing = asyncio.Lock()
        self._fetching: asyncio.Task[None] | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._ended: str | None = None  # why
        self._closing: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Join the group, and wait for the first assignment. KafkaError, OSError."""
        await self._admin.start()
        await check_topics(self._admin, self._topics)
        self._consumer.subscribe(topics=self._topics, listener=self)
        await self._consumer.start()
        self._tasks = [
            asyncio.create_task(self._commit_changes()),
            asyncio.create_task(self._watch()),
        ]
        for task in self._tasks:  # the library can cancel it, too
            task.add_done_callback(lambda _: self._end("the client has failed"))
        await self._settled.wait()
        await self._flush(set(self._partitions.values()))
        self._check()

    async def receive(self, count_max: int) -> list[Delivery]:
        """As :meth:`Subscription.receive`."""
        while True:
            self._check()
            if self._waiting and self._settled.is_set():
                if deliveries := await self._hand_out(count_max):
                    return deliveries
                continue
            if self._fetching is None or self._fetching.done():
                self._fetching = asyncio.create_task(self._fetch(count_max))
            self._changed.clear()
            await self._changed.wait()

    async def _hand_out(self, count_max: int) -> list[Delivery]:
        """Return waiting messages, after their deliveries have been counted in Kafka."""
        count = min(count_max, len(self._waiting))
        deliveries = [self._waiting.popleft() for _ in range(count)]
        for delivery in deliveries:
            if not delivery.deliveries:
                delivery.deliveries = delivery.partition.progress.deliver(delivery.offset)
                delivery.partition.version += 1
        try:
            await self._flush({delivery.partition for delivery in deliveries})
        except BaseException:
            self._waiting.extendleft(reversed(deliveries))
            raise
        return [delivery for delivery in deliveries if delivery.partition.owned]

    async def _fetch(self, count_max: int) -> None:
        try:
            records = await self._consumer.getmany(
                timeout_ms=milliseconds(FETCH_WAIT_S), max_records=count_max
            )
            # Without a pause after `getmany`: a rebalance must not come between.
            if self._settled.is_set():  # otherwise the listener sets the positions
                for key, batch in records.items():
                    if partition := self._partitions.get(key):
                        self._accept(partition, batch)
        except Exception as error:
            self._end(reason_of(error))
        finally:
            self._changed.set()

    def _accept(self, partition: _Partition, records: list[Any]) -> None:
        key = partition.key
        if partition.progress.is_full:
            self._consumer.seek(key, partition.progress.next)  # it was already in the buffer
            return
        for record in records:
            if record.offset < partition.progress.next:
                log.warning(
                    "offsets went backwards, reading the partition again",
                    topic=key.topic,
                    partition=key.partition,
                )
                partition.owned = False
                partition = _Partition(key, Progress(record.offset), None)
                self._partitions[key] = partition
            if partition.progress.accept(record.offset):
                self._waiting.append(_Delivery(self, partition, record))
            else:
                self._mark(partition)
        if partition.progress.is_full:
            self._consumer.pause(key)
            partition.paused = True

    async def acknowledge(self, delivery: _Delivery) -> None:
        """As :meth:`Delivery.acknowledge`."""
        self._check()
        partition = delivery.partition
        if not partition.owned:
            return
        partition.progress.acknowledge(delivery.offset)
        self._mark(partition)
        if partition.paused and self._settled.is_set() and not partition.progress.is_full:
            self._consumer.resume(partition.key)
            partition.paused = False
        await self._flush({partition})

    def release(self, delivery: _Delivery) -> None:
        """As :meth:`Delivery.release`."""
        self._check()
        if delivery.partition.owned:
            delivery.deliveries = 0
            self._waiting.append(delivery)
            self._changed.set()

    # Commits

    def _mark(self, partition: _Partition) -> None:
        """The partition's progress is to be committed."""
        partition.version += 1
        self._uncommitted.set()

    async def _flush(self, partitions: set[_Partition]) -> None:
        """Wait until the partitions' progress is committed, or they have moved."""
        versions = {partition: partition.version for partition in partitions}
        self._uncommitted.set()
        try:
            async with asyncio.timeout(TIMEOUT_S):
                while any(
                    partition.owned and partition.committed_version < version
                    for partition, version in versions.items()
                ):
                    self._check()
                    await asyncio.shield(self._round)
        except TimeoutError:
            self._end(f"has not committed an offset within {TIMEOUT_S:g} s")
            self._check()

    async def _commit_changes(self) -> None:
        while True:
            await self._uncommitted.wait()
            self._uncommitted.clear()
            try:
                await self._commit()
            except (CommitFailedError, IllegalStateError):  # the listener is called next
                self._uncommitted.set()
                await asyncio.sleep(RETRY_S)
            except Exception as error:
                self._end(f"cannot commit an offset: {reason_of(error)}")

    async def _commit(self) -> None:
        """Commit what has changed, unless a rebalance is going on; its end calls for a commit."""
        async with self._committing:
            commits = {
                partition: (partition.version, partition.progress.commit())
                for partition in self._partitions.values()
                if partition.version != partition.committed_version and self._settled.is_set()
            }
            if commits:
                await self._consumer.commit(
                    {partition.key: stored for partition, (_, stored) in commits.items()}
                )
            for partition, (version, stored) in commits.items():
                partition.committed_version = version
                partition.stored = stored
        self._next_round()

    def _next_round(self) -> None:
        done, self._round = self._round, asyncio.get_running_loop().create_future()
        done.set_result(None)

    # Rebalances; the library calls these methods, and ignores their exceptions.

    async def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> None:
        """A rebalance begins: commit what is done, for the next owners."""
        if self._settled.is_set():
            await attempt(self._commit())
            self._settled.clear()

    async def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        """A rebalance has ended: keep what is still ours, and set where to read on."""
        keys = list(assigned)
        try:
            async with asyncio.timeout(REBALANCE_TIMEOUT_S):
                stored = await self._stored(keys)
                begin = await self._offsets_to_begin([key for key in keys if key not in stored])
            self._assign({key: stored.get(key) for key in keys}, begin)
        except TimeoutError:
            self._end(f"did not report the group's offsets within {REBALANCE_TIMEOUT_S:g} s")
        except Exception as error:
            self._end(f"cannot take the partitions: {reason_of(error)}")
        self._settled.set()
        self._changed.set()
        self._uncommitted.set()
        self._next_round()

    def _assign(
        self,
        stored: Mapping[TopicPartition, tuple[int, str] | None],
        begin: Mapping[TopicPartition, int],
    ) -> None:
        before, self._partitions = self._partitions, {}
        for key, commit in stored.items():
            partition = before.get(key)
            # If the commit is not ours, the partition has been somewhere else.
            if partition is None or partition.stored != commit:
                progress = Progress(*commit) if commit else Progress(begin[key])
                partition = _Partition(key, progress, commit)
            self._partitions[key] = partition
            self._consumer.seek(key, partition.progress.next)
            partition.paused = partition.progress.is_full
            if partition.paused:
                self._consumer.pause(key)
        for key, partition in before.items():
            partition.owned = self._partitions.get(key) is partition
        self._waiting = deque(each for each in self._waiting if each.partition.owned)

    async def _stored(self, keys: list[TopicPartition]) -> dict[TopicPartition, tuple[int, str]]:
        """The group's committed offset and its metadata for each partition that has one."""
        while keys:
            try:
                found = await self._admin.list_consumer_group_offsets(self._group, partitions=keys)
            except KafkaError as error:
                if not error.retriable:
                    raise
                await asyncio.sleep(RETRY_S)
            else:
                return {
                    key: (at.offset, at.metadata) for key, at in found.items() if at.offset >= 0
                }
        return {}

    async def _offsets_to_begin(self, keys: list[TopicPartition]) -> dict[TopicPartition, int]:
        if not keys:
            return {}
        consumer = self._consumer
        find = consumer.beginning_offsets if self._from_oldest else consumer.end_offsets
        offsets: dict[TopicPartition, int] = await find(keys)
        return offsets

    # The connection

    async def lag(self) -> int | None:
        """As :meth:`Subscription.lag`, for all partitions of the topics.

        Messages that were fetched or released and wait for `receive` are included.
        """
        self._check()
        keys = [
            TopicPartition(topic, number)
            for topic in self._topics
            for number in self._consumer.partitions_for_topic(topic) or ()
        ]
        try:
            async with asyncio.timeout(TIMEOUT_S):
                stored = await self._stored(keys)
                ends = await self._consumer.end_offsets(keys)
        except (KafkaError, TimeoutError):
            self._check()
            return None  # the leader of some partition is missing
        waiting = len(self._waiting)
        for key, end in ends.items():
            if partition := self._partitions.get(key):
                waiting += partition.progress.waiting(end)
            elif key in stored:
                waiting += undelivered(*stored[key], end)
        return waiting

    async def _watch(self) -> None:
        """End the subscription when it cannot receive any more, which the library hides."""
        time = asyncio.get_running_loop().time
        answered_s = settled_s = time()
        while not self._ended:
            await asyncio.sleep(PROBE_S)
            if await self._coordinator_answers():
                answered_s = time()
            if self._settled.is_set():
                settled_s = time()
            if time() > answered_s + UNREACHABLE_S:
                self._end(reason_of(f"no answer of its coordinator for {UNREACHABLE_S:g} s"))
            elif time() > settled_s + TIMEOUT_S:
                self._end(reason_of(f"no partitions for {TIMEOUT_S:g} s, in a rebalance"))
            elif not is_running(self._consumer):
                self._end(reason_of("the client has failed"))

    async def _coordinator_answers(self) -> bool:
        partitions = [TopicPartition(self._topics[0], 0)]
        try:
            async with asyncio.timeout(UNREACHABLE_S / 3):
                await self._admin.list_consumer_group_offsets(self._group, partitions=partitions)
        except Exception:
            return False
        return True

    def _end(self, reason: str) -> None:
        self._ended = self._ended or reason
        self._changed.set()
        self._next_round()

    def _check(self) -> None:
        if self._ended:
            raise BrokerUnavailable(f"Kafka's group {self._group}: {self._ended}")

    async def close(self) -> None:
        """Leave the group. It ends even if the caller is cancelled."""
        if self._closing is None:
            self._end("the subscription is closed")
            self._closing = asyncio.create_task(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        tasks = [*self._tasks, *([self._fetching] if self._fetching else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await close_consumer(self._consumer)
        await attempt(self._admin.close())
