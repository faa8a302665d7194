"""Addresses of pods: unique on the machine, never the common loopback addresses."""

import socket
import subprocess
import sys

import pytest

from kubeai.errors import KubeAIError
from kubeai.local.kubelet.pods.addresses import PodAddress


def script(*numbers):
    """The given random numbers; three make an address."""
    left = iter(numbers)
    return lambda low, high: next(left)


def test_an_address_is_assigned_to_one_pod_only():
    first = PodAddress.claim(rand=script(7, 7, 7))
    second = PodAddress.claim(rand=script(7, 7, 7, 7, 7, 8))
    try:
        assert (first.ip, second.ip) == ("127.7.7.7", "127.7.7.8")
    finally:
        first.release()
        second.release()


def test_an_address_in_use_by_another_process_is_skipped_until_that_exits():
    code = (
        "from kubeai.local.kubelet.pods.addresses import PodAddress\n"
        "a = PodAddress.claim('127.7.7.9'); print(a.ip, flush=True); input()"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe) as other:
        assert other.stdout.readline() == b"127.7.7.9\n"
        ours = PodAddress.claim("127.7.7.9")
        assert ours.ip != "127.7.7.9"
        ours.release()
        other.kill()
    again = PodAddress.claim("127.7.7.9")
    assert again.ip == "127.7.7.9"
    again.release()


def test_a_released_address_can_be_assigned_again():
    first = PodAddress.claim("127.7.7.10")
    first.release()
    second = PodAddress.claim("127.7.7.10")
    second.release()
    assert first.ip == second.ip == "127.7.7.10"


@pytest.mark.parametrize(
    "ip", ["127.0.0.1", "127.0.1.1", "127.5.5.0", "127.5.5.255", "10.0.0.1", "x"]
)
def test_an_address_outside_the_pod_range_is_not_adopted(ip):
    address = PodAddress.claim(ip)
    address.release()
    assert address.ip != ip


def test_an_address_whose_port_is_taken_is_skipped():
    with socket.create_server(("127.7.7.11", 0)) as server:
        address = PodAddress.claim("127.7.7.11", [server.getsockname()[1]])
        address.release()
        assert address.ip != "127.7.7.11"


def test_a_port_taken_on_every_address_is_reported():
    with socket.create_server(("0.0.0.0", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(KubeAIError, match=rf"free ports {port}"):
            PodAddress.claim(ports=[port])
