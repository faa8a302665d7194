"""Finding and deleting objects that an earlier leadership or configuration may have left.

Used by files.py, services.py and the cache's claims.
"""

from __future__ import annotations

from typing import Literal, TypeVar

from kubeai.kube.client import Kube
from kubeai.kube.errors import ApiError
from kubeai.kube.resources import Resource
from kubeai.logs import get_logger

log = get_logger(__name__)
T = TypeVar("T")


async def list_permitted(
    kube: Kube,
    resource: Resource,
    namespace: str,
    *,
    type: type[T],
    labels: str = "",
    metadata_only: bool = False,
) -> list[T]:
    """The objects of a namespace; none, and a warning, if KubeAI may not list them."""
    try:
        found, _ = await kube.list(
            resource, namespace, labels=labels, metadata_only=metadata_only, type=type
        )
    except ApiError as error:
        if error.status != 403:
            raise
        log.warning(
            "cannot list objects; stale ones may remain", kind=resource.kind, error=str(error)
        )
        return []
    return found


async def delete_unchanged(
    kube: Kube,
    resource: Resource,
    name: str,
    namespace: str,
    *,
    uid: str,
    propagation: Literal["Foreground"] | None = None,
) -> bool:
    """Delete the object with this uid. False if it is gone or has been replaced already."""
    try:
        await kube.delete(resource, name, namespace, uid=uid, propagation=propagation)
    except ApiError as error:
        if error.status not in (404, 409):
            raise
        return False
    return True
