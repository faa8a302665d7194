"""Jobs on `kubeai local`: real processes, a claim's directory, and the end of a Job."""

from __future__ import annotations

import contextlib
import os
import signal

import pytest
from harness import running, until

from kubeai.kube.errors import ApiError
from kubeai.kube.resources import JOBS, PODS

CLAIM = {
    "apiVersion": "v1",
    "kind": "PersistentVolumeClaim",
    "metadata": {"name": "cache"},
    "spec": {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "10Gi"}}},
}


def job(name, script, **spec):
    """Runs the script with the claim's directory at /cache."""
    container = {
        "name": "loader",
        "image": "registry.example/tool:1",
        "command": ["sh", "-ec", script],
        "volumeMounts": [{"name": "cache", "mountPath": "/cache"}],
    }
    claim = {"name": "cache", "persistentVolumeClaim": {"claimName": "cache"}}
    pod = {"restartPolicy": "OnFailure", "containers": [container], "volumes": [claim]}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name},
        "spec": {"parallelism": 1, "completions": 1, "template": {"spec": pod}, **spec},
    }


async def finished(kube, name):
    """The condition that ended the Job, if one did."""
    found = await kube.get(JOBS, name)
    conditions = (found.get("status") or {}).get("conditions") or []
    ends = [c for c in conditions if c["type"] in ("Complete", "Failed")]
    return ends and (ends[0]["type"], ends[0]["reason"])


async def is_gone(kube, name):
    try:
        await kube.get(JOBS, name)
    except ApiError as error:
        return error.status == 404
    return False


async def pods_of(kube, name):
    pods, _ = await kube.list(PODS, kube.namespace, labels=f"job-name={name}")
    return pods


async def test_job_fills_its_claim_and_is_deleted_after_its_ttl(tmp_path):
    script = "[ -e /cache/tried ] || { touch /cache/tried; exit 1; }; echo weights > /cache/model"
    loader = job("load", script, ttlSecondsAfterFinished=2, backoffLimit=3)
    async with running(tmp_path, CLAIM, loader) as local, local.kube() as kube:
        ended = await until("the Job has ended", lambda: finished(kube, "load"))
        assert ended == ("Complete", "CompletionsReached")
        directory = local.data_dir / "state" / "volumes" / "default" / "cache"
        assert (directory / "model").read_text() == "weights\n"
        (pod,) = await pods_of(kube, "load")
        assert pod["status"]["phase"] == "Succeeded"
        assert pod["status"]["containerStatuses"][0]["restartCount"] == 1
        await until("the Job is gone", lambda: is_gone(kube, "load"))

        async def no_pods():
            return not await pods_of(kube, "load")

        await until("its pod is gone", no_pods)
        assert (directory / "model").exists()


async def test_a_job_that_keeps_failing_fails_and_leaves_no_process(tmp_path):
    broken = job("load", "exit 3", backoffLimit=1)
    async with running(tmp_path, CLAIM, broken) as local, local.kube() as kube:
        ended = await until("the Job has ended", lambda: finished(kube, "load"))
        assert ended == ("Failed", "BackoffLimitExceeded")
        assert not await pods_of(kube, "load")
        assert not [c for c in local.processes().values() if "exit 3" in c]


@pytest.mark.parametrize(
    "everything",
    [pytest.param(False, marks=pytest.mark.slow), True],
    ids=["the-parent", "every-process"],
)
async def test_a_job_resumes_after_a_kill_and_its_work_is_done_once(tmp_path, everything):
    script = "until [ -e /cache/go ]; do sleep 0.05; done; echo done >> /cache/log"
    directory = tmp_path / "state" / "volumes" / "default" / "cache"
    async with running(tmp_path, CLAIM, job("load", script)) as local, local.kube() as kube:

        async def runs():
            pods = await pods_of(kube, "load")
            return pods and pods[0]["status"]["phase"] == "Running"

        await until("its process runs", runs)
        for pid in list(local.processes()) if everything else [local.process.pid]:
            with contextlib.suppress(ProcessLookupError):  # one dies with another, or at its end
                os.kill(pid, signal.SIGKILL)
        await until("no process is left", lambda: not local.processes(), 15)
    async with running(tmp_path) as local, local.kube() as kube:
        (directory / "go").touch()
        ended = await until("the Job has ended", lambda: finished(kube, "load"))
        assert ended == ("Complete", "CompletionsReached")
        assert len(await pods_of(kube, "load")) == 1
        assert (directory / "log").read_text() == "done\n"
