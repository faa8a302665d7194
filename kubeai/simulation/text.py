"""Tokens and text for simulated engines: deterministic, cheap and identical on every machine.

A token is four bytes of UTF-8, about the average of real tokenizers for English. Each message
starts on a token boundary and every generated word is one token, so a reply that is sent back as
history has the same tokens as when it was generated and hits the same KV blocks.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
from array import array
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import mmh3

TOKEN_BYTES = 4
EMBEDDING_DIMENSIONS = 384
END = b"</s>"
_MASK = (1 << 64) - 1
_MULTIPLIER = 0x9E3779B97F4A7C15
_FIRST_WORD = "mock"
_NOUNS = (
    "ant ape arm art ash bat bay bed bee big box boy bus cab can cap car cat cow cup "
    "day den dog dry ear egg elm eye fan far fig fir fly fog fox fun gem gum hat hen "
    "ice ink ivy jam jar jet joy key kit lap leg log map mud net nut oak oil old one "
    "owl pan pea pen pie pig pin pot red run sea sky sun tea ten tin toy two van web"
)
WORDS = tuple(f" {noun}" for noun in _NOUNS.split())  # one token each
_WORD_OF_BYTE = [WORDS[byte % len(WORDS)] for byte in range(256)]
# Words that encode a number in `spelled`. 80 words to the power of 11 are more than 2^69 numbers.
_SPELLING_TOKENS = 11
_SPELLINGS = len(WORDS) ** _SPELLING_TOKENS
_SPELLING_MULTIPLIER = (
    0x9E3779B97F4A7C17  # coprime with `_SPELLINGS`, so that each number has its own
)
_SPELLING_OFFSET = 0x5851F42D4C957F2D


class Reply(NamedTuple):
    """A simulated model's reply: ``text[4 * i:4 * i + 4]`` is its token ``i``."""

    text: str
    tokens: int  # includes generated tokens that a stop string cut
    finish: Literal["stop", "length"]
    stop: str | None  # the stop string that ended it


def pack(text: str) -> bytes:
    """The tokens of a text, padded to a whole token."""
    data = text.encode("utf-8", "surrogatepass")
    return data + b"\0" * (-len(data) % TOKEN_BYTES)


OPENING = pack("<|assistant|>")  # the assistant speaks next


def pack_ids(ids: Iterable[int]) -> bytes:
    """The tokens of a prompt that is given as token IDs."""
    return b"".join((number & 0xFFFFFFFF).to_bytes(TOKEN_BYTES, "little") for number in ids)


def message(role: str, text: str) -> bytes:
    """The tokens of a complete chat message."""
    return b"".join((pack(f"<|{role}|>"), pack(text), END))


def render(messages: Iterable[tuple[str, str]]) -> bytes:
    """The prompt of a chat of (role, text) messages, up to the start of the assistant's reply.

    Appending the reply and another message to ``messages`` gives a prompt that starts with this
    prompt's and the reply's tokens.
    """
    return b"".join([*(message(role, text) for role, text in messages), OPENING])


# What `render` adds to the text of a single message from the user.
CHAT_TOKENS = len(render([("user", "")])) // TOKEN_BYTES


def count(tokens: bytes) -> int:
    """The number of tokens."""
    return len(tokens) // TOKEN_BYTES


class Blocks:
    """An append-only sequence of tokens with a hash for each full block.

    The hash covers all tokens up to the block's end. ``salt`` separates sequences that must not
    share blocks, such as those of different adapters.
    """

    __slots__ = ("_chain", "_rest", "_size", "hashes", "tokens")

    def __init__(self, block_tokens: int = 16, salt: str = "") -> None:
        self.tokens = 0
        self.hashes: list[int] = []
        self._chain: int = mmh3.hash64(salt, signed=False)[0]
        self._rest = b""
        self._size = block_tokens * TOKEN_BYTES

    def add(self, tokens: bytes) -> None:
        """Append tokens and hash the blocks they fill."""
        data = self._rest + tokens
        size, chain = self._size, self._chain
        end = len(data) - len(data) % size
        for start in range(0, end, size):
            block = mmh3.hash64(data[start : start + size], signed=False)[0]
            chain = (chain * _MULTIPLIER + block) & _MASK
            self.hashes.append(chain)
        self._chain, self._rest = chain, data[end:]
        self.tokens += len(tokens) // TOKEN_BYTES

    def then(self, tokens: bytes) -> Blocks:
        """A copy with these tokens added."""
        more = Blocks.__new__(Blocks)
        more.tokens, more.hashes = self.tokens, self.hashes.copy()
        more._chain, more._rest, more._size = self._chain, self._rest, self._size
        more.add(tokens)
        return more


def block_hashes(tokens: bytes, salt: str = "", block_tokens: int = 16) -> list[int]:
    """The hashes of :class:`Blocks` for these tokens."""
    blocks = Blocks(block_tokens, salt)
    blocks.add(tokens)
    return blocks.hashes


def reply(
    prompt: bytes,
    *,
    limit: int | None,
    room: int = 1 << 20,
    typical: int = 48,
    end_early: bool = False,
    stops: Sequence[str] = (),
    salt: str = "",
) -> Reply:
    """The reply to a prompt; deterministic for a prompt and salt.

    With a ``limit``, the reply has that many tokens (finish "length"). Without one, it has
    ``typical`` tokens ±50 % (finish "stop"), or fewer if the ``room`` in the context is smaller.
    With ``end_early``, it has the smaller of both, as a model's replies do. The first occurrence of
    any of ``stops`` ends it.
    """
    source = random.Random(mmh3.hash_bytes(prompt) + salt.encode())
    natural = source.randint(max(1, typical // 2), max(1, typical + typical // 2))
    if end_early and limit is not None and limit >= natural:
        limit = None
    tokens = min(natural if limit is None else limit, room)
    finish: Literal["stop", "length"] = "length" if limit or tokens < natural else "stop"
    text = _FIRST_WORD + words(source, tokens - 1)
    places = ((text.find(stop), stop) for stop in stops if stop)
    found = min(((at, stop) for at, stop in places if at >= 0), default=None)
    if found is None:
        return Reply(text, tokens, finish, None)
    at, stop = found
    return Reply(text[:at], -(-(at + len(stop)) // TOKEN_BYTES), "stop", stop)


def words(source: random.Random, tokens: int, vocabulary: Sequence[str] = ()) -> str:
    """Three-letter words, one token each, also in most real tokenizers.

    ``vocabulary``: of `WORDS`, those to use; () uses all.
    """
    return "".join(source.choices(vocabulary or WORDS, k=tokens))


def spelled(number: int, tokens: int) -> str:
    """Words that depend only on the number; a longer text starts with each shorter one.

    Texts of ``tokens`` words differ for all numbers below ``spellings(tokens)``. Consecutive
    numbers differ in the first word.
    """
    digits = (number * _SPELLING_MULTIPLIER + _SPELLING_OFFSET) % _SPELLINGS
    found = []
    for _ in range(min(tokens, _SPELLING_TOKENS)):
        digits, digit = divmod(digits, len(WORDS))
        found.append(WORDS[digit])
    more = tokens - len(found)
    if more:
        source = hashlib.shake_128(number.to_bytes(16, "little")).digest(more)
        found.extend(map(_WORD_OF_BYTE.__getitem__, source))
    return "".join(found)


def spellings(tokens: int) -> int:
    """How many consecutive numbers ``spelled`` gives different texts of this length."""
    return int(len(WORDS) ** min(tokens, _SPELLING_TOKENS))


def embed(text: str, dimensions: int = EMBEDDING_DIMENSIONS) -> array[float]:
    """A unit vector of 32-bit floats; texts that share words have similar vectors.

    Each word contributes to a few dimensions selected by its hash (feature hashing).
    """
    places = [0.0] * dimensions
    for word in re.findall(r"\w+", text.lower()) or [text]:
        for value in mmh3.hash64(word, signed=False):
            places[value % dimensions] += 1.0
            places[(value >> 20) % dimensions] -= 0.5
    length = math.sqrt(sum(value * value for value in places))
    if not length:  # with very few dimensions, contributions can cancel out
        places[0] = length = 1.0
    return array("f", [value / length for value in places])


def similarity(one: Sequence[float], other: Sequence[float]) -> float:
    """The cosine of two unit vectors."""
    return sum(a * b for a, b in zip(one, other, strict=True))
