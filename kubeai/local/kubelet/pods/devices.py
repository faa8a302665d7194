"""The GPUs that pods have.

A pod that requests ``nvidia.com/gpu`` gets as many devices as it requests, for as long as it has
processes, and no other pod gets them. Its containers see only these, by ``CUDA_VISIBLE_DEVICES``.
What a pod has is also written to its directory, so that the next kubelet gives it the same devices.
Called by the agent; which devices there are is found by `kubeai.local.kubelet.gpus`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from kubeai.local.kubelet.pods.pod import GPU, Container, Pod, PodError

VARIABLE = "CUDA_VISIBLE_DEVICES"
ADMISSION_ERROR = "UnexpectedAdmissionError"
NO_DEVICES: Mapping[str, tuple[str, ...]] = {}
_FILE = ".devices"


class Devices:
    """The devices of this machine, and which pod has which."""

    def __init__(self, ids: Sequence[str] = (), variables: Mapping[str, str] | None = None) -> None:
        """``ids``: as CUDA_VISIBLE_DEVICES takes them; ``variables``: what they depend on."""
        self.ids = tuple(ids)
        self._variables = dict(variables or {})
        self._of: dict[str, tuple[str, ...]] = {}  # by the pod's uid

    def assign(self, pod: Pod, directory: Path) -> Mapping[str, tuple[str, ...]]:
        """Give a pod its devices; returns those of each container that requests some.

        Devices that it has already are kept. PodError if there are not enough.
        """
        count = pod.gpus()
        if not count:
            return NO_DEVICES
        uid = pod.metadata.uid
        own = self._of.get(uid, ())
        if len(own) != count:
            taken = {device for devices in self._of.values() for device in devices}
            free = [device for device in self.ids if device not in taken]
            if len(free) < count:
                raise PodError(
                    f"Allocate failed due to requested number of devices unavailable for "
                    f"{GPU}. Requested: {count}, Available: {len(free)}, which is unexpected",
                    ADMISSION_ERROR,
                )
            own = self._of[uid] = tuple(free[:count])
            directory.mkdir(parents=True, exist_ok=True)
            temporary = directory / f"{_FILE}.new"
            temporary.write_bytes(msgspec.json.encode(own))
            temporary.replace(directory / _FILE)
        return _share(pod, own)

    def restore(self, uid: str, directory: Path) -> None:
        """Give a pod of an earlier kubelet the devices that it had, if they still exist."""
        try:
            had = msgspec.json.decode((directory / _FILE).read_bytes(), type=tuple[str, ...])
        except (OSError, msgspec.DecodeError):
            return
        taken = {device for devices in self._of.values() for device in devices}
        if had and all(device in self.ids and device not in taken for device in had):
            self._of[uid] = had

    def release(self, uid: str) -> None:
        """The pod has no process any more."""
        self._of.pop(uid, None)

    def environment(self, ids: Sequence[str], declared: Mapping[str, str]) -> dict[str, str]:
        """A container's variables for its devices. PodError if its manifest sets them too."""
        if VARIABLE in declared:
            raise PodError(
                f"env {VARIABLE}: the kubelet sets it for the GPUs that the container requests "
                f"({GPU}); remove the variable, or the GPUs (resourceProfile)",
                "InvalidPod",
            )
        variables = {k: v for k, v in self._variables.items() if k not in declared}
        return {VARIABLE: ",".join(ids), **variables}


def _share(pod: Pod, ids: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Divide a pod's devices among its containers.

    Sidecars and main containers run at the same time. Other init containers run one at a time
    before the main ones, beside the sidecars that have started.
    """
    shares: dict[str, tuple[str, ...]] = {}

    def give(container: Container, first: int) -> int:
        count = container.gpus()
        if count:
            shares[container.name] = ids[first : first + count]
        return first + count

    used = 0
    for container in pod.spec.init_containers:
        end = give(container, used)
        used = end if container.restart_policy == "Always" else used
    for container in pod.spec.containers:
        used = give(container, used)
    return shares
