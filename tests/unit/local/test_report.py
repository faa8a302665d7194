"""What `kubeai local` logs about pods and Models, and what its table shows."""

import asyncio

import pytest
from fakes.kube import FakeKube
from harness import until
from structlog.testing import capture_logs

from kubeai.local.report import Report, model_problem, pod_state
from kubeai.supervisor.console.state import ModelSummary, Replicas
from kubeai.supervisor.console.traffic import Rates, TimesToFirstToken


def condition(kind, status, reason="", message=""):
    return {"type": kind, "status": str(status), "reason": reason, "message": message}


def model(*conditions, ready=0, **spec):
    status = {"conditions": list(conditions), "replicas": {"all": ready, "ready": ready}}
    return {"metadata": {"name": "m"}, "spec": spec, "status": status}


def pod(*conditions, containers=(), **meta):
    status = {
        "conditions": list(conditions),
        "containerStatuses": list(containers),
        "podIP": "127.1.0.1",
    }
    return {"metadata": {"name": "p", **meta}, "status": status}


CRASHED = {
    "state": {"waiting": {"reason": "CrashLoopBackOff"}},
    "lastState": {"terminated": {"exitCode": 2}},
}
WAITING = {"state": {"waiting": {"reason": "EngineNotInstalled", "message": "install it"}}}


@pytest.mark.parametrize(
    ("object", "event", "fields"),
    [
        (pod(), "starting", {}),
        (pod(deletionTimestamp="now"), "terminating", {}),
        (pod(condition("Ready", True)), "ready", {"address": "127.1.0.1"}),
        (
            pod(condition("Ready", True), annotations={"kubeai.org/mock-engine": "true"}),
            "ready",
            {"address": "127.1.0.1", "mock_engine": True},
        ),
        (pod(containers=[CRASHED]), "crashes", {"message": "exits with 2; kubectl logs p"}),
        (
            pod(containers=[WAITING]),
            "waits",
            {"reason": "EngineNotInstalled", "message": "install it"},
        ),
        (
            pod(condition("PodScheduled", False, "Unschedulable", "no node")),
            "waits",
            {"reason": "Unschedulable", "message": "no node"},
        ),
    ],
)
def test_a_pods_state(object, event, fields):
    assert pod_state(object) == (event, fields)


def test_a_model_that_is_progressing_has_no_problem():
    not_ready = condition("Ready", False, "ReplicasStarting", "0 of 1")
    assert model_problem(model(not_ready, condition("Progressing", True))) == ("", {})
    event, fields = model_problem(model(not_ready, condition("Progressing", False)))
    assert (event, fields["reason"]) == ("cannot run", "ReplicasStarting")


class Followed(FakeKube):
    """Calls back with one list for each resource and label selector."""

    namespace = "default"

    def __init__(self, **objects):
        super().__init__()
        self.by_labels = objects

    async def follow(self, r, namespace="", *, labels="", replaced, changed, **_):
        key = "models" if r.plural == "models" else "pods" if labels == "app=model" else "loaders"
        replaced(self.by_labels.get(key, []))
        for kind, obj in self.by_labels.get(f"{key}_changes", []):
            changed(kind, obj)
        await asyncio.Event().wait()


async def run_until(report, what, check):
    task = asyncio.create_task(report.run())
    try:
        return await until(what, check)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_each_state_is_logged_once_and_the_end_of_a_pod_as_well(tmp_path):
    ready = pod(condition("Ready", True))
    changes = [("MODIFIED", ready), ("MODIFIED", ready), ("DELETED", ready)]
    kube = Followed(pods=[pod()], pods_changes=changes)
    report = Report(kube, tmp_path, None, list)
    with capture_logs() as logs:
        await run_until(report, "the end", lambda: "pod gone" in [log["event"] for log in logs])
    assert [log["event"] for log in logs] == ["pod starting", "pod ready", "pod gone"]


def summary(state):
    return ModelSummary(
        name="m", state=state, reason="CacheNotLoaded", message="loading", engine="VLLM",
        url="hf://a/m", features=(), owner="", strategy="LeastLoad", adapters=(),
        replicas=Replicas(0, 1, 0, None), in_flight=3, held=1, rates=Rates(),
        ttft_s=TimesToFirstToken(),
    )  # fmt: skip


async def test_the_table_has_the_summaries_and_the_progress_of_a_download(tmp_path):
    status = {"containerStatuses": [{"name": "loader", "restartCount": 1}]}
    meta = {"name": "load", "namespace": "ns", "uid": "u", "labels": {"model": "m"}}
    logs = tmp_path / "pods" / "ns_load_u" / "loader"
    logs.mkdir(parents=True)
    (logs / "1.log").write_text(
        "2026-01-01T00:00:00Z stderr F 0.1 of 2 GB\n2026-01-01T00:00:05Z stderr F 0.5 of 2 GB\n"
    )
    kube = Followed(loaders=[{"metadata": meta, "status": status}])
    models, shown = [summary("Starting")], []
    report = Report(kube, tmp_path, shown.append, lambda: models)
    await run_until(report, "the table", lambda: shown and shown[-1])
    (row,) = shown[-1]
    assert (row["in_flight"], row["held"], row["message"]) == (3, 1, "0.5 of 2 GB")
    models[0] = summary("Ready")
    await run_until(report, "the change", lambda: shown[-1][0]["state"] == "Ready")
    assert shown[-1][0]["message"] == "loading"
