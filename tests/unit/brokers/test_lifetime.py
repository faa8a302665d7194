"""The lifetime of a connection, in virtual time."""

import asyncio

import pytest

from kubeai.brokers.base import TIMEOUT_S, BrokerUnavailable
from kubeai.brokers.lifetime import CLOSE_TIMEOUT_S, Lifetime

pytestmark = [pytest.mark.asyncio, pytest.mark.looptime]


class LibraryError(Exception):
    pass


class RefusedError(LibraryError):
    pass


async def silent() -> None:
    await asyncio.Event().wait()


async def nothing() -> None:
    pass


async def failing() -> None:
    raise RefusedError("no permission")


@pytest.fixture
async def lifetime():
    lifetime = Lifetime("Broker at host:1", (LibraryError,))
    yield lifetime
    await lifetime.close(nothing(), lambda: None)


async def test_operation_without_an_answer_ends_the_connection(lifetime):
    started = asyncio.get_running_loop().time()
    with pytest.raises(BrokerUnavailable, match="Broker at host:1: publish: no answer within 30 s"):
        await lifetime.run("publish", silent())
    assert asyncio.get_running_loop().time() - started == TIMEOUT_S
    with pytest.raises(BrokerUnavailable, match="no answer"):
        lifetime.check()


async def test_error_of_the_library_is_translated_unless_it_is_wanted(lifetime):
    with pytest.raises(BrokerUnavailable, match="publish: no permission"):
        await lifetime.run("publish", failing())
    with pytest.raises(RefusedError):
        await lifetime.run("publish", failing(), raises=(RefusedError,))
    lifetime.check()  # the connection serves


async def test_end_interrupts_operations_and_calls_back_once(lifetime):
    ends = []
    lifetime.on_end(lambda: ends.append(1))
    running = asyncio.create_task(lifetime.run("publish", silent()))
    await asyncio.sleep(0)
    lifetime.end("the server has closed the connection")
    lifetime.end("again")
    with pytest.raises(BrokerUnavailable, match="the server has closed the connection"):
        await running
    assert ends == [1]


async def test_cancelled_caller_leaves_the_operation_running(lifetime):
    done = asyncio.Event()

    async def slow() -> None:
        await asyncio.sleep(5)
        done.set()

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1):
            await lifetime.run("publish", slow())
    async with asyncio.timeout(5):
        await done.wait()


async def test_close_aborts_a_connection_that_does_not_close():
    lifetime = Lifetime("Broker", ())
    aborted = []
    running = asyncio.create_task(lifetime.run("publish", silent()))
    await asyncio.sleep(0)
    started = asyncio.get_running_loop().time()
    await lifetime.close(silent(), lambda: aborted.append(1))
    assert asyncio.get_running_loop().time() - started == CLOSE_TIMEOUT_S
    assert aborted == [1]
    with pytest.raises(BrokerUnavailable, match="the connection is closed"):
        await running


async def test_close_after_a_fault_aborts_at_once():
    lifetime = Lifetime("Broker", ())
    events = []
    lifetime.end("the server has closed the connection")

    async def closing() -> None:
        events.append("close")

    await lifetime.close(closing(), lambda: events.append("abort"))
    assert events[:2] == ["abort", "close"]


async def test_close_that_is_cancelled_aborts():
    lifetime = Lifetime("Broker", ())
    aborted = []
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1):
            await lifetime.close(silent(), lambda: aborted.append(1))
    assert aborted == [1]
