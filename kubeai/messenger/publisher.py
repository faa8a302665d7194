"""Publishes the responses of one stream, across losses of the connection to the broker."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from kubeai.brokers.base import Broker, BrokerUnavailable, MessageTooLarge, Topic
from kubeai.kube.backoff import Backoff
from kubeai.messenger.counts import Counts
from kubeai.messenger.operation import close_quietly, operate

RECONNECT_FIRST_S = 0.5


class Publisher:
    """Keeps a topic open while :meth:`run` runs."""

    def __init__(
        self, broker: Broker, counts: Counts, backoff_max_s: float, changed: Callable[[], None]
    ) -> None:
        """``changed``: called when ``connected`` has become true."""
        self._broker = broker
        self._counts = counts
        self._backoff_max_s = backoff_max_s
        self._changed = changed
        self._backoff = self._new_backoff()
        self._topic: Topic | None = None  # the open one
        self._opened = asyncio.Event()
        self._failed = asyncio.Event()
        self._publishing = 0  # messages

    def _new_backoff(self) -> Backoff:
        return Backoff(RECONNECT_FIRST_S, self._backoff_max_s)

    @property
    def connected(self) -> bool:
        """Whether a topic is open, as far as is known."""
        return self._topic is not None

    async def run(self) -> None:
        """Open the topic, and again whenever it fails; closes it when cancelled."""
        while True:
            topic = await self._open()
            self._topic = topic
            self._failed.clear()
            self._opened.set()
            self._counts.responses.note_connected()
            self._changed()
            try:
                await self._failed.wait()
            finally:
                if self._topic is not None:
                    self._counts.responses.note_closed()
                self._topic = None
                self._opened.clear()
                await close_quietly(topic)
            await asyncio.sleep(self._backoff.next_s())

    async def _open(self) -> Topic:
        while True:
            try:
                return await operate(self._broker.open_topic())
            except Exception as error:  # a library's, too: nothing may end this task
                self._counts.responses.note_problem(error)
            await asyncio.sleep(self._backoff.next_s())

    async def publish(self, body: bytes, attributes: Mapping[str, str]) -> None:
        """Publish a message; returns when the broker has confirmed it, however long that takes.

        MessageTooLarge if it never will.
        """
        own = self._new_backoff()  # for a message that fails alone
        while True:
            await self._opened.wait()
            topic = self._topic
            assert topic is not None, "opened"
            self._publishing += 1
            try:
                await operate(topic.publish(body, attributes))
            except MessageTooLarge:
                raise
            except Exception as error:
                self._counts.publish_failures += 1
                self._fail(topic, error)
            else:
                self._backoff.reset()
                return
            finally:
                self._publishing -= 1
            await asyncio.sleep(own.next_s())

    def check(self) -> None:
        """Open the topic again, unless a message is being published, which shows its state.

        Called when the connection for requests is lost: the broker may have gone, which an idle
        topic does not notice.
        """
        if self._topic is not None and not self._publishing:
            self._backoff.reset()
            self._fail(self._topic, BrokerUnavailable("checking the connection"))

    def _fail(self, topic: Topic, error: Exception) -> None:
        """Stop using a topic; no effect if that has happened already."""
        if topic is self._topic:
            self._topic = None
            self._opened.clear()
            self._failed.set()
            self._counts.responses.note_problem(error)
