"""Caches and adapters, from the Model to the answer, and what keeps an engine or a Job from
starting: real processes, on both APIs.

The embedded API has the Job controller of `kubeai local`, and its kubelet binds pods; the real one
has its own controller-manager and scheduler. `kubeai serve` and the kubelet are the same.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
from harness import CONFIG, model, until
from machines import QUOTAS, Machine, install_load, machine
from servers import CONTROL_PLANE, ApiServer, assets, cluster, embedded, install_models

from kubeai.kube.errors import ApiError
from kubeai.kube.resources import EVENTS, JOBS, MODELS, PVCS
from kubeai.podspec.adapters import url_hash

pytestmark = [pytest.mark.timeout(150), pytest.mark.asyncio(loop_scope="module")]
A, B = "hf://org/a", "hf://org/b"


REAL = pytest.param(
    "real",
    marks=[
        pytest.mark.cluster,
        pytest.mark.skipif(
            assets(*CONTROL_PLANE) is None,
            reason="KUBEBUILDER_ASSETS holds no whole control plane",
        ),
    ],
)


@pytest.fixture(scope="module", params=["embedded", REAL])
def whole_api(request, tmp_path_factory) -> Iterator[ApiServer]:
    """Both APIs, with what makes Jobs and claims work."""
    start = cluster if request.param == "real" else embedded
    with start(tmp_path_factory.mktemp("api") / request.param) as server:
        install_models(server)
        yield server


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def one_machine(whole_api, tmp_path_factory) -> AsyncIterator[Machine]:
    directory = tmp_path_factory.mktemp("machine")
    install_load(directory / "bin", directory / "gate")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(directory / "bin"), prepend=":")
        async with machine(whole_api, directory) as one:
            yield one


@pytest_asyncio.fixture(loop_scope="module")
async def box(one_machine) -> AsyncIterator[Machine]:
    """The module's machine, with nothing that another test left in it."""
    yield one_machine
    await one_machine.clear()


def with_adapters(box: Machine, **urls: str):
    adapters = [{"name": name, "url": url} for name, url in urls.items()]
    return model("m", adapters=adapters, minReplicas=1, maxReplicas=1)


async def set_adapters(box: Machine, **urls: str) -> None:
    adapters = [{"name": name, "url": url} for name, url in urls.items()]
    await box.kube.patch(MODELS, "m", {"spec": {"adapters": adapters}})


async def labels(box: Machine) -> dict[str, str]:
    """The adapters of the pods, by their labels."""
    prefix = "adapter.kubeai.org/"
    found = [item for pod in await box.pods() for item in pod["metadata"]["labels"].items()]
    return {key.removeprefix(prefix): value for key, value in found if key.startswith(prefix)}


def claim_folder(box: Machine, claim: str) -> Path:
    """The volume of a claim, on the kubelet's disk."""
    return box.directory / "kubelet" / "data" / "volumes" / box.namespace / claim


async def has(box: Machine, **urls: str) -> bool:
    return await labels(box) == {name: url_hash(url) for name, url in urls.items()}


# -- adapters ------------------------------------------------------------------------------------


async def test_a_request_for_an_adapter_waits_until_it_is_loaded_and_is_answered(box):
    box.gate.touch()
    await box.create(with_adapters(box, a=A))
    asked = asyncio.create_task(box.ask("m_a"))
    status, answer = await box.ask("m")
    assert (status, answer["model"]) == (200, "m")
    await until("loading", lambda: box.is_so("AdaptersLoaded", "False", "Loading"))
    assert not asked.done()
    assert not await has(box, a=A)
    box.gate.unlink()
    status, answer = await asked
    assert (status, answer["model"]) == (200, "m_a")
    assert await has(box, a=A)
    await until("loaded", lambda: box.is_so("AdaptersLoaded", "True", "Loaded"))
    assert (await box.ask("m_b"))[0] == 404


async def test_adapters_come_change_and_go_in_a_running_pod(box):
    await box.create(with_adapters(box, a=A))
    await until("a", lambda: has(box, a=A))
    (before,) = await box.pods()
    await set_adapters(box, a=A, b=B)
    await until("a and b", lambda: has(box, a=A, b=B))
    await set_adapters(box, a=B, b=B)
    await until("the new a", lambda: has(box, a=B, b=B))
    assert await box.read("/adapters/a/url") == B
    assert (await box.ask("m_a"))[0] == 200
    await set_adapters(box, b=B)
    await until("b alone", lambda: has(box, b=B))
    assert (await box.ask("m_a"))[0] == 404
    assert await box.read("/adapters/a/url") == ""
    (after,) = await box.pods()
    assert after["metadata"]["uid"] == before["metadata"]["uid"]


async def test_an_adapter_on_a_claim_is_used_where_it_is_in_a_new_pod(box):
    spec = {
        "accessModes": ["ReadWriteMany"],
        "resources": {"requests": {"storage": "1Gi"}},
        "storageClassName": box.namespace,
    }
    await box.kube.create(PVCS, {"metadata": {"name": "loras"}, "spec": spec})
    law = claim_folder(box, "loras") / "law"
    law.mkdir(parents=True)
    (law / "url").write_text("on the claim")
    await box.create(with_adapters(box, a=A))
    await until("a", lambda: has(box, a=A))
    (before,) = await box.pods()
    await set_adapters(box, a=A, law="pvc://loras/law")

    async def moved():
        (*_, after) = await box.pods()
        return len(await box.pods()) == 1 and after["metadata"]["uid"] != before["metadata"]["uid"]

    await until("a new pod", moved, 60)
    await until("a and law", lambda: has(box, a=A, law="pvc://loras/law"))
    assert await box.read("/adapters/law/url") == "on the claim"
    assert (await box.ask("m_law"))[0] == 200
    await set_adapters(box, a=A)
    await until("a alone", lambda: has(box, a=A))
    assert (law / "url").read_text() == "on the claim"


async def test_an_engine_that_crashed_gets_its_adapters_again(box):
    await box.create(with_adapters(box, a=A))
    await until("a", lambda: has(box, a=A))
    await box.kill_engine()
    status, answer = await box.ask("m_a")
    if status == 502:  # it was sent before anybody knew
        status, answer = await box.ask("m_a")
    assert (status, answer["model"]) == (200, "m_a")


async def test_failed_adapter_is_reported_and_the_model_serves(box):
    await box.serve(gateway=CONFIG["gateway"] | {"startFailureGrace": "1s"})
    await box.create(with_adapters(box, a="hf://org/missing"))
    await until("told", lambda: box.is_so("AdaptersLoaded", "False", "LoadFailed"))
    assert "no such repository: hf://org/missing" in (await box.condition("AdaptersLoaded"))[2]
    assert (await box.condition("Degraded"))[:2] == ("True", "AdaptersFailed")
    assert (await box.ask("m"))[0] == 200
    status, answer = await box.ask("m_a")
    assert (status, answer["error"]["code"]) == (503, "model_unavailable")
    assert "AdaptersFailed: adapter a on pod" in answer["error"]["message"]
    assert "no such repository: hf://org/missing" in answer["error"]["message"]
    assert await warned(box, "AdaptersFailed")
    await set_adapters(box, a=A)

    async def answers() -> bool:  # once the gateway knows of the edit
        return (await box.ask("m_a"))[0] == 200

    await until("answers", answers)
    await until("repaired", lambda: box.is_so("Degraded", "False", "AsExpected"))
    assert "failedAdapters" not in (await box.kube.get(MODELS, "m"))["status"]


async def warned(box: Machine, reason: str):
    """A Warning about the Model."""
    uid = (await box.kube.get(MODELS, "m"))["metadata"]["uid"]

    async def told():
        events, _ = await box.kube.list(EVENTS, box.namespace)
        return [
            event["message"]
            for event in events
            if (event["type"], event["reason"]) == ("Warning", reason)
            and event["involvedObject"]["uid"] == uid
        ]

    return await until(f"an Event {reason}", told)


# -- cache ---------------------------------------------------------------------------------------

CLAIM = "shared-model-cache-shared"


def cached(box: Machine, url: str = "hf://org/name", **spec):
    return model("m", url=url, cacheProfile="shared", maxReplicas=1, **spec)


async def claim(box: Machine):
    return await box.kube.get(PVCS, CLAIM)


async def note(box: Machine) -> str:
    """The uid that the claim's annotation has for the Model."""
    annotations = (await claim(box))["metadata"].get("annotations") or {}
    return json.loads(annotations.get("models.kubeai.org/m", "{}")).get("uid", "")


def folder(box: Machine, uid: str):
    """The Model's folder, on the kubelet's disk."""
    return claim_folder(box, CLAIM) / "models" / f"m-{uid}"


async def is_gone(box: Machine, name: str = "m") -> bool:
    try:
        await box.kube.get(MODELS, name)
    except ApiError as error:
        return error.status == 404
    return False


async def test_a_cold_model_is_loaded_once_served_and_evicted(box):
    box.gate.touch()
    uid = (await box.create(cached(box)))["metadata"]["uid"]
    asked = asyncio.create_task(box.ask("m"))
    await until("loading", lambda: box.is_so("CacheLoaded", "False", "Loading"))
    await until("not served", lambda: box.is_so("Ready", "False", "CacheNotLoaded"))
    assert await box.pods() == []
    box.gate.unlink()
    assert (await asked)[0] == 200
    assert await note(box) == uid
    assert await box.read(f"/models/m-{uid}/url") == "hf://org/name"
    await until("loaded", lambda: box.is_so("CacheLoaded", "True", "Loaded"))

    async def no_jobs():
        return not (await box.kube.list(JOBS, box.namespace))[0]

    await until("the Job is gone", no_jobs)
    await box.kube.delete(MODELS, "m")
    await until("the Model is gone", lambda: is_gone(box))
    assert not folder(box, uid).exists()
    assert folder(box, uid).parent.exists()
    assert await note(box) == ""


async def test_stuck_load_reports_its_reason(box):
    await box.create(cached(box, url="hf://org/missing", minReplicas=1))

    async def told():
        return "CrashLoopBackOff" in (await box.condition("Ready"))[2]

    await until("that the loader keeps exiting", told)
    assert "no such repository: hf://org/missing" in (await box.condition("CacheLoaded"))[2]
    assert (await box.condition("Degraded"))[:2] == ("True", "CacheFailed")
    assert await box.pods() == []
    await box.kube.delete(MODELS, "m")
    await until("the Model is gone", lambda: is_gone(box), 60)


async def test_a_model_can_be_deleted_though_its_profiles_are_gone(box):
    uid = (await box.create(cached(box, minReplicas=1)))["metadata"]["uid"]
    await until("loaded", lambda: box.is_so("CacheLoaded", "True", "Loaded"))
    await until("serves", lambda: box.is_so("Ready", "True", "AllReplicasReady"))
    await box.serve(cacheProfiles={})
    await until("missed", lambda: box.is_so("Ready", "False", "InvalidProfile"))
    await box.kube.delete(MODELS, "m")
    await until("the Model is gone", lambda: is_gone(box), 60)
    assert not folder(box, uid).exists()


async def test_a_model_can_be_deleted_though_its_claim_is_going(box):
    await box.create(cached(box))
    await until("loaded", lambda: box.is_so("CacheLoaded", "True", "Loaded"))
    await box.kube.delete(PVCS, CLAIM)
    await box.kube.delete(MODELS, "m")
    await until("the Model is gone", lambda: is_gone(box), 60)


@pytest.mark.parametrize("whole_api", [REAL], indirect=True)
async def test_load_rejected_by_quota_reports_the_limits_to_set(box):
    nowhere = {"sharedFilesystem": {"storageClassName": "nowhere"}}
    profiles = box.config["cacheProfiles"] | {"nowhere": nowhere}
    await box.serve(cacheProfiles=profiles)
    quota = {"metadata": {"name": "cpu"}, "spec": {"hard": {"requests.cpu": "1"}}}
    await box.kube.create(QUOTAS, quota)

    async def in_force():
        return (await box.kube.get(QUOTAS, "cpu")).get("status", {}).get("hard")

    await until("the quota is in force", in_force)
    await box.create(cached(box))
    await box.create(model("n", cacheProfile="nowhere", maxReplicas=1))
    for name in ("m", "n"):
        await until("refused", lambda n=name: box.is_so("CacheLoaded", "False", "PodRefused", n))
        _, _, message = await box.condition("Degraded", name)
        assert f'pods "load-cache-{name}" is forbidden: failed quota: cpu' in message
    await box.kube.delete(MODELS, "n")
    await until("the Model whose claim was never bound is gone", lambda: is_gone(box, "n"))
    loading = box.config["modelLoading"] | {"resources": {"requests": {"cpu": "100m"}}}
    await box.serve(modelLoading=loading)
    await until("loaded", lambda: box.is_so("CacheLoaded", "True", "Loaded"), 60)
    await until("not degraded", lambda: box.is_so("Degraded", "False", "AsExpected"))


# -- engines -------------------------------------------------------------------------------------


async def test_a_crash_looping_engine_is_degraded_throughout_and_shows_its_last_lines(box):
    await box.create(model("m", args=("--max-batch=many",), minReplicas=1, maxReplicas=1))

    async def degraded():
        return (await box.condition("Degraded"))[0] == "True"

    await until("it has failed", degraded)
    seen = []

    async def has_restarted():
        status, reason, message = await box.condition("Degraded")
        seen.append((status, reason))
        assert "'many' is not an integer" in message
        (pod,) = await box.pods()
        return pod["status"]["containerStatuses"][0]["restartCount"] >= 2

    await until("two restarts", has_restarted, 60)
    assert set(seen) <= {("True", "ContainerExited"), ("True", "CrashLoopBackOff")}
    first = seen.index(("True", "CrashLoopBackOff"))
    assert set(seen[first:]) == {("True", "CrashLoopBackOff")}
    assert any("'many' is not an integer" in text for text in await warned(box, "CrashLoopBackOff"))
