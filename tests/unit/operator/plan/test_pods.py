"""A Model's pods: how many there are, which are created, drained and deleted, and their names."""

from __future__ import annotations

import pytest
from fakes.plans import NOW, config, make_model, make_pod, old, plan_of, with_adapters
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from kubeai.operator.plan import (
    CreatePod,
    DeletePod,
    DrainPod,
    Observed,
    Template,
    UndrainPod,
    free_names,
    plan,
    pod_name,
)
from kubeai.operator.pods import HASH_ANNOTATION, Trouble

DRAINING = {"draining_since_s": NOW.timestamp() - 10}


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
    old = [replace(pod, hash="old") for pod in pods]
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
