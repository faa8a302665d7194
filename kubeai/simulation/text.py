"""Tokens and text for simulated engines: deterministic, cheap, and the same wherever they run.

A token is four bytes of UTF-8, about what a real tokenizer makes of English. Each message starts
on a token boundary and every word that a simulated engine says is one token long, so a reply that
comes back as history has the very tokens it was generated with and finds its KV blocks again.
"""

from __future__ import annotations

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
_WORDS = tuple(f" {noun}" for noun in _NOUNS.split())


class Reply(NamedTuple):
    """What a simulated model says: ``text[4 * i:4 * i + 4]`` is its token ``i``."""

    text: str
    tokens: int  # those that a stop string cut away count too: they were generated
    finish: Literal["stop", "length"]
    stop: str | None  # the stop string that ended it


def pack(text: str) -> bytes:
    """The tokens of a text, padded to a whole one."""
    data = text.encode("utf-8", "surrogatepass")
    return data + b"\0" * (-len(data) % TOKEN_BYTES)


OPENING = pack("<|assistant|>")  # the assistant speaks next


def pack_ids(ids: Iterable[int]) -> bytes:
    """The tokens of a prompt that comes as token numbers."""
    return b"".join((number & 0xFFFFFFFF).to_bytes(TOKEN_BYTES, "little") for number in ids)


def message(role: str, text: str) -> bytes:
    """A message of a chat that others follow."""
    return b"".join((pack(f"<|{role}|>"), pack(text), END))


def render(messages: Iterable[tuple[str, str]]) -> bytes:
    """The prompt of a chat, (role, text) a message, up to where the assistant speaks next.

    Appending the reply and a next message to ``messages`` gives a prompt that starts with this
    one's tokens and the reply's.
    """
    return b"".join([*(message(role, text) for role, text in messages), OPENING])


def count(tokens: bytes) -> int:
    return len(tokens) // TOKEN_BYTES


class Blocks:
    """Tokens that grow at their end, and a number for each full block of them.

    It stands for everything up to the block's end. ``salt`` keeps apart what must not share blocks:
    adapters.
    """

    __slots__ = ("_chain", "_rest", "_size", "hashes", "tokens")

    def __init__(self, block_tokens: int = 16, salt: str = "") -> None:
        self.tokens = 0
        self.hashes: list[int] = []
        self._chain: int = mmh3.hash64(salt, signed=False)[0]
        self._rest = b""
        self._size = block_tokens * TOKEN_BYTES

    def add(self, tokens: bytes) -> None:
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
        """What there would be with these added."""
        more = Blocks.__new__(Blocks)
        more.tokens, more.hashes = self.tokens, self.hashes.copy()
        more._chain, more._rest, more._size = self._chain, self._rest, self._size
        more.add(tokens)
        return more


def block_hashes(tokens: bytes, salt: str = "", block_tokens: int = 16) -> list[int]:
    """Those of :class:`Blocks`."""
    blocks = Blocks(block_tokens, salt)
    blocks.add(tokens)
    return blocks.hashes


def reply(
    prompt: bytes,
    *,
    limit: int | None,
    room: int = 1 << 20,
    typical: int = 48,
    stops: Sequence[str] = (),
    salt: str = "",
) -> Reply:
    """The answer to a prompt: the same for the same prompt and salt.

    A simulated model always has more to say: it makes ``limit`` tokens (finish "length"). Without
    a limit it makes ``typical`` ones, give or take half, and ends by itself (finish "stop") unless
    the ``room`` in its context ends it before. The first of ``stops`` in the text ends it.
    """
    source = random.Random(mmh3.hash_bytes(prompt) + salt.encode())
    natural = source.randint(max(1, typical // 2), max(1, typical + typical // 2))
    tokens = min(natural if limit is None else limit, room)
    finish: Literal["stop", "length"] = "length" if limit or tokens < natural else "stop"
    text = _FIRST_WORD + words(source, tokens - 1)
    places = ((text.find(stop), stop) for stop in stops if stop)
    found = min(((at, stop) for at, stop in places if at >= 0), default=None)
    if found is None:
        return Reply(text, tokens, finish, None)
    at, stop = found
    return Reply(text[:at], -(-(at + len(stop)) // TOKEN_BYTES), "stop", stop)


def words(source: random.Random, tokens: int) -> str:
    """Words of three letters, so many tokens of them; of most real tokenizers' as many."""
    return "".join(source.choices(_WORDS, k=tokens))


def embed(text: str, dimensions: int = EMBEDDING_DIMENSIONS) -> array[float]:
    """A unit vector of 32-bit floats; texts that share words point the same way.

    Each word adds to a few places that its hash names (feature hashing).
    """
    places = [0.0] * dimensions
    for word in re.findall(r"\w+", text.lower()) or [text]:
        for value in mmh3.hash64(word, signed=False):
            places[value % dimensions] += 1.0
            places[(value >> 20) % dimensions] -= 0.5
    length = math.sqrt(sum(value * value for value in places))
    if not length:  # a word may cancel itself in very few dimensions
        places[0] = length = 1.0
    return array("f", [value / length for value in places])


def similarity(one: Sequence[float], other: Sequence[float]) -> float:
    """The cosine of two unit vectors."""
    return sum(a * b for a, b in zip(one, other, strict=True))
