"""``kubeai uninstall``: delete the Models of a namespace while their operator still runs.

A Model with a cache holds a finalizer until its files are gone, and only the operator takes that
away. Deleted after it, Models would stay, and their CustomResourceDefinition with them, for ever.
The Helm chart runs this before it deletes anything.
"""

from __future__ import annotations

import asyncio
import time

from kubeai.engines.cache import CLAIM_PREFIX
from kubeai.errors import KubeAIError
from kubeai.kube import MODELS, PVCS, ApiError, Kube, Resource
from kubeai.logs import get_logger

log = get_logger(__name__)
LOOK_INTERVAL_S = 1.0
CLAIMS = "app.kubernetes.io/managed-by=kubeai"


async def uninstall(kube: Kube, namespace: str, timeout_s: float) -> None:
    """Until no Model is left, then the claims of their caches, which are empty by then.

    KubeAIError when some are left after ``timeout_s`` seconds; it names them.
    """
    deadline_s = time.monotonic() + timeout_s
    told: set[str] = set()
    while left := await _models(kube, namespace):
        for name in left.keys() - told:
            log.info("deleting", model=name)
        for name in (name for name, going in left.items() if not going):
            await _delete(kube, MODELS, name, namespace)
        told |= left.keys()
        if time.monotonic() > deadline_s:
            names = ", ".join(sorted(left))
            raise KubeAIError(f"after {timeout_s:.0f} s these Models are left: {names}")
        await asyncio.sleep(LOOK_INTERVAL_S)
    claims, _ = await kube.list(PVCS, namespace, labels=CLAIMS)
    for claim in claims:
        name = claim["metadata"]["name"]
        if name.startswith(CLAIM_PREFIX):
            log.info("deleting", claim=name)
            await _delete(kube, PVCS, name, namespace)


async def _models(kube: Kube, namespace: str) -> dict[str, bool]:
    """Which there are, and whether they are going."""
    try:
        found, _ = await kube.list(MODELS, namespace)
    except ApiError as error:
        if error.status == 404:  # their definition is gone
            return {}
        raise
    return {m["metadata"]["name"]: "deletionTimestamp" in m["metadata"] for m in found}


async def _delete(kube: Kube, resource: Resource, name: str, namespace: str) -> None:
    try:
        await kube.delete(resource, name, namespace)
    except ApiError as error:
        if error.status != 404:
            raise
