"""A consumer group's progress in one partition of a Kafka topic. Pure.

Kafka stores one offset for each group and partition: every message before it is done. KubeAI
acknowledges messages in any order. The committed offset is therefore the first message that is not
acknowledged, and its metadata, a string that Kafka stores with it, describes the messages from
there on, one character for each offset: ``+`` for an acknowledged message, the number of deliveries
in base 36 for another one, ``0`` for one that is unknown. So a message that was acknowledged is not
delivered again after a restart, and deliveries are counted across restarts.
"""

from __future__ import annotations

PREFIX = "kubeai:"  # of the metadata; other consumers' metadata is ignored
METADATA_MAX_CHARS = 3000  # the broker's offset.metadata.max.bytes is 4096 by default
WINDOW_MAX_COUNT = 2000  # offsets from the first message that is not acknowledged to the last one
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
_ACKNOWLEDGED = -1


class Progress:
    """The messages of one partition that are in hand or done. Offsets only increase."""

    next: int  # the offset after the last accepted message

    def __init__(self, offset: int, metadata: str = "") -> None:
        """From the committed offset and its metadata."""
        self.next = offset
        # Of offsets below `next`, in ascending order, the first of which is not acknowledged.
        self._states: dict[int, int] = {}
        self._stored = _decode(offset, metadata)  # of offsets from `next` on, in ascending order

    @property
    def first(self) -> int:
        """The offset to commit: all messages before it are acknowledged."""
        return next(iter(self._states), self.next)

    @property
    def is_full(self) -> bool:
        """Whether no further message is to be accepted until some are acknowledged."""
        return self.next - self.first >= WINDOW_MAX_COUNT

    def accept(self, offset: int) -> bool:
        """Add a message that Kafka has returned; whether it is to be delivered.

        Offsets that Kafka has skipped no longer exist.
        """
        while self._stored and (oldest := next(iter(self._stored))) < offset:
            del self._stored[oldest]
        self._states[offset] = state = self._stored.pop(offset, 0)
        self.next = offset + 1
        self._trim()
        return state != _ACKNOWLEDGED

    def deliver(self, offset: int) -> int:
        """Count a delivery of an accepted message; how often it has been delivered."""
        self._states[offset] += 1
        return self._states[offset]

    def acknowledge(self, offset: int) -> None:
        """Mark an accepted message as done."""
        self._states[offset] = _ACKNOWLEDGED
        self._trim()

    def commit(self) -> tuple[int, str]:
        """The offset and the metadata to store."""
        first = self.first
        states = self._states | self._stored
        count = min(max(states, default=first) + 1 - first, METADATA_MAX_CHARS - len(PREFIX))
        chars = ["0"] * count
        for offset, state in states.items():
            if offset < first + count:
                chars[offset - first] = _encode(state)
        text = "".join(chars).rstrip("0")
        return first, PREFIX + text if text else ""

    def waiting(self, end: int) -> int:
        """Messages up to the offset ``end`` that are neither accepted nor acknowledged."""
        done = sum(1 for state in self._stored.values() if state == _ACKNOWLEDGED)
        return max(0, end - self.next - done)

    def _trim(self) -> None:
        while self._states and self._states[first := self.first] == _ACKNOWLEDGED:
            del self._states[first]


def undelivered(offset: int, metadata: str, end: int) -> int:
    """Messages from a committed offset up to ``end`` that no consumer has received so far."""
    return max(0, end - offset - len(_decode(offset, metadata)))


def _encode(state: int) -> str:
    return "+" if state == _ACKNOWLEDGED else _DIGITS[min(state, len(_DIGITS) - 1)]


def _decode(offset: int, metadata: str) -> dict[int, int]:
    if not metadata.startswith(PREFIX):
        return {}
    states = {}
    for at, char in enumerate(metadata.removeprefix(PREFIX), offset):
        if char == "+":
            states[at] = _ACKNOWLEDGED
        elif (deliveries := _DIGITS.find(char)) > 0:
            states[at] = deliveries
    return states
