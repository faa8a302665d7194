"""The lifetime of a connection to a broker, which ends at the first fault.

Libraries wait for a silent broker without a limit, and some cannot bear that an operation is
cancelled. So each operation runs in a task of its own, next to which the caller waits. Used by the
brokers whose libraries need that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from kubeai.brokers.base import TIMEOUT_S, BrokerUnavailable

T = TypeVar("T")

CLOSE_TIMEOUT_S = 5.0


class Lifetime:
    """Whether a connection still serves. After its end, ``check`` and ``run`` raise."""

    def __init__(self, broker: str, errors: tuple[type[Exception], ...]) -> None:
        """``broker``: its name and address for messages. ``errors``: what the library raises."""
        self._broker = broker
        # A TimeoutError is an OSError.
        self._errors: tuple[type[Exception], ...] = (*errors, OSError, ValueError)
        self._reason = ""
        self._ended = asyncio.get_running_loop().create_future()
        self._callbacks: list[Callable[[], None]] = []
        self._tasks: set[asyncio.Task[Any]] = set()

    def check(self) -> None:
        """BrokerUnavailable if the connection has ended."""
        if self._reason:
            raise self.error(self._reason)

    def on_end(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` once the connection has ended."""
        self._callbacks.append(callback)

    def end(self, reason: str) -> None:
        """Mark the connection as ended. Only the first call has an effect."""
        if self._reason:
            return
        self._reason = reason
        self._ended.set_result(None)
        for callback in self._callbacks:
            callback()

    async def run(
        self, what: str, operation: Coroutine[Any, Any, T], raises: tuple[type[Exception], ...] = ()
    ) -> T:
        """Run an operation of the library. BrokerUnavailable if it fails, or takes TIMEOUT_S.

        Errors in ``raises`` are raised as they are. If the caller is cancelled, the operation
        continues.
        """
        if self._reason:
            operation.close()
        self.check()
        task = self.start(operation)
        await asyncio.wait(
            (task, self._ended), timeout=TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED
        )
        if not task.done():
            self.end(f"no answer within {TIMEOUT_S:g} s")
            raise self.error(f"{what}: {self._reason}")
        try:
            return task.result()
        except self._errors as error:
            if isinstance(error, raises):
                raise
            raise self.error(f"{what}: {text_of(error)}") from None
        except asyncio.CancelledError:  # by the library, when it closes
            raise self.error(f"{what}: {self._reason or 'the connection is closed'}") from None

    def start(self, operation: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run something until it ends or the connection is closed."""
        task = asyncio.create_task(operation)
        self._tasks.add(task)
        task.add_done_callback(self._discard)
        return task

    def _discard(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # nobody may wait for it any more

    async def close(self, closing: Awaitable[Any], abort: Callable[[], None]) -> None:
        """End, and close the library's connection. Does not raise.

        ``abort`` closes the socket: at once after a fault, else after CLOSE_TIMEOUT_S.
        """
        if self._reason:
            abort()
        self.end("the connection is closed")
        for task in self._tasks:
            task.cancel()
        tasks = {*self._tasks, asyncio.ensure_future(closing)}
        try:
            await asyncio.wait(tasks, timeout=CLOSE_TIMEOUT_S)
        finally:  # also if the caller is cancelled
            abort()
            for task in tasks:
                task.cancel()
        await asyncio.wait(tasks, timeout=CLOSE_TIMEOUT_S)
        await asyncio.gather(*(task for task in tasks if task.done()), return_exceptions=True)

    def error(self, problem: str) -> BrokerUnavailable:
        """A BrokerUnavailable that names the broker."""
        return BrokerUnavailable(f"{self._broker}: {problem}")


def text_of(error: BaseException) -> str:
    """What an error of a library says, or its type."""
    if isinstance(error, TimeoutError):
        return "timed out"
    return str(error).removeprefix("nats: ") or type(error).__name__
