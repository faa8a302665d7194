"""Measure what managedFields cost the embedded API: writes with and without tracking.

    python bench/api_writes.py

Runs in one process without HTTP. Measures the CPU time per write in the registry, with SQLite in
memory, and the size of the stored object. Each figure is the best of ROUNDS.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import orjson

from kubeai.api.crd import model_crd
from kubeai.local.apiserver.apply.ownership import Ownership
from kubeai.local.apiserver.apply.patch import MERGE
from kubeai.local.apiserver.kinds.resources import CRDS, PODS, Catalog
from kubeai.local.apiserver.storage.options import WriteOptions
from kubeai.local.apiserver.storage.registry import Registry
from kubeai.local.apiserver.storage.store import Store

WRITES, ROUNDS = 1000, 3
PROBE = {"httpGet": {"path": "/health", "port": 8000}}
POD = {
    "metadata": {"labels": {"app": "model", "model": "m"}, "annotations": {"pod-port": "8000"}},
    "spec": {
        "containers": [
            {
                "name": "server", "image": "vllm:1", "command": ["python"], "args": ["-m", "x"],
                "env": [{"name": f"E{index}", "value": "1"} for index in range(6)],
                "ports": [{"containerPort": 8000, "name": "http"}],
                "resources": {"limits": {"cpu": "1", "memory": "1Gi"}},
                "startupProbe": PROBE, "readinessProbe": PROBE, "livenessProbe": PROBE,
                "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
            }
        ],
        "volumes": [{"name": "shm", "emptyDir": {"medium": "Memory"}}],
    },
}  # fmt: skip
MODEL = {
    "apiVersion": "kubeai.org/v1", "kind": "Model", "metadata": {},
    "spec": {
        "features": ["TextGeneration"], "url": "hf://org/tiny", "engine": "VLLM",
        "resourceProfile": "cpu:1", "args": ["--a"], "env": {"A": "1"}, "minReplicas": 1,
    },
}  # fmt: skip
RUNNING = {
    "status": {
        "phase": "Running", "podIP": "127.0.0.1",
        "conditions": [{"type": "Ready", "status": "True"}],
        "containerStatuses": [{"name": "server", "ready": True, "restartCount": 0}],
    }
}  # fmt: skip


def measure() -> dict[str, tuple[float, int]]:
    """CPU time in µs and object size in bytes per kind of write."""
    registry = Registry(Store(":memory:"), Catalog())
    registry.create(CRDS, "", model_crd(), WriteOptions())
    models = registry.catalog.find("kubeai.org", "v1", "models")
    assert models is not None
    found: dict[str, tuple[float, int]] = {}

    def run(what: str, write: Callable[[str, WriteOptions], int]) -> None:
        started = time.process_time()
        for index in range(WRITES):
            size = write(f"x{index}", WriteOptions(manager="bench"))
        found[what] = (time.process_time() - started) / WRITES * 1e6, size

    for what, resource, given in (("pod", PODS, POD), ("model", models, MODEL)):
        raw = orjson.dumps(given)

        def create(name: str, options: WriteOptions, raw=raw, resource=resource) -> int:
            obj = orjson.loads(raw)
            obj["metadata"]["name"] = name
            return len(registry.create(resource, "default", obj, options).raw)

        def label(name: str, options: WriteOptions, resource=resource) -> int:
            patch = {"metadata": {"labels": {"n": name}}}
            return len(registry.patch(resource, "default", name, MERGE, patch, options).raw)

        run(f"create a {what}", create)
        run(f"label a {what}", label)

    def observe(name: str, options: WriteOptions) -> int:
        patch = orjson.loads(orjson.dumps(RUNNING))
        return len(registry.patch(PODS, "default", name, MERGE, patch, options, "status").raw)

    run("a pod's status", observe)
    return found


def best() -> dict[str, tuple[float, int]]:
    rounds = [measure() for _ in range(ROUNDS)]
    return {what: min(found[what] for found in rounds) for what in rounds[0]}


def main() -> None:
    tracked = best()
    Ownership.updated = lambda self, managed, *_: managed  # type: ignore[method-assign]
    untracked = best()
    print(f"{'':16}{'tracked':>18}{'untracked':>18}")
    for what, (micros, size) in tracked.items():
        plain_micros, plain_size = untracked[what]
        print(f"{what:16}{micros:8.0f} µs{size:5} B{plain_micros:10.0f} µs{plain_size:5} B")


if __name__ == "__main__":
    main()
