"""The rules of Jobs: from a Job, its pods and the time to the single next step."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kubeai.local.jobs.controller import pod_of
from kubeai.local.jobs.objects import TRACKING, Job, Pod
from kubeai.local.jobs.rules import (
    CreatePods,
    DeleteJob,
    DeletePods,
    ReleasePods,
    Wait,
    WriteStatus,
    endings_of,
    next_step,
)

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
STEPS_MAX = 60


class World:
    """One Job and its pods; steps are applied as an API would. A pod's name is its uid."""

    def __init__(self, restart="Never", **spec):
        self.now = BEGIN
        template = {"metadata": {"labels": {"a": "b"}}, "spec": {"restartPolicy": restart}}
        spec = {"parallelism": 1, "completions": 1, "template": template, **spec}
        self.job: dict[str, Any] | None = {
            "metadata": {"name": "j", "namespace": "n", "uid": "u", "generation": 1},
            "spec": spec,
            "status": {},
        }
        self.pods = {}
        self.made = []
        self.endings = {}
        self.writes = 0

    def step(self):
        job = msgspec.convert(self.job, Job)
        pods = [msgspec.convert(pod, Pod) for pod in self.pods.values()]
        self.endings = endings_of(job, pods, self.endings, self.now)
        return next_step(job, pods, self.now, self.endings)

    def run(self):
        """Apply steps until there is none; return what the last one waits for."""
        for _ in range(STEPS_MAX):
            step = self.step()
            if isinstance(step, Wait) or self.job is None:
                return step.seconds
            self.take(step)
            if self.job is None:
                return None
        raise AssertionError(f"the steps do not end: {step}")

    def take(self, step, parts=None):
        """Apply a step; ``parts`` limits it to its first writes, as if killed after them."""
        self.writes += 1
        if isinstance(step, WriteStatus):
            self.job["status"] = msgspec.to_builtins(step.status)
        elif isinstance(step, CreatePods):
            for name in step.names[:parts]:
                assert name not in self.made, "a pod name is never reused"
                self.made.append(name)
                pod = pod_of(msgspec.convert(self.job, Job), name)
                pod["metadata"]["uid"] = name
                pod["status"] = {"phase": "Pending"}
                self.pods[name] = pod
        elif isinstance(step, ReleasePods):
            for released in step.pods[:parts]:
                self.release(released.metadata.name)
        elif isinstance(step, DeletePods):
            for doomed in step.pods[:parts]:
                if not step.fails and doomed.tracked:
                    self.release(doomed.metadata.name)
                self.delete(doomed.metadata.name)
        elif isinstance(step, DeleteJob):
            self.job = None

    def release(self, name):
        self.pods[name]["metadata"]["finalizers"].remove(TRACKING)
        self.sweep(name)

    def delete(self, name):
        self.pods[name]["metadata"] |= {
            "deletionTimestamp": self.now.isoformat(), "deletionGracePeriodSeconds": 0,
        }  # fmt: skip
        self.sweep(name)

    def sweep(self, name):
        meta = self.pods[name]["metadata"]
        if "deletionTimestamp" in meta and not meta["finalizers"]:
            del self.pods[name]

    def say(self, name, phase, **status):
        self.pods[name]["status"] = {"phase": phase, **status}

    def active(self):
        return [
            name
            for name, pod in self.pods.items()
            if pod["status"]["phase"] in ("Pending", "Running")
            and "deletionTimestamp" not in pod["metadata"]
        ]

    def numbers(self):
        return tuple(self.job["status"].get(k) or 0 for k in ("active", "succeeded", "failed"))

    def conditions(self):
        return [(c["type"], c["status"], c["reason"]) for c in self.job["status"]["conditions"]]


def test_a_job_is_complete_once_its_pod_succeeds_and_then_idle():
    world = World()
    assert world.run() is None
    (pod,) = world.active()
    assert pod.startswith("j-")
    assert len(pod) == len("j-") + 5
    assert world.numbers() == (1, 0, 0)
    world.say(pod, "Succeeded")
    assert world.run() is None
    assert world.numbers() == (0, 1, 0)
    reason = "CompletionsReached"
    assert world.conditions() == [
        ("SuccessCriteriaMet", "True", reason), ("Complete", "True", reason),
    ]  # fmt: skip
    assert world.pods[pod]["metadata"]["finalizers"] == []
    writes = world.writes
    assert world.run() is None
    assert world.writes == writes


def test_a_pod_has_the_labels_owner_and_finalizer_of_its_job():
    world = World()
    world.run()
    (pod,) = world.pods.values()
    assert pod["metadata"]["labels"] == {"a": "b"}
    assert pod["metadata"]["finalizers"] == [TRACKING]
    (owner,) = pod["metadata"]["ownerReferences"]
    assert owner == {
        "apiVersion": "batch/v1", "kind": "Job", "name": "j", "uid": "u", "controller": True,
        "blockOwnerDeletion": True,
    }  # fmt: skip


def test_active_pods_are_limited_by_parallelism_and_remaining_completions():
    world = World(parallelism=3, completions=4)
    for running, done in ((3, 0), (3, 1), (2, 2), (1, 3)):
        world.run()
        assert world.numbers() == (running, done, 0)
        world.say(world.active()[0], "Succeeded")
    world.run()
    assert world.numbers() == (0, 4, 0)
    assert world.conditions()[-1][0] == "Complete"


def test_without_completions_the_first_success_completes_the_job_once_the_others_end():
    world = World(parallelism=2, completions=None)
    world.run()
    one, other = world.active()
    world.say(one, "Succeeded")
    world.run()
    assert world.numbers() == (1, 1, 0)
    world.say(other, "Failed")
    world.run()
    assert world.numbers() == (0, 1, 1)
    assert world.conditions()[-1][0] == "Complete"


def test_a_job_with_zero_completions_is_complete_at_once():
    world = World(completions=0)
    world.run()
    assert not world.made
    assert world.conditions()[-1][0] == "Complete"


def test_failed_pods_are_replaced_with_back_off_that_doubles_up_to_six_minutes():
    world = World(backoffLimit=99)
    rests = []
    for _ in range(8):
        world.run()
        (pod,) = world.active()
        world.say(pod, "Failed")
        rests.append(world.run())
        assert not world.active()
        world.now += timedelta(seconds=rests[-1])
    assert rests == [10, 20, 40, 80, 160, 320, 360, 360]


def test_the_back_off_starts_at_the_failure_and_a_success_resets_it():
    world = World(parallelism=2, completions=9, backoffLimit=99)
    world.run()
    one, other = world.active()
    ended = world.now
    world.now += timedelta(seconds=4)
    terminated = {"exitCode": 1, "finishedAt": ended.isoformat()}
    world.say(one, "Failed", containerStatuses=[{"state": {"terminated": terminated}}])
    assert world.run() == 6
    world.say(other, "Succeeded")
    world.run()
    assert len(world.active()) == 2


def test_a_new_controller_derives_the_back_off_from_the_pods():
    world = World()
    world.run()
    terminated = {"exitCode": 1, "finishedAt": world.now.isoformat()}
    world.say(world.made[0], "Failed", containerStatuses=[{"state": {"terminated": terminated}}])
    world.run()
    world.now += timedelta(seconds=3)
    world.endings = {}
    assert world.run() == 7


def test_exceeding_the_back_off_limit_fails_the_job_and_ends_its_other_pods():
    world = World(parallelism=3, completions=3, backoffLimit=1)
    world.run()
    one, two, three = world.active()
    world.say(one, "Failed")
    world.run()
    assert world.numbers() == (2, 0, 1)
    world.say(two, "Failed")
    step = world.step()
    assert [c.type for c in step.status.conditions] == ["FailureTarget"]
    world.run()
    assert three not in world.pods
    assert world.numbers() == (0, 0, 3)
    reason = "BackoffLimitExceeded"
    assert world.conditions() == [("FailureTarget", "True", reason), ("Failed", "True", reason)]


@pytest.mark.parametrize(
    ("limit", "restarts", "fails"), [(2, 1, False), (2, 2, True), (0, 1, True)]
)
def test_container_restarts_count_if_the_pod_is_not_replaced(limit, restarts, fails):
    world = World("OnFailure", backoffLimit=limit)
    world.run()
    world.say(world.made[0], "Running", containerStatuses=[{"restartCount": restarts}])
    world.run()
    assert bool(world.conditions()) is fails
    assert bool(world.active()) is not fails


def test_a_job_fails_at_its_active_deadline():
    world = World(activeDeadlineSeconds=30)
    assert world.run() == 30
    world.now += timedelta(seconds=29)
    assert world.run() == 1
    world.now += timedelta(seconds=1)
    world.run()
    assert world.conditions()[-1] == ("Failed", "True", "DeadlineExceeded")
    assert not world.pods


def test_suspending_a_job_deletes_its_pods_and_resets_its_start_time():
    world = World(activeDeadlineSeconds=30, suspend=True)
    assert world.run() is None
    assert not world.made
    assert world.job["status"]["startTime"] is None
    world.job["spec"]["suspend"] = False
    world.job["metadata"]["generation"] += 1
    world.now += timedelta(seconds=60)
    assert world.run() == 30
    assert world.conditions() == [("Suspended", "False", "JobResumed")]
    world.job["spec"]["suspend"] = True
    world.job["metadata"]["generation"] += 1
    assert world.run() is None
    assert world.conditions() == [("Suspended", "True", "JobSuspended")]
    assert not world.pods
    assert world.numbers() == (0, 0, 0)  # it was stopped, and did not fail


def test_reducing_parallelism_deletes_the_least_ready_pods():
    world = World(parallelism=3, completions=3)
    world.run()
    one, two, three = world.active()
    ready = [{"type": "Ready", "status": "True"}]
    world.say(two, "Running", conditions=ready)
    world.say(three, "Running")
    world.job["spec"]["parallelism"] = 1
    world.run()
    assert world.active() == [two]
    assert one not in world.pods
    assert world.numbers() == (1, 0, 0)


def test_a_pod_deleted_by_someone_else_counts_as_failed():
    world = World()
    world.run()
    world.delete(world.made[0])
    assert world.run() == 10
    assert world.numbers() == (0, 0, 1)
    assert not world.pods


def test_a_terminating_pod_is_not_replaced_under_replacement_policy_failed():
    world = World(podReplacementPolicy="Failed")
    world.run()
    pod = world.made[0]
    world.delete(pod)
    world.pods[pod]["metadata"]["deletionGracePeriodSeconds"] = 30
    assert world.run() is None
    assert world.job["status"]["terminating"] == 1
    world.say(pod, "Succeeded")
    world.run()
    assert world.numbers() == (0, 1, 0)


def test_a_deleted_job_creates_no_pods_and_releases_its_existing_ones():
    world = World(parallelism=2, completions=3)
    world.run()
    world.say(world.made[0], "Succeeded")
    world.job["metadata"]["deletionTimestamp"] = world.now.isoformat()
    world.run()
    assert len(world.made) == 2
    assert all(not pod["metadata"]["finalizers"] for pod in world.pods.values())
    assert world.numbers() == (1, 1, 0)


@pytest.mark.parametrize("phase", ["Succeeded", "Failed"])
def test_a_finished_job_is_deleted_after_its_ttl(phase):
    world = World(ttlSecondsAfterFinished=60, backoffLimit=0)
    world.run()
    world.say(world.made[0], phase)
    assert world.run() == 60
    world.now += timedelta(seconds=60)
    assert isinstance(world.step(), DeleteJob)


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        ({"completionMode": "Indexed"}, "spec.completionMode Indexed"),
        ({"podFailurePolicy": {"rules": []}}, "spec.podFailurePolicy"),
        ({"successPolicy": {"rules": []}}, "spec.successPolicy"),
        ({"backoffLimitPerIndex": 1}, "spec.backoffLimitPerIndex"),
    ],
)
def test_an_unsupported_field_is_rejected_by_name(spec, named):
    world = World(**spec)
    world.run()
    assert not world.made
    assert world.conditions()[-1] == ("Failed", "True", "NotSupported")
    assert world.job["status"]["conditions"][-1]["message"].endswith(named)


def test_a_job_managed_by_another_controller_is_ignored():
    world = World(managedBy="example.com/another")
    assert world.run() is None
    assert world.writes == 0


PHASES = st.sampled_from(["Running", "Succeeded", "Failed", "deleted"])
HAPPENINGS = st.lists(
    st.one_of(
        st.tuples(st.just("pod"), st.integers(0, 5), PHASES),
        st.tuples(st.just("step"), st.integers(0, 2)),
        st.tuples(st.just("forget")),
        st.tuples(st.just("time"), st.integers(0, 700)),
        st.tuples(st.just("parallelism"), st.integers(0, 4)),
    ),
    max_size=40,
)


@settings(max_examples=300, deadline=None)
@given(HAPPENINGS, st.integers(0, 5), st.integers(0, 4))
def test_every_pod_is_counted_once_regardless_of_controller_kills(happenings, wanted, limit):
    world = World(parallelism=2, completions=wanted, backoffLimit=limit)
    succeeded, failed, spared = set(), set(), set()
    for what, *how in happenings:
        if what == "pod" and (active := world.active()):
            name = active[how[0] % len(active)]
            tracked = world.pods[name]["metadata"]["finalizers"]
            if how[1] == "deleted":
                world.delete(name)
                (failed if tracked else spared).add(name)
            else:
                world.say(name, how[1])
                ended = {"Succeeded": succeeded, "Failed": failed}.get(how[1], set())
                (ended if tracked else spared).add(name)
        elif what == "step" and not isinstance(step := world.step(), Wait):
            if isinstance(step, DeletePods):
                names = {pod.metadata.name for pod in step.pods[: how[0]]}
                (failed if step.fails else spared).update(names)
            world.take(step, how[0])
        elif what == "forget":
            world.endings = {}
        elif what == "time":
            world.now += timedelta(seconds=how[0])
        elif what == "parallelism":
            world.job["spec"]["parallelism"] = how[0]
            world.job["metadata"]["generation"] += 1
    status = world.job["status"]
    waiting = status.get("uncountedTerminatedPods", {})
    uncounted = {kind: len(waiting.get(kind, ())) for kind in ("succeeded", "failed")}
    assert status.get("succeeded", 0) + uncounted["succeeded"] <= len(succeeded)
    assert status.get("failed", 0) + uncounted["failed"] <= len(failed)
    world.job["spec"]["parallelism"] = 0  # no new pods: the existing ones settle
    for name in world.active():
        if world.pods[name]["metadata"]["finalizers"]:
            succeeded.add(name)
        world.say(name, "Succeeded")
    for _ in range(3):
        world.run()
        for name in world.active():
            raise AssertionError(f"{name} is still active")
    assert world.numbers() == (0, len(succeeded), len(failed))
    over = [c["type"] for c in world.job["status"]["conditions"]]
    assert over.count("Complete") + over.count("Failed") <= 1
    if len(failed) > limit:
        assert over[-1] in ("Failed", "Complete")
