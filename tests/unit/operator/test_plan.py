"""The next steps for a Model: tables of situations, and random histories."""

from __future__ import annotations

import functools
from datetime import UTC, datetime, timedelta

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from examples import some
from kubeai.api.config.system import parse_config
from kubeai.api.model import ModelStatusAdapter, decode_model
from kubeai.operator.adapter_steps import AdaptersView
from kubeai.operator.cache.plan import (
    FINALIZER,
    AnnotateClaim,
    CacheView,
    Claim,
    CreateClaim,
    CreateJob,
    DeleteJob,
    Job,
)
from kubeai.operator.plan import (
    AdoptPod,
    CreatePod,
    DeletePod,
    DrainPod,
    Observed,
    PatchModel,
    PatchStatus,
    Template,
    UndrainPod,
    free_names,
    plan,
    pod_name,
)
from kubeai.operator.pods import HASH_ANNOTATION, Pod, Trouble
from kubeai.podspec.cache import job_hash, load_job

NOW = datetime(2026, 1, 1, tzinfo=UTC)
CONFIG = parse_config("resourceProfiles: {cpu: {requests: {cpu: 1}}}")
LABELS = {"features.kubeai.org/TextGeneration": "true"}


@functools.cache
def config(surge=1):
    return parse_config(
        f"resourceProfiles: {{cpu: {{requests: {{cpu: 1}}}}}}\nmodelRollouts: {{surge: {surge}}}"
    )


def make_model(meta=None, status=None, **spec):
    return decode_model(
        {
            "metadata": {
                "name": "m", "namespace": "default", "uid": "u1", "generation": 1,
                "resourceVersion": "7", "labels": LABELS, **(meta or {}),
            },
            "spec": {
                "url": "hf://org/name", "engine": "VLLM", "features": ["TextGeneration"],
                "resourceProfile": "cpu:1", "image": "vllm:1", **spec,
            },
            "status": status or {},
        }
    )  # fmt: skip


def hash_of(model):
    creates = plan_of(make_model(replicas=1, args=list(model.spec.args)))[0]
    return creates[0].hash


def plan_of(model, *pods, surge=1, **observed):
    """Return (creates, deletes, adoptions, patches, the status or None)."""
    actions = plan(model, config(surge), Observed(pods=tuple(pods), **observed), NOW)
    status = next((a.status for a in actions if isinstance(a, PatchStatus)), None)
    return (
        [a for a in actions if isinstance(a, CreatePod)],
        [a.name for a in actions if isinstance(a, DeletePod)],
        [a.name for a in actions if isinstance(a, AdoptPod)],
        [a.patch for a in actions if isinstance(a, PatchModel)],
        status,
    )


CURRENT = "current"
DRAINING = {"draining_since_s": NOW.timestamp() - 10}


def make_pod(name, **facts):
    facts = {"hash": CURRENT, "ready": True, "scheduled": True, "uid": f"uid-{name}"} | facts
    if facts["hash"] == CURRENT:
        facts["hash"] = hash_of(make_model())
    return Pod(name=name, model="m", owner="u1", **facts)


def conditions(status):
    return {c.type: (c.status, c.reason) for c in status.conditions}


# -- replicas ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "wanted", "patched"),
    [
        ({}, 0, 0),
        ({"minReplicas": 2}, 2, 2),
        ({"replicas": 1, "minReplicas": 2}, 2, 2),
        ({"replicas": 9, "maxReplicas": 3}, 3, 3),
        ({"replicas": 2, "minReplicas": 1, "maxReplicas": 3}, 2, None),
        ({"replicas": 0}, 0, None),
        ({"replicas": 1, "minReplicas": 5, "maxReplicas": 3}, 3, 3),
        ({"autoscalingDisabled": True}, 0, None),
        ({"autoscalingDisabled": True, "replicas": 4, "maxReplicas": 2}, 4, None),
        ({"autoscalingDisabled": True, "replicas": 0, "minReplicas": 2}, 0, None),
    ],
)
def test_replicas_are_kept_within_bounds_unless_autoscaling_is_disabled(spec, wanted, patched):
    creates, _, _, patches, _ = plan_of(make_model(**spec))
    assert len(creates) == wanted
    assert [p["spec"]["replicas"] for p in patches] == ([] if patched is None else [patched])


def test_each_feature_has_a_label():
    model = make_model(
        meta={"labels": {"features.kubeai.org/SpeechToText": "true", "mine": "1"}},
        features=["TextGeneration", "TextEmbedding"], replicas=0,
    )  # fmt: skip
    _, _, _, patches, _ = plan_of(model)
    assert patches == [
        {
            "metadata": {
                "labels": {
                    "features.kubeai.org/TextGeneration": "true",
                    "features.kubeai.org/TextEmbedding": "true",
                    "features.kubeai.org/SpeechToText": None,
                }
            }
        }
    ]


# -- pods ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "replicas", "surge", "pods", "creates", "deletes"),
    [
        ("no pod exists", 2, 1, [], 2, []),
        ("one of two exists", 2, 1, [make_pod("a")], 1, []),
        ("all exist", 2, 1, [make_pod("a"), make_pod("b", ready=False)], 0, []),
        ("a terminating pod is ignored", 1, 1, [make_pod("a", terminating=True)], 1, []),
        ("a finished pod is ignored", 1, 1, [make_pod("a", finished=True, ready=False)], 1, ["a"]),
        ("created, not observed", 1, 1, [make_pod("a", uid="", ready=False)], 0, []),
        ("too many, one not observed", 0, 1, [make_pod("a", uid="", ready=False)], 0, []),
        ("an unready pod first", 1, 1, [make_pod("a"), make_pod("b", ready=False)], 0, ["b"]),
        ("then an unscheduled one", 1, 1,
         [make_pod("a", ready=False), make_pod("b", ready=False, scheduled=False)], 0, ["b"]),
        ("then one with an old hash", 1, 0, [make_pod("a"), make_pod("b", hash="old")], 0, ["b"]),
        ("then the youngest", 1, 1,
         [make_pod("a", created_s=2.0), make_pod("b", created_s=1.0)], 0, ["a"]),
        ("scaled to zero", 0, 1, [make_pod("a"), make_pod("b", hash="old")], 0, ["a", "b"]),
        ("outdated: surge", 2, 1, [make_pod("a", hash="o"), make_pod("b", hash="o")], 1, []),
        ("outdated: surge of 2", 2, 2, [make_pod("a", hash="o"), make_pod("b", hash="o")], 2, []),
        ("outdated, no surge", 2, 0, [make_pod("a", hash="o"), make_pod("b", hash="o")], 1, ["a"]),
        ("no surge, one is not ready", 2, 0,
         [make_pod("a", hash="o"), make_pod("b", ready=False)], 0, []),
        ("outdated and not ready: deleted at once", 2, 1,
         [make_pod("a", hash="o", ready=False), make_pod("b", hash="o")], 2, ["a"]),
        ("the new one is not ready", 2, 1,
         [make_pod("a", hash="o"), make_pod("b", hash="o"), make_pod("c", ready=False)], 0, []),
        ("the new one is ready: one old one is deleted", 2, 1,
         [make_pod("a", hash="o"), make_pod("b", hash="o"), make_pod("c")], 1, ["a"]),
        ("the last old one is deleted, none is created", 2, 1,
         [make_pod("a", hash="o"), make_pod("b"), make_pod("c")], 0, ["a"]),
        ("scaled up while rolling out", 3, 1, [make_pod("a", hash="o")], 3, []),
        ("scaled down while rolling out", 1, 1,
         [make_pod("a", hash="o"), make_pod("b", hash="o"), make_pod("c")], 0, ["a", "b"]),
        ("upstream's hash is not outdated", 1, 1, [make_pod("a", hash=None)], 0, []),
    ],
)  # fmt: skip
def test_pods_are_created_and_deleted_to_match_the_spec(
    name, replicas, surge, pods, creates, deletes
):
    got_creates, got_deletes, *_ = plan_of(make_model(replicas=replicas), *pods, surge=surge)
    assert (len(got_creates), sorted(got_deletes)) == (creates, sorted(deletes))


def old(name, **facts):
    return make_pod(name, **{"hash": "o", "ready": False, "started": True} | facts)


@pytest.mark.parametrize(
    ("name", "replicas", "surge", "pods", "creates", "deletes"),
    [
        ("it is the only one", 1, 1, [old("a")], 1, []),
        ("the new one is not ready", 1, 1, [old("a"), make_pod("b", ready=False)], 0, []),
        ("the new one is ready", 1, 1, [old("a"), make_pod("b")], 0, ["a"]),
        ("one of several is enough", 3, 1, [old("a"), old("b"), old("c")], 3, ["a", "b"]),
        ("the one with the most requests", 2, 1, [old("a"), old("busy"), old("c")], 2, ["a", "c"]),
        ("another outdated one is ready", 2, 1, [old("a"), old("b", ready=True)], 2, ["a"]),
        ("it never served", 1, 1, [old("a", started=False)], 1, ["a"]),
        ("one never served", 2, 1, [old("a", started=False), old("b")], 2, ["a"]),
        ("it crashes", 1, 1, [old("a", trouble=Trouble("Error", "exited"))], 1, ["a"]),
        ("there is no room for two", 1, 0, [old("a")], 1, ["a"]),
        ("none is wanted", 0, 1, [old("a")], 0, ["a"]),
        ("the ready one is draining", 1, 1, [old("a"), old("b", ready=True, **DRAINING)], 1, ["b"]),
    ],
)  # fmt: skip
def test_the_last_replica_that_served_is_kept_until_a_new_one_is_ready(
    name, replicas, surge, pods, creates, deletes
):
    loads = {"busy": 3}
    got_creates, got_deletes, *_ = plan_of(
        make_model(replicas=replicas), *pods, surge=surge, in_flight=lambda pod: loads.get(pod, 0)
    )
    assert (len(got_creates), sorted(got_deletes)) == (creates, deletes)


def test_among_equal_replicas_the_least_loaded_is_deleted():
    pods = [make_pod("a", created_s=1), make_pod("b", created_s=2), make_pod("c", created_s=3)]
    loads = {"a": 4, "b": 0, "c": 7}
    _, deletes, *_ = plan_of(make_model(replicas=2), *pods, in_flight=loads.__getitem__)
    assert deletes == ["b"]
    old = [msgspec.structs.replace(pod, hash="old") for pod in pods]
    _, deletes, *_ = plan_of(make_model(replicas=2), *old, in_flight=loads.__getitem__)
    assert deletes == ["b"]


def changes_of(model, *pods, surge=1, **observed):
    """Return ({pod: action}, the number of creates)."""
    actions = plan(model, config(surge), Observed(pods=tuple(pods), **observed), NOW)
    changes = {a.name: type(a) for a in actions if isinstance(a, DrainPod | UndrainPod | DeletePod)}
    return changes, sum(isinstance(a, CreatePod) for a in actions)


@pytest.mark.parametrize(
    ("name", "replicas", "surge", "pods", "used", "changes", "creates"),
    [
        ("too many, in use", 1, 1, [make_pod("a"), make_pod("b")], "ab", {"a": DrainPod}, 0),
        ("not in use", 1, 1, [make_pod("a"), make_pod("b")], "b", {"a": DeletePod}, 0),
        ("not ready, but with requests in flight", 0, 1,
         [make_pod("a", ready=False)], "a", {"a": DrainPod}, 0),
        ("outdated", 1, 1,
         [make_pod("a", hash="o"), make_pod("b")], "ab", {"a": DrainPod}, 0),
        ("draining", 1, 1, [make_pod("a", **DRAINING), make_pod("b")], "ab", {}, 0),
        ("drained", 1, 1,
         [make_pod("a", **DRAINING), make_pod("b")], "b", {"a": DeletePod}, 0),
        ("draining for too long", 1, 1,
         [make_pod("a", draining_since_s=1.0), make_pod("b")], "ab", {"a": DeletePod}, 0),
        ("wanted again", 2, 1,
         [make_pod("a", **DRAINING), make_pod("b")], "ab", {"a": UndrainPod}, 0),
        ("wanted again, and more", 4, 1,
         [make_pod("a", **DRAINING), make_pod("b")], "ab", {"a": UndrainPod}, 2),
        ("one of two wanted again", 2, 1,
         [make_pod("a", **DRAINING), make_pod("b", **DRAINING), make_pod("c")], "abc",
         {"a": UndrainPod}, 0),
        ("more wanted, it cannot serve", 1, 1,
         [make_pod("a", ready=False, **DRAINING)], "a", {}, 1),
        ("more wanted, but it is outdated", 1, 1,
         [make_pod("a", hash="o", **DRAINING)], "a", {}, 0),
        ("an outdated one still occupies its node", 2, 1,
         [make_pod("a", hash="o", **DRAINING), make_pod("b", hash="o"), make_pod("c")], "abc",
         {}, 0),
        ("also without a surge", 2, 0,
         [make_pod("a", hash="o", **DRAINING), make_pod("b", hash="o")], "ab", {}, 0),
        ("many outdated ones do not delay a rollout", 3, 1,
         [make_pod(n, hash="o", **DRAINING) for n in "abcd"] + [make_pod("e")], "abcde", {}, 1),
        ("already terminating", 0, 1,
         [make_pod("a", terminating=True, **DRAINING)], "a", {}, 0),
        ("finished", 1, 1,
         [make_pod("a", ready=False, finished=True, **DRAINING), make_pod("b")], "ab",
         {"a": DeletePod}, 0),
    ],
)  # fmt: skip
def test_a_pod_is_drained_before_it_is_deleted(name, replicas, surge, pods, used, changes, creates):
    model = make_model(replicas=replicas)
    got = changes_of(model, *pods, surge=surge, in_use=set(used).__contains__)
    assert got == (changes, creates)


def test_a_draining_pod_does_not_count_as_a_replica():
    pod = make_pod("a", address="10.0.0.1:8000", **DRAINING)
    assert not pod.serves
    *_, status = plan_of(make_model(replicas=0), pod, in_use=lambda name: True)
    assert (status.replicas.all, status.replicas.ready) == (0, 0)


def test_pods_of_a_deleted_model_are_deleted_without_draining():
    model = make_model({"deletionTimestamp": "2026-01-01T00:00:00Z", "finalizers": ["x/y"]})
    pods = [make_pod("a"), make_pod("b", **DRAINING)]
    assert changes_of(model, *pods, in_use=lambda name: True) == (
        {"a": DeletePod, "b": DeletePod},
        0,
    )


def test_a_pod_has_its_models_owner_reference_and_its_hash():
    (create,), *_ = plan_of(make_model(replicas=1))
    meta = create.manifest["metadata"]
    assert meta["labels"]["pod-hash"] == meta["annotations"][HASH_ANNOTATION] == create.hash
    assert meta["labels"]["model"] == "m"
    assert [(o["uid"], o["controller"]) for o in meta["ownerReferences"]] == [("u1", True)]
    assert create.name == pod_name(make_model(), create.hash, 0)


def test_pod_names_are_deterministic_and_avoid_taken_ones():
    model = make_model(replicas=3)
    first = [create.name for create in plan_of(model)[0]]
    assert first == [create.name for create in plan_of(model)[0]]
    assert len(set(first)) == 3
    pods = [make_pod(first[0], terminating=True), make_pod(first[2])]
    again = [c.name for c in plan_of(model, *pods, taken=frozenset({first[1]}))[0]]
    assert len(again) == 2
    assert not set(again) & set(first)
    recreated = make_model(meta={"uid": "u2"}, replicas=3)
    assert not set(first) & {create.name for create in plan_of(recreated)[0]}


@given(st.integers(0, 200), st.frozensets(st.integers(0, 300)))
def test_free_names_are_unused(count, used):
    model = make_model()
    taken = frozenset(pod_name(model, "h", ordinal) for ordinal in used)
    names = free_names(model, Template({}, "h"), taken, count)
    assert len(names) == len(set(names)) == count
    assert not set(names) & taken


def test_pods_of_kubeai_in_go_are_adopted_as_current():
    creates, deletes, adopted, _, _ = plan_of(make_model(replicas=1), make_pod("a", hash=None))
    assert (creates, deletes, adopted) == ([], [], ["a"])


def test_no_pod_is_created_while_pods_keep_failing():
    ended = make_pod("a", finished=True, ready=False)
    creates, deletes, *_ = plan_of(make_model(replicas=2), ended, replace_finished=False)
    assert (creates, deletes) == ([], [])


def test_all_pods_of_a_deleted_model_are_deleted_even_without_its_profile():
    model = make_model(
        meta={"deletionTimestamp": "2026-01-01T00:00:00Z"},
        replicas=2,
        resourceProfile="gone:1",
    )
    pods = [make_pod("a"), make_pod("b", finished=True), make_pod("c", terminating=True)]
    creates, deletes, _, patches, status = plan_of(model, *pods)
    assert (creates, sorted(deletes), patches, status) == ([], ["a", "b"], [], None)


# -- invalid Models ------------------------------------------------------------------------------


def test_a_model_error_becomes_a_condition_and_running_pods_are_kept():
    model = make_model(replicas=2, resourceProfile="gone:1")
    creates, deletes, adopted, _, status = plan_of(model, make_pod("a", hash="old"))
    assert (creates, deletes, adopted) == ([], [], [])
    assert conditions(status) == {
        "Ready": ("False", "InvalidProfile"),
        "Progressing": ("False", "InvalidProfile"),
        "Degraded": ("True", "InvalidProfile"),
    }
    assert "gone" in status.conditions[0].message
    assert (status.replicas.all, status.replicas.ready) == (1, 1)


def test_a_model_in_error_can_still_be_scaled_down():
    model = make_model(replicas=0, resourceProfile="gone:1")
    _, deletes, *_ = plan_of(model, make_pod("a"))
    assert deletes == ["a"]


# -- status --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "pods", "ready", "progressing"),
    [
        ({"replicas": 0}, [], ("True", "ScaledToZero"), ("False", "UpToDate")),
        ({"replicas": 0, "autoscalingDisabled": True}, [],
         ("False", "ScaledToZero"), ("False", "UpToDate")),
        ({"replicas": 1}, [], ("False", "ReplicasStarting"), ("True", "ReplicasStarting")),
        ({"replicas": 2}, [make_pod("a"), make_pod("b")],
         ("True", "AllReplicasReady"), ("False", "UpToDate")),
        ({"replicas": 2}, [make_pod("a"), make_pod("b", ready=False)],
         ("True", "SomeReplicasReady"), ("True", "ReplicasStarting")),
        ({"replicas": 1},
         [make_pod("a", ready=False, trouble=Trouble("Unschedulable", "no GPU"))],
         ("False", "Unschedulable"), ("True", "ReplicasStarting")),
        ({"replicas": 1}, [make_pod("a", hash="old")],
         ("True", "AllReplicasReady"), ("True", "RollingOut")),
    ],
)  # fmt: skip
def test_conditions_reflect_the_state_of_the_pods(spec, pods, ready, progressing):
    *_, status = plan_of(make_model(**spec), *pods)
    trouble = [pod.trouble.reason for pod in pods if pod.trouble]
    degraded = ("True", trouble[0]) if trouble else ("False", "AsExpected")
    assert conditions(status) == {"Ready": ready, "Progressing": progressing, "Degraded": degraded}
    assert status.selector == "app=model,model=m"


@pytest.mark.parametrize(
    "others", [[make_pod("a", hash="old")], [make_pod("a")]], ids=["rollout", "scale-up"]
)
def test_a_replica_that_cannot_start_is_reported_while_others_serve(others):
    model = make_model(replicas=1 if others[0].hash == "old" else 2)
    trouble = Trouble("CrashLoopBackOff", "container server keeps exiting")
    *_, status = plan_of(model, *others, make_pod("b", ready=False, trouble=trouble))
    ready, progressing, degraded = status.conditions
    assert ready.status == progressing.status == degraded.status == "True"
    assert degraded.reason == "CrashLoopBackOff"
    assert progressing.message.endswith("CrashLoopBackOff: container server keeps exiting")


def test_conditions_show_a_failing_containers_last_lines_until_it_recovers():
    trouble = Trouble("CrashLoopBackOff", "container server keeps exiting", "CUDA error")
    until_s = NOW.timestamp() + 1
    failing = make_pod("a", ready=False, trouble=trouble, trouble_until_s=until_s)
    *_, status = plan_of(make_model(replicas=1), failing)
    told = {c.type: c.message for c in status.conditions}
    text = "container server keeps exiting: CUDA error"
    assert told["Ready"] == told["Degraded"] == text
    assert told["Progressing"].endswith(text)
    recovered = msgspec.structs.replace(failing, trouble_until_s=NOW.timestamp())
    *_, status = plan_of(make_model(replicas=1), recovered)
    assert conditions(status)["Degraded"] == ("False", "AsExpected")


def test_a_rejected_create_is_reported_and_retried():
    trouble = Trouble("PodRefused", "exceeded quota")
    creates, *_, status = plan_of(make_model(replicas=1), create_error=trouble)
    assert len(creates) == 1
    assert conditions(status)["Ready"] == ("False", "PodRefused")
    assert status.replicas.all == 0


def test_an_unchanged_status_is_not_written():
    model = make_model(replicas=1)
    *_, status = plan_of(model, make_pod("a"))
    told = msgspec.structs.replace(model, status=status)
    later = Observed(pods=(make_pod("a"),))
    assert plan(told, CONFIG, later, NOW + timedelta(hours=1)) == []


def test_a_condition_keeps_its_time_until_its_status_changes_and_foreign_ones_are_kept():
    theirs = {"type": "Theirs", "status": "Unknown"}
    model = make_model(replicas=2, status={"conditions": [theirs]})
    *_, first = plan_of(model, make_pod("a"), make_pod("b"))
    model = msgspec.structs.replace(model, status=first)
    later = NOW + timedelta(minutes=1)
    observed = Observed(pods=(make_pod("a"), make_pod("b", ready=False)))
    (patch,) = plan(model, CONFIG, observed, later)
    times = {c.type: c.last_transition_time for c in patch.status.conditions}
    assert times == {"Ready": NOW, "Progressing": later, "Degraded": NOW, "Theirs": None}
    assert patch.status.conditions[-1].status == "Unknown"


# -- cache ---------------------------------------------------------------------------------------


CLAIM = Claim("shared-model-cache-fast", "claim-1")
LOADED = msgspec.structs.replace(CLAIM, loaded={"m": "u1"})
LOAD = Job("load-cache-m", "job-1", "u1")
EVICT = Job("evict-cache-m", "job-2", "u1")
OURS = {"finalizers": [FINALIZER]}
DELETED = OURS | {"deletionTimestamp": "2026-01-01T00:00:00Z"}


def replace(value, **changes):
    return msgspec.structs.replace(value, **changes)


CACHE_CONFIG = parse_config(
    "resourceProfiles: {cpu: {requests: {cpu: 1}}}\n"
    "cacheProfiles: {fast: {sharedFilesystem: {storageClassName: nfs}}}"
)


def cached_model(meta=OURS, **spec):
    return make_model(meta, **({"cacheProfile": "fast", "replicas": 1} | spec))


def cache_plan(model, view, *pods):
    """Return the steps as "verb name" or the patch of the Model, and the plan's status."""
    done, status = [], None
    for action in plan(model, CACHE_CONFIG, Observed(pods=pods, cache=view), NOW):
        match action:
            case CreateClaim() | CreateJob() | CreatePod():
                kind = action.manifest["kind"]
                done.append(f"create {kind}")
            case DeleteJob() | DeletePod():
                done.append(f"delete {action.name}")
            case AnnotateClaim():
                done.append("note loaded" if action.value else "note gone")
            case PatchModel():
                done.append(action.patch)
            case PatchStatus():
                status = action.status
    return done, status


NO_LOAD = replace(LOAD, owner="u0")
REFUSED = Trouble("PodRefused", "exceeded quota")
LOAD_HASH = job_hash(load_job(cached_model(), CACHE_CONFIG))
LOADING_STEPS = [
    # the Model's finalizers, the observed state, the steps, the condition's reason
    ("first the finalizer", {}, CacheView(), [{"metadata": OURS}], "Loading"),
    ("then the claim", OURS, CacheView(), ["create PersistentVolumeClaim"], "Loading"),
    ("then the Job", OURS, CacheView(claim=CLAIM), ["create Job"], "Loading"),
    ("it is waited for", OURS, CacheView(claim=CLAIM, load=LOAD), [], "Loading"),
    ("then it is recorded", OURS, CacheView(claim=CLAIM, load=replace(LOAD, complete=True)),
     ["note loaded"], "Loading"),
    ("then the Job is deleted", OURS, CacheView(claim=LOADED, load=replace(LOAD, complete=True)),
     ["delete load-cache-m", "create Pod"], "Loaded"),
    ("the Job is deleted once", OURS, CacheView(claim=LOADED, load=replace(LOAD, terminating=True)),
     ["create Pod"], "Loaded"),
    ("another Model's Job is deleted first", OURS, CacheView(claim=CLAIM, load=NO_LOAD),
     ["delete load-cache-m"], "Loading"),
    ("another Model's files do not count", OURS,
     CacheView(claim=replace(CLAIM, loaded={"m": "u0"})), ["create Job"], "Loading"),
    ("a failed Job waits", OURS,
     CacheView(claim=CLAIM, load=replace(LOAD, failed="x"), may_load=False, failure="x"),
     [], "LoadFailed"),
    ("and is created again", OURS,
     CacheView(claim=CLAIM, load=replace(LOAD, failed="x"), failure="x"),
     ["delete load-cache-m"], "Loading"),
    ("a Job without a pod is waited for", OURS,
     CacheView(claim=CLAIM, load=replace(LOAD, hash=LOAD_HASH), trouble=REFUSED), [],
     "PodRefused"),
    ("and recreated if its spec has changed", OURS,
     CacheView(claim=CLAIM, load=replace(LOAD, hash="old"), trouble=REFUSED),
     ["delete load-cache-m"], "PodRefused"),
    ("not while it progresses", OURS, CacheView(claim=CLAIM, load=replace(LOAD, hash="old")), [],
     "Loading"),
    ("nothing before all lists are synced", OURS, CacheView(unknown="not read yet"), [], "Unknown"),
    ("a terminating claim is waited for", OURS, CacheView(claim=replace(LOADED, terminating=True)),
     [], "ClaimDeleted"),
    ("an API without Jobs", OURS, CacheView(claim=CLAIM, has_jobs=False), [], "NoJobs"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("meta", "view", "done", "reason"),
    [step[1:] for step in LOADING_STEPS],
    ids=[step[0] for step in LOADING_STEPS],
)
def test_files_are_loaded_before_the_first_pod(meta, view, done, reason):
    got, status = cache_plan(cached_model(meta), view)
    assert got == done
    loaded = reason == "Loaded"
    assert conditions(status)["CacheLoaded"] == (str(loaded), reason)
    assert status.cache.loaded == loaded
    if not loaded:
        assert conditions(status)["Ready"] == ("False", "CacheNotLoaded")


def test_a_failed_load_is_reported_with_its_reason():
    view = CacheView(claim=CLAIM, may_load=False, failure="BackoffLimitExceeded")
    _, status = cache_plan(cached_model(), view)
    assert conditions(status)["Degraded"] == ("True", "CacheFailed")
    assert "BackoffLimitExceeded" in status.conditions[0].message


@pytest.mark.parametrize("trouble", [REFUSED, Trouble("ImagePullBackOff", "no such image")])
def test_a_stuck_load_is_degraded(trouble):
    view = CacheView(claim=CLAIM, load=replace(LOAD, hash=LOAD_HASH), trouble=trouble)
    _, status = cache_plan(cached_model(), view)
    assert conditions(status)["Degraded"] == ("True", "CacheFailed")
    assert trouble.message in next(c.message for c in status.conditions if c.type == "Degraded")
    deleted = cached_model(DELETED | {"finalizers": [FINALIZER]})
    _, status = cache_plan(deleted, replace(view, load=None, evict=EVICT, claim=LOADED))
    assert conditions(status)["Degraded"] == ("True", "CacheFailed")


def test_a_missing_cache_profile_is_reported_and_the_pods_stay():
    model = cached_model(cacheProfile="gone")
    done, status = cache_plan(model, CacheView(), make_pod("a"))
    assert done == []
    assert conditions(status)["CacheLoaded"] == ("False", "InvalidProfile")
    assert "'gone'" in status.conditions[0].message


EVICTION_STEPS = [
    ("first its pods", CacheView(claim=LOADED), [make_pod("a")], ["delete a"], "Evicting"),
    ("they are waited for", CacheView(claim=LOADED), [make_pod("a", terminating=True)], [],
     "Evicting"),
    ("then the Job that loads", CacheView(claim=CLAIM, load=LOAD), [], ["delete load-cache-m"],
     "Evicting"),
    ("it is waited for", CacheView(claim=CLAIM, load=replace(LOAD, terminating=True)), [], [],
     "Evicting"),
    ("then the Job", CacheView(claim=LOADED), [], ["create Job"], "Evicting"),
    ("not another Model's", CacheView(claim=LOADED, evict=replace(EVICT, owner="u0")), [],
     ["delete evict-cache-m"], "Evicting"),
    ("it is waited for", CacheView(claim=LOADED, evict=EVICT), [], [], "Evicting"),
    ("then it is recorded", CacheView(claim=LOADED, evict=replace(EVICT, complete=True)), [],
     ["note gone"], "Evicting"),
    ("then the Model is removed", CacheView(claim=CLAIM, evict=replace(EVICT, complete=True)), [],
     [{"metadata": {"finalizers": ["theirs"]}}], "Evicted"),
    ("also if the Job failed", CacheView(claim=CLAIM, evict=replace(EVICT, failed="x")), [],
     [{"metadata": {"finalizers": ["theirs"]}}], "EvictFailed"),
    ("also without a claim", CacheView(), [], [{"metadata": {"finalizers": ["theirs"]}}],
     "Evicted"),
    ("also if the claim was never bound",
     CacheView(claim=replace(CLAIM, unbound=True), evict=EVICT), [],
     [{"metadata": {"finalizers": ["theirs"]}}], "Evicted"),
    ("but not before the Job that loads is gone",
     CacheView(claim=replace(CLAIM, unbound=True), load=LOAD), [], ["delete load-cache-m"],
     "Evicting"),
    ("also if the claim is deleted",
     CacheView(claim=replace(LOADED, terminating=True), load=LOAD), [],
     [{"metadata": {"finalizers": ["theirs"]}}], "Evicted"),
    ("also without Jobs", CacheView(claim=LOADED, load=LOAD, has_jobs=False), [],
     [{"metadata": {"finalizers": ["theirs"]}}], "EvictFailed"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("view", "pods", "done", "reason"),
    [step[1:] for step in EVICTION_STEPS],
    ids=[step[0] for step in EVICTION_STEPS],
)
@pytest.mark.parametrize("profile", ["fast", "gone"])
def test_files_are_evicted_after_the_last_pod(profile, view, pods, done, reason):
    meta = DELETED | {"finalizers": ["theirs", FINALIZER]}
    model = cached_model(meta, cacheProfile=profile, resourceProfile="gone:1")
    got, status = cache_plan(model, view, *pods)
    assert got == done
    assert conditions(status)["CacheLoaded"] == ("False", reason)
    assert conditions(status)["Ready"] == ("False", "Deleting")


# -- adapters ------------------------------------------------------------------------------------


def with_adapters(**spec):
    adapters = [{"name": "a", "url": "hf://x/a"}, {"name": "b", "url": "hf://x/b"}]
    return make_model(adapters=adapters, **spec)


def test_an_old_pod_stays_until_a_new_one_serves_its_adapters():
    model = with_adapters(replicas=1)
    hash_ = plan_of(with_adapters(replicas=1))[0][0].hash
    old = make_pod("old", hash="old", adapters=(("a", "hash"), ("gone", "hash")))
    new = make_pod("new", hash=hash_, adapters=(("a", "loading"),))
    assert plan_of(model, old, new)[1] == []
    new = replace(new, adapters=(("a", "hash"),))  # neither has b, so b delays nothing
    assert plan_of(model, old, new)[1] == ["old"]
    new = replace(new, adapters_current=False)  # its engine has restarted
    assert plan_of(model, old, new)[1] == []


@pytest.mark.parametrize(
    ("view", "adapters_loaded", "degraded"),
    [
        (AdaptersView(), ("False", "NoReplicas"), ("False", "AsExpected")),
        (AdaptersView(2, 1), ("False", "Loading"), ("False", "AsExpected")),
        (AdaptersView(2, 2), ("True", "Loaded"), ("False", "AsExpected")),
        (AdaptersView(2, 1, (ModelStatusAdapter(name="a", message="pod a: no such adapter"),)),
         ("False", "LoadFailed"), ("True", "AdaptersFailed")),
    ],
)  # fmt: skip
def test_adapters_are_reported_in_the_status(view, adapters_loaded, degraded):
    *_, status = plan_of(with_adapters(replicas=0), adapters=view)
    assert conditions(status)["AdaptersLoaded"] == adapters_loaded
    assert conditions(status)["Degraded"] == degraded


# -- random histories ----------------------------------------------------------------------------


class History:
    """A Model, its pods, and random events that happen to them."""

    def __init__(self, surge):
        self.config = config(surge)
        self.surge = surge
        self.model = make_model(replicas=0)
        self.pods = {}
        self.clock_s = 0.0
        self.names_ever = 0
        self.used = set()  # pods that still receive requests

    def wanted(self):
        return self.model.spec.replicas

    def step(self):
        """Plan and apply everything at once; returns the actions except status writes."""
        before = [pod for pod in self.pods.values() if pod.counts]
        actions = plan(self.model, self.config, history_view(self), NOW)
        ready_left = sum(pod.ready for pod in before)
        for action in actions:
            self.clock_s += 1
            if isinstance(action, CreatePod):
                assert action.name not in self.pods
                self.names_ever += 1
                self.pods[action.name] = Pod(
                    name=action.name, uid=f"u-{self.names_ever}", model="m", owner="u1",
                    hash=action.hash, created_s=self.clock_s,
                )  # fmt: skip
            elif isinstance(action, DeletePod | DrainPod):
                pod = self.pods[action.name]
                assert pod.uid == action.uid
                assert (action.name in self.used) == isinstance(action, DrainPod) or pod.finished
                if pod.ready and pod.counts:
                    ready_left -= 1
                    if action.why.startswith("outdated"):
                        assert ready_left >= self.wanted() - (0 if self.surge else 1)
                goes = {"terminating": True}
                if isinstance(action, DrainPod):
                    goes = {"draining_since_s": NOW.timestamp()}
                self.pods[action.name] = msgspec.structs.replace(pod, **goes)
            elif isinstance(action, UndrainPod):
                pod = self.pods[action.name]
                self.pods[action.name] = msgspec.structs.replace(pod, draining_since_s=0.0)
            elif isinstance(action, PatchStatus):
                self.model = msgspec.structs.replace(self.model, status=action.status)
        alive = [pod for pod in self.pods.values() if pod.counts]
        assert len(alive) <= self.wanted() + self.surge
        scaled = any(a.why == "more replicas than wanted" for a in actions if hasattr(a, "why"))
        if self.surge and self.wanted() and not scaled and any(pod.started for pod in before):
            assert any(pod.started for pod in alive)
        assert self.model.status.replicas.all == len(alive)
        assert self.model.status.replicas.ready == sum(pod.ready for pod in alive)
        return [a for a in actions if not isinstance(a, PatchStatus)]

    def happen(self, what, which, number):
        spec = self.model.spec
        pods = sorted(self.pods)
        if what == "scale":
            spec = msgspec.structs.replace(spec, replicas=number)
        elif what == "edit":
            spec = msgspec.structs.replace(spec, args=(f"--version={number % 3}",))
        elif pods:
            name = pods[which % len(pods)]
            pod = self.pods[name]
            if pod.terminating:
                del self.pods[name]
            elif what == "ready" and not pod.finished:
                self.become_ready(name)
            elif what == "unready":
                self.pods[name] = msgspec.structs.replace(pod, ready=False)
            elif what == "restart":
                self.pods[name] = msgspec.structs.replace(pod, ready=False, started=False)
            elif what == "fail":
                self.pods[name] = msgspec.structs.replace(pod, ready=False, finished=True)
            elif what == "lose":
                del self.pods[name]
            elif what == "use":
                self.used ^= {name}
            elif what == "delete":
                self.pods[name] = msgspec.structs.replace(pod, terminating=True)
        self.model = msgspec.structs.replace(self.model, spec=spec)

    def become_ready(self, name):
        """A container that is ready has started, in Kubernetes too."""
        self.pods[name] = msgspec.structs.replace(
            self.pods[name], scheduled=True, started=True, ready=True
        )

    def settle(self):
        """Terminating pods disappear, and all others become ready."""
        for name, pod in list(self.pods.items()):
            if pod.terminating:
                del self.pods[name]
            elif not pod.finished:
                self.become_ready(name)


EVENTS = st.tuples(
    st.sampled_from(
        [
            "scale",
            "edit",
            "ready",
            "ready",
            "use",
            "use",
            "unready",
            "restart",
            "fail",
            "lose",
            "delete",
        ]
    ),
    st.integers(0, 9),
    st.integers(0, 5),
)


@settings(max_examples=some(80))
@given(st.integers(0, 3), st.lists(EVENTS, max_size=25))
@example(1, [("scale", 0, 1), ("ready", 0, 0), ("edit", 0, 0)])
def test_any_history_converges_within_the_limits_to_a_steady_state(surge, events):
    history = History(surge)
    for event in events:
        history.happen(*event)
        history.step()
    history.used.clear()
    for _ in range(60):
        changed = history.step()
        history.settle()
        if not changed and not history.step():
            break
    assert history.step() == []
    assert plan(history.model, history.config, history_view(history), NOW) == []
    alive = [pod for pod in history.pods.values() if pod.counts]
    assert len(alive) == len(history.pods) == history.wanted()
    assert {pod.hash for pod in alive} <= {hash_of(history.model)}


def history_view(history):
    return Observed(pods=tuple(history.pods.values()), in_use=history.used.__contains__)
