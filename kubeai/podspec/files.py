"""A Model's files: the ConfigMap that holds them, and their mounts in pods."""

from __future__ import annotations

import hashlib
import re

from kubeai.api.model import API_VERSION, KIND, Model
from kubeai.errors import ModelError
from kubeai.podspec.container import Object

VOLUME = "model-files"
HASH_ANNOTATION = "kubeai.org/files-hash"  # on the pod, so that editing a file replaces pods
_KEY = re.compile(r"[-._a-zA-Z0-9]{1,253}")


def config_map_name(model: str) -> str:
    """The name of the ConfigMap that holds the files of the named Model."""
    return f"model-{model}-files"


def files_config_map(model: Model) -> Object | None:
    """The ConfigMap with the Model's files, owned by the Model; None if it has no files."""
    if not model.spec.files:
        return None
    meta = model.metadata
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {
            "name": config_map_name(model.metadata.name),
            "namespace": meta.namespace,
            "labels": {"app.kubernetes.io/managed-by": "kubeai", "model": meta.name},
            "ownerReferences": [owner_reference(model)],
        },
        "data": dict(zip(_keys(model), (file.content for file in model.spec.files), strict=True)),
    }


def owner_reference(model: Model) -> Object:
    """The owner reference that makes the Model an object's controller."""
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "name": model.metadata.name,
        "uid": model.metadata.uid,
        "controller": True,
        "blockOwnerDeletion": True,
    }


def files_volume(model: Model) -> tuple[Object, list[Object]]:
    """The volume of the Model's files, and a mount for each of them."""
    volume = {"name": VOLUME, "configMap": {"name": config_map_name(model.metadata.name)}}
    mounts = [
        {"name": VOLUME, "mountPath": file.path, "subPath": key, "readOnly": True}
        for file, key in zip(model.spec.files, _keys(model), strict=True)
    ]
    return volume, mounts


def files_hash(model: Model) -> str:
    """A hash of all paths and contents."""
    digest = hashlib.sha256()
    for file in sorted(model.spec.files, key=lambda file: file.path):
        for text in (file.path, file.content):
            raw = text.encode()
            digest.update(len(raw).to_bytes(8, "big") + raw)
    return digest.hexdigest()[:16]


def _keys(model: Model) -> list[str]:
    """Each file's key in the ConfigMap: its path with ``_`` for ``/``."""
    keys: list[str] = []
    for i, file in enumerate(model.spec.files):
        key = file.path.replace("/", "_")
        field = f"spec.files[{i}].path"
        if not _KEY.fullmatch(key):
            raise ModelError(
                field,
                f"{file.path!r} may contain only letters, digits, '-', '_', '.' and '/', "
                "and at most 253 characters",
                "InvalidFile",
            )
        if key in keys:
            other = model.spec.files[keys.index(key)].path
            raise ModelError(
                field, f"{file.path!r} and {other!r} map to the same key {key!r}", "InvalidFile"
            )
        keys.append(key)
    return keys
