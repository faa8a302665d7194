"""Builds the pod that serves a Model, from the Model and the system config. Pure.

A pod combines the engine's `Server` (one module per engine) with what all engines share: probes,
resources, credentials, files, labels, and finally the JSON patches of the system config and of the
Model. Its hash covers all of that, so a pod whose hash differs from the Model's is outdated. The
hash does not cover what `_finish` adds, so pods created before KubeAI added it are not restarted.
Called by the operator.
"""

from __future__ import annotations

import base64
import copy
import hashlib
import math
from collections.abc import Callable
from typing import Any, Literal

import jsonpatch
import msgspec

from kubeai.api.config.images import DEFAULT_IMAGES
from kubeai.api.config.profiles import (
    DEFAULT_IMAGE,
    device_claims,
    resolve_profile,
    server_image,
    size_of,
)
from kubeai.api.config.system import ResourceProfile, SystemConfig
from kubeai.api.json_patch import JSONPatch
from kubeai.api.model import (
    DRAINING_ANNOTATION,
    MODEL_LABEL,
    MODEL_UID_LABEL,
    POD_HASH_LABEL,
    POD_IP_ANNOTATION,
    POD_MODEL_LABEL,
    POD_PORT_ANNOTATION,
    Engine,
    Model,
)
from kubeai.api.model_url import ModelURL
from kubeai.errors import ModelError
from kubeai.podspec import cache, sources
from kubeai.podspec.adapters import add_loader
from kubeai.podspec.container import (
    PORT,
    PORT_NAME,
    SERVER_CONTAINER,
    TERMINATION_MESSAGE,
    Object,
    Server,
    container_resources,
    http_probe,
)
from kubeai.podspec.engines import (
    faster_whisper,
    infinity,
    llama_cpp,
    mock,
    ollama,
    sglang,
    vllm,
)
from kubeai.podspec.files import HASH_ANNOTATION, files_hash, files_volume, owner_reference
from kubeai.podspec.groups import (
    SET_LABEL,
    WORKER_LABEL,
    leader_worker_set,
    parallel,
    set_annotations,
)

GRACE_MIN_S = 10  # as in KubeAI in Go
PATCHED_MAX_BYTES = 1 << 20  # of a pod's manifest: each `copy` may double it
# By these, the operator knows what a pod is and does. A patch that sets them would have it create
# pods without end, none of which it counts as a replica.
_RESERVED = frozenset((SET_LABEL, WORKER_LABEL, cache.JOB_LABEL, DRAINING_ANNOTATION))
_HASH_BYTES = 5  # 8 characters of base32
# Besides its own errors, jsonpatch leaks Python's errors for a path into a value of another type.
_PATCH_ERRORS = (
    jsonpatch.JsonPatchException,
    jsonpatch.JsonPointerException,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)

_SERVERS: dict[Engine, Callable[[Model, ModelURL, str], Server]] = {
    "VLLM": vllm.server,
    "OLlama": ollama.server,
    "FasterWhisper": faster_whisper.server,
    "Infinity": infinity.server,
    "SGLang": sglang.server,
    "LlamaCpp": llama_cpp.server,
}


def build_replica(model: Model, config: SystemConfig) -> Object:
    """The manifest of one replica, without a name: a Pod, or a LeaderWorkerSet for several nodes.

    ModelError names the invalid field. Both have the label `POD_HASH_LABEL`.
    """
    pod = build_pod(model, config)
    size = size_of(model.spec.resource_profile)
    if size.nodes == 1:
        return pod
    return leader_worker_set(
        model, pod, size, mock=mock.ANNOTATION in pod["metadata"]["annotations"]
    )


def build_pod(model: Model, config: SystemConfig) -> Object:
    """The manifest of the pod that serves requests, without a name. ModelError as above."""
    profile = resolve_profile(config, model.spec.resource_profile)
    url = sources.model_url(model.spec)
    image = model.spec.image or server_image(config, model.spec.engine, profile)
    mocked = mock.is_mock(image)
    played = DEFAULT_IMAGES[model.spec.engine][DEFAULT_IMAGE] if mocked else image
    size = size_of(model.spec.resource_profile)
    server = parallel(model, _SERVERS[model.spec.engine](model, url, played), size)
    annotations = _annotations(model)
    if mocked:
        server = mock.server(model, url, server)
        annotations[mock.ANNOTATION] = "true"
    source = sources.source(url, config.secret_names)
    container = _container(model, config, profile, image, server, source)
    pod: Object = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"labels": _labels(model), "annotations": annotations},
        "spec": {
            **_pod_settings(model, config, profile, source),
            "containers": [container],
            "volumes": [
                {"name": "dshm", "emptyDir": {"medium": "Memory"}},
                *source.volumes,
                *server.volumes,
            ],
        },
    }
    _add_devices(model, profile, pod, container)
    _add_cache(model, config, pod, container)
    _add_files(model, pod, container)
    add_loader(model, config, pod, container)
    # A deep copy: parts of it belong to the config and must not be changed through the pod.
    pod = msgspec.json.decode(msgspec.json.encode(pod))
    pod = _patched(pod, model, config.model_server_pods.json_patches, "modelServerPods")
    pod = _patched(pod, model, model.spec.json_patches, "spec")
    group = (size.nodes, set_annotations(model)) if size.nodes > 1 else None
    hash_ = pod_hash(pod, group)
    _finish(pod, model, hash_)
    return pod


def form_model(model: Model, config: SystemConfig) -> str:
    """The ``model`` of forms at the engine, if it is not the one that clients send; else empty."""
    if model.spec.engine != "FasterWhisper":
        return ""
    try:
        image = model.spec.image or server_image(
            config, model.spec.engine, resolve_profile(config, model.spec.resource_profile)
        )
        return faster_whisper.form_model(model, sources.model_url(model.spec), image)
    except ModelError:
        return ""  # it gets no pods either


def _finish(pod: Object, model: Model, hash_: str) -> None:
    """Add the parts that the hash does not cover."""
    metadata, spec = pod["metadata"], pod["spec"]
    metadata["labels"] |= {
        POD_HASH_LABEL: hash_,
        MODEL_LABEL: model.metadata.name,
        MODEL_UID_LABEL: model.metadata.uid,
    }
    metadata["namespace"] = model.metadata.namespace
    metadata["ownerReferences"] = [owner_reference(model)]
    for container in (*(spec.get("initContainers") or ()), *spec["containers"]):
        container.setdefault(*TERMINATION_MESSAGE)


def pod_hash(pod: Object, group: tuple[int, dict[str, str]] | None = None) -> str:
    """Eight letters and digits that depend on the pod's spec, labels and annotations.

    ``group``: the number of nodes and the annotations of its set, for a replica on several nodes.
    For a manifest from `build_pod`, not for a pod to which the API server has applied defaults.
    """
    metadata = pod["metadata"]
    added = (POD_HASH_LABEL, MODEL_LABEL, MODEL_UID_LABEL)
    labels = {k: v for k, v in metadata.get("labels", {}).items() if k not in added}
    covered = [pod["spec"], labels, metadata.get("annotations", {})]
    if group is not None:
        covered += group
    digest = hashlib.sha256(msgspec.json.encode(covered, order="sorted")).digest()
    return base64.b32encode(digest[:_HASH_BYTES]).decode().lower()


def _labels(model: Model) -> dict[str, str]:
    engine = model.spec.engine.lower()
    name = model.metadata.name
    return {
        "app": "model",
        POD_MODEL_LABEL: name,
        "app.kubernetes.io/name": engine,
        "app.kubernetes.io/instance": f"{engine}-{name}",
        "app.kubernetes.io/managed-by": "kubeai",
    }


def _annotations(model: Model) -> dict[str, str]:
    given = model.metadata.annotations
    annotations = {POD_PORT_ANNOTATION: given.get(POD_PORT_ANNOTATION, str(PORT))}
    if POD_IP_ANNOTATION in given:
        annotations[POD_IP_ANNOTATION] = given[POD_IP_ANNOTATION]
    return annotations


def _pod_settings(
    model: Model, config: SystemConfig, profile: ResourceProfile, source: sources.Source
) -> Object:
    """The pod's spec without containers and volumes. Empty settings are left out."""
    pods = config.model_server_pods
    secrets = list(msgspec.to_builtins(pods.image_pull_secrets))
    secrets += [{"name": n} for n in source.pull_secrets if {"name": n} not in secrets]
    spec: dict[str, Any] = {
        "serviceAccountName": pods.service_account_name,
        "securityContext": pods.pod_security_context,
        "imagePullSecrets": secrets,
        "priorityClassName": model.spec.priority_class_name,
        "nodeSelector": profile.node_selector,
        "affinity": msgspec.to_builtins(profile.affinity),
        "tolerations": msgspec.to_builtins(profile.tolerations),
        "schedulerName": profile.scheduler_name,
        "runtimeClassName": profile.runtime_class_name,
    }
    spec = {key: value for key, value in spec.items() if value}
    # A deleted pod gets no new requests; in-flight ones may take as long as during a drain.
    drain_s = math.ceil(config.gateway.drain_timeout_s)
    return spec | {"terminationGracePeriodSeconds": max(GRACE_MIN_S, drain_s)}


def _container(
    model: Model,
    config: SystemConfig,
    profile: ResourceProfile,
    image: str,
    server: Server,
    source: sources.Source,
) -> Object:
    optional: dict[str, Any] = {
        "command": server.command,
        "args": [*server.args, *model.spec.args, *server.more_args],
        "env": sources.environment(model, server.env, server.pod_fields, source),
        "envFrom": msgspec.to_builtins(model.spec.env_from),
        "resources": container_resources(profile),
        "securityContext": config.model_server_pods.security_context,
    }
    return {
        "name": SERVER_CONTAINER,
        "image": image,
        **{key: value for key, value in optional.items() if value},
        "ports": [{"name": PORT_NAME, "containerPort": PORT, "protocol": "TCP"}],
        "startupProbe": server.startup_probe,
        "readinessProbe": http_probe(server.health_path, period_s=10, failures=3, timeout_s=2),
        "livenessProbe": http_probe(server.health_path, period_s=30, failures=3, timeout_s=3),
        "volumeMounts": [
            {"name": "dshm", "mountPath": "/dev/shm"},
            *source.mounts,
            *server.mounts,
        ],
    }


def _add_devices(model: Model, profile: ResourceProfile, pod: Object, container: Object) -> None:
    """Claim devices by dynamic resource allocation."""
    claims = device_claims(profile, model.spec.resource_profile)
    if claims is not None:
        pod["spec"]["resourceClaims"] = claims.of_pod
        container["resources"] = container.get("resources", {}) | {"claims": claims.of_container}


def _add_cache(model: Model, config: SystemConfig, pod: Object, container: Object) -> None:
    """Mount the Model's cache folder, which the load Job has already filled."""
    if model.spec.cache_profile:
        cache.cache_profile(model, config)
        volume, mount = cache.cache_volume(model)
        pod["spec"]["volumes"].append(volume)
        container["volumeMounts"].append(mount | {"readOnly": True})


def _add_files(model: Model, pod: Object, container: Object) -> None:
    """Mount the Model's files, and add their hash, so that editing a file replaces the pod."""
    if not model.spec.files:
        return
    volume, mounts = files_volume(model)
    taken = {mount["mountPath"] for mount in container["volumeMounts"]}
    for i, mount in enumerate(mounts):
        if mount["mountPath"] in taken:
            raise ModelError(
                f"spec.files[{i}].path",
                f"{mount['mountPath']!r} is already the mount path of a volume",
                "InvalidFile",
            )
    container["volumeMounts"] += mounts
    pod["spec"]["volumes"].append(volume)
    pod["metadata"]["annotations"][HASH_ANNOTATION] = files_hash(model)


def _patched(pod: Object, model: Model, patches: tuple[JSONPatch, ...], where: str) -> Object:
    """Apply patches one by one, so that an error names the failing one: ``<where>.jsonPatches``."""
    for i, patch in enumerate(patches):
        try:
            operation = copy.deepcopy(patch.operation())  # the value becomes part of the pod
            pod = jsonpatch.apply_patch(pod, [operation], in_place=True)
            why = _why_unusable(pod, model)
        except _PATCH_ERRORS as error:
            why = _why_failed(error)
        if why:
            raise ModelError(
                f"{where}.jsonPatches[{i}]",
                f"{patch.op} {patch.path!r} cannot be applied to the pod: {why}",
                "InvalidPatch",
            )
    return pod


def _why_failed(error: Exception) -> str:
    """Why a patch failed, without content of the pod: clients see the error, and may not see that.

    jsonpatch's own messages quote the value, or the whole object in which a member was not found.
    """
    if isinstance(error, jsonpatch.JsonPatchTestFailed) and "is not equal to" in str(error):
        return "the value is different"
    text, found, _ = str(error).partition(" not found in ")
    if text.startswith("'"):  # only the name of the member
        return f"member {text} not found"
    return f"{text} not found" if found else text or type(error).__name__


class _Container(msgspec.Struct):
    name: str
    args: list[str] | None = None
    ports: list[dict[str, Any]] | None = None


class _Metadata(msgspec.Struct):
    labels: dict[str, str | None]
    annotations: dict[str, str | None]


class _Spec(msgspec.Struct, rename="camel"):
    containers: list[_Container]
    init_containers: list[_Container] | None = None


class _Manifest(msgspec.Struct, rename="camel"):
    """What KubeAI relies on in a patched pod. The API server checks everything else."""

    api_version: Literal["v1"]
    kind: Literal["Pod"]
    metadata: _Metadata
    spec: _Spec


def _why_unusable(pod: Any, model: Model) -> str:
    """What a patch broke: the labels, the server container, or the manifest's structure."""
    if len(msgspec.json.encode(pod)) > PATCHED_MAX_BYTES:
        return f"the manifest would be larger than {PATCHED_MAX_BYTES} bytes"
    try:
        manifest = msgspec.convert(pod, _Manifest)
    except msgspec.ValidationError as error:
        return f"the result is not the manifest of a pod: {error}"
    labels, annotations = manifest.metadata.labels, manifest.metadata.annotations
    if not _labels(model).items() <= labels.items():
        return "it removes or changes a label that KubeAI needs"
    if SERVER_CONTAINER not in (container.name for container in manifest.spec.containers):
        return f"it removes the container {SERVER_CONTAINER!r}"
    reserved = sorted(_RESERVED & (labels.keys() | annotations.keys()))
    return f"{reserved[0]!r} is reserved" if reserved else ""
