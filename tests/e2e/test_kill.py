"""kill -9 of an engine, a worker or everything: only its own requests fail, and it recovers."""

import asyncio
import contextlib
import os
import signal

import aiohttp
import pytest
from harness import chat, model, pods, replicas, running, scrape, until

STREAMS = 40
TOKENS = 60  # 3 s at the model's rate
SLOW = ("--decode-tokens-per-second=20", "--max-batch=64")


def start_chats(session, endpoint, name, count=STREAMS, tokens=TOKENS):
    return [
        asyncio.create_task(chat(session, endpoint, name, f"conversation {n}", max_tokens=tokens))
        for n in range(count)
    ]


async def active(local):
    samples = await scrape(local.metrics)
    return sum(
        value
        for series, value in samples.items()
        if series.startswith("kubeai_inference_requests_active{")
    )


async def all_streaming(local, count=STREAMS):
    async def streaming():
        return await active(local) == count

    await until(f"{count} requests are in flight", streaming)


async def nothing_in_flight(local, timeout_s):
    async def zero():
        return await active(local) == 0

    await until("every counter is 0", zero, timeout_s)


async def ready(client, name, count):
    async def settled():
        return await replicas(client, name) == (count, count, count)

    await until(f"{count} replicas of {name} are ready", settled, 30)


@pytest.fixture
async def session():
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(connector=connector) as session:
        yield session


async def test_killed_engine_fails_only_its_own_requests(tmp_path, session):
    two = model("chat", args=SLOW, minReplicas=2, maxReplicas=2)
    async with running(tmp_path, two) as local, local.kube() as kube:
        await ready(kube, "chat", 2)
        chats = start_chats(session, local.endpoint, "chat")
        await all_streaming(local)
        engines = local.engines()
        assert len(engines) == 2
        os.kill(engines[0], signal.SIGKILL)
        answers = await asyncio.gather(*chats)
        # An answer that was cut between its head and its first token names no replica.
        assert {a.status for a in answers} == {200}
        lost = {a.replica for a in answers if not a.whole} - {""}
        kept = {a.replica for a in answers if a.whole}
        assert len(lost) == 1, "only streams of the dead engine are cut, and not tidily"
        assert len(kept) == 1
        assert not lost & kept
        await nothing_in_flight(local, 2)
        await ready(kube, "chat", 2)
        again = await asyncio.gather(*start_chats(session, local.endpoint, "chat", 4))
        assert all(answer.whole for answer in again)


@pytest.mark.slow
async def test_killed_worker_fails_only_its_own_requests(tmp_path, session):
    one = model("chat", args=SLOW, minReplicas=1, maxReplicas=1)
    async with running(tmp_path, one, workers=2) as local, local.kube() as kube:
        await ready(kube, "chat", 1)
        chats = start_chats(session, local.endpoint, "chat", tokens=3 * TOKENS)
        await all_streaming(local)
        before = local.workers()
        assert len(before) == 2
        os.kill(before[0], signal.SIGKILL)
        answers_left = [asyncio.ensure_future(c) for c in chats]

        async def half_released():
            count = await active(local)
            return 0 < count < STREAMS

        await until("the dead worker's requests are counted no more", half_released, 4)
        await until("it has a successor", lambda: len(set(local.workers()) - {before[0]}) == 2, 4)
        answers = await asyncio.gather(*answers_left)
        whole = sum(answer.whole for answer in answers)
        assert 0 < whole < STREAMS
        await nothing_in_flight(local, 2)
        again = await asyncio.gather(*start_chats(session, local.endpoint, "chat", 8))
        assert all(answer.whole for answer in again)


async def test_a_killed_fork_server_is_missed_by_nobody(tmp_path, session):
    one = model("chat", minReplicas=1, maxReplicas=1)
    async with running(tmp_path, one) as local, local.kube() as kube:
        await ready(kube, "chat", 1)
        before = local.processes()
        (fork_server,) = (pid for pid, command in before.items() if "fork server" in command)
        (worker,) = local.workers()
        os.kill(fork_server, signal.SIGKILL)
        assert (await chat(session, local.endpoint, "chat", "hello")).whole
        os.kill(worker, signal.SIGKILL)
        await until("it has a successor", lambda: set(local.workers()) - {worker}, 10)
        await until("requests are served", lambda: served(session, local), 10)
        assert set(before) - set(local.processes()) == {fork_server, worker}


async def served(session, local):
    return (await chat(session, local.endpoint, "chat", "hello")).whole


@pytest.mark.parametrize(
    "everything",
    [pytest.param(False, marks=pytest.mark.slow), True],
    ids=["the-parent", "every-process"],
)
async def test_killing_everything_leaves_no_orphan_and_restarts(tmp_path, session, everything):
    one = model("chat", args=SLOW, minReplicas=1, maxReplicas=2)
    async with running(tmp_path, one) as local, local.kube() as kube:
        await ready(kube, "chat", 1)
        chats = start_chats(session, local.endpoint, "chat")
        await all_streaming(local)
        victims = list(local.processes()) if everything else [local.process.pid]
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):  # one dies with another
                os.kill(pid, signal.SIGKILL)
        answers = await asyncio.gather(*chats)
        assert not everything or not any(answer.whole for answer in answers)
        await until("no process is left", lambda: not local.processes(), 15)
    kubeconfig = tmp_path / "state" / "kubeconfig"
    before = kubeconfig.read_bytes()
    async with running(tmp_path) as local, local.kube() as kube:
        assert kubeconfig.read_bytes() == before
        await ready(kube, "chat", 1)
        assert len(await pods(kube, "chat")) == 1
        again = await asyncio.gather(*start_chats(session, local.endpoint, "chat", 4))
        assert all(answer.whole for answer in again)
        await nothing_in_flight(local, 2)


async def test_killed_api_and_kubelet_restart_by_themselves(tmp_path, session):
    one = model("chat", args=SLOW, minReplicas=1, maxReplicas=1)
    async with running(tmp_path, one) as local, local.kube() as kube:
        await ready(kube, "chat", 1)
        for name in ("local.apiserver", "local.kubelet"):
            (pid,) = [p for p, command in local.processes().items() if name in command]
            os.kill(pid, signal.SIGKILL)
            await until(
                f"{name} has a successor",
                lambda name=name, pid=pid: [
                    p for p, c in local.processes().items() if name in c and p != pid
                ],
            )
        answer = None

        async def answered():
            nonlocal answer
            answer = await chat(session, local.endpoint, "chat", "hi", max_tokens=3)
            return answer.whole

        await until("the model answers", answered, 30)
        await ready(kube, "chat", 1)
