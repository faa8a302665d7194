"""Addresses of pods: unique on the machine, never the ones that belong to all."""

import socket
import subprocess
import sys

import pytest

from kubeai.errors import KubeAIError
from kubeai.local.kubelet.addresses import PodAddress


def script(*numbers):
    """Random numbers as handed in; three make an address."""
    left = iter(numbers)
    return lambda low, high: next(left)


def test_an_address_is_given_to_one_pod_only():
    first = PodAddress.claim(rand=script(7, 7, 7))
    second = PodAddress.claim(rand=script(7, 7, 7, 7, 7, 8))
    try:
        assert (first.ip, second.ip) == ("127.7.7.7", "127.7.7.8")
    finally:
        first.release()
        second.release()


def test_an_address_of_another_process_is_passed_over_until_that_ends():
    code = (
        "from kubeai.local.kubelet.addresses import PodAddress\n"
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


def test_a_released_address_can_be_had_again():
    first = PodAddress.claim("127.7.7.10")
    first.release()
    second = PodAddress.claim("127.7.7.10")
    second.release()
    assert first.ip == second.ip == "127.7.7.10"


@pytest.mark.parametrize(
    "ip", ["127.0.0.1", "127.0.1.1", "127.5.5.0", "127.5.5.255", "10.0.0.1", "x"]
)
def test_an_address_that_is_not_a_pods_is_not_taken_over(ip):
    address = PodAddress.claim(ip)
    address.release()
    assert address.ip != ip


def test_an_address_whose_port_is_taken_is_passed_over():
    with socket.create_server(("127.7.7.11", 0)) as server:
        address = PodAddress.claim("127.7.7.11", [server.getsockname()[1]])
        address.release()
        assert address.ip != "127.7.7.11"


def test_a_port_that_is_taken_everywhere_is_named():
    with socket.create_server(("0.0.0.0", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(KubeAIError, match=rf"ports {port} free"):
            PodAddress.claim(ports=[port])
