"""The status of a Model in a namespace that `kubeai local` does not serve."""

from datetime import UTC, datetime

from kubeai.local.unserved import status_patch

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def model(**status):
    meta = {"name": "m", "namespace": "team", "generation": 3, "resourceVersion": "7"}
    return {"metadata": meta, "status": status}


def condition(kind, status, reason="R", since="2025-01-01T00:00:00Z"):
    return {"type": kind, "status": status, "reason": reason, "lastTransitionTime": since}


def test_a_new_model_is_not_ready_and_has_the_reason():
    patch = status_patch(model(), "default", NOW)
    assert patch["metadata"] == {"resourceVersion": "7"}
    (ready,) = patch["status"]["conditions"]
    assert ready.pop("message").startswith("kubeai local serves Models in the namespace default")
    assert ready == {
        "type": "Ready",
        "status": "False",
        "reason": "NamespaceNotServed",
        "observedGeneration": 3,
        "lastTransitionTime": "2026-01-02T03:04:05Z",
    }


def test_the_status_from_when_it_was_served_is_replaced():
    before = [condition("Ready", "True"), condition("Progressing", "True"), condition("X", "True")]
    patch = status_patch(
        model(conditions=before, replicas={"all": 2, "ready": 1}, selector="s"), "default", NOW
    )
    assert [c["type"] for c in patch["status"]["conditions"]] == ["Ready", "X"]
    assert patch["status"]["replicas"] == {"all": 0, "ready": 0}
    assert "selector" not in patch["status"]


def test_a_model_that_was_not_ready_keeps_its_transition_time():
    before = [condition("Ready", "False", since="2025-05-05T00:00:00Z")]
    (ready,) = status_patch(model(conditions=before), "default", NOW)["status"]["conditions"]
    assert ready["lastTransitionTime"] == "2025-05-05T00:00:00Z"


def test_an_unchanged_status_is_not_written_again():
    written = status_patch(model(), "default", NOW)["status"]
    assert status_patch(model(**written), "default", datetime.now(UTC)) is None
    assert status_patch(model(**written), "other", NOW) is not None
