"""Notifies those who wait for a model's route to change.

Unlike the model's held requests, which get an endpoint when there is one, they decide what to do:
gateway/fallback.py waits for several models at a time.
"""

from __future__ import annotations

import asyncio


class Changes:
    """Owned by a RoutedModel. Its callers limit how many wait."""

    def __init__(self) -> None:
        self._next: asyncio.Future[None] | None = None  # None: nobody waits

    async def next(self) -> None:
        """Return when the route changes, or the model is deleted."""
        if self._next is None:
            self._next = asyncio.get_running_loop().create_future()
        await asyncio.shield(self._next)

    def notify(self) -> None:
        """The route has changed."""
        if self._next is not None:
            self._next.set_result(None)
            self._next = None
