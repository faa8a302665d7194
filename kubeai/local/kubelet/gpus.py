"""Finds the NVIDIA GPUs of this machine, as ``CUDA_VISIBLE_DEVICES`` takes them.

They come from ``nvidia-smi -L``, or from the driver's files in /proc if there is no nvidia-smi. A
GPU in MIG mode counts as its instances. If CUDA_VISIBLE_DEVICES is set in the kubelet's own
environment, only these devices are used. ``--gpus`` overrides what is found.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from kubeai.errors import KubeAIError
from kubeai.local.kubelet.pods.devices import VARIABLE, Devices
from kubeai.local.kubelet.runtime.children import run_helper

NVIDIA_SMI_TIMEOUT_S = 5.0  # the driver takes seconds to load if nothing uses it
GPUS_MAX = 1024
ALL, NONE = "all", "none"
PROC = Path("/proc/driver/nvidia/gpus")
# With CUDA's default order, the fastest GPU is 0, whichever number nvidia-smi shows.
_ORDER = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
_DEVICE = re.compile(r"(GPU|MIG)-[0-9A-Za-z./-]+")
_GPU_LINE = re.compile(r"GPU (?P<index>\d+): .*\(UUID: (?P<uuid>GPU-[^)]+)\)")
_MIG_LINE = re.compile(r"\s+MIG .*\(UUID: (?P<uuid>MIG-[^)]+)\)")


def check_gpus(text: str) -> None:
    """Check a value of ``--gpus``. KubeAIError names the option."""
    _given(text)


async def find_gpus(
    option: str = ALL, environ: Mapping[str, str] = os.environ, proc: Path = PROC
) -> Devices:
    """The devices of this machine, or those that ``--gpus`` gives."""
    given = _given(option)
    if given is not None:
        return Devices(given, _ORDER if all(map(str.isdecimal, given)) else {})
    program = shutil.which("nvidia-smi", path=environ.get("PATH", os.defpath))
    found = parse_list(await _list(program)) if program else []
    found = found or _driver_files(proc)
    visible = environ.get(VARIABLE)
    if visible is not None:
        return Devices(_visible(visible, found))  # they count by the caller's own order
    # By number where possible: vLLM before 0.11 takes no UUID.
    return Devices([mig or index for index, _, mig in found], _ORDER)


def _given(option: str) -> list[str] | None:
    """The devices that ``--gpus`` names; None if they are to be found."""
    if option == ALL:
        return None
    if option == NONE:
        return []
    if option.isdecimal() and option.isascii():
        count = int(option[:9])
        if count > GPUS_MAX:
            raise KubeAIError(f"--gpus: {option} is more than {GPUS_MAX}")
        return [str(index) for index in range(count)]
    ids = [one.strip() for one in option.split(",")]
    for one in ids:
        if not _DEVICE.fullmatch(one):
            raise KubeAIError(
                f"--gpus: {option!r} must be all, none, a number of GPUs, or the UUIDs that "
                f"`nvidia-smi -L` shows, separated by commas"
            )
    if len(set(ids)) < len(ids):
        raise KubeAIError(f"--gpus: {option!r} names a device twice")
    return ids


Gpu = tuple[str, str, str]  # index, UUID, and the UUID of a MIG instance or ""


def parse_list(text: str) -> list[Gpu]:
    """The devices in the output of ``nvidia-smi -L``."""
    found: list[Gpu] = []
    index = uuid = ""
    for line in text.splitlines():
        if gpu := _GPU_LINE.match(line):
            index, uuid = gpu["index"], gpu["uuid"]
            found.append((index, uuid, ""))
        elif (mig := _MIG_LINE.match(line)) and found:
            if found[-1] == (index, uuid, ""):
                found.pop()  # a GPU in MIG mode can be used only by its instances
            found.append((index, uuid, mig["uuid"]))
    return found


async def _list(program: str) -> str:
    code, output = await run_helper([program, "-L"], NVIDIA_SMI_TIMEOUT_S)
    return output if code == 0 else ""


def _driver_files(proc: Path) -> list[Gpu]:
    """The GPUs in the driver's files, which are in the order of the PCI bus."""
    found = []
    for place, file in enumerate(sorted(proc.glob("*/information"))):
        uuid = re.search(r"GPU UUID:\s*(GPU-\S+)", file.read_text(errors="replace"))
        found.append((str(place), uuid[1] if uuid else "", ""))
    return found


def _visible(value: str, found: list[Gpu]) -> list[str]:
    """The entries of CUDA_VISIBLE_DEVICES that exist. As for CUDA, an invalid one ends the list."""
    visible: list[str] = []
    for entry in map(str.strip, value.split(",")):
        if entry.isdecimal():
            exists = int(entry) < len({index for index, _, _ in found})
        else:
            uuids = (mig or uuid for _, uuid, mig in found)
            exists = bool(_DEVICE.match(entry)) and any(u.startswith(entry) for u in uuids)
        if not exists or entry in visible:
            break
        visible.append(entry)
    return visible
