"""The requests of a simulated run: conversations, or what an access log recorded of requests.

A session knows its requests' prompts as the gateway sees them (:class:`Request`) and as the engine
does, as hashes of KV blocks. ``cluster`` decides when each request is sent.
"""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import msgspec
from typing_extensions import override

from kubeai._prompt import Prompt, sample_ends
from kubeai.openai.request import read as read_request
from kubeai.openai.routes import Kind
from kubeai.simulation import text
from kubeai.simulation.access_logs import LoggedRequest
from kubeai.simulation.routers import Request
from kubeai.simulation.setting import Setting
from kubeai.simulation.traffic import Conversation

REPLY_TOKENS = 48  # for turns without a length
Traffic = Conversation | LoggedRequest


class Submission(NamedTuple):
    """A request, and what the engine needs to simulate it."""

    request: Request
    output_tokens: int
    hashes: list[int]  # of the full blocks of prompt and output together


class Session:
    """Requests that are sent one after the other."""

    __slots__ = ("at_s", "number", "turn")

    def __init__(self, number: int, at_s: float | None) -> None:
        self.number = number
        self.turn = 0
        self.at_s = at_s  # start time, since the run's start; None: when a slot is free

    def next_request(self) -> Submission:
        """The request of the current turn. Called once per turn."""
        raise NotImplementedError

    def complete_turn(self) -> None:
        """The current turn's response is complete."""
        self.turn += 1

    @property
    def is_over(self) -> bool:
        """Whether all turns are complete."""
        return self.turn > 0

    @property
    def think_s(self) -> float:
        """The pause before the current turn."""
        return 0.0


def make_session(number: int, traffic: Traffic, setting: Setting) -> Session:
    """The session of a conversation or of a logged request."""
    if isinstance(traffic, Conversation):
        return _Talk(number, traffic, setting)
    return _Logged(number, traffic, setting.engine.block_tokens)


class _Logged(Session):
    """One request of an access log, with the samples that the gateway took of its prompt."""

    __slots__ = ("_block", "_logged")

    def __init__(self, number: int, logged: LoggedRequest, block_tokens: int) -> None:
        super().__init__(number, logged.at_s)
        self._logged = logged
        self._block = block_tokens

    @override
    def next_request(self) -> Submission:
        logged = self._logged
        hashes = logged.block_hashes(self.number, self._block)
        prompt = Prompt(
            logged.tokens, logged.blocks, logged.depths, key=logged.key, streams=logged.streams
        )
        request = Request(prompt, hashes[: logged.tokens // self._block])
        return Submission(request, logged.output_tokens, hashes)


class _Talk(Session):
    """A conversation in progress: its tokens so far and its hash key."""

    __slots__ = ("_block", "_blocks", "_conversation", "_key", "_learns", "_random", "_reply")

    def __init__(self, number: int, conversation: Conversation, setting: Setting) -> None:
        super().__init__(number, conversation.at_s)
        self._conversation = conversation
        self._key = _key(conversation, setting.prefix_char_length)
        # The gateway learns how slow an engine is from streams only.
        self._learns = not {"rates", "work"} & set(setting.without)
        self._random = random.Random(f"{setting.seed} answers {number}")
        self._reply = b""
        self._block = setting.engine.block_tokens
        self._blocks = text.Blocks(self._block)
        for role, content in conversation.history:
            self._blocks.add(text.message(role, content))

    @override
    def next_request(self) -> Submission:
        turn = self._conversation.turns[self.turn]
        if self._conversation.kind == "embeddings":
            tokens = max(1, text.count(text.pack(turn.text)))
            return Submission(Request(Prompt(tokens, key=self._key, streams=True), []), 0, [])
        self._blocks.add(text.message("user", turn.text))
        prompt = self._blocks.then(text.OPENING)
        output = turn.reply_tokens or REPLY_TOKENS
        reply = text.pack(text.words(self._random, output))
        # The history may have a given reply instead of the engine's.
        kept = reply if turn.reply is None else text.pack(turn.reply)
        self._reply = text.OPENING + kept + text.END
        request = Request(self._sampled(prompt), prompt.hashes)
        return Submission(request, output, prompt.then(reply).hashes)

    def _sampled(self, prompt: text.Blocks) -> Prompt:
        """The prompt with its sampled blocks, as the gateway finds them in a text."""
        block_bytes = self._block * text.TOKEN_BYTES
        ends = sample_ends(len(prompt.hashes) * block_bytes)
        counts = sorted({end // block_bytes for end in ends} - {0})
        hashes = [prompt.hashes[count - 1] for count in counts]
        depths = [count * self._block for count in counts]
        return Prompt(prompt.tokens, hashes, depths, key=self._key, streams=self._learns)

    @override
    def complete_turn(self) -> None:
        self._blocks.add(self._reply)
        self.turn += 1

    @property
    @override
    def is_over(self) -> bool:
        return self.turn == len(self._conversation.turns)

    @property
    @override
    def think_s(self) -> float:
        return self._conversation.turns[self.turn].think_s


def _key(conversation: Conversation, prefix_char_length: int) -> int:
    """The hash key, which is the same for all turns: it depends on the first message."""
    if conversation.kind == "embeddings":
        body: dict[str, Any] = {"input": conversation.turns[0].text}
        kind = Kind.EMBEDDINGS
    else:
        messages = conversation.prompt(0, ())
        body = {"messages": [{"role": role, "content": content} for role, content in messages]}
        kind = Kind.CHAT
    request = read_request(kind, msgspec.json.encode({"model": "m"} | body))
    return request.key(prefix_char_length)
