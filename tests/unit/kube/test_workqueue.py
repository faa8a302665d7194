"""The queue of keys: one worker for each, back-off after failures, requeues on request."""

from __future__ import annotations

import asyncio
import itertools
from collections import defaultdict

from fakes.kube import now_s
from fakes.time import FAKE_TIME

from kubeai.kube.workqueue import Queue

pytestmark = FAKE_TIME


async def test_a_key_is_processed_by_one_worker_at_a_time_and_different_keys_in_parallel():
    running, most, done = defaultdict(int), 0, defaultdict(int)

    async def work(name):
        nonlocal most
        running[name] += 1
        assert running[name] == 1
        most = max(most, sum(running.values()))
        await asyncio.sleep(1.0)
        running[name] -= 1
        done[name] += 1

    queue = Queue(work, parallel_max=3)
    for _ in range(10):
        for name in "abcde":
            queue.add(name)
        await asyncio.sleep(0.1)
    await asyncio.sleep(20.0)
    assert most == 3
    assert set(done) == set("abcde")
    assert done["a"] == 2  # once, and once more for all that was added while it ran
    await queue.stop()


async def test_a_failed_key_backs_off_even_if_it_is_added_again():
    times = []

    async def work(name):
        times.append(now_s())
        raise ValueError("a fault")

    queue = Queue(work, parallel_max=1)
    for _ in range(1000):
        queue.add("a")
        await asyncio.sleep(0.1)
    rests = [b - a for a, b in itertools.pairwise(times)]
    assert min(rests) >= 0.5
    assert max(rests) <= 30.0
    assert len(times) < 12
    await queue.stop()


async def test_a_key_is_requeued_on_request():
    times = []

    async def work(name):
        times.append(now_s())
        return 5.0 if len(times) < 3 else None

    queue = Queue(work, parallel_max=1)
    queue.add("a")
    await asyncio.sleep(60.0)
    assert [round(b - a) for a, b in itertools.pairwise(times)] == [5, 5]
    await queue.stop()
