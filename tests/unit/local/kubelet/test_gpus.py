"""The GPUs of this machine: what nvidia-smi reports, the environment and --gpus."""

import pytest

from kubeai.errors import KubeAIError
from kubeai.local.kubelet import gpus
from kubeai.local.kubelet.gpus import check_gpus, find_gpus

TWO = """\
GPU 0: NVIDIA H200 (UUID: GPU-aaaa1111-2222)
GPU 1: NVIDIA H200 (UUID: GPU-bbbb1111-2222)
"""
MIG = """\
GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-aaaa1111-2222)
  MIG 3g.20gb     Device  0: (UUID: MIG-cccc-1)
  MIG 3g.20gb     Device  1: (UUID: MIG-cccc-2)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-bbbb1111-2222)
"""


@pytest.fixture
def machine(tmp_path):
    """Find the GPUs of a machine with this nvidia-smi, environment and driver."""

    async def find(output=None, visible=None, option="all"):
        environ = {"PATH": str(tmp_path)}
        if visible is not None:
            environ["CUDA_VISIBLE_DEVICES"] = visible
        if output is not None:
            (tmp_path / "out").write_text(output)
            program = tmp_path / "nvidia-smi"
            program.write_text(f'#!/bin/sh\n[ "$1" = -L ] && exec /bin/cat {tmp_path}/out\n')
            program.chmod(0o755)
        return (await find_gpus(option, environ, tmp_path / "proc")).ids

    return find


async def test_a_machine_without_nvidias_driver_has_none(machine):
    assert await machine() == ()
    assert await machine(visible="0,1") == ()


async def test_gpus_are_counted_by_nvidia_smi(machine):
    assert await machine(TWO) == ("0", "1")
    assert await machine("No devices were found\n") == ()


async def test_a_gpu_in_mig_mode_counts_as_its_instances(machine):
    assert await machine(MIG) == ("MIG-cccc-1", "MIG-cccc-2", "1")


async def test_without_nvidia_smi_the_drivers_files_are_counted(machine, tmp_path):
    for bus, uuid in (("0000:01:00.0", "GPU-a"), ("0000:02:00.0", "GPU-b")):
        folder = tmp_path / "proc" / bus
        folder.mkdir(parents=True)
        (folder / "information").write_text(f"Model: \t H200\nGPU UUID: \t {uuid}\n")
    assert await machine() == ("0", "1")
    assert await machine(visible="GPU-b") == ("GPU-b",)


@pytest.mark.parametrize(
    ("visible", "ids"),
    [
        ("1", ("1",)),
        ("1, 0", ("1", "0")),
        ("GPU-bbbb", ("GPU-bbbb",)),
        ("", ()),
        ("-1", ()),
        ("NoDevFiles", ()),
        ("0,2,1", ("0",)),  # as for CUDA, an invalid entry hides those after it
        ("0,0", ("0",)),
    ],
)
async def test_only_the_devices_that_kubeai_may_see_are_given_to_pods(machine, visible, ids):
    assert await machine(TWO, visible) == ids


async def test_an_nvidia_smi_that_hangs_is_given_up(machine, tmp_path, monkeypatch):
    monkeypatch.setattr(gpus, "NVIDIA_SMI_TIMEOUT_S", 0.1)
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nexec /bin/sleep 600\n")
    program.chmod(0o755)
    assert await machine() == ()


@pytest.mark.parametrize(
    ("option", "ids"),
    [
        ("none", ()),
        ("0", ()),
        ("3", ("0", "1", "2")),
        ("GPU-x1,MIG-y/2/0", ("GPU-x1", "MIG-y/2/0")),
    ],
)
async def test_the_option_overrides_what_is_found(machine, option, ids):
    check_gpus(option)
    assert await machine(TWO, option=option) == ids


@pytest.mark.parametrize("option", ["", "some", "-1", "1.5", "0,1", "GPU-a,,GPU-b", "²", "9999"])
def test_a_wrong_option_is_an_error_that_names_it(option):
    with pytest.raises(KubeAIError, match=r"^--gpus: "):
        check_gpus(option)


def test_a_device_is_named_once():
    with pytest.raises(KubeAIError, match="names a device twice"):
        check_gpus("GPU-a,GPU-a")
