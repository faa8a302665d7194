"""Waits for several Models at the same time. Called by fallback.py."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

from kubeai.logs import get_logger
from kubeai.openai.errors import ErrorResponse
from kubeai.routing.queueing import Unserved

if TYPE_CHECKING:
    from kubeai._counts import Reservation

log = get_logger(__name__)


async def first_of(
    here: Coroutine[Any, Any, Reservation], *others: Coroutine[Any, Any, Reservation]
) -> tuple[int, Reservation]:
    """The first Reservation that one of several waits has, and which one: 0 is ``here``.

    The exception of ``here`` if it ends before that. Those of the others end their waits only.
    """
    tasks = [asyncio.ensure_future(wait) for wait in (here, *others)]
    first = None
    try:
        while first is None and not tasks[0].done():
            pending = [task for task in tasks if not task.done()]
            await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            first = next(filter(_has_reservation, tasks), None)
    finally:
        for task in tasks:
            task.cancel()
        try:
            await asyncio.gather(*tasks, return_exceptions=True)
        except asyncio.CancelledError:
            first = None
            raise
        finally:
            for task in tasks:
                if task is not first:
                    task.add_done_callback(_let_go)
    first = first or tasks[0]
    return tasks.index(first), first.result()


def _let_go(task: asyncio.Future[Reservation]) -> None:
    """Release what a wait has got that is not needed any more."""
    if task.cancelled():
        return
    error = task.exception()
    if error is None:
        task.result().release()
    elif not isinstance(error, ErrorResponse | Unserved | TimeoutError):
        log.error("waiting for a model failed", exc_info=error)


def _has_reservation(task: asyncio.Future[Reservation]) -> bool:
    return task.done() and not task.cancelled() and task.exception() is None
