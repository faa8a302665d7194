"""Two hundred chats at once on a model at zero: three replicas come, and go, and nothing is lost.

The clients go on for a few rounds: those that were held all go to the replica that came first,
and only what is asked later can reach the others.
"""

import asyncio
import contextlib

import aiohttp
import pytest
from harness import chat, model, pods, received, replicas, running, scrape, until

CHATS = 200
ROUNDS = 3
TOKENS = 30  # 3 s a chat
ARGS = ("--startup-delay=1s", "--decode-tokens-per-second=10")
WINDOW_S = 10  # the load is averaged over so long: that long after the last chat it is 0


class Watch:
    """What the Model went through: every (wanted, all, ready) that was seen."""

    def __init__(self, kube):
        self.seen = []
        self._kube = kube

    async def run(self):
        while True:
            state = await replicas(self._kube, "chat")
            if not self.seen or self.seen[-1] != state:
                self.seen.append(state)
            await asyncio.sleep(0.1)


async def active(local):
    samples = await scrape(local.metrics)
    series = [name for name in samples if name.startswith("kubeai_inference_requests_active{")]
    series += [name for name in samples if name.startswith("kubeai_endpoint_requests_in_flight{")]
    assert series
    return sum(samples[name] for name in series)


async def zero(kube):
    return await replicas(kube, "chat") == (0, 0, 0) and not await pods(kube, "chat")


async def a_client(session, local, number):
    answers = []
    for turn in range(ROUNDS):
        answer = await chat(
            session,
            local.endpoint,
            "chat",
            f"chat {number}, round {turn}",
            max_tokens=TOKENS,
            headers={"X-Request-Id": f"{number}.{turn}"},
        )
        answers.append(answer)
    return answers


@pytest.mark.slow
@pytest.mark.timeout(90)
async def test_200_chats_at_once_scale_from_zero_to_three_and_back(tmp_path):
    burst = model("chat", args=ARGS, minReplicas=0, maxReplicas=3, targetRequests=32)
    scaling = {"modelAutoscaling": {"interval": "1s", "timeWindow": f"{WINDOW_S}s"}}
    async with (
        running(tmp_path, burst, config=scaling, workers=2) as local,
        local.kube() as kube,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session,
    ):
        watch = Watch(kube)
        watching = asyncio.create_task(watch.run())
        try:
            await until("the Model is at zero", lambda: zero(kube))
            rounds = await asyncio.gather(*(a_client(session, local, n) for n in range(CHATS)))
            answers = [answer for answers in rounds for answer in answers]
            assert [a for a in answers if a.status != 200 or not a.whole] == []
            assert {answer.chunks for answer in answers} == {TOKENS}

            async def nothing_in_flight():
                return await active(local) == 0

            await until("the load table is back to 0", nothing_in_flight, 2)
            engines = await pods(kube, "chat")
            addresses = [f"{pod['status']['podIP']}:8000" for pod in engines]
            assert len(addresses) == 3
            came = await received(addresses)
            assert sorted(came) == sorted(f"{n}.{t}" for n in range(CHATS) for t in range(ROUNDS))
            assert {i: at for i, at in came.items() if len(at) > 1} == {}, "sent twice"
            assert len({answer.replica for answer in answers}) == 3, "all three took part"

            await until(
                "the Model is seen at zero again",
                lambda: watch.seen[-1] == (0, 0, 0),
                WINDOW_S + 15,
            )
            await until("its pods are gone", lambda: zero(kube))
        finally:
            watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watching
        assert max(wanted for wanted, _, _ in watch.seen) == 3
        assert max(ready for _, _, ready in watch.seen) == 3
        assert watch.seen[0] == watch.seen[-1] == (0, 0, 0)
