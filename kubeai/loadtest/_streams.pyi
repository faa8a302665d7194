"""Reads thousands of event streams, most events without a Python object or call."""

from collections.abc import Callable

class Stream:
    """Arrival times of a stream's events with content."""

    tokens: int  # number of such events
    between_chunks: bool  # whether the HTTP parser is between two chunks
    rest: bytes  # an incomplete line
    kept: list[bytes] | None  # the received data; None: not kept

    @property
    def times_s(self) -> list[float]: ...
    def note(self, at_s: float) -> None:
        """Record an event's arrival."""
    def learn(self, line: bytes, text_at: int) -> None:
        """Learn the shape of events from a line without its line feed.

        ``text_at``: the offset of its `"content":"`.
        """
    def forget(self) -> None:
        """Forget the shape learned from the last event."""
    def take(self, piece: bytes, at_s: float) -> bool:
        """Count the piece if it is one event of the learned shape; returns whether it was."""

class Poller:
    """Reads sockets that nothing else reads while they are added; single-threaded.

    Call `run` whenever ``fd`` is readable and `close` at the end.
    """

    fd: int

    def add(self, fd: int, stream: Stream, other: Callable[[bytes], object]) -> None:
        """Read a socket. ``other`` receives data that does not match the stream's shape.

        It receives b"" at the end or on an error, and must then call `remove`. OSError if epoll
        accepts no more sockets.
        """
    def remove(self, fd: int, stream: Stream) -> None:
        """Stop reading a socket. No effect if it was not added."""
    def run(self) -> None: ...
    def close(self) -> None: ...
