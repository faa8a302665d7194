"""Stock kubectl beside a running `kubeai local`, no flags beyond KUBECONFIG."""

import asyncio
import os
import re
import shutil
from pathlib import Path

import aiohttp
import pytest
import yaml
from harness import chat, model, running, until

KUBECTL = shutil.which("kubectl", path=os.environ.get("KUBEBUILDER_ASSETS")) or shutil.which(
    "kubectl"
)
TIMEOUT_S = 30
ARGS = ("--startup-delay=1s", "--decode-tokens-per-second=200")

pytestmark = [
    pytest.mark.kubectl,
    pytest.mark.slow,
    pytest.mark.skipif(KUBECTL is None, reason="no kubectl on PATH or in KUBEBUILDER_ASSETS"),
]


class Kubectl:
    def __init__(self, local, home: Path):
        self._env = {"KUBECONFIG": local.kubeconfig, "HOME": str(home), "PATH": os.environ["PATH"]}

    async def start(self, *arguments):
        return await asyncio.create_subprocess_exec(
            *(KUBECTL, *arguments),
            env=self._env,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )

    async def __call__(self, *arguments):
        process = await self.start(*arguments)
        async with asyncio.timeout(TIMEOUT_S):
            out, _ = await process.communicate()
        assert process.returncode == 0, out.decode()
        return out.decode()

    async def says(self, words, *arguments):
        return words in await self(*arguments)

    async def row(self, *arguments):
        """The one row of a table, by its columns."""
        header, row = (await self(*arguments)).splitlines()
        return dict(
            zip(*(re.split(r"\s{2,}", line.strip()) for line in (header, row)), strict=False)
        )

    async def counts(self, wanted):
        """Whether the Model's counts of all and of ready replicas are as wanted."""
        row = await self.row("get", "models")
        return [row.get(name) for name in ("NAME", "REPLICAS", "READY")] == ["chat", wanted, wanted]


async def lines_until(process, done):
    """Read what a running kubectl prints, up to the line whose words ``done`` accepts."""
    async with asyncio.timeout(TIMEOUT_S):
        async for line in process.stdout:
            if done(line.decode().split()):
                return
    raise AssertionError("kubectl ended")


async def test_kubectl_watches_a_replica_come_and_go(tmp_path):
    file = tmp_path / "chat.yaml"
    file.write_text(yaml.safe_dump(model("chat", args=ARGS, maxReplicas=3)))
    async with running(tmp_path / "local") as local, aiohttp.ClientSession() as session:
        kubectl = Kubectl(local, tmp_path)
        assert await kubectl("apply", "-f", str(file)) == "model.kubeai.org/chat created\n"
        await until("no replica", lambda: kubectl.counts("0"))
        watch = await kubectl.start("get", "models", "-w", "--no-headers")
        try:
            await lines_until(watch, lambda row: row[:4] == ["chat", "VLLM", "0", "0"])
            assert (await chat(session, local.endpoint, "chat", "hi")).whole
            await lines_until(watch, lambda row: row[2:4] == ["1", "1"])
            pod = await kubectl.row("get", "pods", "-o", "wide")
            assert (pod["READY"], pod["STATUS"], pod["NODE"]) == ("1/1", "Running", "local")
            assert pod["IP"].startswith("127.")
            described = await kubectl("describe", "model", "chat")
            assert "AllReplicasReady" in described

            logs = await kubectl.start("logs", "-f", pod["NAME"])
            await lines_until(logs, lambda row: "listens" in " ".join(row))
            logs.terminate()
            await logs.wait()

            await lines_until(watch, lambda row: row[2:4] == ["0", "0"])
        finally:
            watch.terminate()
            await watch.wait()


async def test_exec_scale_patch_and_delete(tmp_path):
    fixed = model("chat", args=ARGS, autoscalingDisabled=True, replicas=1)
    async with running(tmp_path / "local", fixed) as local:
        kubectl = Kubectl(local, tmp_path)

        await until("one replica", lambda: kubectl.counts("1"))
        pod = await kubectl.row("get", "pods", "-o", "wide")
        said = await kubectl("exec", pod["NAME"], "--", "sh", "-c", "echo $POD_IP")
        assert said == f"{pod['IP']}\n"
        await kubectl("scale", "model", "chat", "--replicas=3")
        await until("three replicas", lambda: kubectl.counts("3"))
        await kubectl("patch", "model", "chat", "--type=merge", "-p", '{"spec":{"replicas":2}}')
        await until("two replicas", lambda: kubectl.counts("2"))

        said = await kubectl("drain", "local", "--delete-emptydir-data")
        assert "node/local drained" in said

        async def waiting():
            pods = (await kubectl("get", "pods", "--no-headers")).splitlines()
            return len(pods) == 2 and all(pod.split()[2] == "Pending" for pod in pods)

        await until("the new replicas wait", waiting)
        assert (await kubectl.row("get", "nodes"))["STATUS"] == "Ready,SchedulingDisabled"
        why = "Unschedulable: 0/1 nodes are available: 1 node(s) were unschedulable."
        await until("the Model says so", lambda: kubectl.says(why, "describe", "model", "chat"))
        reason, _, message = why.partition(": ")
        await until(
            "the log says so", lambda: local.said("pod waits", reason=reason, message=message)
        )
        assert not local.engines()
        await kubectl("uncordon", "local")
        await until("two replicas", lambda: kubectl.counts("2"))

        await kubectl("delete", "model", "chat")

        async def no_pods():
            return "No resources found" in await kubectl("get", "pods")

        await until("the pods are gone", no_pods)
        await until("the engines are gone", lambda: not local.engines())
