"""How one endpoint has answered, and when it is ejected: passive health checking.

Failures are counted over all workers, in the load table. ``eject_after_failures`` consecutive ones
eject the endpoint: for ``eject_time_s``, twice as long each further time. It is then half-open: one
request at a time probes it, and a failed probe ejects it again. When every endpoint of a model is
ejected there is nothing to be gained by passing any over, and picks go to all of them (panic mode),
until one answers.

An endpoint is *trusted* while it is expected to answer, *down* while it keeps failing, and
*proven* by an answer that has begun since a given time; attempts.py chooses by these. An endpoint's
pool owns its Health, which holds no connection and gets the time from a clock.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from kubeai._load import TRIAL_S

if TYPE_CHECKING:
    from kubeai.api.config import GatewayConfig
    from kubeai.routing import RoutedModel

# For how long a failure makes an endpoint doubtful, unless as many answers have begun since.
DOUBT_S = 10.0
TRUST_ANSWERS = 5
# For how long consecutive failures say that the next attempt there would fail as well.
DOWN_S = 0.25
DOWN_FAILURES = 2
# How long after a probe beyond the retry budget the next one may follow; doubled with each that
# has not led to a complete answer.
PROBE_INTERVAL_S = 0.25
PROBE_DOUBLINGS_MAX = 10
EJECTION_DOUBLINGS_MAX = 32


class Health:
    """One endpoint's health, as one worker sees it; see the module."""

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
        self._failed_s = 0.0  # the last failure that ``is_trusted`` has seen, by any worker
        self._answers = 0  # how many answers had begun then
        self._probed_s = -math.inf
        self._probes = 0  # since the last recovery

    def failed(self, *, unreachable: bool, probe: bool) -> float | None:
        """Count a failure; for how many seconds the endpoint is ejected by it, if it is.

        ``unreachable``: there was no answer. ``probe``: the endpoint was picked while ejected.
        """
        now_s, routed, config = self._clock(), self._routed, self._config
        failures = routed.note_failure(self._endpoint, now_s, unreachable)
        after = config.eject_after_failures
        if not after:
            return None
        until_s = routed.ejected_until(self._endpoint)
        if until_s and not (probe and until_s - now_s <= TRIAL_S):
            return None  # sent before the ejection, or in panic mode
        if not until_s and failures < after:  # also of a probe, if others have recovered it since
            return None
        doublings = min(routed.ejection_count(self._endpoint), EJECTION_DOUBLINGS_MAX)
        for_s = min(config.eject_max_time_s, config.eject_time_s * 2.0**doublings)
        return for_s if routed.eject(self._endpoint, now_s + for_s) else None

    def restored(self) -> bool:
        """A request that was sent while the endpoint was ejected is being answered.

        Returns whether this ends an ejection.
        """
        if not self._routed.ejected_until(self._endpoint):
            return False
        self._routed.restore(self._endpoint, self._clock())
        return True

    def recovered(self) -> None:
        """An answer is complete, the first since a failure or an ejection."""
        self._probes = 0
        self._routed.recover(self._endpoint)

    def is_trusted(self, answers: int) -> bool:
        """Whether the endpoint can be expected to answer. ``answers``: that have begun so far.

        It can if it is not ejected and has not failed lately, or not after its last few answers.
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
        """Whether it fails just now, again and again. ``answered_s``: when it last answered."""
        failed_s = self._routed.failed_at(self._endpoint)
        return (
            failed_s > answered_s
            and self._clock() - failed_s <= DOWN_S
            and self._routed.failures(self._endpoint) >= DOWN_FAILURES
        )

    def take_probe(self, answered_s: float) -> bool:
        """Whether a request may probe the endpoint beyond the retry budget, which is then counted.

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
        """Whether an answer began after ``since_s``, and no attempt has failed after that."""
        return (
            not self._routed.ejected_until(self._endpoint)
            and answered_s > since_s
            and answered_s > self._routed.failed_at(self._endpoint)
        )
