"""A condition of KubeAI's own pod that says whether its message streams are connected.

``kubectl get pod -o yaml`` shows it, and ``kubectl wait --for=condition=…`` waits for it. It is no
readiness gate: HTTP requests are served without the brokers. The supervisor runs one
:class:`PodCondition` if the config has streams and the pod's name is known.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime

from kubeai.kube.backoff import Backoff
from kubeai.kube.client import Kube
from kubeai.kube.errors import ApiError
from kubeai.kube.resources import PODS
from kubeai.logs import get_logger

log = get_logger(__name__)

TYPE = "kubeai.org/MessagingConnected"
INTERVAL_S = 5.0
# Between writes that change only the message: an error may have another text at each attempt.
MESSAGE_INTERVAL_S = 60.0
MESSAGE_MAX_CHARS = 1024
BACKOFF_MAX_S = 300.0  # after a failed write, such as without the permission for it


class PodCondition:
    """Writes the condition when it changes. ``problems``: what is not connected, and why."""

    def __init__(
        self, kube: Kube, namespace: str, pod: str, problems: Callable[[], list[str]]
    ) -> None:
        self._kube = kube
        self._namespace = namespace
        self._pod = pod
        self._problems = problems
        self._written: tuple[str, str] | None = None  # status and message
        self._status_since = ("", "")  # the last status, and when it began

    async def run(self) -> None:
        """Write the condition at most every ``INTERVAL_S``, and at once if it is new."""
        backoff = Backoff(INTERVAL_S, BACKOFF_MAX_S)
        clock = asyncio.get_running_loop().time
        written_s = 0.0
        while True:
            problems = self._problems()
            wanted = ("False" if problems else "True", "; ".join(problems)[:MESSAGE_MAX_CHARS])
            wait_s = INTERVAL_S
            is_new = self._written is None or wanted[0] != self._written[0]
            if is_new or (wanted != self._written and clock() - written_s >= MESSAGE_INTERVAL_S):
                try:
                    await self._write(*wanted)
                    self._written, written_s = wanted, clock()
                    backoff.reset()
                except ApiError as error:
                    if not backoff.failures:
                        log.warning("cannot write the pod's condition", error=str(error))
                    wait_s = backoff.next_s()
            await asyncio.sleep(wait_s)

    async def _write(self, status: str, message: str) -> None:
        if self._status_since[0] != status:
            now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            self._status_since = status, now
        condition = {
            "type": TYPE,
            "status": status,
            "reason": "Connected" if status == "True" else "NotConnected",
            "message": message,
            "lastTransitionTime": self._status_since[1],
        }
        patch = {"status": {"conditions": [condition]}}
        await self._kube.patch(
            PODS, self._pod, patch, self._namespace, subresource="status", kind="strategic"
        )
