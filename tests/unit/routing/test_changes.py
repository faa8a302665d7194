"""Those who wait for a change are woken by the next one."""

import asyncio

from kubeai.routing.changes import Changes


async def test_all_who_wait_are_woken_once():
    changes = Changes()
    changes.notify()  # nobody waits
    first, second = (asyncio.ensure_future(changes.next()) for _ in range(2))
    await asyncio.sleep(0)
    assert not first.done()
    changes.notify()
    await asyncio.gather(first, second)
    later = asyncio.ensure_future(changes.next())
    await asyncio.sleep(0)
    assert not later.done()
    changes.notify()
    await later


async def test_one_who_leaves_takes_nobody_along():
    changes = Changes()
    leaving, staying = (asyncio.ensure_future(changes.next()) for _ in range(2))
    await asyncio.sleep(0)
    leaving.cancel()
    await asyncio.sleep(0)
    changes.notify()
    await staying
    assert leaving.cancelled()
