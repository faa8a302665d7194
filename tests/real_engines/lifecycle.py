"""What is checked of an engine's replicas: adapters, disconnects, rollouts, scale, prefix cache."""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any

from checks import MESSAGES
from harness import until
from session import START_TIMEOUT_S, Check, Session, Traffic

ABORT_TIMEOUT_S = 5.0
IDLE_TIMEOUT_S = 60.0
ADAPTER_TIMEOUT_S = 60.0


# -- adapters --------------------------------------------------------------------------------------


async def adapter(s: Session) -> None:
    """An adapter answers under the name that the client uses, and differently from the model."""
    name = f"{s.model}_one"

    async def text(model: str) -> str:
        answer = await s.openai.completions.create(
            model=model, prompt="Once upon a time", max_tokens=12, temperature=0
        )
        assert answer.model == model, f"the response names {answer.model!r} instead of {model!r}"
        return answer.choices[0].text

    listed = await s.http.get("/openai/v1/models")
    assert name in [one["id"] for one in listed.json()["data"]]
    assert await text(name) != await text(s.model), "the adapter changes nothing"
    stream = await s.openai.chat.completions.create(
        model=name, messages=MESSAGES, max_tokens=4, stream=True
    )
    assert {chunk.model async for chunk in stream} == {name}


async def adapters_change(s: Session) -> str:
    """An adapter is added and removed while the replica runs."""
    before = [pod["metadata"]["uid"] for pod in await s.pods()]
    one, two = ({"name": n, "url": f"pvc://weights/lora-{i}"} for n, i in (("one", 1), ("two", 2)))

    async def status(model: str) -> int:
        body = {"model": model, "prompt": "Hello", "max_tokens": 2}
        return (await s.http.post("/openai/v1/completions", json=body)).status_code

    async def is_served() -> bool:
        return await status(f"{s.model}_two") == 200

    async def is_unknown() -> bool:
        return await status(f"{s.model}_two") == 404

    started = time.monotonic()
    await s.patch(adapters=[one, two])
    await until("the second adapter is served", is_served, ADAPTER_TIMEOUT_S)
    loaded_s = time.monotonic() - started
    await s.patch(adapters=[one])
    await until("the second adapter is unknown", is_unknown, ADAPTER_TIMEOUT_S)
    assert [pod["metadata"]["uid"] for pod in await s.pods()] == before, "a pod was replaced"
    return f"served after {loaded_s:.1f} s, without a new pod"


# -- replicas --------------------------------------------------------------------------------------


def long_chat(s: Session, *, stream: bool, tokens: int, **more: Any) -> dict[str, Any]:
    return {
        "model": s.model,
        "messages": MESSAGES,
        "max_tokens": tokens,
        "ignore_eos": True,
        "stream": stream,
        **more,
    }


def disconnect(
    metric: str, tokens: int, *, streams: tuple[bool, ...] = (True, False), **more: Any
) -> Check:
    """The engine stops generating when its client leaves. ``metric``: its requests in flight.

    ``streams``: for which requests, streamed or not, the engine notices that its client has left.
    """

    async def check(s: Session) -> str:
        (address,) = await s.addresses()
        took = []
        for stream in streams:
            body = long_chat(s, stream=stream, tokens=tokens, **more)
            task = asyncio.create_task(s.http.post("/openai/v1/chat/completions", json=body))

            async def running(wanted: bool) -> bool:
                (count,) = await s.metrics(address, metric)
                return (count > 0) == wanted

            await until("the engine generates", lambda: running(True), 20)
            assert not task.done(), "the response was complete before the client could leave"
            task.cancel()
            started = time.monotonic()
            await until("the engine has stopped", lambda: running(False), ABORT_TIMEOUT_S)
            kind = "streamed" if stream else "not streamed"
            took.append(f"{kind}: stopped after {time.monotonic() - started:.2f} s")
        return "; ".join(took)

    return check


async def disconnect_by_queue(s: Session) -> str:
    """The same for an engine without metrics, which runs one request at a time."""

    async def short() -> float:
        started = time.monotonic()
        await s.openai.chat.completions.create(model=s.model, messages=MESSAGES, max_tokens=2)
        return time.monotonic() - started

    idle_s = await short()
    body = long_chat(s, stream=True, tokens=100_000)
    request = s.http.stream("POST", "/openai/v1/chat/completions", json=body)
    async with request as response:
        await anext(response.aiter_bytes())
    busy_s = await short()
    assert busy_s < idle_s + ABORT_TIMEOUT_S, busy_s
    return f"the next request was answered in {busy_s:.2f} s"


def rollout(send: Check) -> Check:
    """A new version of the Model replaces the replica under traffic, and no request fails."""

    async def check(s: Session) -> str:
        before = {pod["metadata"]["uid"] for pod in await s.pods()}

        async def replaced() -> bool:
            pods = await s.pods()
            return bool(pods) and not before & {pod["metadata"]["uid"] for pod in pods}

        started = time.monotonic()
        async with Traffic(s, send) as traffic:
            await s.patch(env={"REVISION": "2"})  # merged with the others
            await until("the replica is replaced", replaced, START_TIMEOUT_S)
            await s.ready(1)
        took = time.monotonic() - started
        assert not traffic.failures, f"{len(traffic.failures)} failed: {traffic.failures[:3]}"
        return (
            f"{took:.0f} s, {traffic.answered} requests, none failed, "
            f"slowest {traffic.slowest_s:.1f} s"
        )

    return check


async def scale_to_zero(s: Session) -> str:
    """Without requests, the replicas go, and the processes with them."""
    started = time.monotonic()
    await s.patch(minReplicas=0)
    await s.ready(0, IDLE_TIMEOUT_S)
    return f"after {time.monotonic() - started:.0f} s"


async def prefix_cache(s: Session) -> str:
    """Two replicas: the turns of a conversation reach the replica that has its beginning.

    Two requests are in flight, so that no replica is too busy for its conversations.
    """
    await s.patch(minReplicas=2)
    await s.ready(2)
    addresses = await s.addresses()
    names = "vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total"
    before = [await s.metrics(address, *names) for address in addresses]
    random_words = random.Random(1)
    waiting = [Conversation(random.Random(random_words.random())) for _ in range(16)]

    async def talk() -> None:
        while waiting:
            conversation = waiting.pop(0)
            await conversation.turn(s)
            if conversation.turns < 5:
                waiting.insert(random_words.randint(len(waiting) // 2, len(waiting)), conversation)

    await asyncio.gather(*(talk() for _ in range(2)))
    after = [await s.metrics(address, *names) for address in addresses]
    asked = [new[0] - old[0] for new, old in zip(after, before, strict=True)]
    hits = [new[1] - old[1] for new, old in zip(after, before, strict=True)]
    share = sum(hits) / sum(asked)
    assert min(asked) > 0, "one replica got no request"
    assert share > 0.5, f"only {share:.0%} of the prompt tokens were in a replica's cache"
    return f"{share:.0%} of {sum(asked):.0f} prompt tokens were in the replica's cache"


WORDS = ("gateway", "operator", "model", "replica", "prompt", "token", "cache", "route", "weight")


class Conversation:
    """A chat whose prompt grows with every turn."""

    def __init__(self, words: random.Random) -> None:
        self._words = words
        self.turns = 0
        self._messages: list[Any] = [{"role": "system", "content": "You answer in one word."}]

    async def turn(self, s: Session) -> None:
        text = " ".join(self._words.choices(WORDS, k=30))
        self._messages.append({"role": "user", "content": text})
        await s.openai.chat.completions.create(model=s.model, messages=self._messages, max_tokens=2)
        self._messages.append({"role": "assistant", "content": self._words.choice(WORDS)})
        self.turns += 1
