"""When the chart's hook may delete Models, based on Helm's release records and the hook's Job."""

from __future__ import annotations

import pytest

from kubeai.operator.uninstall import reason_to_refuse

JOB = {"metadata": {"name": "kubeai-uninstall", "creationTimestamp": "2026-01-01T12:00:00Z"}}


def record(status: str, version: int = 1, time: str | None = "2026-01-01T12:00:00Z") -> dict:
    labels = {"owner": "helm", "name": "r", "status": status, "version": str(version)}
    managers = [
        {"manager": "helm", "time": "2026-01-01T09:00:00Z"},
        {"manager": "helm", "time": time},
    ]
    return {"metadata": {"labels": labels, "managedFields": managers if time else []}}


def test_an_uninstall_in_progress_that_created_the_job_is_accepted():
    assert reason_to_refuse("r", [record("uninstalling")], JOB) == ""
    older = [record("superseded", 9), record("uninstalling", 10), record("superseded", 2)]
    assert reason_to_refuse("r", older, JOB) == ""


@pytest.mark.parametrize(
    "status",
    [
        "deployed",
        "failed",
        "pending-install",
        "pending-rollback",
        "pending-upgrade",
        "uninstalled",
        "unknown",
    ],
)
def test_any_other_status_is_rejected(status):
    assert f"its status is {status}" in reason_to_refuse("r", [record(status)], JOB)


def test_the_newest_revision_counts():
    records = [record("uninstalling", 9), record("deployed", 10)]
    assert "its status is deployed" in reason_to_refuse("r", records, JOB)


def test_a_release_without_a_record_is_rejected():
    assert "no Secret for a Helm release r" in reason_to_refuse("r", [], JOB)


@pytest.mark.parametrize("time", ["2026-01-01T11:58:59Z", "2026-01-01T12:00:06Z", None])
def test_a_job_created_at_another_time_is_rejected(time):
    assert "was created at" in reason_to_refuse("r", [record("uninstalling", time=time)], JOB)
