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

    def key(self, prefix_char_length: int) -> int:
        """As ``openai.hash_key``."""
    def with_model(self, value: bytes) -> bytes:
        """The body with another value (JSON) for its model; every other byte stays as it came."""

class Refused(Exception):
    """Why a body is refused: a message, and the parameter that it is about, or None."""

def read(shape: Shape, body: bytes) -> Ask | None:
    """Read a body of this shape; None: ``openai.parse`` may say why not.

    A body that is taken is one that ``openai.parse`` takes, and understands in the same way.
    """

def judge(shape: Shape, body: bytes) -> Ask:
    """As :func:`read`, without the interpreter's lock; Refused says why not."""
