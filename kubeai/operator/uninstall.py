"""``kubeai uninstall``: delete the Models of a namespace and the volume claims of their caches.

A Model with a cache keeps a finalizer until its files are removed, which needs a running operator.
Models must therefore be deleted before the operator.

The Helm chart can run this as a hook. Other tools apply the hook's manifests as an ordinary Job;
:func:`require_helm_uninstall` distinguishes the two cases before anything is deleted.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from datetime import UTC, datetime

from kubeai.errors import KubeAIError
from kubeai.kube.client import Kube
from kubeai.kube.errors import ApiError
from kubeai.kube.resources import JOBS, MODELS, PVCS, SECRETS, Object, Resource
from kubeai.logs import get_logger
from kubeai.podspec.cache import CLAIM_PREFIX

log = get_logger(__name__)
LOOK_INTERVAL_S = 1.0
CLAIMS = "app.kubernetes.io/managed-by=kubeai"
HELM_RELEASE_TYPE = "helm.sh/release.v1"
# Helm updates its record of the release right before it creates a hook's Job. The API server
# timestamps both, and the clocks of its replicas may differ.
HOOK_DELAY_MAX_S = 60.0
CLOCK_SKEW_MAX_S = 5.0


async def require_helm_uninstall(kube: Kube, namespace: str, release: str, job: str) -> None:
    """Raise KubeAIError unless Helm is uninstalling the release and has created the Job for that.

    Only releases that Helm stores in Secrets (its default) in their own namespace are supported.
    """
    stored, _ = await kube.list(SECRETS, namespace, labels=f"owner=helm,name={release}")
    records = [secret for secret in stored if secret.get("type") == HELM_RELEASE_TYPE]
    reason = reason_to_refuse(release, records, await kube.get(JOBS, job, namespace))
    if reason:
        raise KubeAIError(f"refusing to delete the Models of namespace {namespace}: {reason}")


def reason_to_refuse(release: str, records: Sequence[Object], job: Object) -> str:
    """Why the Job is not the hook of an uninstall in progress; empty if it is.

    ``records`` are Helm's Secrets of the release, one per revision. The newest one's status shows
    whether Helm is uninstalling the release. That status remains if the uninstall fails, so a Job
    created at another time is refused too.
    """
    if not records:
        return (
            f"it has no Secret for a Helm release {release}. uninstall.deleteModels must not be "
            "set for manifests applied without Helm or releases stored elsewhere (HELM_DRIVER)"
        )
    record = max(records, key=_revision)
    status = record["metadata"]["labels"].get("status")
    if status != "uninstalling":
        return f"Helm is not uninstalling release {release}, its status is {status}"
    created = _time(job["metadata"]["creationTimestamp"])
    updated = _updated(record)
    if updated is not None:
        delay_s = (created - updated).total_seconds()
        if -CLOCK_SKEW_MAX_S <= delay_s <= HOOK_DELAY_MAX_S:
            return ""
    return (
        f"Job {job['metadata']['name']} was created at {created}, not by the uninstall of release "
        f"{release} that Helm recorded at {updated or 'an unknown time'}"
    )


def _revision(record: Object) -> int:
    version = record["metadata"]["labels"].get("version", "")
    return int(version) if version.isdecimal() else 0


def _updated(record: Object) -> datetime | None:
    """When the record was last updated, by the API server's clock."""
    managers = record["metadata"].get("managedFields") or ()
    return max((_time(m["time"]) for m in managers if m.get("time")), default=None)


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text).astimezone(UTC)


async def uninstall(kube: Kube, namespace: str, timeout_s: float) -> None:
    """Delete all Models and wait until they are gone, then delete the claims of their caches.

    KubeAIError if Models remain after ``timeout_s`` seconds; the message names them.
    """
    deadline_s = time.monotonic() + timeout_s
    logged: set[str] = set()
    while left := await _models(kube, namespace):
        for name in left.keys() - logged:
            log.info("deleting Model", model=name)
        for name in (name for name, is_deleted in left.items() if not is_deleted):
            await _delete(kube, MODELS, name, namespace)
        logged |= left.keys()
        if time.monotonic() > deadline_s:
            names = ", ".join(sorted(left))
            raise KubeAIError(f"Models not deleted within {timeout_s:.0f} s: {names}")
        await asyncio.sleep(LOOK_INTERVAL_S)
    claims, _ = await kube.list(PVCS, namespace, labels=CLAIMS)
    for claim in claims:
        name = claim["metadata"]["name"]
        if name.startswith(CLAIM_PREFIX):
            log.info("deleting claim", claim=name)
            await _delete(kube, PVCS, name, namespace)


async def _models(kube: Kube, namespace: str) -> dict[str, bool]:
    """Map each Model's name to whether it is being deleted."""
    try:
        found, _ = await kube.list(MODELS, namespace)
    except ApiError as error:
        if error.status == 404:  # the CRD is not installed
            return {}
        raise
    return {m["metadata"]["name"]: "deletionTimestamp" in m["metadata"] for m in found}


async def _delete(kube: Kube, resource: Resource, name: str, namespace: str) -> None:
    try:
        await kube.delete(resource, name, namespace)
    except ApiError as error:
        if error.status != 404:
            raise
