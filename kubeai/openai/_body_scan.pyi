"""Extract routing data from a JSON request body in one pass."""

from typing import final

@final
class Shape:
    """The top-level members that a kind of request is hashed by: one of the first two is set."""

    conversation: bytes | None  # holds a list of messages, or a string
    text: bytes | None  # holds a string, or a list that begins with one
    system: bytes | None  # holds system text outside the conversation

    def __init__(
        self,
        conversation: bytes | None = None,
        text: bytes | None = None,
        system: bytes | None = None,
    ) -> None: ...

@final
class Ask:
    """The routing data of one request. Created by :func:`read`."""

    model: str  # as the client wrote it
    name: str  # the Model's name
    adapter: str | None
    stream: bool

    def key(self, prefix_char_length: int) -> int:
        """The same key as ``openai.hash_key``."""
    def with_model(self, value: bytes) -> bytes:
        """The body with the value of ``model`` replaced (JSON); all other bytes are unchanged."""

class Refused(Exception):
    """A body was rejected. Arguments: a message, and the parameter at fault or None."""

def read(shape: Shape, body: bytes) -> Ask | None:
    """Parse a body of this shape; None if it is rejected: ``openai.parse`` then finds out why.

    Accepts only bodies that ``openai.parse`` accepts, with the same result.
    """

def judge(shape: Shape, body: bytes) -> Ask:
    """Like :func:`read`, without the GIL. Raises Refused with the reason."""
