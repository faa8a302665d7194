"""Which troubles of a Model fail requests, from when, and what ends that."""

from __future__ import annotations

import ast
import math
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest

import kubeai
from kubeai.api.config.system import parse_config
from kubeai.api.model import ModelStatusAdapter, decode_model
from kubeai.operator.adapter_steps import AdaptersView
from kubeai.operator.blocks import AT_ONCE, BlockTracker
from kubeai.operator.cache.plan import FINALIZER, CacheView, Claim, Job
from kubeai.operator.plan import Observed, PatchStatus, plan
from kubeai.operator.pods import Pod, Trouble
from kubeai.podspec.adapters import url_hash

CONFIG = parse_config(
    "cacheProfiles: {nfs: {sharedFilesystem: {storageClassName: nfs}}}\n"
    "gateway: {startFailureGrace: 30s, unschedulableGrace: 100s}"
)
START_S = 1000.0
CRASHING = Trouble("CrashLoopBackOff", "container server keeps exiting")
PULLING = Trouble("ImagePullBackOff", "the image of container server cannot be pulled")
HOMELESS = Trouble("Unschedulable", "Insufficient nvidia.com/gpu")
ADAPTER = {"name": "fin", "url": "hf://org/fin"}


class World:
    """One Model and its pods, as a replica of KubeAI sees them, on the test's clock."""

    def __init__(self, **spec):
        self.now_s = START_S
        self.unix_s = 1_800_000_000.0
        self.tracker = BlockTracker(CONFIG.gateway, lambda: self.now_s, lambda: self.unix_s)
        self.pods = []
        self.refused = None  # the reason why the API refuses to create a pod
        self.cache = CacheView(claim=Claim("shared-model-cache-nfs", "c1"))
        self.adapters = None
        self.generation = 0
        self.uid = "u1"
        self.status = {}
        self.spec = {"url": "hf://org/name", "engine": "VLLM", "replicas": 1}
        self.edit(**spec)

    def edit(self, **spec):
        """Change the spec; the conditions still describe the former one."""
        self.spec |= spec
        self.generation += 1

    @property
    def model(self):
        meta = {"name": "m", "uid": self.uid, "generation": self.generation}
        meta |= {"finalizers": [FINALIZER] if "cacheProfile" in self.spec else []}
        features = {"features": ["TextGeneration"]}
        return decode_model({"metadata": meta, "spec": features | self.spec, "status": self.status})

    def reconciled(self):
        """The leader writes the status."""
        observed = Observed(
            pods=tuple(pod for pod in self.pods if not pod.job),
            create_error=self.refused,
            cache=self.cache,
            adapters=self.adapters,
        )
        for action in plan(self.model, CONFIG, observed, datetime.now(UTC)):
            if isinstance(action, PatchStatus):
                self.status = msgspec.to_builtins(action.status)
        return self

    def pod(self, trouble=None, name="a", **values):
        """Add a pod, replacing the one with that name."""
        pod = Pod(**{"name": name, "uid": name, "owner": "u1", "hash": "h", "address": "i:1"}
                  | {"trouble": trouble} | values)  # fmt: skip
        self.pods = [one for one in self.pods if one.name != name] + [pod]
        return self

    def after(self, time_s):
        self.now_s = START_S + time_s
        return self

    def look(self):
        return self.tracker.observe(self.model, self.pods)

    def reason(self):
        block = self.look().model
        return None if block is None else block.reason

    def fails_after_s(self):
        """Seconds from the start; None if requests are not blocked."""
        block = self.look().model
        return None if block is None else max(0.0, block.fails_at_s - START_S)


# -- the Model -------------------------------------------------------------------------------------


def model_errors():
    """Each reason that a ModelError is raised with."""
    reasons = {"InvalidModel"}  # its default
    for path in Path(kubeai.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "ModelError":
                reasons |= {one.value for one in node.args[2:] if isinstance(one, ast.Constant)}
    return reasons


def test_every_model_error_reason_fails_requests_at_once():
    assert model_errors() == AT_ONCE


@pytest.mark.parametrize(
    ("spec", "reason", "words"),
    [
        ({"resourceProfile": "nope:1"}, "InvalidProfile", "nope"),
        ({"url": "ftp://org/name"}, "InvalidURL", "ftp"),
        ({"cacheProfile": "nope"}, "InvalidProfile", "nope"),
    ],
)
@pytest.mark.parametrize("replicas", [0, 1])
def test_an_invalid_model_fails_at_once_even_at_zero_replicas(spec, reason, words, replicas):
    block = World(replicas=replicas, **spec).reconciled().look().model
    assert (block.reason, block.fails_at_s, block.retry) == (reason, 0.0, False)
    assert words in block.message


def test_an_edited_model_is_not_blocked_for_its_former_spec():
    world = World(resourceProfile="nope:1").reconciled()
    assert world.fails_after_s() == 0
    world.edit(resourceProfile="cpu:1")
    assert world.reason() is None, "the leader has not seen it yet"
    assert world.reconciled().reason() == "ReplicasStarting"
    assert world.fails_after_s() == math.inf


def test_a_starting_replica_of_the_last_valid_spec_is_waited_for():
    world = World().pod()
    world.edit(resourceProfile="nope:1")
    assert world.reconciled().fails_after_s() == math.inf
    assert world.pod(ready=True).look().model is None


def test_rejected_pods_fail_requests_at_once_but_may_be_created_later():
    world = World()
    world.refused = Trouble("PodRefused", "exceeded quota: gpus")
    block = world.reconciled().look().model
    assert (block.reason, block.message) == ("PodRefused", "exceeded quota: gpus")
    assert (block.fails_at_s, block.retry) == (0.0, True)
    world.refused = None
    assert world.pod().reconciled().fails_after_s() == math.inf


def test_a_rejected_claim_fails_requests_at_once():
    world = World(cacheProfile="nfs")
    world.cache = CacheView()
    world.refused = Trouble("PodRefused", "claims are forbidden")
    assert world.reconciled().reason() == "PodRefused"
    assert world.fails_after_s() == 0


def test_a_rejected_pod_does_not_matter_while_another_starts():
    world = World(replicas=2).pod()
    world.refused = Trouble("PodRefused", "exceeded quota")
    assert world.reconciled().fails_after_s() == math.inf


def test_a_request_at_zero_replicas_does_not_fail():
    assert World(replicas=0).reconciled().look().model is None


def test_at_zero_replicas_without_autoscaling_the_timeout_gives_the_reason():
    world = World(replicas=0, autoscalingDisabled=True).reconciled()
    assert (world.reason(), world.fails_after_s()) == ("ScaledToZero", math.inf)


# -- pods ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reason", "fails_after_s", "retry"),
    [
        ("EngineNotInstalled", 0, False),
        ("UnknownImage", 0, False),
        ("InvalidPod", 0, False),
        ("InvalidImageName", 0, False),
        ("Unschedulable", 100, True),
        ("SchedulingGated", 100, True),
        ("ImagePullBackOff", 30, True),
        ("CrashLoopBackOff", 30, True),
        ("OOMKilled", 30, True),
        ("CreateContainerConfigError", 30, True),
        ("CreateContainerError", 30, True),
        ("StartError", 30, True),
        ("RunContainerError", 30, True),
        ("ErrImageNeverPull", 30, True),
        ("ContainerCreating", 30, True),
        ("Evicted", 30, True),
        ("Failed", 30, True),
        ("SchedulerError", 30, True),
        ("KubeletStopped", 30, True),
        ("SomethingNew", 30, True),
    ],
)
def test_each_pod_trouble_has_its_own_grace(reason, fails_after_s, retry):
    world = World().pod(Trouble(reason, "why")).reconciled()
    block = world.look().model
    assert (block.reason, block.message, block.retry) == (reason, "why", retry)
    assert world.fails_after_s() == fails_after_s


def test_requests_wait_for_a_container_that_restarts_after_a_single_exit():
    """Its output is for readers of the Model's status, not for clients."""
    exited = Trouble("ContainerExited", "container server exited (exit code 1)", "secret words")
    world = World().pod(exited).reconciled()
    assert world.fails_after_s() == math.inf
    block = world.look().model
    assert (block.reason, block.message) == (exited.reason, exited.message)
    assert world.pod(CRASHING).fails_after_s() == 30


def test_a_trouble_ends_once_the_container_has_run_for_long_enough():
    world = World()
    world.pod(CRASHING, trouble_until_s=world.unix_s + 60).reconciled()
    assert world.fails_after_s() == 30
    world.unix_s += 61
    assert world.fails_after_s() == math.inf


def test_a_grace_starts_when_the_trouble_is_first_seen_and_does_not_restart():
    world = World().pod(CRASHING)
    assert world.after(5).fails_after_s() == 35
    assert world.after(20).fails_after_s() == 35
    world.pod()  # it runs again
    assert world.reconciled().after(21).fails_after_s() == math.inf
    assert world.pod(CRASHING).after(25).fails_after_s() == 35


def test_a_different_trouble_starts_its_own_grace():
    world = World().pod(HOMELESS)
    assert world.fails_after_s() == 100
    assert world.pod(PULLING).after(90).fails_after_s() == 120


def test_scheduling_the_pod_ends_the_scheduling_trouble():
    world = World().pod(HOMELESS)
    assert world.fails_after_s() == 100
    assert world.pod().reconciled().after(90).fails_after_s() == math.inf
    assert world.pod(HOMELESS, "b").pod(HOMELESS).after(300).fails_after_s() == 400


def test_one_replica_that_serves_or_starts_lifts_the_block():
    world = World(replicas=2).pod(CRASHING).pod(CRASHING, "b")
    assert world.reason() == "CrashLoopBackOff"
    assert world.pod(None, "b").reconciled().fails_after_s() == math.inf
    assert world.pod(None, "b", ready=True).look().model is None


def test_with_several_replicas_the_latest_grace_counts():
    world = World(replicas=2).pod(CRASHING).pod(HOMELESS, "b")
    assert (world.reason(), world.fails_after_s()) == ("Unschedulable", 100)


def test_the_grace_restarts_after_a_replica_was_ready():
    world = World().pod(CRASHING)
    assert world.fails_after_s() == 30
    world.pod(ready=True).after(40).look()
    assert world.pod(CRASHING).after(50).fails_after_s() == 80


def test_a_new_pod_template_restarts_the_grace():
    world = World().pod(CRASHING)
    assert world.fails_after_s() == 30
    world.pods = []
    world.edit(args=["--other"])
    assert world.pod(CRASHING, "b", hash="h2").after(50).fails_after_s() == 80


def test_replacing_a_pod_does_not_restart_the_grace():
    evicted = Trouble("Evicted", "the node was low on memory")
    world = World().pod(evicted, finished=True)
    assert world.fails_after_s() == 30
    world.pods = []
    assert world.reconciled().fails_after_s() == math.inf
    assert world.pod(evicted, "b", finished=True).after(20).fails_after_s() == 30


def test_scaling_from_zero_again_restarts_the_grace():
    world = World().pod(CRASHING).reconciled()
    assert world.fails_after_s() == 30
    world.edit(replicas=0)
    assert world.look().model is None, "its pods are about to be deleted"
    world.pods = []
    assert world.reconciled().look().model is None
    world.edit(replicas=1)
    assert world.reason() is None
    assert world.pod(CRASHING, "b").reconciled().after(60).fails_after_s() == 90


def test_terminating_pods_and_those_of_other_models_do_not_count():
    world = World().pod(CRASHING, terminating=True).pod(CRASHING, "b", owner="u0")
    assert world.look().model is None


def test_a_recreated_model_starts_with_a_clean_state():
    world = World().pod(CRASHING)
    assert world.fails_after_s() == 30
    world.uid = "u2"
    assert world.pod(CRASHING, owner="u2").after(50).fails_after_s() == 80
    world.tracker.forget("m")
    assert world.after(60).fails_after_s() == 90


# -- its files -------------------------------------------------------------------------------------


def cached(**view):
    world = World(cacheProfile="nfs")
    world.cache = CacheView(claim=Claim("shared-model-cache-nfs", "c1"), **view)
    return world


def test_requests_wait_while_files_are_loaded():
    assert (cached().reconciled().reason(), cached().reconciled().fails_after_s()) == (
        "CacheNotLoaded",
        math.inf,
    )


def test_a_failing_load_fails_requests_after_the_grace():
    world = cached(may_load=False, failure="no such repository").reconciled()
    block = world.look().model
    assert (block.reason, block.fails_at_s) == ("LoadFailed", START_S + 30)
    assert "no such repository" in block.message
    assert world.after(40).fails_after_s() == 30
    job = Job("load-cache-m", "j1", owner="u1")
    world.cache = CacheView(claim=world.cache.claim, load=job, failure="no such repository")
    world.pod(name="j", job="load-cache", owner="")
    assert world.reconciled().fails_after_s() == math.inf, "it is retried"
    world.cache = CacheView(claim=world.cache.claim, may_load=False, failure="no such repository")
    world.pods = []
    assert world.reconciled().fails_after_s() == 30


def test_requests_fail_after_the_grace_if_jobs_cannot_run():
    world = cached(has_jobs=False).reconciled()
    assert (world.reason(), world.fails_after_s()) == ("NoJobs", 30)


def test_a_load_whose_pod_cannot_start_fails_requests():
    world = cached().pod(PULLING, job="load-cache", owner="").reconciled()
    assert (world.reason(), world.fails_after_s()) == ("ImagePullBackOff", 30)
    assert world.pod(job="load-cache", owner="").fails_after_s() == math.inf


# -- adapters --------------------------------------------------------------------------------------


def with_adapter():
    world = World(adapters=[ADAPTER]).pod(ready=True)
    failure = ModelStatusAdapter(name="fin", message="adapter fin on pod a: no such repository")
    world.adapters = AdaptersView(1, 0, (failure,))
    return world.reconciled()


def test_an_adapter_that_fails_to_load_is_blocked_but_not_its_model():
    blocked = with_adapter().look()
    assert blocked.model is None
    block = blocked.adapters["fin"]
    assert (block.reason, block.retry, block.fails_at_s) == ("AdaptersFailed", True, START_S + 30)
    assert "no such repository" in block.message


def test_an_adapter_served_by_another_replica_is_not_blocked():
    world = with_adapter()
    world.pod(None, "b", ready=True, adapters=(("fin", url_hash(ADAPTER["url"])),))
    assert world.look().adapters == {}


def test_an_adapter_that_is_still_loading_is_not_blocked():
    world = with_adapter()
    world.edit(adapters=[ADAPTER, {"name": "law", "url": "hf://org/law"}])
    assert list(world.reconciled().look().adapters) == ["fin"]


def test_an_adapter_whose_url_was_changed_is_not_blocked():
    world = with_adapter()
    assert world.look().adapters["fin"].fails_at_s == START_S + 30
    world.edit(adapters=[ADAPTER | {"url": "hf://org/right"}])
    assert world.after(50).look().adapters == {}
    assert world.reconciled().look().adapters["fin"].fails_at_s == START_S + 80


def test_the_status_lists_each_adapter_that_failed():
    assert with_adapter().status["failedAdapters"][0]["name"] == "fin"
