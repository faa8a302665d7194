"""Collects entries for SQS's batch requests. Each costs as much as a request for one entry.

Entries that are added within ``LINGER_S`` go together. The number of entries that wait is bounded
by the callers, each of which waits for its own.
"""

from __future__ import annotations

import asyncio
from typing import Any, NamedTuple, Protocol

from kubeai.brokers.base import BrokerUnavailable

LINGER_S = 0.02  # a response has taken an engine seconds
BATCH_MAX_COUNT = 10  # of SQS
BATCH_MAX_BYTES = 256 << 10  # of older servers; SQS takes 1 MiB, and bills each 64 KiB anyway
ERROR_MAX_CHARS = 200

Entry = dict[str, Any]


class Refused(BrokerUnavailable):
    """SQS has answered a request, or an entry of a batch, with an error."""

    def __init__(self, operation: str, code: str, message: str) -> None:
        # The first line: the others of a bad signature repeat the headers, with a session token.
        line = message.partition("\n")[0][:ERROR_MAX_CHARS]
        super().__init__(f"SQS: {operation}: {code}: {line}")
        self.code = code
        self.is_about_size = code.endswith("BatchRequestTooLong") or "shorter than" in line


class Client(Protocol):
    """What sends the requests."""

    async def request(self, operation: str, **parameters: Any) -> dict[str, Any]:
        """Send a request about the queue; :class:`Refused` or :class:`BrokerUnavailable`."""


class _Waiting(NamedTuple):
    entry: Entry
    size_bytes: int
    done: asyncio.Future[None]


class Batch:
    """The entries of one operation, such as ``delete_message_batch``."""

    def __init__(self, client: Client, operation: str) -> None:
        self._client = client
        self._operation = operation
        self._waiting: list[_Waiting] = []
        self._size_bytes = 0
        self._timer: asyncio.TimerHandle | None = None
        self._sending: set[asyncio.Task[None]] = set()
        self._closed = False

    def add(self, entry: Entry, size_bytes: int = 0) -> asyncio.Future[None]:
        """Send an entry. The future is done when SQS has confirmed it.

        It has :class:`Refused` if SQS refuses the entry. Cancelling it keeps the entry back only if
        that has not been sent yet.
        """
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        if self._closed:
            done.set_exception(BrokerUnavailable(f"SQS: {self._operation}: it is closed"))
            return done
        if self._size_bytes + size_bytes > BATCH_MAX_BYTES:
            self._flush()
        self._waiting.append(_Waiting(entry, size_bytes, done))
        self._size_bytes += size_bytes
        if len(self._waiting) == BATCH_MAX_COUNT:
            self._flush()
        elif self._timer is None:
            self._timer = loop.call_later(LINGER_S, self._flush)
        return done

    def _flush(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        batch = [waiting for waiting in self._waiting if not waiting.done.done()]
        self._waiting, self._size_bytes = [], 0
        if batch:
            task = asyncio.create_task(self._send(batch))
            self._sending.add(task)
            task.add_done_callback(self._sending.discard)

    async def _send(self, batch: list[_Waiting]) -> None:
        entries = [{"Id": str(n), **waiting.entry} for n, waiting in enumerate(batch)]
        try:
            answer = await self._client.request(self._operation, Entries=entries)
        except BrokerUnavailable as error:
            failed = dict.fromkeys((entry["Id"] for entry in entries), error)
        except (Exception, asyncio.CancelledError) as error:  # of the library; the callers wait
            problem = f"SQS: {self._operation}: {str(error) or type(error).__name__}"
            failed = dict.fromkeys((entry["Id"] for entry in entries), BrokerUnavailable(problem))
        else:
            failed = {failure["Id"]: self._refused(failure) for failure in answer.get("Failed", [])}
        for entry, waiting in zip(entries, batch, strict=True):
            if waiting.done.done():
                continue  # the caller was cancelled
            if failure := failed.get(entry["Id"]):
                waiting.done.set_exception(failure)
            else:
                waiting.done.set_result(None)

    def _refused(self, failure: Entry) -> BrokerUnavailable:
        return Refused(self._operation, failure.get("Code", ""), failure.get("Message", ""))

    async def close(self) -> None:
        """Send what waits, and wait for it; the client's timeout bounds that."""
        self._closed = True
        self._flush()
        if self._sending:
            await asyncio.wait(self._sending)
