"""The columns of Tables, as kubectl shows them."""

from __future__ import annotations

from typing import Any

import pytest

from kubeai.local.apiserver.kinds import columns, jsonpath


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0, "0s"), (119, "119s"), (120, "2m"), (125, "2m5s"), (600, "10m"), (3 * 3600, "3h"),
        (3 * 3600 + 300, "3h5m"), (47 * 3600, "47h"), (49 * 3600, "2d1h"), (9 * 86400, "9d"),
        (800 * 86400, "2y70d"), (-10, "<invalid>"),
    ],
)  # fmt: skip
def test_ages_are_printed_like_kubectl(seconds: int, expected: str):
    assert columns.human_duration(seconds) == expected


def _pod(status: dict, **metadata: Any) -> dict:
    return {"metadata": {"name": "p", **metadata}, "spec": {"containers": []}, "status": status}


def _container(ready: bool = False, **state: Any) -> dict:
    return {"name": "c", "ready": ready, "restartCount": 0, "state": state}


@pytest.mark.parametrize(
    ("pod", "expected"),
    [
        (_pod({"phase": "Pending"}), "Pending"),
        (
            _pod({"phase": "Running", "containerStatuses": [_container(True, running={})]}),
            "Running",
        ),
        (
            _pod({"phase": "Running",
                  "containerStatuses": [_container(waiting={"reason": "CrashLoopBackOff"})]}),
            "CrashLoopBackOff",
        ),
        (
            _pod({"phase": "Failed",
                  "containerStatuses": [_container(terminated={"reason": "OOMKilled"})]}),
            "OOMKilled",
        ),
        (_pod({"containerStatuses": [_container(terminated={"exitCode": 3})]}), "ExitCode:3"),
        (_pod({"containerStatuses": [_container(terminated={"signal": 9})]}), "Signal:9"),
        (_pod({"phase": "Running"}, deletionTimestamp="2026-01-01T00:00:00Z"), "Terminating"),
        (_pod({"phase": "Pending", "initContainerStatuses": [_container(running={})]}),
         "Init:0/1"),
        (_pod({"phase": "Failed", "reason": "Evicted"}), "Evicted"),
    ],
)  # fmt: skip
def test_the_status_column_of_pods(pod: dict, expected: str):
    assert columns.pod_status(pod) == expected


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (".a.b", [1]),
        ("{.a.b}", [1]),
        (".a['b']", [1]),
        (".l[0].n", ["x"]),
        (".l[-1].n", ["y"]),
        (".l[*].n", ["x", "y"]),
        ('.l[?(@.n=="y")].v', [2]),
        (r".d\.e", [3]),
        (".none.b", []),
    ],
)
def test_paths_are_parsed(path: str, expected: list):
    obj = {"a": {"b": 1}, "l": [{"n": "x", "v": 1}, {"n": "y", "v": 2}], "d.e": 3}
    assert jsonpath.find(jsonpath.parse_path(path), obj) == expected
