"""Jobs, as their users see them: a cluster's own controllers, and the one of `kubeai local`.

The latter on the embedded API, and on a real kube-apiserver that has no controllers, whose checks
of a Job's status are stricter. No Node takes the pods: the tests say what becomes of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import subprocess
import time
from collections import Counter

import pytest
from operators import until
from servers import CONTROL_PLANE, assets, cluster, embedded, real

from kubeai.kube.client import Kube
from kubeai.kube.errors import ApiError
from kubeai.kube.resources import EVENTS, JOBS, PODS
from kubeai.local.jobs.controller import JobController

TRACKING = "batch.kubernetes.io/job-tracking"
SERVERS = {"cluster": cluster, "embedded": embedded, "real": real}
CLUSTER = pytest.param("cluster", marks=pytest.mark.cluster)
REAL = pytest.param("real", marks=pytest.mark.cluster)


@pytest.fixture(scope="module", params=["embedded", CLUSTER, REAL])
def api(request, tmp_path_factory):
    if request.param != "embedded" and assets(*CONTROL_PLANE) is None:
        pytest.skip("KUBEBUILDER_ASSETS holds no whole control plane")
    start = SERVERS[request.param]
    with start(tmp_path_factory.mktemp("jobs") / request.param) as server:
        yield server._replace(kind=request.param)


class World:
    """One namespace, its Jobs, and every pod that was ever seen in it."""

    def __init__(self, kube, api, kubeconfig):
        self.kube, self.api, self.kubeconfig = kube, api, kubeconfig
        self.seen = set()
        self.pods = {}
        self._follower = asyncio.create_task(
            kube.follow(PODS, kube.namespace, replaced=self._replaced, changed=self._changed)
        )
        self._controller = None
        if api.kind != "cluster":
            self.start()

    def start(self):
        self._controller = asyncio.create_task(JobController(self.kube).run())

    async def kill(self):
        """The controller's end between two bytes: what it was writing may or may not be written."""
        self._controller.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._controller

    async def close(self):
        if self._controller is not None:
            await self.kill()
        self._follower.cancel()
        await asyncio.gather(self._follower, return_exceptions=True)
        await self.kube.close()

    def _replaced(self, pods):
        self.pods = {}
        for pod in pods:
            self._changed("ADDED", pod)

    def _changed(self, kind, pod):
        name = pod["metadata"]["name"]
        self.seen.add(name)
        if kind == "DELETED":
            self.pods.pop(name, None)
        else:
            self.pods[name] = pod

    async def create(self, name="j", restart="Never", pod=None, **spec):
        container = {"name": "c", "image": "registry.example/tool:1", "command": ["load"]}
        pod = {"restartPolicy": restart, "containers": [container], **(pod or {})}
        template = {"spec": pod}
        job = {"metadata": {"name": name}, "spec": {"template": template, **spec}}
        return await self.kube.create(JOBS, job)

    async def patch(self, name="j", **spec):
        await self.kube.patch(JOBS, name, {"spec": spec})

    async def job(self, name="j"):
        return await self.kube.get(JOBS, name)

    async def status(self, name="j"):
        return (await self.job(name)).get("status") or {}

    def active(self):
        return sorted(
            name
            for name, pod in self.pods.items()
            if pod["status"]["phase"] in ("Pending", "Running")
            and "deletionTimestamp" not in pod["metadata"]
        )

    async def some_active(self, count):
        await until(lambda: len(self.active()) == count, f"{count} pods are active")
        return self.active()

    async def say(self, pod, phase, **status):
        """And see it: by the watch, which may be behind, it is told what is active."""
        patch = {"status": {"phase": phase, **status}}
        said = await self.kube.patch(PODS, pod, patch, subresource="status")
        version = int(said["metadata"]["resourceVersion"])

        def seen():
            known = self.pods.get(pod)
            return known is None or int(known["metadata"]["resourceVersion"]) >= version

        await until(seen, f"{pod} is seen to be {phase}")

    async def numbers_are(self, active, succeeded, failed, name="j"):
        async def told():
            status = await self.status(name)
            found = tuple(status.get(key, 0) for key in ("active", "succeeded", "failed"))
            waiting = status.get("uncountedTerminatedPods") or {}
            return found == (active, succeeded, failed) and not any(waiting.values())

        await until(told, f"{active} active, {succeeded} succeeded, {failed} failed")

    async def conditions(self, name="j"):
        conditions = (await self.status(name)).get("conditions") or []
        return [(c["type"], c["status"], c["reason"]) for c in conditions]

    async def conditions_are(self, *wanted, name="j"):
        async def told():
            return await self.conditions(name) == list(wanted)

        await until(told, f"the conditions {wanted}")

    async def is_gone(self, name="j"):
        with contextlib.suppress(ApiError):
            await self.job(name)
            return False
        return True

    async def reasons(self, name="j"):
        """Count the Job's Events by reason."""
        events, _ = await self.kube.list(EVENTS, self.kube.namespace)
        return Counter(e["reason"] for e in events if e["involvedObject"]["name"] == name)

    def kubectl(self, *arguments):
        done = subprocess.run(
            [str(assets("kubectl") / "kubectl"), *arguments],
            env={"KUBECONFIG": str(self.kubeconfig), "HOME": str(self.kubeconfig.parent)},
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture
async def world(api, tmp_path):
    namespace = f"test-{secrets.token_hex(4)}"
    code, answer = api.request("POST", "/api/v1/namespaces", {"metadata": {"name": namespace}})
    assert code == 201, answer
    kubeconfig = api.kubeconfig(tmp_path / "kubeconfig", namespace)
    world = World(await Kube.connect(str(kubeconfig)), api, kubeconfig)
    try:
        yield world
    finally:
        await world.close()


COMPLETE = (
    ("SuccessCriteriaMet", "True", "CompletionsReached"),
    ("Complete", "True", "CompletionsReached"),
)


def failed(reason):
    return (("FailureTarget", "True", reason), ("Failed", "True", reason))


async def test_a_job_makes_its_pod_and_is_complete_once_that_succeeds(world):
    job = await world.create(ttlSecondsAfterFinished=600)
    uid = job["metadata"]["uid"]
    assert job["spec"]["selector"] == {"matchLabels": {"batch.kubernetes.io/controller-uid": uid}}
    (name,) = await world.some_active(1)
    assert name.startswith("j-")
    assert len(name) == len("j-") + 5
    await world.numbers_are(1, 0, 0)
    meta = world.pods[name]["metadata"]
    assert meta["labels"] == {
        "batch.kubernetes.io/controller-uid": uid, "batch.kubernetes.io/job-name": "j",
        "controller-uid": uid, "job-name": "j",
    }  # fmt: skip
    assert meta["finalizers"] == [TRACKING]
    (owner,) = meta["ownerReferences"]
    assert owner == {
        "apiVersion": "batch/v1", "kind": "Job", "name": "j", "uid": uid, "controller": True,
        "blockOwnerDeletion": True,
    }  # fmt: skip
    await world.say(name, "Running", conditions=[{"type": "Ready", "status": "True"}])

    async def ready():
        return (await world.status()).get("ready") == 1

    await until(ready, "one pod is ready")
    await world.say(name, "Succeeded")
    await world.conditions_are(*COMPLETE)
    await world.numbers_are(0, 1, 0)
    status = await world.status()
    assert status["startTime"] <= status["completionTime"]
    assert (status.get("ready"), status.get("terminating")) == (0, 0)
    await until(lambda: "finalizers" not in world.pods[name]["metadata"], "nothing holds the pod")
    assert world.seen == {name}

    async def told():
        return await world.reasons() == {"SuccessfulCreate": 1, "Completed": 1}

    await until(told, "two events")


async def test_no_more_pods_at_the_same_time_than_allowed_or_still_needed(world):
    await world.create(parallelism=2, completions=3)
    for active, succeeded in ((2, 0), (2, 1), (1, 2)):
        await world.numbers_are(active, succeeded, 0)
        await world.say((await world.some_active(active))[0], "Succeeded")
    await world.numbers_are(0, 3, 0)
    await world.conditions_are(*COMPLETE)
    assert len(world.seen) == 3


async def test_without_completions_one_success_is_enough(world):
    job = await world.create(parallelism=2)
    assert "completions" not in job["spec"]
    one, other = await world.some_active(2)
    await world.say(one, "Succeeded")
    await world.numbers_are(1, 1, 0)
    await world.say(other, "Failed")
    await world.conditions_are(*COMPLETE)
    await world.numbers_are(0, 1, 1)


@pytest.mark.slow
async def test_failed_pod_is_replaced_with_back_off_up_to_the_limit(world):
    await world.create(backoffLimit=1)
    (first,) = await world.some_active(1)
    began = time.monotonic()
    await world.say(first, "Failed")
    await world.numbers_are(0, 0, 1)
    (second,) = await world.some_active(1)
    assert time.monotonic() - began > 8
    await world.numbers_are(1, 0, 1)
    await world.say(second, "Failed")
    await world.conditions_are(*failed("BackoffLimitExceeded"))
    await world.numbers_are(0, 0, 2)
    assert "completionTime" not in await world.status()
    assert world.seen == {first, second}


async def test_too_many_restarts_of_a_container_fail_the_job(world):
    await world.create(restart="OnFailure", backoffLimit=2)
    (name,) = await world.some_active(1)
    container = {"name": "c", "image": "i", "imageID": "i", "ready": False, "state": {}}
    await world.say(name, "Running", containerStatuses=[{**container, "restartCount": 1}])
    await world.numbers_are(1, 0, 0)
    await world.say(name, "Running", containerStatuses=[{**container, "restartCount": 2}])
    await world.conditions_are(*failed("BackoffLimitExceeded"))
    await world.numbers_are(0, 0, 1)
    await until(lambda: not world.pods, "its pod is gone")

    async def told():
        wanted = {"SuccessfulCreate": 1, "SuccessfulDelete": 1, "BackoffLimitExceeded": 1}
        return await world.reasons() == wanted

    await until(told, "three events")


async def test_a_job_that_is_active_too_long_fails(world):
    await world.create(activeDeadlineSeconds=2)
    await until(lambda: world.seen, "a pod was created")
    await world.conditions_are(*failed("DeadlineExceeded"))
    await world.numbers_are(0, 0, 1)
    await until(lambda: not world.pods, "its pod is gone")


async def test_a_suspended_job_has_no_pods_and_continues_once_resumed(world):
    await world.create(suspend=True)
    await world.conditions_are(("Suspended", "True", "JobSuspended"))
    assert "startTime" not in await world.status()
    assert not world.seen
    await world.patch(suspend=False)
    (first,) = await world.some_active(1)
    await world.numbers_are(1, 0, 0)
    await world.conditions_are(("Suspended", "False", "JobResumed"))
    assert "startTime" in await world.status()
    await world.patch(suspend=True)
    await world.conditions_are(("Suspended", "True", "JobSuspended"))
    await until(lambda: not world.pods, "its pod is gone")
    await world.numbers_are(0, 0, 0)
    assert "startTime" not in await world.status()
    await world.patch(suspend=False)
    (second,) = await world.some_active(1)
    assert first != second
    await world.say(second, "Succeeded")
    await world.numbers_are(0, 1, 0)


async def test_lower_parallelism_deletes_active_pods_without_counting_failures(world):
    await world.create(parallelism=3, completions=3)
    pods = await world.some_active(3)
    await world.say(pods[1], "Running", conditions=[{"type": "Ready", "status": "True"}])
    await world.patch(parallelism=1)
    assert await world.some_active(1) == [pods[1]]
    await world.numbers_are(1, 0, 0)
    await until(lambda: len(world.pods) == 1, "two are gone")
    await world.patch(parallelism=2)
    await world.some_active(2)


async def test_externally_deleted_pod_counts_as_failed(world):
    await world.create(backoffLimit=0)
    (name,) = await world.some_active(1)
    await world.kube.delete(PODS, name)
    await world.conditions_are(*failed("BackoffLimitExceeded"))
    await world.numbers_are(0, 0, 1)
    await until(lambda: not world.pods, "it is gone")


async def test_a_pod_that_succeeded_still_counts_when_it_is_deleted(world):
    await world.create(completions=2)
    (first,) = await world.some_active(1)
    await world.say(first, "Succeeded")
    await world.numbers_are(1, 1, 0)
    await world.kube.delete(PODS, first)
    await until(lambda: first not in world.pods, "it is gone")
    (second,) = await world.some_active(1)
    await world.say(second, "Succeeded")
    await world.numbers_are(0, 2, 0)
    assert len(world.seen) == 2


async def test_finished_job_is_deleted_with_its_pods_after_its_ttl(world):
    if world.api.kind == "real":
        pytest.skip("no controller collects what the Job owns")
    await world.create(ttlSecondsAfterFinished=1)
    (name,) = await world.some_active(1)
    await world.say(name, "Succeeded")
    await until(world.is_gone, "the Job is gone")
    await until(lambda: not world.pods, "its pod is gone")


@pytest.mark.parametrize("propagation", ["Background", "Foreground"])
async def test_a_deleted_jobs_pods_go_and_none_is_made(world, propagation):
    if world.api.kind == "real":
        pytest.skip("no controller collects what the Job owns")
    await world.create(parallelism=2, completions=2)
    await world.some_active(2)
    await world.kube.delete(JOBS, "j", propagation=propagation)
    await until(world.is_gone, "the Job is gone")
    await until(lambda: not world.pods, "its pods are gone")
    assert len(world.seen) == 2


async def test_pods_that_are_left_by_their_job_can_be_deleted(world):
    if world.api.kind == "real":
        pytest.skip("no controller takes the owner from what the Job owned")
    await world.create()
    (name,) = await world.some_active(1)
    await world.kube.delete(JOBS, "j", propagation="Orphan")
    left = {"finalizers", "ownerReferences"}
    await until(lambda: not left & world.pods[name]["metadata"].keys(), "nothing holds the pod")
    await world.kube.delete(PODS, name)
    await until(lambda: not world.pods, "it is gone")


async def test_a_selector_of_ones_own_is_left_as_it_is(world):
    labels = {"app": "mine"}
    container = {"name": "c", "image": "registry.example/tool:1"}
    spec = {"restartPolicy": "Never", "containers": [container]}
    job = {
        "metadata": {"name": "j"},
        "spec": {
            "manualSelector": True,
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": spec},
        },
    }
    created = await world.kube.create(JOBS, job)
    assert created["spec"]["selector"] == {"matchLabels": labels}
    (name,) = await world.some_active(1)
    assert world.pods[name]["metadata"]["labels"] == labels
    await world.say(name, "Succeeded")
    await world.conditions_are(*COMPLETE)


async def test_pods_that_the_api_refuses_are_tried_again(world):
    if world.api.kind == "embedded":
        pytest.skip("nothing there refuses a pod that its Job's checks let through")
    priority = {"metadata": {"name": world.kube.namespace}, "value": 1}
    await world.create(pod={"priorityClassName": world.kube.namespace})

    async def told():
        return (await world.reasons())["FailedCreate"]

    await until(told, "why there is no pod")
    assert not world.seen
    classes = "/apis/scheduling.k8s.io/v1/priorityclasses"
    assert world.api.request("POST", classes, priority)[0] == 201
    await world.some_active(1)


async def test_nothing_is_written_while_nothing_changes(world):
    await world.create()
    (name,) = await world.some_active(1)
    await world.numbers_are(1, 0, 0)
    before = (await world.job())["metadata"]["resourceVersion"]
    for value in "abc":
        await world.kube.patch(PODS, name, {"metadata": {"annotations": {"seen": value}}})
    await world.create("fence")
    await world.numbers_are(1, 0, 0, name="fence")
    assert (await world.job())["metadata"]["resourceVersion"] == before


async def test_a_killed_controllers_successor_makes_no_pod_twice_and_counts_each_once(world):
    if world.api.kind == "cluster":
        pytest.skip("the cluster's own controller cannot be killed here")
    await world.create(parallelism=2, completions=6)

    async def succeed():
        while True:
            for name in world.active():
                with contextlib.suppress(ApiError):
                    await world.say(name, "Succeeded")
            await asyncio.sleep(0.01)

    node = asyncio.create_task(succeed())
    try:
        for life_ms in range(1, 60, 3):  # each ends somewhere else
            await asyncio.sleep(life_ms / 1000)
            await world.kill()
            world.start()
        await world.conditions_are(*COMPLETE)
    finally:
        node.cancel()
    await world.numbers_are(0, 6, 0)
    assert len(world.seen) == 6


async def test_indexed_job_is_rejected_with_a_message(world):
    if world.api.kind == "cluster":
        pytest.skip("the cluster's controller supports them")
    await world.create(completionMode="Indexed", completions=2)
    await world.conditions_are(*failed("NotSupported"))
    message = (await world.status())["conditions"][-1]["message"]
    assert message == "kubeai local does not support spec.completionMode Indexed"
    assert not world.seen


@pytest.mark.kubectl
@pytest.mark.skipif(
    not os.environ.get("KUBEBUILDER_ASSETS") or assets("kubectl") is None,
    reason="no kubectl in KUBEBUILDER_ASSETS",
)
async def test_kubectl_shows_waits_for_and_describes_a_job(world):
    await world.create()
    (name,) = await world.some_active(1)
    await world.numbers_are(1, 0, 0)
    header, row = (await asyncio.to_thread(world.kubectl, "get", "jobs")).splitlines()
    assert header.split() == ["NAME", "STATUS", "COMPLETIONS", "DURATION", "AGE"]
    assert row.split()[:3] == ["j", "Running", "0/1"]
    waiting = asyncio.create_task(
        asyncio.to_thread(world.kubectl, "wait", "--for=condition=complete", "job/j")
    )
    await world.say(name, "Succeeded")
    assert await waiting == "job.batch/j condition met\n"
    _, row = (await asyncio.to_thread(world.kubectl, "get", "jobs")).splitlines()
    assert row.split()[:3] == ["j", "Complete", "1/1"]

    async def told():
        said = await asyncio.to_thread(world.kubectl, "describe", "job", "j")
        return all(
            words in said
            for words in (
                "0 Active (0 Ready) / 1 Succeeded / 0 Failed", f"Created pod: {name}",
                "Job completed",
            )
        )  # fmt: skip

    await until(told, "what became of it is described")
    logs = await asyncio.to_thread(world.kubectl, "get", "pods", "-l", "job-name=j", "-o", "name")
    assert logs == f"pod/{name}\n"
