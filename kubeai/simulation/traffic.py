"""Client traffic: multi-turn conversations with their history, and when they start.

The same traffic drives real endpoints (``kubeai.loadtest``) and simulated engines
(``kubeai.simulation.cluster``). Generators are deterministic for a seed. In the generated text a
simulated token is four bytes (``kubeai.simulation.text``); real tokenizers give about the same
number of tokens.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec

from kubeai.errors import KubeAIError, decode_problem
from kubeai.simulation import text

Message = tuple[str, str]  # role, text
FILE_MAX_BYTES = 8 << 30


class TrafficError(KubeAIError):
    """A traffic file is invalid; the message names the position."""


class Turn(msgspec.Struct, frozen=True):
    """The user's next message and the maximum length of the reply."""

    text: str
    reply_tokens: int = 0  # `max_tokens`; 0: not sent
    reply: str | None = None  # the reply to use in the history; None: the engine's
    think_s: float = 0.0  # pause after the previous reply


class Conversation(msgspec.Struct, frozen=True):
    """``history`` precedes the first turn. With kind ``embeddings``, turns are only inputs."""

    turns: tuple[Turn, ...]
    history: tuple[Message, ...] = ()
    at_s: float | None = None  # start time, since the run's start; None: when a slot is free
    kind: Literal["chat", "embeddings"] = "chat"

    def prompt(self, turn: int, replies: Iterable[str]) -> list[Message]:
        """The messages of a turn; ``replies``: the engine's replies to the previous turns."""
        messages = list(self.history)
        for turn_before, reply in zip(self.turns[:turn], replies, strict=True):
            messages.append(("user", turn_before.text))
            messages.append(
                ("assistant", reply if turn_before.reply is None else turn_before.reply)
            )
        messages.append(("user", self.turns[turn].text))
        return messages


# -- generated -------------------------------------------------------------------------------------


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """A generator's parameters. Lengths are means in tokens, with a lognormal distribution."""

    conversations: int = 1000
    turns: int = 8
    system_tokens: int = 0
    systems: int = 1  # number of distinct system prompts; each conversation has one
    prompt_tokens: int = 120  # first turn
    turn_tokens: int = 60  # later turns
    reply_tokens: int = 120
    think_s: float = 0.0
    documents: int = 0  # RAG: number of distinct documents; popularity follows Zipf's law
    document_tokens: int = 0
    replies: bool = False  # whether the history has generated replies instead of the engine's
    spread: float = 0.6  # standard deviation of the logarithm of lengths; 0: all equal
    kind: Literal["chat", "embeddings"] = "chat"


SHAPES = {
    "chat": Shape(),
    # A long system prompt shared by all conversations.
    "assistant": Shape(system_tokens=1500, turns=6),
    # Questions, each preceded by a document.
    "rag": Shape(turns=2, documents=200, document_tokens=4000, prompt_tokens=40, reply_tokens=200),
    # Many short steps with tool output, after a long system prompt.
    "agent": Shape(turns=20, system_tokens=3000, systems=4, turn_tokens=250, reply_tokens=60),
    "embeddings": Shape(turns=1, prompt_tokens=300, reply_tokens=0, kind="embeddings"),
}


def generate(shape: Shape, seed: int, *, first: int = 0, step: int = 1) -> Iterator[Conversation]:
    """Generate the conversations of a shape; the same seed gives the same conversations.

    ``first`` and ``step`` select every ``step``-th conversation, to split them among processes.
    """
    writer = _Writer(shape, seed)
    for number in range(first, shape.conversations, step):
        yield writer.conversation(number)


class _Writer:
    def __init__(self, shape: Shape, seed: int) -> None:
        self._shape, self._seed = shape, seed
        self._popularity = list(
            itertools.accumulate(1 / (rank + 1) for rank in range(shape.documents))
        )

    def conversation(self, number: int) -> Conversation:
        shape = self._shape
        # Seeded per conversation, so that each is independent of the others.
        source = random.Random(f"{self._seed} conversation {number}")
        history: list[Message] = []
        if shape.system_tokens:
            which = source.randrange(shape.systems)
            history.append(("system", self._fixed("system", which, shape.system_tokens)))
        before = ""
        if shape.documents:
            (which,) = source.choices(range(shape.documents), cum_weights=self._popularity)
            before = self._fixed("document", which, shape.document_tokens) + "\n\n"
        turns = [self._turn(source, shape.prompt_tokens, before)]
        while len(turns) < shape.turns:
            turns.append(self._turn(source, shape.turn_tokens))
        return Conversation(tuple(turns), tuple(history), kind=shape.kind)

    def _turn(self, source: random.Random, tokens: int, before: str = "") -> Turn:
        shape = self._shape
        message = before + text.words(source, self._length(source, tokens))
        reply_tokens = self._length(source, shape.reply_tokens) if shape.reply_tokens else 0
        reply = text.words(source, reply_tokens) if shape.replies else None
        think_s = source.expovariate(1 / shape.think_s) if shape.think_s else 0.0
        return Turn(message, reply_tokens, reply, think_s)

    def _fixed(self, what: str, which: int, tokens: int) -> str:
        """A text of exactly this length, identical wherever it is used."""
        return text.words(random.Random(f"{self._seed} {what} {which}"), tokens)

    def _length(self, source: random.Random, mean: int) -> int:
        spread = self._shape.spread
        if not spread:
            return max(1, mean)
        # A lognormal's mean is exp(mu + spread² / 2).
        drawn = source.lognormvariate(math.log(mean) - spread * spread / 2, spread)
        return max(1, min(round(drawn), 20 * mean))


def unrolled(conversations: Iterable[Conversation]) -> Iterator[Conversation]:
    """Turn each turn into an independent request with its history; turns must have replies.

    Like vLLM's benchmark and its derivatives: turns do not wait for the previous ones.
    """
    for one in conversations:
        for turn in range(len(one.turns)):
            *history, _ = one.prompt(turn, [""] * turn)
            last = msgspec.structs.replace(one.turns[turn], think_s=0.0)
            yield Conversation((last,), tuple(history), kind=one.kind)


# -- exact lengths ---------------------------------------------------------------------------------


class RandomLengths(msgspec.Struct, frozen=True, kw_only=True):
    """Independent requests with lengths in tokens, like those of vLLM's random dataset.

    An input has ``prefix_len`` tokens that all share, then between ``input_len`` × (1 −
    ``input_ratio``) and ``input_len`` × (1 + ``input_ratio``), evenly distributed; an output
    likewise. ``overhead`` is what an engine adds to the text, such as its chat template: that many
    tokens fewer are generated. None: what the simulated engine adds.
    """

    input_len: int = 1024
    output_len: int = 128
    input_ratio: float = 0.0
    output_ratio: float = 0.0
    prefix_len: int = 0
    kind: Literal["chat", "embeddings"] = "chat"
    overhead: int | None = None
    words: tuple[str, ...] = ()  # one token each for the engine; (): for the simulated one

    @property
    def added_tokens(self) -> int:
        """What the engine adds to the text, in tokens."""
        if self.overhead is not None:
            return self.overhead
        return text.CHAT_TOKENS if self.kind == "chat" else 0

    @property
    def shortest(self) -> int:
        """The length of the shortest input, in tokens."""
        return self.prefix_len + _around(self.input_len, self.input_ratio)[0]

    def lengths(self, seed: int, number: int) -> tuple[int, int]:
        """The lengths of a request's input and output, in tokens; embeddings have no output."""
        source = random.Random(f"{seed} lengths {number}")
        given = source.randint(*_around(self.input_len, self.input_ratio))
        if self.kind == "embeddings":
            return self.prefix_len + given, 0
        return self.prefix_len + given, source.randint(*_around(self.output_len, self.output_ratio))


def _around(mean: int, ratio: float) -> tuple[int, int]:
    """The range of lengths: integers from mean × (1 − ratio) to mean × (1 + ratio)."""
    return max(1, math.floor(mean * (1 - ratio))), max(1, math.ceil(mean * (1 + ratio)))


def generate_exact(
    lengths: RandomLengths, seed: int, *, first: int = 0, step: int = 1
) -> Iterator[Conversation]:
    """Endless requests with these lengths; ``first`` and ``step`` as for :func:`generate`.

    All texts begin with the same word, because chat templates strip the space before it, and some
    tokenizers then split it. A request of at most ``added_tokens`` tokens has only that word.
    """
    start = (lengths.words or text.WORDS)[0]
    prefix = text.words(random.Random(f"{seed} prefix"), lengths.prefix_len, lengths.words)
    for number in itertools.count(first, step):
        input_tokens, output_tokens = lengths.lengths(seed, number)
        count = max(1, input_tokens - lengths.added_tokens)
        own = text.words(random.Random(f"{seed} input {number}"), count, lengths.words)
        # All words have the same length, so that characters count tokens.
        content = start + (prefix + own[len(prefix) :])[len(start) : count * len(start)]
        yield Conversation((Turn(content, output_tokens),), kind=lengths.kind)


# -- from files ------------------------------------------------------------------------------------


def read_sharegpt(
    path: Path, *, messages_min: int = 2, tokens_max: int = 8192
) -> list[Conversation]:
    """Conversations in ShareGPT format: ``[{"conversations": [{"from", "value"}, …]}, …]``.

    The history uses the file's replies, whose lengths also limit the engine's. Leading replies are
    dropped; a conversation is cut before the turn that exceeds ``tokens_max``. TrafficError if the
    file is invalid.
    """
    found = _parsed(path)
    if not isinstance(found, list):
        raise TrafficError(f"{path}: is not a list of conversations")
    conversations = []
    for number, entry in enumerate(found):
        try:
            messages = [(str(m["from"]), str(m["value"])) for m in entry["conversations"]]
        except (TypeError, KeyError):
            raise TrafficError(
                f"{path}: entry {number} is not {{'conversations': [{{'from', 'value'}}, …]}}"
            ) from None
        if len(messages) >= messages_min and (turns := _turns(messages, tokens_max)):
            conversations.append(Conversation(turns))
    if not conversations:
        raise TrafficError(f"{path}: has no conversation with at least {messages_min} messages")
    return conversations


def _turns(messages: list[Message], tokens_max: int) -> tuple[Turn, ...]:
    while messages and messages[0][0] not in ("human", "user"):
        messages = messages[1:]
    turns, tokens = [], 0
    for (_, question), (_, answer) in zip(messages[::2], messages[1::2], strict=False):
        length = text.count(text.pack(answer))
        tokens += text.count(text.pack(question)) + length
        if tokens > tokens_max or not question:
            break
        turns.append(Turn(question, max(1, length), answer))
    return tuple(turns)


def _parsed(path: Path) -> Any:
    try:
        if path.stat().st_size > FILE_MAX_BYTES:
            raise TrafficError(f"{path}: is larger than {FILE_MAX_BYTES >> 30} GiB")
        return msgspec.json.decode(path.read_bytes())
    except OSError as error:
        raise TrafficError(f"{path}: {error.strerror}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise TrafficError(f"{path}: is not JSON: {decode_problem(error)}") from None


# -- arrivals --------------------------------------------------------------------------------------


class Arrivals(msgspec.Struct, frozen=True, kw_only=True):
    """Start times of conversations or requests, regardless of completions (open loop).

    ``poisson`` has gaps with a gamma distribution whose shape is ``burstiness``, like vLLM's
    benchmark: 1 is a Poisson process, less is burstier, more is more even, infinity is constant.
    """

    per_s: float
    kind: Literal["poisson", "constant", "bursts", "ramp"] = "poisson"
    burstiness: float = 1.0
    burst: int = 10  # arrivals per burst
    until_per_s: float = 0.0  # final rate of a ramp
    ramp_s: float = 60.0

    def times(self, seed: int, count: int | None = None) -> Iterator[float]:
        """An endless sequence of times, in seconds since the start.

        With ``count``, that many times. Those of a Poisson or gamma process are then scaled so that
        the last one is at ``count / per_s``, and the mean rate does not depend on the seed.
        """
        if count is None:
            return self._endless(seed)
        times = list(itertools.islice(self._endless(seed), count))
        if self.kind == "poisson" and times and times[-1]:
            scale = count / self.per_s / times[-1]
            times = [at_s * scale for at_s in times]
        return iter(times)

    def _endless(self, seed: int) -> Iterator[float]:
        source = random.Random(f"{seed} arrivals")
        at_s = 0.0
        while True:
            if self.kind == "bursts":
                at_s += source.expovariate(self.per_s / self.burst)
                yield from itertools.repeat(at_s, self.burst)
            elif self.kind == "constant":
                yield at_s
                at_s += 1 / self.per_s
            else:
                at_s += self._gap_s(source, at_s)
                yield at_s

    def _gap_s(self, source: random.Random, at_s: float) -> float:
        if self.kind == "ramp":
            share = min(1.0, at_s / self.ramp_s)
            return source.expovariate(self.per_s + (self.until_per_s - self.per_s) * share)
        if self.burstiness == 1.0:
            return source.expovariate(self.per_s)
        if math.isinf(self.burstiness):
            return 1 / self.per_s
        return source.gammavariate(self.burstiness, 1 / (self.per_s * self.burstiness))


def timed(conversations: Iterable[Conversation], times: Iterable[float]) -> Iterator[Conversation]:
    """Assign start times to conversations."""
    for one, at_s in zip(conversations, times, strict=False):
        yield msgspec.structs.replace(one, at_s=at_s)
