"""What all pods of a kubelet share: directories, the API's objects, the prober, limits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec

from kubeai.local.engines import EngineEnvs
from kubeai.local.kubelet.pods.devices import Devices
from kubeai.local.kubelet.pods.pod import ObjectMeta
from kubeai.local.kubelet.pods.probes import Prober
from kubeai.local.kubelet.pods.volumes import Objects
from kubeai.local.kubelet.runtime.memory import MemoryGuard

NODE_VARIABLE = "KUBEAI_NODE_DIR"


class Timing(msgspec.Struct, frozen=True):
    """Delays between starts; tests shorten them."""

    restart_first_s: float = 10.0
    restart_max_s: float = 300.0
    restart_reset_s: float = 600.0  # a run of this length resets the back-off
    config_first_s: float = 1.0  # retry if a referenced object is missing
    config_max_s: float = 60.0


class Host(msgspec.Struct):
    """State shared by all pods of a kubelet."""

    data_dir: Path
    objects: Objects
    prober: Prober
    memory: MemoryGuard
    timing: Timing = Timing()
    ip: str = "127.0.0.1"
    namespace: str = "auto"  # of mounts; see runtime/shim/mounts.py
    engine_envs: EngineEnvs = {}
    volumes: Mapping[str, Path] = {}  # claim → the directory that serves as its volume
    devices: Devices = msgspec.field(default_factory=Devices)

    def pod_directory(self, meta: ObjectMeta) -> Path:
        """The directory of a pod's logs and volumes."""
        return self.data_dir / "pods" / f"{meta.namespace}_{meta.name}_{meta.uid}"

    @property
    def marker(self) -> str:
        """An environment variable that marks every process of this data directory."""
        return f"{NODE_VARIABLE}={self.data_dir.resolve()}"
