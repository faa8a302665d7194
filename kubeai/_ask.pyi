"""What a JSON request asks for, found in one pass over its body."""

from typing import final

@final
class Shape:
    """Which top-level members place a request of one kind; one of the first two."""

    conversation: bytes | None  # a list of messages, or a string
    text: bytes | None  # a string, or a list that begins with one
    system: bytes | None  # text beside the conversation

    def __init__(
        self,
        conversation: bytes | None = None,
        text: bytes | None = None,
        system: bytes | None = None,
    ) -> None: ...

@final
class Ask:
    """What one request asks for. Made by :func:`read`."""

    model: str  # as the client wrote it
    name: str  # the Model's
    adapter: str | None
    stream: bool

    def key(self, prefix_char_length: int) -> int | None:
        """As ``openai.hash_key``; None when only that can tell."""
    def for_adapter(self) -> bytes:
        """The body with the adapter's name for its model; every other byte stays as it came."""

def read(shape: Shape, body: bytes) -> Ask | None:
    """Read a body of this shape; None: let ``openai.parse`` judge.

    A body that is taken is one that ``openai.parse`` takes, and understands in the same way.
    """
