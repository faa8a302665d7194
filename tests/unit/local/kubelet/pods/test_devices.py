"""Which GPUs a pod's containers see."""

import pytest

from kubeai.local.kubelet.pods.devices import Devices
from kubeai.local.kubelet.pods.pod import GPU, PodError, decode_pod


def container(name, gpus=None, **spec):
    resources = {} if gpus is None else {"limits": {GPU: gpus}}
    return {"name": name, "resources": resources, **spec}


def pod(uid, *containers, init=()):
    meta = {"name": uid, "namespace": "default", "uid": uid}
    spec = {"containers": list(containers), "initContainers": list(init)}
    return decode_pod({"metadata": meta, "spec": spec})


def one(uid, gpus=1):
    return pod(uid, container("server", gpus))


def test_pods_get_distinct_devices(tmp_path):
    devices = Devices(["0", "1", "2"])
    assert devices.assign(one("a", 2), tmp_path / "a") == {"server": ("0", "1")}
    assert devices.assign(one("b"), tmp_path / "b") == {"server": ("2",)}


def test_a_pod_that_requests_no_gpu_gets_none_and_leaves_nothing_behind(tmp_path):
    assert Devices(["0"]).assign(pod("a", container("server")), tmp_path / "a") == {}
    assert not (tmp_path / "a").exists()


def test_too_few_devices_are_an_admission_error_as_in_kubernetes(tmp_path):
    devices = Devices(["0", "1"])
    devices.assign(one("a"), tmp_path / "a")
    with pytest.raises(PodError, match=r"Requested: 2, Available: 1") as caught:
        devices.assign(one("b", 2), tmp_path / "b")
    assert caught.value.reason == "UnexpectedAdmissionError"


def test_the_devices_of_a_pod_without_processes_are_given_to_others(tmp_path):
    devices = Devices(["0"])
    devices.assign(one("a"), tmp_path / "a")
    devices.release("a")
    assert devices.assign(one("b"), tmp_path / "b") == {"server": ("0",)}


def test_a_pod_keeps_its_devices_under_the_next_kubelet(tmp_path):
    devices = Devices(["0", "1"])
    devices.assign(one("a"), tmp_path / "a")
    devices.assign(one("b"), tmp_path / "b")
    after = Devices(["0", "1"])
    after.restore("b", tmp_path / "b")
    assert after.assign(one("c"), tmp_path / "c") == {"server": ("0",)}
    assert after.assign(one("b"), tmp_path / "b") == {"server": ("1",)}


def test_a_device_that_is_gone_is_replaced(tmp_path):
    Devices(["GPU-a"]).assign(one("a"), tmp_path / "a")
    after = Devices(["GPU-b"])
    after.restore("a", tmp_path / "a")
    assert after.assign(one("a"), tmp_path / "a") == {"server": ("GPU-b",)}
    again = Devices(["GPU-b"])
    again.restore("a", tmp_path / "a")
    assert again.assign(one("a"), tmp_path / "a") == {"server": ("GPU-b",)}


@pytest.mark.parametrize("content", [b"", b"{", b'["0", 1]'])
def test_a_damaged_file_is_as_good_as_none(tmp_path, content):
    (tmp_path / ".devices").write_bytes(content)
    after = Devices(["0"])
    after.restore("a", tmp_path)
    assert after.assign(one("b"), tmp_path / "b") == {"server": ("0",)}


def test_containers_that_run_at_the_same_time_share_no_device(tmp_path):
    shared = pod(
        "a",
        container("one", 1),
        container("none"),
        container("two", 2),
        init=[
            container("alone", 3),
            container("sidecar", 1, restartPolicy="Always"),
            container("later", 1),
        ],
    )
    assert shared.gpus() == 4
    assert Devices(["0", "1", "2", "3"]).assign(shared, tmp_path) == {
        "alone": ("0", "1", "2"),
        "sidecar": ("0",),
        "later": ("1",),
        "one": ("1",),
        "two": ("2", "3"),
    }


def test_a_container_sees_its_devices_by_number_in_the_order_of_nvidia_smi():
    devices = Devices(["0", "1"], {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"})
    assert devices.environment(["1"], {}) == {
        "CUDA_VISIBLE_DEVICES": "1",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
    }
    chosen = devices.environment(["1"], {"CUDA_DEVICE_ORDER": "FASTEST_FIRST"})
    assert chosen == {"CUDA_VISIBLE_DEVICES": "1"}


def test_a_manifest_cannot_choose_devices_and_request_some():
    with pytest.raises(PodError, match=r"CUDA_VISIBLE_DEVICES.*remove the variable") as caught:
        Devices(["0"]).environment(["0"], {"CUDA_VISIBLE_DEVICES": "1"})
    assert caught.value.reason == "InvalidPod"


@pytest.mark.parametrize("amount", ["500m", "-1", "x"])
def test_only_whole_gpus_can_be_requested(amount):
    with pytest.raises(PodError) as caught:
        one("a", amount)
    assert caught.value.reason == "InvalidPod"
