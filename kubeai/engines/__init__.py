"""Builds engine pods. Pure: Models and the system config in, manifests out.

The operator calls `build_pod` and compares hashes. One module per engine defines how it is started.
"""

from kubeai.engines.files import config_map_name, files_config_map, owner_reference
from kubeai.engines.pod import build_pod, pod_hash
from kubeai.engines.server import PORT, SERVER_CONTAINER

__all__ = [
    "PORT",
    "SERVER_CONTAINER",
    "build_pod",
    "config_map_name",
    "files_config_map",
    "owner_reference",
    "pod_hash",
]
