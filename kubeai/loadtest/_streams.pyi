"""Reads the streams of thousands of connections, most of it without an object or a call for each."""

from collections.abc import Callable

class Stream:
    """When the events of a stream came that have something in them."""

    tokens: int  # how many those are
    between_chunks: bool  # the HTTP parser is
    rest: bytes  # of a line, whose end has not come
    kept: list[bytes] | None  # the pieces of the text, where it is wanted

    @property
    def times_s(self) -> list[float]: ...
    def note(self, at_s: float) -> None:
        """One came."""
    def learn(self, line: bytes, text_at: int) -> None:
        """Events are as this line, given without its line feed, which has `"content":"` there."""
    def forget(self) -> None:
        """The next event is not as the last."""
    def take(self, piece: bytes, at_s: float) -> bool:
        """Whether a piece is one event as usual, which is counted then."""

class Poller:
    """Reads sockets of which nobody else reads while they are here, on one thread.

    Call `run` whenever ``fd`` can be read, `close` at the end.
    """

    fd: int

    def add(self, fd: int, stream: Stream, other: Callable[[bytes], object]) -> None:
        """Read a socket. ``other``: takes what is not as usual; b"" at the end, or at an error.

        At that it is to `remove` it. OSError when there is no room for one more.
        """
    def remove(self, fd: int, stream: Stream) -> None:
        """Leave a socket alone, whether or not it was added, or was closed meanwhile."""
    def run(self) -> None: ...
    def close(self) -> None: ...
