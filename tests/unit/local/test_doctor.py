"""`kubeai doctor`: each fault is found, with what to do."""

import errno
import fcntl
import json
import os
import resource
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from kubeai.errors import KubeAIError
from kubeai.local import doctor
from kubeai.local.doctor import Check, Setting
from kubeai.local.kubelet.pods.devices import Devices


@pytest.fixture
def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def by_name(checks):
    return {check.name: check for check in checks}


def run_doctor(port, data_dir, *arguments):
    options = ("--port", str(port), "--data-dir", str(data_dir), *arguments)
    return subprocess.run(
        [sys.executable, "-m", "kubeai", "doctor", *options],
        capture_output=True,
        env=os.environ | {"KUBECONFIG": ""},
        text=True,
        timeout=50,
    )


def test_on_this_machine_nothing_that_the_tests_need_is_a_problem(tmp_path, free_port):
    done = run_doctor(free_port, tmp_path / "data", "-o", "json")
    report = json.loads(done.stdout)
    checks = {check["name"]: check for check in report["checks"]}
    for name in ("Python", "compiled core", "system", f"port {free_port}", "data directory"):
        assert checks[name]["status"] == "ok", checks[name]
    problems = [check for check in report["checks"] if check["status"] == "problem"]
    assert report["ok"] == (not problems)
    assert done.returncode == (1 if problems else 0)
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_a_port_in_use_is_a_problem_and_the_exit_status_says_so(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run_doctor(port, tmp_path)
    assert done.returncode == 1
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("problem  port ")]
    assert f"in use by {Path('/proc/self/comm').read_text().strip()}" in line
    assert "use kubeai local --port with another port" in done.stdout


def test_while_kubeai_local_runs_its_ports_are_only_warnings(tmp_path):
    with (
        (tmp_path / "lock").open("w") as lock,
        socket.create_server(("127.0.0.1", 0)) as taken,
    ):
        fcntl.flock(lock, fcntl.LOCK_EX)
        port = taken.getsockname()[1]
        checks = by_name(doctor.check_ports(Setting("127.0.0.1", port, tmp_path)))
    assert checks["kubeai local"].status == "warning"
    assert checks[f"port {port}"].status == "warning"


def test_the_kept_port_of_the_api_in_use_is_a_warning(tmp_path, free_port):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        cluster = {"cluster": {"server": f"https://127.0.0.1:{taken.getsockname()[1]}"}}
        (tmp_path / "kubeconfig").write_text(yaml.safe_dump({"clusters": [cluster]}))
        checks = by_name(doctor.check_ports(Setting("127.0.0.1", free_port, tmp_path)))
    assert checks["port of the Kubernetes API"].status == "warning"


def test_a_data_directory_that_cannot_be_used_is_a_problem(tmp_path, monkeypatch):
    def refuse(folder):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(doctor, "_use", refuse)
    (check,) = doctor.check_data_dir(tmp_path / "data")
    assert check.status == "problem"
    assert check.message == f"{tmp_path}: cannot be used: Read-only file system"
    assert "--data-dir" in check.hint


def test_a_network_file_system_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "_file_system", lambda path: "nfs4")
    (check,) = doctor.check_data_dir(tmp_path)
    assert check.status == "warning"


@pytest.mark.parametrize(
    ("limit", "status"),
    [(256, "problem"), (1024, "warning"), (1 << 20, "ok"), (resource.RLIM_INFINITY, "ok")],
)
def test_a_low_limit_of_descriptors(monkeypatch, limit, status):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    (check,) = doctor.check_descriptors()
    assert check.status == status


@pytest.mark.parametrize(
    ("environ", "status"),
    [
        ({}, "ok"),
        ({"HTTP_PROXY": "http://proxy:3128"}, "warning"),
        ({"https_proxy": "http://proxy:3128", "NO_PROXY": "example.com"}, "warning"),
        ({"HTTP_PROXY": "http://proxy:3128", "no_proxy": "localhost, 127.0.0.1"}, "ok"),
        ({"HTTP_PROXY": "http://proxy:3128", "NO_PROXY": "*"}, "ok"),
    ],
)
def test_a_proxy_that_would_be_used_for_loopback_is_a_warning(environ, status):
    (check,) = doctor.check_proxies(environ)
    assert check.status == status


async def test_a_cluster_that_does_not_answer_is_a_warning_with_the_kubeconfig(tmp_path, free_port):
    config = {
        "current-context": "c",
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{free_port}"}}],
        "users": [{"name": "u", "user": {"token": "t"}}],
    }
    path = tmp_path / "kubeconfig"
    path.write_text(yaml.safe_dump(config))
    (check,) = await doctor.check_cluster({"KUBECONFIG": str(path)})
    assert check.status == "warning"
    assert str(path) in check.message
    (check,) = await doctor.check_cluster({"KUBECONFIG": str(tmp_path / "none")})
    assert check.status == "warning"


async def test_without_engines_each_is_a_warning_with_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    checks = by_name(await doctor.check_engines({}))
    assert set(checks) == {
        "vLLM",
        "Ollama",
        "Infinity",
        "FasterWhisper",
        "SGLang",
        "llama.cpp",
    }
    assert {check.status for check in checks.values()} == {"warning"}
    assert "pip install vllm" in checks["vLLM"].message
    program = tmp_path / "ollama"
    program.write_text("#!/bin/sh\necho ollama version is 0.17.4\n")
    program.chmod(0o755)
    checks = by_name(await doctor.check_engines({}))
    assert checks["Ollama"] == Check("Ollama", "ok", f"0.17.4 at {program} (PATH)")
    assert checks["vLLM"].status == "ok", "one engine is enough"


async def test_an_engines_environment_is_looked_into_and_a_wrong_one_is_an_error(
    monkeypatch, tmp_path
):
    monkeypatch.setenv("PATH", str(tmp_path))
    program = tmp_path / "env" / "bin" / "llama-server"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\necho 'version: 6400 (8f3a2bc)'\n")
    program.chmod(0o755)
    checks = by_name(await doctor.check_engines({"LlamaCpp": tmp_path / "env"}))
    found = f"6400 at {program} (--engine-env)"
    assert checks["llama.cpp"] == Check("llama.cpp", "ok", found)
    with pytest.raises(KubeAIError, match=r"--engine-env LlamaCpp=.* has no program bin/llama-ser"):
        await doctor.examine(Setting("127.0.0.1", 0, tmp_path, (f"LlamaCpp={tmp_path}",)))


async def test_gpus_are_those_that_replicas_get(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(doctor, "find_gpus", lambda: found(Devices(["0"])))

    async def found(devices):
        return devices

    assert (await doctor.check_gpus())[0].message == "1 (no nvidia-smi)"
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho NVIDIA A10, 23028 MiB, 550.54\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    message = "1 for replicas: NVIDIA A10, 23028 MiB, 550.54"
    assert await doctor.check_gpus() == [Check("GPUs", "ok", message)]


async def test_broken_nvidia_smi_and_kubectl_are_warnings(monkeypatch, tmp_path):
    for name in ("nvidia-smi", "kubectl"):
        (tmp_path / name).write_text("#!/bin/sh\nexit 9\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    for check in await doctor.check_gpus() + await doctor.check_kubectl():
        assert check.status == "warning"
        assert "9" in check.message


async def test_a_check_that_fails_itself_is_a_problem():
    def fail():
        raise RuntimeError("oh")

    async def run():
        fail()

    assert await doctor._guarded("name", run) == [Check("name", "problem", "RuntimeError: oh")]
