"""Which Models' engines reject requests that ask for the usage of a stream.

An engine that does not know ``stream_options`` may reject a body that has it. The request is then
sent again without (attempts.py). If that succeeds, its Model's engine is not asked for a while.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from kubeai.routing.table import RoutedModel

REFUSAL_S = 600.0  # the engine may have been replaced by another version


class UsageRefusals:
    """The Models of one worker whose engines are not asked at present."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._until_s: WeakKeyDictionary[RoutedModel, float] = WeakKeyDictionary()

    def add(self, routed: RoutedModel) -> None:
        """The Model's engine has rejected a request that asked, and accepted it without."""
        self._until_s[routed] = self._clock() + REFUSAL_S

    def __contains__(self, routed: object) -> bool:
        until_s = self._until_s.get(routed)  # type: ignore[call-overload]
        return until_s is not None and self._clock() < until_s
