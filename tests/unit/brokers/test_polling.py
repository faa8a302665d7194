"""Polls that outlive the call that has begun them."""

from __future__ import annotations

import asyncio

import pytest

from kubeai.brokers.base import BrokerUnavailable, Delivery
from kubeai.brokers.inbox import UNCLAIMED_S
from kubeai.brokers.polling import Poller

pytestmark = pytest.mark.looptime


class Message(Delivery):
    def __init__(self, number: int, released: list[int]) -> None:
        self.id = str(number)
        self._number = number
        self._released = released

    async def acknowledge(self) -> None:
        raise AssertionError

    async def extend(self) -> None:
        raise AssertionError

    async def release(self) -> None:
        self._released.append(self._number)


class Source:
    """A broker from which messages arrive at given times."""

    def __init__(self, *batches: tuple[float, int]) -> None:
        self.polls: list[int] = []
        self.released: list[int] = []
        self._batches = list(batches)
        self._numbers = iter(range(100))

    async def poll(self, count: int) -> list[Message]:
        self.polls.append(count)
        if not self._batches:
            await asyncio.Event().wait()
        delay_s, size = self._batches.pop(0)
        await asyncio.sleep(delay_s)
        return [Message(next(self._numbers), self.released) for _ in range(size)]


def ids(deliveries: list[Delivery]) -> list[str]:
    return [delivery.id for delivery in deliveries]


async def test_polls_again_until_there_are_messages():
    source = Source((1, 0), (1, 0), (1, 2))
    poller = Poller(source.poll)
    assert ids(await poller.receive(5)) == ["0", "1"]
    assert source.polls == [5, 5, 5]
    await poller.close()


async def test_cancelled_receive_leaves_its_messages_to_the_next():
    source = Source((2, 3))
    poller = Poller(source.poll)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1):
            await poller.receive(3)
    assert ids(await poller.receive(3)) == ["0", "1", "2"]
    assert source.polls == [3]
    await poller.close()
    assert source.released == []


async def test_messages_that_nobody_receives_are_released():
    source = Source((2, 2), (0, 1))
    poller = Poller(source.poll)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1):
            await poller.receive(2)
    await asyncio.sleep(1 + UNCLAIMED_S / 2)
    assert source.released == []
    await asyncio.sleep(UNCLAIMED_S)
    assert source.released == [0, 1]
    assert ids(await poller.receive(2)) == ["2"]
    await poller.close()


async def test_messages_beyond_a_smaller_count_are_kept_for_a_while():
    source = Source((2, 3))
    poller = Poller(source.poll)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1):
            await poller.receive(3)
    assert ids(await poller.receive(1)) == ["0"]
    assert ids(await poller.receive(1)) == ["1"]
    await asyncio.sleep(2 * UNCLAIMED_S)
    assert source.released == [2]
    await poller.close()


async def test_closing_releases_what_was_not_received_and_ends_a_receive():
    source = Source((1, 2))
    poller = Poller(source.poll)
    assert ids(await poller.receive(1)) == ["0"]
    await poller.close()
    assert source.released == [1]

    poller = Poller(Source().poll)
    receiving = asyncio.create_task(poller.receive(1))
    await asyncio.sleep(1)
    await poller.close()
    with pytest.raises(BrokerUnavailable, match="closed"):
        await receiving
    with pytest.raises(BrokerUnavailable, match="closed"):
        await poller.receive(1)


@pytest.mark.parametrize("error", [BrokerUnavailable("it is gone"), KeyError("a defect")])
async def test_failed_poll_is_raised_by_each_receive(error):
    async def poll(count: int) -> list[Delivery]:
        await asyncio.sleep(1)
        raise error

    poller = Poller(poll)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.5):
            await poller.receive(1)
    await asyncio.sleep(1)
    for _ in range(2):
        with pytest.raises(type(error)):
            await poller.receive(1)
    await poller.close()


async def test_poll_that_the_library_cancels_is_a_failed_one():
    async def poll(count: int) -> list[Delivery]:
        raise asyncio.CancelledError

    poller = Poller(poll)
    for _ in range(2):
        with pytest.raises(BrokerUnavailable, match="cancelled"):
            async with asyncio.timeout(1):
                await poller.receive(1)
    await poller.close()
