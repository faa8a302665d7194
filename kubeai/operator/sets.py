"""Follows the LeaderWorkerSets of a namespace where their API is installed.

Used by the operator.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from kubeai.kube.client import Kube
from kubeai.kube.errors import ApiError
from kubeai.kube.resources import SETS
from kubeai.operator.groups import SetObject

PROBE_INTERVAL_S = 10.0  # while a Model needs the API and it is not installed
# Lists that fail, one after the other, until KubeAI starts without them. A missing permission is no
# reason to wait; an API server that is just starting is.
FAILURES_MAX = 6
_NOT_INSTALLED = (
    "a replica on several nodes needs the LeaderWorkerSet API (leaderworkerset.x-k8s.io/v1), which "
    "is not installed; install LeaderWorkerSet, or use <profile>:<count>"
)


class Sets:
    """Follows the LeaderWorkerSets of a namespace, where their API is installed.

    ``replaced`` and ``changed`` are those of :meth:`Kube.follow`. ``needed`` says whether a Model
    asks for several nodes; only then is an API that is not installed looked for again. `problem`
    says why sets cannot be created, if they cannot; `changed_problem` is called when it changes.
    """

    def __init__(
        self,
        kube: Kube,
        namespace: str,
        labels: str,
        *,
        replaced: Callable[[list[SetObject]], None],
        changed: Callable[[str, SetObject], None],
        needed: Callable[[], bool],
        changed_problem: Callable[[], None],
    ) -> None:
        self._kube = kube
        self._namespace = namespace
        self._labels = labels
        self._replaced = replaced
        self._changed = changed
        self._needed = needed
        self._changed_problem = changed_problem
        self._known = False
        self._failures = 0
        self._gone = asyncio.Event()
        self.problem = "the LeaderWorkerSets have not been listed yet"

    async def run(self) -> None:
        """Look for the API and follow the sets, forever."""
        looks = True
        while True:
            if looks:
                if await self._installed():
                    await self._follow()
                self._replaced([])
                self._set_problem(_NOT_INSTALLED)
            await asyncio.sleep(PROBE_INTERVAL_S)
            looks = self._needed()

    async def _installed(self) -> bool:
        """Whether the API may be there: only a 404 says that it is not."""
        try:
            await self._kube.list(SETS, self._namespace, metadata_only=True)
        except ApiError as error:
            return error.status != 404
        return True

    async def _follow(self) -> None:
        """Follow the sets until their API is gone."""
        self._gone.clear()
        follow = asyncio.create_task(
            self._kube.follow(
                SETS,
                self._namespace,
                labels=self._labels,
                type=SetObject,
                replaced=self._listed,
                changed=self._changed,
                failed=self._failed,
            )
        )
        gone = asyncio.create_task(self._gone.wait())
        try:
            await asyncio.wait((follow, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (follow, gone):
                task.cancel()
            await asyncio.gather(follow, gone, return_exceptions=True)

    def _listed(self, sets: list[SetObject]) -> None:
        self._replaced(sets)
        self._known = True
        self._set_problem("")

    def _failed(self, error: ApiError) -> None:
        """Without this API, or the permission to use it, everything else works.

        While it is unknown which sets there are, their pods get no requests. So KubeAI waits for
        the list while another try may succeed, but not forever.
        """
        if error.status == 404:
            self._gone.set()
            return
        self._failures += 1
        if not self._known and (error.status == 403 or self._failures >= FAILURES_MAX):
            self._replaced([])
            self._set_problem(f"the LeaderWorkerSets cannot be listed: {error}")

    def _set_problem(self, problem: str) -> None:
        if problem != self.problem:
            self.problem = problem
            self._changed_problem()
