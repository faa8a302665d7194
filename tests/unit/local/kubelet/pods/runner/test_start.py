"""A pod's start with real processes: the order of its containers, and what a pod waits for."""

import asyncio
import os
import sys
import time

from fakes.running_pods import HTTP, PORTS, PYTHON, SERVE, SLEEP


async def test_two_pods_serve_the_same_port_on_different_addresses(run):
    pods = [
        run({"command": PYTHON, "args": [SERVE], "ports": PORTS, "readinessProbe": HTTP})
        for _ in "ab"
    ]
    for pod in pods:
        await pod.until_ready()
        assert pod.status["phase"] == "Running"
        assert pod.container()["state"]["running"]["startedAt"].endswith("Z")
    ips = [pod.status["podIP"] for pod in pods]
    assert len(set(ips)) == 2
    assert all(ip.startswith("127.") for ip in ips)
    for ip in ips:
        _, writer = await asyncio.open_connection(ip, 8000)
        writer.close()


async def test_a_cold_start_does_not_wait_for_the_period_of_its_probes(run):
    slow = HTTP | {"periodSeconds": 30, "failureThreshold": 3}
    pod = run(
        {
            "command": PYTHON,
            "args": [SERVE],
            "env": [{"name": "DELAY", "value": "0.3"}],
            "ports": PORTS,
            "startupProbe": slow,
            "readinessProbe": slow,
        }
    )
    began = time.monotonic()
    await pod.until_ready()
    assert time.monotonic() - began < slow["periodSeconds"]


async def test_the_environment_comes_from_the_manifest_and_the_machine_not_the_kubelet(
    run, host, monkeypatch
):
    monkeypatch.setenv("KUBECONFIG", "/secret")
    monkeypatch.setenv("SOME_TOOL_HOME", "/opt/tool")
    host.objects.secrets["s"] = {"key": b"token"}
    code = "import os; print(*(os.environ.get(n) for n in os.environ['SHOW'].split()))"
    pod = run(
        {
            "command": [*PYTHON, code],
            "env": [
                {"name": "SHOW", "value": "KUBECONFIG SOME_TOOL_HOME TOKEN URL POD_IP"},
                {"name": "TOKEN", "valueFrom": {"secretKeyRef": {"name": "s", "key": "key"}}},
                {"name": "URL", "value": "http://0.0.0.0:8000/$(TOKEN)"},
            ],
        },
        restartPolicy="Never",
    )
    await pod.over()
    ip = pod.runner.ip
    assert pod.log() == [f"None /opt/tool token http://{ip}:8000/token {ip}"]


async def test_init_containers_run_in_order_and_share_a_volume(run):
    mount = {"volumeMounts": [{"name": "v", "mountPath": "/kubeai-test"}]}
    write = "import sys; open('/kubeai-test/f', 'a').write(sys.argv[1])"
    pod = run(
        {"command": [*PYTHON, "print(open('/kubeai-test/f').read())"], **mount},
        initContainers=[
            {"name": "one", "command": [*PYTHON, write, "1"], **mount},
            {"name": "two", "command": [*PYTHON, write, "2"], **mount},
        ],
        volumes=[{"name": "v", "emptyDir": {}}],
        restartPolicy="Never",
    )
    await pod.over()
    assert pod.log() == ["12"]
    assert pod.status["phase"] == "Succeeded"
    assert pod.container("one")["state"]["terminated"]["reason"] == "Completed"


async def test_a_failed_init_container_fails_a_pod_with_restart_policy_never(run):
    pod = run(
        {"command": SLEEP},
        initContainers=[{"name": "init", "command": [*PYTHON, "raise SystemExit(2)"]}],
        restartPolicy="Never",
    )
    await pod.over()
    assert pod.status["phase"] == "Failed"
    assert "waiting" in pod.container()["state"]


async def test_a_sidecar_starts_before_the_containers_and_ends_after_them(run, tmp_path):
    up = tmp_path / "up"
    side = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('terminated'), sys.exit(0)))\n"
        "print('up')\n"
        f"open({str(up)!r}, 'w')\n"
        "time.sleep(600)"
    )
    probe = {"exec": {"command": [*PYTHON, f"open({str(up)!r})"]}, "periodSeconds": 1}
    pod = run(
        {"command": [*PYTHON, f"open({str(up)!r}); print('saw it')"]},
        initContainers=[
            {
                "name": "side",
                "command": [*PYTHON, side],
                "restartPolicy": "Always",
                "startupProbe": probe,
            }
        ],
        restartPolicy="Never",
    )
    await pod.over()
    assert pod.log() == ["saw it"]
    assert pod.log("side") == ["up", "terminated"]
    assert pod.status["phase"] == "Succeeded"


async def test_a_pod_waits_for_a_program_that_is_not_installed(run, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    pod = run({"command": ["kubeai-test-engine"]})
    await pod.until(lambda: pod.container()["state"].get("waiting", {}).get("message"))
    waiting = pod.container()["state"]["waiting"]
    assert waiting["reason"] == "EngineNotInstalled"
    assert "kubeai-test-engine is not installed" in waiting["message"]
    assert pod.status["phase"] == "Pending"
    program = tmp_path / "kubeai-test-engine"
    program.write_text(f"#!{sys.executable}\nimport time; time.sleep(600)")
    program.chmod(0o755)
    await pod.until_ready()
    assert pod.container()["restartCount"] == 0


async def test_a_pod_waits_for_a_missing_secret(run, host):
    ref = {"secretKeyRef": {"name": "s", "key": "k"}}
    pod = run({"command": SLEEP, "env": [{"name": "X", "valueFrom": ref}]})
    await pod.until(lambda: pod.container()["state"].get("waiting", {}).get("message"))
    assert pod.container()["state"]["waiting"]["reason"] == "CreateContainerConfigError"
    host.objects.secrets["s"] = {"k": b"v"}
    await pod.until_ready()


async def test_a_pod_waits_for_a_missing_volume(run, host):
    pod = run({"command": SLEEP}, volumes=[{"name": "v", "configMap": {"name": "c"}}])
    await pod.until(lambda: pod.container()["state"]["waiting"].get("message"))
    assert "configmap 'c' not found" in pod.container()["state"]["waiting"]["message"]
    host.objects.maps["c"] = {}
    await pod.until_ready()


async def test_an_unsupported_mount_is_reported(run, host):
    host.namespace = "none"
    pod = run(
        {"command": SLEEP, "volumeMounts": [{"name": "v", "mountPath": "/kubeai-test"}]},
        volumes=[{"name": "v", "emptyDir": {}}],
    )
    await pod.until(lambda: pod.container()["state"]["waiting"].get("message"))
    assert pod.container()["state"]["waiting"]["reason"] == "MountError"
    assert "/kubeai-test" in pod.container()["state"]["waiting"]["message"]
