"""The operator is killed at any write, and the next one ends in the same state."""

from __future__ import annotations

import asyncio

from fakes.kube import World
from fakes.time import FAKE_TIME

from kubeai.kube.errors import ApiError

pytestmark = FAKE_TIME


async def life(world, crash_at, committed):
    """Create, scale, roll out, scale down; the controller dies at one write and restarts."""
    seen = 0

    def before(verb, plural, name):
        nonlocal seen
        seen += 1
        if seen == crash_at and not committed:
            crashed.set()
            raise ApiError(0, "Crash", "never sent")

    def after(verb, plural, name):
        if seen == crash_at and committed:
            crashed.set()
            raise ApiError(0, "Crash", "sent, but the response was lost")

    async def phoenix():
        await crashed.wait()
        await world.stop()
        world.start()

    crashed = asyncio.Event()
    rising = asyncio.create_task(phoenix())
    world.kube.before, world.kube.after = before, after
    world.start()
    limits = []
    for spec, wanted in (
        ({"replicas": 1}, 1),
        ({"replicas": 3}, 3),
        ({"args": ["--new"]}, 3),
        ({"replicas": 2, "files": [{"path": "/a", "content": "x"}]}, 2),
    ):
        world.apply(**spec)
        limits.append(wanted)
        goal = {"all": wanted, "ready": wanted}
        await world.until(
            lambda goal=goal: (
                world.replicas() == goal
                and world.condition("Progressing") == ("False", "UpToDate")
                and world.model()["status"]["conditions"][0]["observedGeneration"]
                == world.model()["metadata"]["generation"]
            ),
            limit_s=200.0,
        )
        assert len(world.pods()) == wanted
    rising.cancel()
    await asyncio.gather(rising, return_exceptions=True)
    return seen, world.pods()


async def test_a_crash_at_any_write_ends_in_the_same_state():
    world = World()
    writes, pods = await life(world, 0, False)
    await world.stop()
    assert 15 < writes < 60
    for crash_at in range(1, writes + 1):
        for committed in (False, True):
            world = World()
            _, got = await life(world, crash_at, committed)
            await world.stop()
            assert len(got) == len(pods) == 2
            assert world.kube.most_pods <= 4  # 3 replicas and a surge of 1
            assert {n.rsplit("-", 1)[0] for n in got} == {n.rsplit("-", 1)[0] for n in pods}
