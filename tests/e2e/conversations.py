"""Realistic load: many concurrent multi-turn conversations, the turns of each in order."""

from __future__ import annotations

import asyncio
import dataclasses
import random

import aiohttp
from harness import Answer, chat

SYSTEM = "You are a patient assistant; you answer in short words, and never in more than one line."
_NOUNS = "rain wind snow tide leaf root seed bark stone sand clay moss fern reed lake hill"
WORDS = _NOUNS.split()


@dataclasses.dataclass
class Turn:
    conversation: int
    number: int
    request_id: str
    answer: Answer


@dataclasses.dataclass
class Talk:
    """The client's view of all turns of all conversations."""

    turns: list[Turn]

    def failed(self) -> list[Turn]:
        return [turn for turn in self.turns if not turn.answer.whole]

    def by_conversation(self) -> dict[int, list[Turn]]:
        grouped: dict[int, list[Turn]] = {}
        for turn in self.turns:
            grouped.setdefault(turn.conversation, []).append(turn)
        return grouped

    def strays(self) -> list[tuple[Turn, Turn]]:
        """(first turn, turn) where a turn was not answered by its conversation's first replica."""
        return [
            (turns[0], turn)
            for turns in self.by_conversation().values()
            for turn in turns
            if turn.answer.replica != turns[0].answer.replica
        ]

    def hit_rate(self) -> float:
        """Prompt tokens found in the engines' caches, of all."""
        asked = sum(turn.answer.prompt_tokens for turn in self.turns)
        return sum(turn.answer.cached_tokens for turn in self.turns) / asked


async def talk(
    endpoint: str,
    model: str,
    *,
    conversations: int,
    turns: int,
    at_a_time: int,
    think_s: float = 0.2,
    user_chars: int = 400,
    tokens: int = 16,
    seed: int = 1,
) -> Talk:
    """Hold the conversations; each turn carries the history, as chat clients do.

    Between turns a client thinks up to ``think_s``, and replies are ``tokens`` long give or take
    half: without that, clients that began together would go on in step, and least load would send
    them round to the same endpoints again.
    """
    held = Talk([])
    places = asyncio.Semaphore(at_a_time)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:

        async def converse(number: int) -> None:
            source = random.Random(f"{seed} {number}")
            messages = [{"role": "system", "content": SYSTEM}]
            async with places:
                for turn in range(turns):
                    said = f"Conversation {seed}.{number}, turn {turn}:"
                    while len(said) < user_chars:
                        said += " " + source.choice(WORDS)
                    messages.append({"role": "user", "content": said})
                    request_id = f"{model}-{seed}-{number}-{turn}"
                    answer = await chat(
                        session,
                        endpoint,
                        model,
                        messages,
                        max_tokens=source.randint(tokens // 2, 3 * tokens // 2),
                        headers={"X-Request-Id": request_id},
                    )
                    held.turns.append(Turn(number, turn, request_id, answer))
                    if not answer.whole:
                        return
                    messages.append({"role": "assistant", "content": answer.text})
                    await asyncio.sleep(source.random() * think_s)

        await asyncio.gather(*(converse(number) for number in range(conversations)))
    return held
