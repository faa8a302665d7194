"""Adapters in engines: what a pod needs (pure), and real requests to engines on loopback."""

from __future__ import annotations

import asyncio
import copy

import msgspec
import pytest
from fakes.kube import World, merge
from fakes.lora import Engine

from kubeai.api.model import decode_model
from kubeai.kube.errors import ApiError
from kubeai.kube.resources import PODS
from kubeai.operator import adapters
from kubeai.operator.adapter_steps import Steps, Wanted, steps
from kubeai.operator.pods import Pod
from kubeai.operator.routes import route_of
from kubeai.podspec import adapters as engine
from kubeai.podspec.adapters import (
    Call,
    load_call,
    refusal,
    remove_command,
    unload_call,
    url_hash,
)

A, B = "hf://org/a", "hf://org/b"
HASH_A, HASH_B = url_hash(A), url_hash(B)
LABEL = engine.LABEL_PREFIX


# -- what an engine needs ------------------------------------------------------------------------


def model(**urls):
    listed = [{"name": name, "url": url} for name, url in urls.items()]
    spec = {"url": "hf://o/n", "engine": "VLLM", "features": [], "adapters": listed}
    return decode_model({"metadata": {"name": "m", "uid": "u"}, "spec": spec})


def pod(name="p", current=True, **labels):
    return Pod(
        name=name, uid=name, ready=True, address="x", adapters=tuple(labels.items()),
        adapters_current=current,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("wanted", "have", "busy", "expected"),
    [
        (model(), pod(), [], Steps()),
        (model(a=A), pod(a=HASH_A), [], Steps()),
        (model(a=A), pod(), [], Steps((Wanted("a", A, HASH_A),))),
        (model(a=A), pod(a="loading"), [], Steps((Wanted("a", A, HASH_A),))),
        (model(), pod(a=HASH_A), [], Steps(drop=("a",))),
        (model(a=B), pod(a=HASH_A), [], Steps((Wanted("a", B, HASH_B),))),
        # one pod at a time, as long as some pod serves the former URL's adapter
        (model(a=B), pod(a=HASH_A), ["a"], Steps()),
        (model(a=B), pod(a="loading"), ["a"],
         Steps((Wanted("a", B, HASH_B),))),
        # a restarted engine has none of them
        (model(a=A), pod(current=False, a=HASH_A, b=HASH_B), [],
         Steps((Wanted("a", A, HASH_A),), ("b",))),
    ],
)  # fmt: skip
def test_steps_lead_from_the_labels_to_the_declared_adapters(wanted, have, busy, expected):
    assert steps(wanted, have, busy) == expected


def test_the_hash_of_a_url_equals_that_of_kubeai_in_go():
    # the FNV-1a hash of empty text is its offset basis, 2166136261
    assert url_hash("") == "".join("bcdfghjklmnpqrstvwxz2456789"[ord(d) % 27] for d in "2166136261")
    assert url_hash(A) != url_hash(B)


@pytest.mark.parametrize(
    ("call", "status", "answer", "refused"),
    [
        (load_call("a"), 200, "Success", False),
        (load_call("a"), 400, "The lora adapter 'a' has already been loaded.", False),
        (load_call("a"), 404, "No adapter found for /adapters/a", True),
        (load_call("a"), 400, "LoRA rank 64 is greater than max_lora_rank 16", True),
        (unload_call("a"), 200, "Success", False),
        (unload_call("a"), 404, "The lora adapter 'a' cannot be found.", False),
        (unload_call("a"), 400, "The lora adapter 'a' cannot be found.", False),
        (unload_call("a"), 500, "", True),
        (load_call("a"), 401, "Unauthorized", True),
    ],
)
def test_vllm_responses_are_classified(call: Call, status, answer, refused):
    assert bool(refusal(call, status, answer)) == refused


# -- real engines --------------------------------------------------------------------------------


class AdapterWorld(World):
    """Every pod gets its own engine with a loader beside it."""

    def __init__(self):
        super().__init__()
        self.auto_ready = False
        self.engines = {}
        self.refuse = False  # whether a new engine refuses to load adapters
        self.kube.executed = self._exec
        self._tasks = set()

    def _node(self, plural, kind, obj):
        if plural == "pods" and kind == "ADDED":
            task = asyncio.ensure_future(self._start(obj["metadata"]["name"]))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _start(self, name):
        engine_ = self.engines[name] = Engine()
        engine_.refuse = self.refuse
        port = await engine_.start()
        obj = copy.deepcopy(self.kube.objects["pods", name])
        where = {"model-pod-ip": "127.0.0.1", "model-pod-port": str(port)}
        self.kube._keep(PODS, merge(obj, {"metadata": {"annotations": where}}), "MODIFIED")
        self.run(name)

    def run(self, name, ready=True, restarts=0):
        containers = [
            {"name": "server", "restartCount": restarts, "state": {"running": {}}},
            {"name": "loader", "state": {"running": {}}},
        ]
        obj = copy.deepcopy(self.kube.objects["pods", name])
        status = {
            "phase": "Running",
            "podIP": "127.0.0.1",
            "conditions": [{"type": "Ready", "status": str(ready)}],
            "containerStatuses": containers,
        }
        self.kube._keep(PODS, merge(obj, {"status": status}), "MODIFIED")

    async def _exec(self, pod_name, command, container):
        assert container == "loader"
        return self.engines[pod_name].run(command)

    def labels(self):
        """Each pod's adapters according to its labels."""
        return [
            {
                key.removeprefix(LABEL): value
                for key, value in obj["metadata"]["labels"].items()
                if key.startswith(LABEL)
            }
            for obj in self.kube.alive()
        ]

    def set_adapters(self, **urls):
        listed = [{"name": name, "url": url} for name, url in urls.items()]
        self.apply(adapters=listed)

    def served(self):
        """The adapters of each endpoint of the route."""
        route = route_of(self.store.models["m"], self.store.observed_pods("m"))
        return [set(endpoint.adapters) for endpoint in route.endpoints]

    async def close(self):
        await self.stop()
        for engine_ in self.engines.values():
            await engine_.stop()


@pytest.fixture
async def world(monkeypatch):
    monkeypatch.setattr(adapters, "RETRY_FIRST_S", 0.02)
    monkeypatch.setattr(adapters, "RETRY_MAX_S", 0.2)
    world = AdapterWorld()
    world.start()
    yield world
    await world.close()


def both(**urls):
    return [{"name": name, "url": url} for name, url in urls.items()]


async def test_an_adapter_is_served_by_a_pod_only_after_it_is_loaded_there(world):
    world.apply(replicas=2, adapters=both(a=A, b=B))
    await world.until(lambda: world.labels() == [{"a": HASH_A, "b": HASH_B}] * 2)
    assert world.served() == [{"a", "b"}] * 2
    for one in world.engines.values():
        assert one.adapters == {"a": A, "b": B}
        assert "unload a" not in one.log  # there was nothing to unload
    await world.until(lambda: world.condition("AdaptersLoaded") == ("True", "Loaded"))
    assert "Loaded" in world.events.reasons()


async def test_files_are_fetched_while_the_engine_starts(world):
    run = world.run
    world.run = lambda name: run(name, ready=False)
    world.apply(replicas=1, adapters=both(a=A))
    await world.until(lambda: any(one.folder for one in world.engines.values()))
    assert world.served() == []
    assert world.labels() == [{}]
    assert world.condition("AdaptersLoaded") in (None, ("False", "NoReplicas"))
    (name,) = world.engines
    run(name)
    await world.until(lambda: world.served() == [{"a"}])
    removal = " ".join(remove_command("a"))
    assert world.engines[name].log == [removal, f"load {A} /adapters/a", "load a"]


async def test_adapters_are_added_and_removed_without_a_new_pod(world):
    world.apply(replicas=1, adapters=both(a=A))
    await world.until(lambda: world.labels() == [{"a": HASH_A}])
    before = world.pods()
    world.set_adapters(a=A, b=B)
    await world.until(lambda: world.labels() == [{"a": HASH_A, "b": HASH_B}])
    world.set_adapters(b=B)
    await world.until(lambda: world.labels() == [{"b": HASH_B}])
    assert world.pods() == before
    (one,) = world.engines.values()
    assert one.adapters == one.folder == {"b": B}


async def test_an_adapter_on_a_claim_is_loaded_from_where_it_is_in_new_pods(world):
    """A pod mounts its claims when it is created."""
    world.apply(replicas=1, adapters=both(a=A))
    await world.until(lambda: world.labels() == [{"a": HASH_A}])
    (former,) = world.engines
    claim = "pvc://loras/law"
    world.set_adapters(a=A, law=claim)
    await world.until(lambda: world.labels() == [{"a": HASH_A, "law": url_hash(claim)}])
    (name,) = world.pods()
    assert name != former
    assert world.engines[name].adapters == {"a": A, "law": "/adapter-claims/loras/law"}
    assert "law" not in world.engines[former].folder
    assert not any("law" in line for line in world.engines[former].log)
    assert "failedAdapters" not in world.model()["status"]


async def test_a_changed_url_is_reloaded_one_pod_at_a_time(world):
    world.apply(replicas=3, adapters=both(a=A))
    await world.until(lambda: world.labels() == [{"a": HASH_A}] * 3)
    least = []
    world.kube.listeners.append(lambda *_: least.append(sum("a" in s for s in world.served())))
    world.set_adapters(a=B)
    await world.until(lambda: world.labels() == [{"a": HASH_B}] * 3)
    assert min(least) == 2
    assert all(one.adapters == {"a": B} for one in world.engines.values())


async def test_a_broken_new_url_stops_at_the_first_pod(world):
    world.apply(replicas=3, adapters=both(a=A))
    await world.until(lambda: world.labels() == [{"a": HASH_A}] * 3)
    broken = "hf://org/missing"
    world.set_adapters(a=broken)
    await world.until(lambda: world.condition("AdaptersLoaded") == ("False", "LoadFailed"))
    load = f"load {broken} /adapters/a"
    (tried,) = [one for one in world.engines.values() if load in one.log]
    await world.until(lambda: tried.log.count(load) >= 4)
    assert sorted(label["a"] for label in world.labels()) == sorted([HASH_A, HASH_A, "loading"])
    assert world.condition("Degraded") == ("True", "AdaptersFailed")
    message = next(
        c["message"] for c in world.model()["status"]["conditions"] if c["type"] == "Degraded"
    )
    assert "no such repository" in message
    (failed,) = world.model()["status"]["failedAdapters"]
    assert (failed["name"], failed["message"]) == ("a", message)
    world.set_adapters(a=B)
    await world.until(lambda: world.labels() == [{"a": HASH_B}] * 3)
    await world.until(lambda: world.condition("Degraded") == ("False", "AsExpected"))
    assert "failedAdapters" not in world.model()["status"]


async def test_a_corrected_url_is_loaded_at_once_regardless_of_the_back_off(world, monkeypatch):
    monkeypatch.setattr(adapters, "RETRY_FIRST_S", 1000.0)
    monkeypatch.setattr(adapters, "RETRY_MAX_S", 1000.0)
    world.apply(replicas=1, adapters=both(a="hf://org/missing"))
    await world.until(lambda: world.condition("AdaptersLoaded") == ("False", "LoadFailed"))
    world.set_adapters(a=B)
    await world.until(lambda: world.labels() == [{"a": HASH_B}])
    await world.until(lambda: world.condition("AdaptersLoaded") == ("True", "Loaded"))


async def test_an_adapter_that_fails_to_load_does_not_block_the_others(world):
    broken = "hf://org/missing"
    world.apply(replicas=1, adapters=both(a=A, broken=broken, z=B))
    await world.until(lambda: world.served() == [{"a", "z"}])
    await world.until(lambda: world.condition("AdaptersLoaded") == ("False", "LoadFailed"))
    (one,) = world.engines.values()
    load = f"load {broken} /adapters/broken"
    await world.until(lambda: one.log.count(load) >= 3)
    assert one.log.count(f"load {A} /adapters/a") == 1
    assert one.log.count("load z") == 1
    world.set_adapters(a=A, z=B)
    await world.until(lambda: world.condition("AdaptersLoaded") == ("True", "Loaded"))


async def test_a_refused_load_is_retried(world):
    world.refuse = True
    world.apply(replicas=1, adapters=both(a=A))
    await world.until(lambda: len(world.engines) == 1)
    (one,) = world.engines.values()
    await world.until(lambda: one.log.count("load a") >= 2)
    assert one.log.count(f"load {A} /adapters/a") == 1  # the files are still there
    one.refuse = False
    await world.until(lambda: {"a": HASH_A} in world.labels())


async def test_a_restarted_engine_gets_its_adapters_again(world):
    world.apply(replicas=1, adapters=both(a=A))
    await world.until(lambda: world.served() == [{"a"}])
    (name,) = world.engines
    one = world.engines[name]
    one.adapters.clear()  # it crashed
    world.run(name, ready=False, restarts=1)
    world.run(name, ready=True, restarts=1)
    assert world.served() == [set()]
    await world.until(lambda: world.served() == [{"a"}])
    assert one.adapters == {"a": A}
    assert one.log.count(f"load {A} /adapters/a") == 1  # the files were kept


async def test_a_new_leader_recovers_from_a_kill_at_any_step(world):
    """The leader is killed after every write and after every request to an engine, in turn."""
    world.apply(replicas=1, adapters=both(a=A))
    await world.until(lambda: world.served() == [{"a"}])
    (name,) = world.engines
    one = world.engines[name]
    urls = [A, B]
    for k in range(12):
        wanted = urls[(k + 1) % 2]
        one.log.clear()
        calls = len(world.kube.writes)
        world.set_adapters(a=wanted)
        await world.until(
            lambda k=k, calls=calls: len(one.log) + len(world.kube.writes) - calls > k // 2
        )
        await world.stop()
        world.start()
        await world.until(lambda wanted=wanted: world.labels() == [{"a": url_hash(wanted)}])
        assert one.adapters == {"a": wanted}
    world.set_adapters()
    await world.stop()
    world.start()


async def test_an_adapter_re_added_after_the_leader_died_while_unloading_it_is_loaded(
    world,
):
    world.apply(replicas=1, adapters=both(a=A, b=B))
    await world.until(lambda: world.served() == [{"a", "b"}])
    (one,) = world.engines.values()
    execute, stuck = world.kube.executed, asyncio.Event()

    async def hang(*_):
        stuck.set()
        await asyncio.get_running_loop().create_future()

    world.kube.executed = hang
    world.set_adapters(b=B)
    await world.until(stuck.is_set)
    assert one.log[-1] == "unload a"
    assert world.labels() == [{"a": "loading", "b": HASH_B}], "no request is routed there"
    await world.stop()
    world.kube.executed = execute
    world.set_adapters(a=A, b=B)
    world.start()
    await world.until(lambda: world.served() == [{"a", "b"}])
    assert one.adapters == {"a": A, "b": B}


async def test_the_api_key_is_sent_to_an_engine_that_has_one(world):
    world.apply(replicas=1, adapters=both(a=A), env={"VLLM_API_KEY": "secret"})
    await world.until(lambda: world.served() == [{"a"}])
    assert next(iter(world.engines.values())).key == "Bearer secret"


async def test_a_replica_that_is_not_the_leader_does_nothing(world):
    world.apply(replicas=1, adapters=both(a=A))
    await world.until(lambda: world.served() == [{"a"}])
    world.leader.leads = False
    world.controller.stopped_leading()
    (one,) = world.engines.values()
    asked, writes = len(one.log), len(world.kube.writes)
    world.set_adapters(a=B)
    world.controller.all_changed()
    for _ in range(20):
        await asyncio.sleep(0)
    assert (len(one.log), len(world.kube.writes)) == (asked, writes)


async def test_no_request_is_sent_if_leadership_is_lost_while_connecting(world, monkeypatch):
    loop = asyncio.get_running_loop()
    connect = loop.sock_connect

    async def slowly(*args):
        await connect(*args)
        world.leader.leads = False

    monkeypatch.setattr(loop, "sock_connect", slowly)
    world.apply(replicas=1, adapters=both(a=A))
    await world.until(lambda: not world.leader.leads)
    await world.until(lambda: not world.controller._adapters._tasks)
    (one,) = world.engines.values()
    assert one.log == [" ".join(remove_command("a")), f"load {A} /adapters/a"]
    assert world.labels() == [{"a": "loading"}]


async def test_an_unreachable_loader_is_reported(world):
    async def unreachable(*_):
        raise ApiError(500, "InternalError", "error dialing backend")

    world.kube.executed = unreachable
    world.apply(replicas=1, adapters=both(a=A))
    await world.until(lambda: world.condition("AdaptersLoaded") == ("False", "LoadFailed"))
    messages = [c["message"] for c in world.model()["status"]["conditions"]]
    assert any("error dialing backend" in message for message in messages)


def test_pods_keep_the_adapters_in_their_labels():
    assert msgspec.structs.replace(pod(a=HASH_A, b="loading")).loaded == ("a",)
    assert pod(current=False, a=HASH_A).loaded == ()
