"""What a pick needs to know of a prompt: its length, and hashes of its beginnings."""

from collections.abc import Sequence
from typing import final

BLOCKS_MAX: int  # sampled blocks of a prompt

@final
class Prompt:
    tokens: int
    key: int  # of PrefixHash
    has_key: bool
    streams: bool  # the response is streamed

    def __init__(
        self,
        tokens: int = 0,
        blocks: Sequence[int] = (),
        depths: Sequence[int] = (),
        key: int | None = None,
        streams: bool = False,
    ) -> None:
        """``blocks``: 64-bit hashes of the sampled blocks, in order, at most ``BLOCKS_MAX``.
        ``depths``: the tokens up to the end of each. ``key``: where the ring's walk begins."""
    @property
    def samples(self) -> tuple[tuple[int, int], ...]:
        """Of each sampled block, its hash and the tokens up to its end."""

def sample_ends(size_bytes: int) -> list[int]:
    """Where the sampled blocks of a conversation of this size end, in bytes from its beginning."""
