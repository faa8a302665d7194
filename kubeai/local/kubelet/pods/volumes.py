"""A pod's volumes as directories of this machine, and their mounts in containers.

Owns ``<pod directory>/.volumes`` (emptyDir, configMap, secret) and ``<data dir>/volumes`` (claims
without a directory of their own). Called by the runner before the first container starts.
ConfigMaps and Secrets are written once per pod; later changes only affect new pods.
"""

from __future__ import annotations

import asyncio
import base64
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Protocol

from kubeai.local.kubelet.pods.environment import Data, expand
from kubeai.local.kubelet.pods.pod import (
    Container,
    KeyToPath,
    Pod,
    PodError,
    Volume,
    VolumeMount,
)
from kubeai.local.kubelet.runtime.process import Mount

CONFIG_MAP_MODE, SECRET_MODE = 0o644, 0o400
VOLUME_NOT_FOUND = "VolumeNotFound"
UNSUPPORTED_VOLUME = "UnsupportedVolume"


class Objects(Protocol):
    """The objects a pod refers to; None if one does not exist, KubeAIError if the API fails."""

    async def config_map(self, namespace: str, name: str) -> Data | None:
        """Return the data of a ConfigMap."""

    async def secret(self, namespace: str, name: str) -> Data | None:
        """Return the data of a Secret."""

    async def open_claim(self, namespace: str, name: str) -> bool:
        """Whether the claim exists. Called before its volume is used."""


class Claims(NamedTuple):
    """The directories that serve as the volumes of claims."""

    directory: Path  # the volume of a claim is <namespace>/<claim> in it …
    given: Mapping[str, Path] = {}  # … except for these claims, in all namespaces

    async def open(self, namespace: str, claim: str, objects: Objects) -> Path:
        """The claim's directory, created if the claim is an object of the API and has none yet.

        PodError says how to name a directory if there is neither.
        """
        exists = await objects.open_claim(namespace, claim)
        if claim in self.given:
            place = self.given[claim]
            if not place.is_dir():
                raise PodError(f"--volume {claim}={place}: is not a directory", VOLUME_NOT_FOUND)
            return place
        place = self.directory / namespace / claim
        if exists:
            place.mkdir(parents=True, exist_ok=True)
        elif not place.is_dir():
            raise PodError(
                f"persistentvolumeclaim {claim!r} not found: to use a directory of this machine, "
                f"start with --volume {claim}=DIR",
                VOLUME_NOT_FOUND,
            )
        return place


def config_map_data(obj: dict[str, Any]) -> Data:
    """The data of a ConfigMap object."""
    text = {key: value.encode() for key, value in (obj.get("data") or {}).items()}
    return text | _decoded(obj.get("binaryData"))


def secret_data(obj: dict[str, Any]) -> Data:
    """The data of a Secret object."""
    text = {key: value.encode() for key, value in (obj.get("stringData") or {}).items()}
    return _decoded(obj.get("data")) | text


def _decoded(values: dict[str, str] | None) -> dict[str, bytes]:
    return {key: base64.b64decode(value) for key, value in (values or {}).items()}


async def prepare_volumes(
    pod: Pod, directory: Path, claims: Claims, objects: Objects
) -> dict[str, Path]:
    """Create the pod's volumes; returns their directories by name. PodError if one fails."""
    places = await asyncio.gather(
        *(_prepare(pod, volume, directory, claims, objects) for volume in pod.spec.volumes)
    )
    return dict(zip((volume.name for volume in pod.spec.volumes), places, strict=True))


async def _prepare(
    pod: Pod, volume: Volume, directory: Path, claims: Claims, objects: Objects
) -> Path:
    namespace = pod.metadata.namespace
    place = directory / ".volumes" / volume.name
    if volume.empty_dir is not None:
        place.mkdir(parents=True, exist_ok=True)
    elif (config_map := volume.config_map) is not None:
        data = await objects.config_map(namespace, config_map.name)
        if data is None and not config_map.optional:
            raise _failed(volume, f"configmap {config_map.name!r} not found")
        mode = config_map.default_mode or CONFIG_MAP_MODE
        _write(volume, place, data or {}, config_map.items, mode, config_map.optional)
    elif (secret := volume.secret) is not None:
        data = await objects.secret(namespace, secret.secret_name)
        if data is None and not secret.optional:
            raise _failed(volume, f"secret {secret.secret_name!r} not found")
        mode = secret.default_mode or SECRET_MODE
        _write(volume, place, data or {}, secret.items, mode, secret.optional)
    elif volume.persistent_volume_claim is not None:
        try:
            claim = volume.persistent_volume_claim.claim_name
            place = await claims.open(namespace, claim, objects)
        except PodError as error:
            raise _failed(volume, str(error), error.reason) from None
    elif volume.host_path is not None:
        place = Path(volume.host_path.path)
        if volume.host_path.type == "DirectoryOrCreate":
            place.mkdir(parents=True, exist_ok=True)
        if not place.exists():
            raise _failed(volume, f"hostPath {place} does not exist")
    elif volume.image is not None:
        raise _failed(
            volume,
            f"the image {volume.image.reference} cannot be mounted, because there is no container "
            "runtime; copy its files into a directory, start with --volume NAME=DIR, and set the "
            "Model's url to pvc://NAME",
            UNSUPPORTED_VOLUME,
        )
    else:
        raise _failed(
            volume,
            "unsupported type (supported: emptyDir, configMap, secret, persistentVolumeClaim, "
            "hostPath)",
            UNSUPPORTED_VOLUME,
        )
    return place


def _write(
    volume: Volume,
    place: Path,
    data: Data,
    items: Sequence[KeyToPath],
    mode: int,
    optional: bool,
) -> None:
    if place.exists():
        shutil.rmtree(place)
    place.mkdir(parents=True)
    for item in items or [KeyToPath(key, key) for key in data]:
        if item.key not in data:
            if optional:
                continue
            raise _failed(volume, f"references a missing key {item.key!r}")
        file = place / _inside(volume.name, item.path)
        file.parent.mkdir(parents=True, exist_ok=True)
        bits = (item.mode or mode) | 0o400  # containers run as this user
        with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, bits), "wb") as opened:
            opened.write(data[item.key])
        file.chmod(bits)  # regardless of the umask


def mounts_of(
    pod: Pod, container: Container, places: dict[str, Path], env: dict[str, str]
) -> tuple[Mount, ...]:
    """The container's mounts; PodError if a volume or path does not exist."""
    volumes = {volume.name: volume for volume in pod.spec.volumes}
    mounts = []
    for mount in container.volume_mounts:
        volume = volumes.get(mount.name)
        if volume is None:
            raise PodError(f"container {container.name}: volume {mount.name!r} not found")
        if not mount.mount_path.startswith("/"):
            raise PodError(f"mountPath {mount.mount_path!r} is not absolute")
        if mount.mount_path.rstrip("/") == "/dev/shm" and volume.empty_dir is not None:
            continue  # uses the machine's own /dev/shm
        claim = volume.persistent_volume_claim
        read_only = mount.read_only or (claim is not None and claim.read_only)
        fills = pod.spec.restart_policy != "Always"  # a Job's pod
        source = _source(volume, mount, places[mount.name], env, fills)
        mounts.append(Mount(str(source), mount.mount_path, read_only))
    return tuple(mounts)


def _source(
    volume: Volume, mount: VolumeMount, place: Path, env: dict[str, str], fills: bool
) -> Path:
    """What a mount shows: the volume or a part of it.

    A missing directory is created, except in a claim, for a pod that does not fill it: such a pod
    reads what is there, and an empty directory would hide a misspelt path. Kubernetes creates it.
    """
    below = mount.sub_path or expand(mount.sub_path_expr, env)
    if not below:
        return place
    source = place / _inside(volume.name, below)
    if not source.exists():
        if volume.config_map or volume.secret:
            raise PodError(f"volume {volume.name!r}: subPath {below!r} does not exist")
        if (claim := volume.persistent_volume_claim) is not None and not fills:
            raise PodError(
                f"volume {volume.name!r}: the claim {claim.claim_name!r} has no {below!r}: "
                f"{source} does not exist",
                VOLUME_NOT_FOUND,
            )
        source.mkdir(parents=True)
    return source


def _inside(volume: str, path: str) -> PurePosixPath:
    relative = PurePosixPath(path)
    if relative.is_absolute() or ".." in relative.parts or not relative.parts:
        raise PodError(f"volume {volume!r}: path {path!r} is outside the volume")
    return relative


def _failed(volume: Volume, why: str, reason: str = "ContainerCreating") -> PodError:
    return PodError(f"volume {volume.name!r}: {why}", reason)
