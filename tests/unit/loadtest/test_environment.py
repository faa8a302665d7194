"""What results say about where they come from."""

from __future__ import annotations

import pytest

from kubeai.loadtest import environment


@pytest.mark.parametrize(
    ("argv", "shown"),
    [
        (["/x/kubeai/__main__.py", "bench", "run", "http://x/v1"], "kubeai bench run http://x/v1"),
        (["/usr/bin/kubeai", "--api-key", "sk-1", "-m", "m"], "kubeai --api-key '***' -m m"),
        (["kubeai", "--api-key=sk-1"], "kubeai '--api-key=***'"),
        (["kubeai", "--header", "Cookie: s=1"], "kubeai --header 'Cookie: ***'"),
        (["kubeai", "--header=Cookie: s=1"], "kubeai '--header=Cookie: ***'"),
        (["kubeai", "--header", "s"], "kubeai --header '***'"),
        (["kubeai", "--name", "two words"], "kubeai --name 'two words'"),
    ],
)
def test_the_command_line_is_shown_without_secrets(argv, shown):
    assert environment.command(argv) == shown


def test_gpus_are_those_that_their_driver_reports(tmp_path):
    for name, model in (("0000:01:00.0", "NVIDIA H200"), ("0000:02:00.0", "NVIDIA L4")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "information").write_text(f"Model: \t\t {model}\nIRQ:   \t\t 1\n")
    assert environment.gpus(tmp_path) == ["NVIDIA H200", "NVIDIA L4"]
    assert environment.gpus(tmp_path / "none") == []


def test_an_unknown_server_version_is_none():
    found = environment.describe()
    assert found["versions"]["server"] is None
    assert found["hardware"].keys() == {"cpu", "cores", "memory_bytes", "gpus"}
