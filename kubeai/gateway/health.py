"""Passive health checking: tracks an endpoint's failures and ejects it.

Failures of all workers are counted in the load table. ``eject_after_failures`` consecutive failures
eject the endpoint for ``eject_time_s``, doubled with each further ejection. The endpoint is then
half-open: one request at a time probes it, and a failed probe ejects it again. If every endpoint of
a model is ejected, skipping them gains nothing, and picks go to all of them (panic mode) until one
responds.

An endpoint is *trusted* while it is expected to respond, *down* while it keeps failing, and
*proven* by a response that began after a given time; retries.py chooses endpoints by these. An
endpoint's pool owns its Health, which holds no connections and takes the time from a clock.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from kubeai._load import HALF_OPEN_PROBE_S

if TYPE_CHECKING:
    from kubeai.api.config.system import GatewayConfig
    from kubeai.routing.table import RoutedModel

# After a failure, an endpoint is trusted again after this time or this many responses.
DOUBT_S = 10.0
TRUST_ANSWERS = 5
# An endpoint is down for this long after this many consecutive failures.
DOWN_S = 0.25
DOWN_FAILURES = 2
# Minimum time between probes beyond the retry budget; doubled with each probe until the endpoint
# completes a response.
PROBE_INTERVAL_S = 0.25
PROBE_DOUBLINGS_MAX = 10
EJECTION_DOUBLINGS_MAX = 32


class Health:
    """One endpoint's health from the point of view of one worker; see the module."""

    def __init__(
        self,
        routed: RoutedModel,
        endpoint: str,
        config: GatewayConfig,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._routed = routed
        self._endpoint = endpoint
        self._config = config
        self._clock = clock
        self._failed_s = 0.0  # the last failure in any worker that ``is_trusted`` has seen
        self._answers = 0  # how many responses had begun then
        self._probed_s = -math.inf
        self._probes = 0  # since the last recovery

    def failed(self, *, unreachable: bool, probe: bool) -> float | None:
        """Count a failure. If it ejects the endpoint, return for how many seconds.

        ``unreachable``: there was no response. ``probe``: the endpoint was picked while ejected.
        """
        now_s, routed, config = self._clock(), self._routed, self._config
        failures = routed.note_failure(self._endpoint, now_s, unreachable)
        after = config.eject_after_failures
        if not after:
            return None
        until_s = routed.ejected_until(self._endpoint)
        if until_s and not (probe and until_s - now_s <= HALF_OPEN_PROBE_S):
            return None  # the request was sent before the ejection, or in panic mode
        if not until_s and failures < after:  # even for a probe, if others have recovered it since
            return None
        doublings = min(routed.ejection_count(self._endpoint), EJECTION_DOUBLINGS_MAX)
        for_s = min(config.eject_max_time_s, config.eject_time_s * 2.0**doublings)
        return for_s if routed.eject(self._endpoint, now_s + for_s) else None

    def restored(self) -> bool:
        """Call when a request that was sent to the ejected endpoint gets a response.

        Returns whether this ends an ejection.
        """
        if not self._routed.ejected_until(self._endpoint):
            return False
        self._routed.restore(self._endpoint, self._clock())
        return True

    def recovered(self) -> None:
        """Call when the first response after a failure or an ejection is complete."""
        self._probes = 0
        self._routed.recover(self._endpoint)

    def is_trusted(self, answers: int) -> bool:
        """Whether the endpoint is expected to respond.

        It is if it is not ejected, and has not failed within ``DOUBT_S`` or has begun
        ``TRUST_ANSWERS`` responses since. ``answers``: responses begun so far.
        """
        failed_s = self._routed.failed_at(self._endpoint)
        if failed_s != self._failed_s:
            self._failed_s, self._answers = failed_s, answers
        if self._routed.ejected_until(self._endpoint):
            return False
        return (
            not failed_s
            or self._clock() - failed_s > DOUBT_S
            or answers - self._answers >= TRUST_ANSWERS
        )

    def is_down(self, answered_s: float) -> bool:
        """Whether it currently fails repeatedly. ``answered_s``: when its last response began."""
        failed_s = self._routed.failed_at(self._endpoint)
        return (
            failed_s > answered_s
            and self._clock() - failed_s <= DOWN_S
            and self._routed.failures(self._endpoint) >= DOWN_FAILURES
        )

    def take_probe(self, answered_s: float) -> bool:
        """Whether a request may probe the endpoint beyond the retry budget; if so, counts a probe.

        ``answered_s``: as for `is_down`.
        """
        now_s = self._clock()
        interval_s = PROBE_INTERVAL_S * 2.0 ** min(self._probes, PROBE_DOUBLINGS_MAX)
        if now_s - self._probed_s < interval_s or self.is_down(answered_s):
            return False
        self._probed_s = now_s
        self._probes += 1
        return True

    def is_proven(self, answered_s: float, since_s: float) -> bool:
        """Whether a response began after ``since_s``, and no attempt has failed since."""
        return (
            not self._routed.ejected_until(self._endpoint)
            and answered_s > since_s
            and answered_s > self._routed.failed_at(self._endpoint)
        )
