"""Mistakes of users and clients: each gives one clear error naming the place; nothing is lost."""

import asyncio
import json
import os
import socket
import sys

import aiohttp
import pytest
import yaml
from fakes import command_line
from harness import chat, model, pods, running, until

from kubeai.errors import install_hint
from kubeai.kube.resources import MODELS, PODS

RUN_TIMEOUT_S = 40


async def kubeai(*arguments, env=None):
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "kubeai", *map(str, arguments)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=env,
    )
    async with asyncio.timeout(RUN_TIMEOUT_S):
        out, err = await process.communicate()
    return process.returncode, out.decode(), err.decode()


async def refused(tmp_path, *arguments):
    """Run `kubeai local` with something wrong; returns its one line of error."""
    code, _, err = await kubeai(
        "local", "--port", "0", "--data-dir", tmp_path / "state", *arguments
    )
    assert code == 2
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0]


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--helm-release", "r"),
        ("--job", "j"),
    ],
)
def test_uninstall_has_to_be_confirmed(arguments):
    code, _, err = command_line.kubeai("uninstall", *arguments)
    assert code == 2
    assert err.strip() == (
        "error: uninstall deletes all Models of the namespace; confirm with --yes"
    )


@pytest.mark.parametrize(
    ("manifest", "named"),
    [
        pytest.param("kind: [", ":1:", id="not-yaml", marks=pytest.mark.slow),
        pytest.param("apiVersion: v1", "kind", id="no-kind", marks=pytest.mark.slow),
        pytest.param(
            *(yaml.safe_dump(model("a") | {"spec": {"engine": "VLLM"}}), "spec.url"),
            id="no-url",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *(yaml.safe_dump(model("a", minReplicas=3, maxReplicas=1)), "minReplicas"), id="cel"
        ),
        pytest.param(
            *(yaml.safe_dump(model("a", minReplica=1)), 'did you mean "spec.minReplicas"?'),
            id="misspelt",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            yaml.safe_dump(model("a") | {"metadata": {"name": "a", "namespace": "kube-system"}}),
            "metadata.namespace: kube-system",
            id="elsewhere",
        ),
    ],
)
async def test_a_wrong_manifest(tmp_path, manifest, named):
    file = tmp_path / "wrong.yaml"
    file.write_text(manifest)
    line = await refused(tmp_path, file)
    assert str(file) in line
    assert named in line


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ("modelAutoscaling: {intervall: 1s}", "modelAutoscaling.intervall"),
        pytest.param(
            *("modelAutoscaling: {interval: 1 parsec}", "modelAutoscaling.interval"),
            marks=pytest.mark.slow,
        ),
        pytest.param("metricsAddr: [", "config.yaml", marks=pytest.mark.slow),
        pytest.param(
            *("gateway: {bodyMaxBytes: -1}", "gateway.bodyMaxBytes"), marks=pytest.mark.slow
        ),
        pytest.param(
            *("messaging: {streams: [{requestsURL: a, responsesURL: b}]}", "messaging.streams"),
            marks=pytest.mark.slow,
        ),
    ],
)
async def test_a_wrong_config(tmp_path, config, named):
    (tmp_path / "config.yaml").write_text(config)
    line = await refused(tmp_path, "--config", tmp_path / "config.yaml")
    assert named in line


async def test_a_port_in_use_and_a_data_directory_in_use(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = await refused(tmp_path, "--port", port)
        assert f"--port: cannot listen on 127.0.0.1:{port}: address already in use by " in line
        assert f"(process {os.getpid()}); choose another port" in line
        line = await refused(tmp_path, "--port", "0", "--api-port", port)
        assert f"--api-port: cannot listen on 127.0.0.1:{port}: address already in use by" in line
        # The port that an earlier start kept is somebody else's now.
        (tmp_path / "state").mkdir(exist_ok=True)
        cluster = {"cluster": {"server": f"https://127.0.0.1:{port}"}}
        (tmp_path / "state" / "kubeconfig").write_text(yaml.safe_dump({"clusters": [cluster]}))
        async with running(tmp_path) as local, local.kube() as kube:
            assert await kube.list(PODS)
            (said,) = local.said("port of the Kubernetes API changed")
            assert f"port {port} is in use by " in said["message"]
            assert f"(process {os.getpid()})" in said["message"]
            assert "in use by another" in await refused(tmp_path)


async def test_ports_that_do_not_exist_and_a_data_directory_that_kubeconfig_cannot_name(tmp_path):
    for option in ("--port", "--api-port"):
        code, _, err = command_line.kubeai("local", option, "70000", "--data-dir", tmp_path)
        assert code == 2
        assert option in err
    code, _, err = await kubeai("local", "--port", "0", "--data-dir", tmp_path / "a:b")
    assert (code, err) == (2, f"error: --data-dir: {tmp_path / 'a:b'}: must not contain ':'\n")


async def test_invalid_namespace_is_rejected(tmp_path):
    line = await refused(tmp_path, "--namespace", "Team_A")
    assert "--namespace: 'Team_A'" in line


async def test_one_namespace_is_served_and_models_of_others_say_so(tmp_path):
    chosen, other = model("chosen", minReplicas=1), model("other", minReplicas=1)

    async def ready(kube, name, namespace):
        found = await kube.get(MODELS, name, namespace)
        conditions = found.get("status", {}).get("conditions", [])
        return next(((c["status"], c["reason"]) for c in conditions if c["type"] == "Ready"), None)

    async def settles(kube, name, namespace, wanted):
        async def as_wanted():
            return await ready(kube, name, namespace) == wanted

        await until(f"{name} is {wanted}", as_wanted)

    served, unserved = ("True", "AllReplicasReady"), ("False", "NamespaceNotServed")
    arguments = ("--namespace", "team")
    async with running(tmp_path, chosen, arguments=arguments) as local, local.kube() as kube:
        assert kube.namespace == "team"
        assert local.said("serving", namespace="team")
        await settles(kube, "chosen", "team", served)
        await kube.create(MODELS, other, "default")
        await settles(kube, "other", "default", unserved)
        assert not await pods(kube, "other")
        (said,) = local.said("model not served", model="default/other")
        assert "serves Models in the namespace team only" in said["message"]
    async with running(tmp_path) as local, local.kube() as kube:
        assert kube.namespace == "default"
        await settles(kube, "other", "default", served)
        await settles(kube, "chosen", "team", unserved)
        found, _ = await kube.list(PODS, "team")
        assert not [pod for pod in found if not pod["metadata"].get("deletionTimestamp")]
        await until("only one engine runs", lambda: len(local.engines()) == 1)


async def test_the_pods_port_on_every_interface(tmp_path):
    line = await refused(tmp_path, "--host", "0.0.0.0", "--port", "8000")
    assert "--host 0.0.0.0" in line
    assert "another --port" in line


async def test_serve_without_a_cluster_or_with_a_wrong_config_says_so(tmp_path):
    code, _, err = await kubeai("serve", env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)})
    assert code == 2
    assert err.startswith("error: ")
    assert "KUBECONFIG" in err
    (tmp_path / "c.yaml").write_text("nope: 1")
    code, _, err = await kubeai(
        "serve", env={"PATH": "/usr/bin:/bin", "CONFIG_PATH": str(tmp_path / "c.yaml")}
    )
    assert code == 2
    assert "nope" in err


async def test_models_that_cannot_run_say_why_and_others_are_served(tmp_path):
    missing = model("missing", engine="OLlama", minReplicas=1)
    del missing["spec"]["image"]
    models = (
        model("wrong", minReplicas=1, resourceProfile="nvidia-gpu-l44:1"),
        model("crashing", minReplicas=1, args=("--max-batch=frog",)),
        missing,
        model("right", minReplicas=1),
    )

    async with (
        running(tmp_path, *models, env={"PATH": "/nonexistent"}) as local,
        local.kube() as kube,
    ):

        async def conditions(name, word):
            found = await kube.get(MODELS, name, kube.namespace)
            conditions = found.get("status", {}).get("conditions", [])
            return [c for c in conditions if word in f"{c['reason']} {c.get('message', '')}"]

        (condition, *_) = await until(
            "the condition names the profile", lambda: conditions("wrong", "nvidia-gpu-l44")
        )
        assert condition["status"] == "False"
        assert "spec.resourceProfile" in condition["message"]
        await until(
            "the terminal says so",
            lambda: local.said("model cannot run", model="wrong", reason="InvalidProfile"),
        )
        assert await pods(kube, "wrong") == []

        await until(
            "the terminal says how the engine ended",
            lambda: [
                said
                for said in local.said("pod crashes")
                if said["message"].startswith("exits with 2; kubectl logs model-crashing")
            ],
        )

        (machine,) = local.said("engines found")
        assert "ollama.com" in machine["Ollama"]
        said = await until(
            "the pod has no Ollama", lambda: local.said("pod waits", reason="EngineNotInstalled")
        )
        assert said[0]["pod"].startswith("model-missing-")
        assert "ollama is not installed" in said[0]["message"]
        found = await until(
            "the Model says so too", lambda: conditions("missing", "EngineNotInstalled")
        )
        assert "ollama" in found[0]["message"]

        async with aiohttp.ClientSession() as session:
            assert (await chat(session, local.endpoint, "right", "hi")).whole
        # The user repairs it; it can be deleted without that.
        await kube.delete(MODELS, "wrong", kube.namespace)


async def test_wrong_requests_get_openais_errors_and_others_go_on(tmp_path):
    small = {"gateway": {"bodyMaxBytes": 10_000, "drainAccept": "0s", "drainTimeout": "5s"}}
    async with (
        running(tmp_path, model("chat", minReplicas=1), config=small) as local,
        aiohttp.ClientSession() as session,
    ):
        assert (await chat(session, local.endpoint, "chat", "hi")).whole

        async def post(path, data, status, **headers):
            url = local.endpoint + path
            async with session.post(
                url, data=data, headers={"Content-Type": "application/json"} | headers
            ) as response:
                assert response.status == status, await response.text()
                error = json.loads(await response.read())["error"]
                assert set(error) == {"message", "type", "param", "code"}
                return error

        ok = json.dumps({"model": "chat", "messages": [{"role": "user", "content": "hi"}]})
        assert (await post("/chat/completions", "{not json", 400))["message"]
        assert (await post("/chat/completions", "{}", 400))["param"] == "model"
        assert "bytes" in (await post("/chat/completions", b" " * 20_000, 413))["message"]
        unknown = await post("/chat/completions", ok.replace("chat", "nobody"), 404)
        assert unknown["code"] == "model_not_found"
        assert "nobody" in unknown["message"]
        assert (await post("/load_lora_adapter", ok, 404))["message"]
        assert (await post("/chat/completions/../../v1/load_lora_adapter", ok, 404))["message"]
        assert (
            "selector"
            in (await post("/chat/completions", ok, 400, **{"X-Label-Selector": "a in ("}))[
                "message"
            ].lower()
        )
        await post("/chat/completions", ok, 404, **{"X-Label-Selector": "team=other"})
        assert (await chat(session, local.endpoint, "chat", "still here")).whole


async def test_traces_without_an_installed_exporter_fail_at_start(tmp_path):
    """Reported once, before serving: a worker that failed on it would be restarted forever."""
    package = tmp_path / "modules" / "opentelemetry"  # hides what is installed here
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    code, _, err = await kubeai(
        *("local", "--port", "0", "--data-dir", tmp_path / "state"),
        env={
            **os.environ,
            "PYTHONPATH": str(package.parent),
            "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1",
        },
    )
    assert code == 2
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "OTEL_EXPORTER_OTLP_ENDPOINT" in line
    assert install_hint("otel") in line
    assert "Traceback" not in err
