"""Builds engine pods. Pure: Models and the system config in, manifests out.

The operator calls `build_pod` and compares hashes. One module per engine defines how it is started.
"""

from kubeai.podspec.container import PORT, SERVER_CONTAINER
from kubeai.podspec.files import config_map_name, files_config_map, owner_reference
from kubeai.podspec.template import build_pod, build_replica, form_model, pod_hash

__all__ = [
    "PORT",
    "SERVER_CONTAINER",
    "build_pod",
    "build_replica",
    "config_map_name",
    "files_config_map",
    "form_model",
    "owner_reference",
    "pod_hash",
]
