"""A Model's cache: the claim shared by all Models of a profile, the Model's folder, its two Jobs.

Pure. The operator decides when to create each (`kubeai.operator.cache.plan`); pods mount the
folder.
"""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec

from kubeai.api.config.system import CacheProfile, ModelServerPods, SystemConfig
from kubeai.api.model import POD_MODEL_LABEL, Model
from kubeai.api.model_url import ModelURL, parse_url
from kubeai.errors import ModelError
from kubeai.podspec import loader_commands
from kubeai.podspec.container import (
    MODEL_MOUNT,
    TERMINATION_MESSAGE,
    Object,
    container_resources,
    literal,
)
from kubeai.podspec.files import owner_reference
from kubeai.podspec.sources import environment, source

ROOT = "/models"
CLAIM_PREFIX = "shared-model-cache-"
LOAD_JOB_PREFIX, EVICT_JOB_PREFIX = "load-cache-", "evict-cache-"
ANNOTATION_PREFIX = "models.kubeai.org/"  # on the claim: this Model's files are complete
JOB_TTL_S = 60
EVICT_LIMIT_S = 900  # then the Model may be deleted although its files remain
JOB_HASH_ANNOTATION = "kubeai.org/job-hash"  # hash of the Job's manifest
JOB_LABEL = "kubeai.org/job"  # on the pods of Jobs, which are not replicas
_VOLUME = "models"
# Variables of the Model that would keep a load Job from loading, or from starting at all.
_ENGINE_ONLY = frozenset(
    ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "PATH", "PYTHONPATH", "PYTHONHOME", "LD_PRELOAD")
)
# Jobs mount all folders rather than the Model's own: a mount point can neither be put in place by a
# single rename once the files are complete, nor be removed.
_ALL_FOLDERS = {"name": _VOLUME, "mountPath": ROOT, "subPath": ROOT.lstrip("/")}


def directory(model: Model) -> str:
    """The Model's folder, in every container that mounts it."""
    return f"{ROOT}/{model.metadata.name}-{model.metadata.uid}"


def staging_directory(path: str) -> str:
    """Where a load keeps the files of a folder that is not complete yet."""
    parent, _, name = path.rpartition("/")
    return f"{parent}/.{name}.kubeai-load"


def weights(model: Model, url: ModelURL) -> str:
    """Where the engine finds the weights, as the value of an argument or variable."""
    if model.spec.cache_profile:
        return directory(model)
    return MODEL_MOUNT if url.scheme in ("pvc", "oci") else literal(url.ref)


def cache_profile(model: Model, config: SystemConfig) -> CacheProfile:
    """The Model's cache profile in the config; ModelError if it is missing or incomplete."""
    profile = config.cache_profiles.get(model.spec.cache_profile)
    if profile is None:
        raise ModelError(
            "spec.cacheProfile",
            f"the system config has no cache profile {model.spec.cache_profile!r}",
            "InvalidProfile",
        )
    shared = profile.shared_filesystem
    if not shared.storage_class_name and not shared.persistent_volume_name:
        raise ModelError(
            "spec.cacheProfile",
            f"cacheProfiles.{model.spec.cache_profile}.sharedFilesystem in the system config "
            "needs a storageClassName or a persistentVolumeName",
            "InvalidProfile",
        )
    return profile


def claim_name(model: Model) -> str:
    """The claim's name. It depends only on the Model, because its profile may be gone."""
    return CLAIM_PREFIX + model.spec.cache_profile


def claim(model: Model, config: SystemConfig) -> Object:
    """The claim of the Model's profile. It has no owner, because it outlives every Model."""
    shared = cache_profile(model, config).shared_filesystem
    spec: Object = {
        "accessModes": ["ReadWriteMany"],
        # An empty class disables dynamic provisioning: the claim binds to volumeName.
        "storageClassName": shared.storage_class_name,
        "resources": {"requests": {"storage": shared.storage_size}},
    }
    if shared.persistent_volume_name:
        spec["volumeName"] = shared.persistent_volume_name
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {
            "name": claim_name(model),
            "namespace": model.metadata.namespace,
            "labels": {"app.kubernetes.io/managed-by": "kubeai"},
        },
        "spec": spec,
    }


def cache_volume(model: Model) -> tuple[Object, Object]:
    """The claim as a volume, and a writable mount of the Model's folder."""
    path = directory(model)
    mount = {"name": _VOLUME, "mountPath": path, "subPath": path.lstrip("/")}
    return _claim_volume(model), mount


def load_job(model: Model, config: SystemConfig) -> Object:
    """The Job that fetches the Model's files into its folder, with the URL's credentials."""
    files = source(parse_url(model.spec.url), config.secret_names)
    container = {
        "name": "loader",
        "command": ["load"],
        "args": [literal(model.spec.url), directory(model)],
        "env": [
            variable
            for variable in environment(model, {}, {}, files)
            if variable["name"] not in _ENGINE_ONLY
        ],
        "envFrom": msgspec.to_builtins(model.spec.env_from),
        "volumeMounts": [_ALL_FOLDERS, *files.mounts],
    }
    volumes = [_claim_volume(model), *files.volumes]
    return _job(model, config, LOAD_JOB_PREFIX, container, volumes)


def evict_job(model: Model, config: SystemConfig) -> Object:
    """The Job that removes the Model's folder."""
    path = directory(model)
    container = {
        "name": "evictor",
        "command": loader_commands.remove(path, staging_directory(path)),
        "volumeMounts": [_ALL_FOLDERS],
    }
    job = _job(model, config, EVICT_JOB_PREFIX, container, [_claim_volume(model)])
    job["spec"]["activeDeadlineSeconds"] = EVICT_LIMIT_S
    return job


def _claim_volume(model: Model) -> Object:
    return {"name": _VOLUME, "persistentVolumeClaim": {"claimName": claim_name(model)}}


def _whose_folders(pods: ModelServerPods) -> Object:
    """The user of a Job: root, which owns a new volume's folders, unless the config sets one."""
    says = pods.pod_security_context.keys() | pods.security_context.keys()
    return {} if says & {"runAsUser", "runAsNonRoot"} else {"runAsUser": 0}


def _job(
    model: Model, config: SystemConfig, prefix: str, container: Object, volumes: list[Object]
) -> Object:
    """A Job that runs the loader image once, owned by the Model. Empty settings are left out."""
    pods = config.model_server_pods
    labels = {
        "app.kubernetes.io/managed-by": "kubeai",
        POD_MODEL_LABEL: model.metadata.name,
        JOB_LABEL: prefix.rstrip("-"),
    }
    container["image"] = config.model_loading.image
    container["securityContext"] = _whose_folders(pods) | pods.security_context
    container["resources"] = container_resources(config.model_loading.resources)
    container.setdefault(*TERMINATION_MESSAGE)
    pod: dict[str, Any] = {
        "serviceAccountName": pods.service_account_name,
        "securityContext": pods.pod_security_context,
        "imagePullSecrets": msgspec.to_builtins(pods.image_pull_secrets),
        "restartPolicy": "OnFailure",
        "containers": [{key: value for key, value in container.items() if value}],
        "volumes": volumes,
    }
    template = {
        "metadata": {"labels": labels},
        "spec": {key: value for key, value in pod.items() if value},
    }
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": prefix + model.metadata.name,
            "namespace": model.metadata.namespace,
            "labels": labels,
            "ownerReferences": [owner_reference(model)],
        },
        "spec": {
            "ttlSecondsAfterFinished": JOB_TTL_S,
            "parallelism": 1,
            "completions": 1,
            "template": template,
        },
    }
    # A deep copy: parts of it belong to the config.
    plain: Object = msgspec.json.decode(msgspec.json.encode(job))
    digest = hashlib.blake2b(msgspec.json.encode(plain["spec"], order="sorted"), digest_size=8)
    plain["metadata"]["annotations"] = {JOB_HASH_ANNOTATION: digest.hexdigest()}
    return plain


def job_hash(job: Object) -> str:
    """The hash of a Job's spec, as built by `load_job` and `evict_job`."""
    return str(job["metadata"]["annotations"][JOB_HASH_ANNOTATION])
