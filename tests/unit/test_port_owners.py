"""What listens on a port."""

import os
import socket
from pathlib import Path

import pytest

from kubeai.errors import KubeAIError
from kubeai.port_owners import port_owner
from kubeai.supervisor.listeners import listen


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_the_process_that_listens_is_named(host):
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        try:
            listener.bind((host, 0))
        except OSError:
            pytest.skip("no IPv6")
        listener.listen()
        name = Path("/proc/self/comm").read_text().strip()
        assert port_owner(listener.getsockname()[1]) == f"{name} (process {os.getpid()})"


def test_a_port_that_is_only_bound_or_not_used_has_no_owner():
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        assert port_owner(bound.getsockname()[1]) == ""


def test_another_users_process_is_described_by_the_user(tmp_path):
    (tmp_path / "net").mkdir()
    line = "0: 0100007F:1F40 00000000:0000 0A 0:0 0:0 0 0 0 4242 1 0 100 0 0 10 0"
    (tmp_path / "net" / "tcp").write_text(f"header\n{line}\n")
    assert port_owner(8000, tmp_path) == "a process of the user root"
    assert port_owner(8001, tmp_path) == ""


@pytest.mark.parametrize(
    ("setting", "hint"),
    [("--port", "choose another port (0: any free one)"), ("metricsAddr", "set another address")],
)
def test_a_port_in_use_is_an_error_that_names_the_setting_and_the_process(setting, hint):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(KubeAIError) as error:
            listen("127.0.0.1", port, 2, setting)
    start = f"{setting}: cannot listen on 127.0.0.1:{port}: address already in use by "
    assert str(error.value).startswith(start)
    assert str(error.value).endswith(f"(process {os.getpid()}); {hint}")


def test_an_address_of_another_machine_is_an_error_that_names_the_host_option():
    with pytest.raises(KubeAIError, match=r"has the address 192\.0\.2\.1; change --host"):
        listen("192.0.2.1", 0, 1, "--port")


def test_a_host_that_is_no_address_is_an_error_that_names_the_host_option():
    with pytest.raises(KubeAIError, match=r"300\.1\.1\.1 is not an address .*; change --host"):
        listen("300.1.1.1", 0, 1, "--port")
