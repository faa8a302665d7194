"""What held requests learn about the start of a replica, and how long starts take."""

from __future__ import annotations

import msgspec
import pytest

from kubeai._load import LoadTable
from kubeai.api.model import decode_model
from kubeai.operator.pods import PodObject, observe
from kubeai.operator.routes import route_of
from kubeai.operator.starting import STARTS_MAX, StartTracker
from kubeai.podspec.cache import JOB_LABEL
from kubeai.routing.publisher import Publisher

WAITING = {"waiting": {"reason": "ContainerCreating"}}
RUNNING = {"running": {"startedAt": "2026-01-01T00:00:10Z"}}
SCHEDULED = {"nodeName": "n", "containers": [{"name": "server"}]}


def make_model(replicas=1, *, uid="u1", conditions=(), **spec):
    return decode_model(
        {
            "metadata": {"name": "m", "uid": uid},
            "spec": {
                "url": "hf://org/name",
                "engine": "VLLM",
                "features": ["TextGeneration"],
                "replicas": replicas,
                **spec,
            },
            "status": {"conditions": list(conditions)},
        }
    )


def make_pod(name="a", *, uid="u1", spec=SCHEDULED, ready_at=None, job=None, **status):
    conditions = status.pop("conditions", [])
    if ready_at is not None:
        ready_at = f"2026-01-01T00:{ready_at // 60:02}:{ready_at % 60:02}Z"
        conditions = [{"type": "Ready", "status": "True", "lastTransitionTime": ready_at}]
    owner = {"apiVersion": "kubeai.org/v1", "kind": "Model", "name": "m", "uid": uid}
    labels = {"model": "m"} | ({JOB_LABEL: job} if job else {})
    pod = {
        "metadata": {
            "name": name,
            "uid": f"uid-{name}",
            "creationTimestamp": "2026-01-01T00:00:00Z",
            "labels": labels,
            "ownerReferences": [] if job else [owner | {"controller": True}],
        },
        "spec": spec,
        "status": {"podIP": "10.0.0.1", "conditions": conditions, **status},
    }
    return observe(msgspec.convert(pod, PodObject))


def pulling(name="a"):
    conditions = [{"type": "PodReadyToStartContainers", "status": "True"}]
    return make_pod(name, conditions=conditions, containerStatuses=[{"state": WAITING}])


def loading(name="a"):
    return make_pod(name, containerStatuses=[{"name": "server", "state": RUNNING}])


def pending(name="a"):
    return make_pod(name, spec={})


def in_trouble(reason, name="a"):
    state = {"waiting": {"reason": reason}}
    return make_pod(name, containerStatuses=[{"name": "server", "state": state}])


def progress(*pods, model=None):
    return StartTracker().observe(model or make_model(), pods).progress


UNSCHEDULABLE = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}


@pytest.mark.parametrize(
    ("pod", "phrase"),
    [
        (pending(), "waiting for a node"),
        (make_pod(spec={}, conditions=[UNSCHEDULABLE]), "waiting for a node"),
        (make_pod(containerStatuses=[{"state": WAITING}]), "creating the container"),
        (pulling(), "pulling image"),
        (
            make_pod(
                initContainerStatuses=[{"state": RUNNING}], containerStatuses=[{"state": WAITING}]
            ),
            "running init containers",
        ),
        (loading(), "loading the model"),
        (in_trouble("ErrImagePull"), "image cannot be pulled, trying again"),
        (in_trouble("CrashLoopBackOff"), "engine keeps exiting, restarting"),
        (in_trouble("CreateContainerConfigError"), "CreateContainerConfigError"),
    ],
)
def test_the_phrase_says_what_a_replica_does(pod, phrase):
    assert progress(pod) == phrase


def test_the_replica_that_is_closest_to_ready_counts():
    three = make_model(3)
    assert (
        progress(pulling("a"), pending("b"), pending("c"), model=three) == "pulling image, 1 of 3"
    )
    assert progress(pulling("a"), loading("b"), loading("c"), model=three) == (
        "loading the model, 2 of 3"
    )
    assert progress(pulling("a"), model=three) == "pulling image, 1 of 3"
    broken = in_trouble("CrashLoopBackOff", "b")
    assert progress(pending("a"), broken, model=make_model(2)) == "waiting for a node, 1 of 2"


def test_replicas_that_are_not_the_models_do_not_count():
    gone = msgspec.structs.replace(loading("gone"), terminating=True)
    assert progress(gone, make_pod("other", uid="u2"), pending("a")) == "waiting for a node"
    assert progress(gone) == "creating a replica"


def test_nothing_is_said_while_a_replica_serves():
    assert progress(make_pod(ready_at=30), pulling("b"), model=make_model(2)) == ""


def test_a_model_without_files_in_its_cache_downloads_them():
    loaded = {"type": "CacheLoaded", "status": "True", "reason": "Loaded"}
    model = make_model(cacheProfile="nfs")
    job = make_pod("j", job="load-cache", containerStatuses=[{"name": "load", "state": RUNNING}])
    assert progress(job, model=model) == "downloading to the cache"
    assert progress(model=model) == "preparing the download to the cache"
    model = make_model(cacheProfile="nfs", conditions=[loaded])
    assert progress(model=model) == "creating a replica"


# -- start times -----------------------------------------------------------------------------------


def test_the_start_time_is_the_median_of_the_latest_starts():
    tracker, model = StartTracker(), make_model(9)
    pods = []
    assert tracker.observe(model, pods).start_s == 0
    for number, ready_at in enumerate([600, 10, 30, 20, 40, 50]):
        pods.append(make_pod(f"p{number}", ready_at=ready_at))
        start = tracker.observe(model, pods)
    assert STARTS_MAX == 5
    assert start.start_s == 30


def test_a_replica_is_measured_once_even_if_it_is_unready_in_between():
    tracker, model = StartTracker(), make_model()
    assert tracker.observe(model, [loading()]).start_s == 0
    assert tracker.observe(model, [make_pod(ready_at=20)]).start_s == 20
    for again in (loading(), make_pod(ready_at=900), make_pod(ready_at=1000)):
        assert tracker.observe(model, [again]).start_s == 20
    tracker.observe(model, [])
    assert tracker.observe(model, [make_pod("b", ready_at=40)]).start_s == 30


def test_starts_that_do_not_show_their_time_are_not_measured():
    tracker, model = StartTracker(), make_model()
    restarted = msgspec.structs.replace(make_pod(ready_at=900), restarts=1)
    unknown = msgspec.structs.replace(make_pod("b", ready_at=9), created_s=0.0)
    late = msgspec.structs.replace(make_pod("c", ready_at=9), created_s=9e9)
    assert tracker.observe(model, [restarted, unknown, late]).start_s == 0
    instant = make_pod("d", ready_at=0)
    assert tracker.observe(model, [instant]).start_s == 1  # never 0, which means unknown


def test_start_times_are_forgotten_with_their_model():
    tracker = StartTracker()
    assert tracker.observe(make_model(), [make_pod(ready_at=20)]).start_s == 20
    assert tracker.observe(make_model(uid="u2"), []).start_s == 0
    tracker.observe(make_model(), [make_pod("b", ready_at=20)])
    tracker.forget("m")
    assert tracker.observe(make_model(), []).start_s == 0


def test_workers_are_sent_a_delta_only_when_the_phrase_changes():
    publisher, tracker = Publisher(LoadTable.create(8, 1)), StartTracker()
    model = make_model()

    def publish(*pods):
        return publisher.update("m", route_of(model, pods, start=tracker.observe(model, pods)))

    assert publish(pending()).route.progress == "waiting for a node"
    assert publish(make_pod(spec={}, conditions=[UNSCHEDULABLE])) is None
    assert publish(pulling()).route.progress == "pulling image"
    assert publish(pulling()) is None
    served = publish(make_pod(ready_at=20)).route
    assert (served.progress, served.start_s) == ("", 20)
    assert publish(make_pod(ready_at=20)) is None
