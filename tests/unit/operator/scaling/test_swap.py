"""Models that do not all fit on one machine: the idle ones make room. On fake time."""

from __future__ import annotations

import asyncio
import copy
from collections import Counter
from functools import partial

import pytest
from fakes.kube import FakeLoads, World, merge, now_s
from fakes.time import FAKE_TIME

from kubeai.api.config.profiles import replica_requests
from kubeai.api.config.system import parse_config
from kubeai.kube.resources import PODS
from kubeai.operator.scaling.scaler import Activator, Scaler
from kubeai.operator.scaling.swap import IDLE_S, Eviction, Swap, _Tenant, make_room
from kubeai.operator.scaling.timeline import Timeline

GPU = "nvidia.com/gpu"
CONFIG = parse_config(
    """
modelAutoscaling: {interval: 1s, timeWindow: 10s}
resourceProfiles: {gpu: {requests: {nvidia.com/gpu: 1}}}
"""
)
LOAD_S, END_S = 20.0, 1.0  # from a replica's place to ready, and from its deletion to its end


class Loads(FakeLoads):
    def __init__(self):
        super().__init__()
        self.ends = Counter()

    def held(self, model):
        return self.counts[model]

    def ended(self, model):
        return self.ends[model]


class Machine(World):
    """Some GPUs, on which replicas get a place as on the embedded node."""

    loads: Loads

    def __init__(self, gpus=1):
        self.gpus = gpus
        super().__init__()
        self.auto_ready = False
        self.loads = Loads()

    def begin(self, swap=True):
        self.start(CONFIG)
        timeline = Timeline()
        self.activator = Activator(
            self.kube, "default", self.store, self.loads, self.events, timeline
        )
        scaler = Scaler(
            self.kube,
            "default",
            CONFIG.model_autoscaling,
            self.store,
            self.leader,
            self.loads,
            self.events,
            timeline,
            clock=now_s,
        )
        if swap:
            needs = partial(replica_requests, CONFIG)
            scaler.enable_swap(Swap({GPU: self.gpus * 10**9}, needs))
        self.scaling = asyncio.create_task(scaler.run())
        self.activating = asyncio.create_task(self.activator.run())

    async def end(self):
        for task in (self.scaling, self.activating):
            task.cancel()
        await asyncio.gather(self.scaling, self.activating, return_exceptions=True)
        await self.activator.stop()
        await self.stop()

    def serve(self, name, gpus=1, **spec):
        self.apply(name, resourceProfile=f"gpu:{gpus}", scaleDownDelaySeconds=600, **spec)

    # -- the node ----------------------------------------------------------------------------------

    def _node(self, plural, kind, obj):
        if plural == "pods":
            asyncio.get_running_loop().call_soon(self._place)

    def _place(self):
        free = self.gpus
        waiting = []
        for (plural, name), pod in sorted(self.kube.objects.items()):
            if plural != "pods":
                continue
            needs = int(pod["spec"]["containers"][0]["resources"]["requests"][GPU])
            if pod["spec"].get("nodeName"):
                free -= needs
                if "deletionTimestamp" in pod["metadata"]:
                    asyncio.get_running_loop().call_later(END_S, self._gone, name)
            else:
                waiting.append((name, pod, needs))
        for name, pod, needs in waiting:
            if needs <= free:
                free -= needs
                status = {"conditions": [], "phase": "Pending"}
                self._write(pod, {"spec": {"nodeName": "n"}, "status": status})
                asyncio.get_running_loop().call_later(LOAD_S, self.make_ready, name)
            elif not pod.get("status", {}).get("conditions"):
                why = "0/1 nodes are available: 1 Insufficient nvidia.com/gpu."
                condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}
                self._write(pod, {"status": {"conditions": [condition | {"message": why}]}})

    def _write(self, pod, patch):
        self.kube._keep(PODS, merge(copy.deepcopy(pod), patch), "MODIFIED")

    def _gone(self, name):
        pod = self.kube.objects.get(("pods", name))
        if pod is not None:
            self.kube._keep(PODS, copy.deepcopy(pod), "DELETED")

    # -- clients -----------------------------------------------------------------------------------

    async def ask(self, name, service_s=1.0):
        """Send a request, which is held until a replica serves it; returns how long it took."""
        began_s = now_s()
        self.loads.counts[name] += 1
        while not any(pod.serves for pod in self.store.observed_pods(name)):
            self.activator.demand(name)
            await asyncio.sleep(0.05)
        await asyncio.sleep(service_s)
        self.loads.counts[name] -= 1
        self.loads.ends[name] += 1
        return now_s() - began_s

    def wanted(self):
        models = [obj for (plural, _), obj in self.kube.objects.items() if plural == "models"]
        return {m["metadata"]["name"]: m["spec"].get("replicas") or 0 for m in models}

    def swaps(self):
        """The Models that were scaled down to make room, in order."""
        return [model for model, _, text in self.events.emitted if "to make room for" in text]


@pytest.fixture
async def machines():
    """A function that makes a machine, with a swap unless it is switched off."""
    made = []

    def machine(gpus=1, swap=True):
        one = Machine(gpus)
        made.append(one)
        one.begin(swap)
        return one

    yield machine
    for one in made:
        await one.end()


@FAKE_TIME
async def test_an_idle_model_makes_room_for_the_one_that_is_requested_and_back(machines):
    machine = machines()
    machine.serve("a")
    machine.serve("b")
    await machine.ask("a")
    await asyncio.sleep(5)
    took_s = await machine.ask("b")
    assert took_s <= LOAD_S + 5
    assert machine.wanted() == {"a": 0, "b": 1}
    await asyncio.sleep(5)
    await machine.ask("a")
    assert machine.wanted() == {"a": 1, "b": 0}
    assert machine.swaps() == ["a", "b"]


@FAKE_TIME
async def test_without_the_option_a_model_that_does_not_fit_waits_and_shows_why(machines):
    machine = machines(swap=False)
    machine.serve("a")
    machine.serve("b")
    await machine.ask("a")
    asking = asyncio.create_task(machine.ask("b"))
    await asyncio.sleep(60)
    assert machine.wanted() == {"a": 1, "b": 1}
    assert machine.condition("Ready", "b") == ("False", "Unschedulable")
    assert machine.condition("Degraded", "b") == ("True", "Unschedulable")
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)


@FAKE_TIME
async def test_a_model_with_requests_in_flight_is_not_scaled_down(machines):
    machine = machines()
    machine.serve("a")
    machine.serve("b")
    busy = asyncio.create_task(machine.ask("a", service_s=120))
    await asyncio.sleep(LOAD_S + 5)
    asking = asyncio.create_task(machine.ask("b"))
    await asyncio.sleep(60)
    assert machine.wanted() == {"a": 1, "b": 1}
    assert machine.swaps() == []
    await busy
    await asking
    assert machine.swaps() == ["a"]


@FAKE_TIME
async def test_short_pauses_between_requests_do_not_end_a_model(machines):
    machine = machines()
    machine.serve("a")
    machine.serve("b")
    await machine.ask("a")
    asking = asyncio.create_task(machine.ask("b"))
    for _ in range(30):
        await machine.ask("a", service_s=0.5)
        await asyncio.sleep(IDLE_S / 2)
    assert machine.swaps() == []
    await asking
    assert machine.swaps() == ["a"]


@FAKE_TIME
async def test_two_models_in_turn_cost_one_swap_for_each_turn(machines):
    machine = machines()
    machine.serve("a")
    machine.serve("b")
    for name in "ababab":
        await machine.ask(name)
    await asyncio.sleep(120)
    assert machine.swaps() == list("ababa")


@FAKE_TIME
async def test_its_past_load_does_not_bring_a_model_back(machines):
    machine = machines()
    machine.serve("a", targetRequests=1)
    machine.serve("b")
    await machine.ask("a")  # the average over the window wants a replica
    await machine.ask("b")
    assert machine.wanted() == {"a": 0, "b": 1}
    await asyncio.sleep(60)
    assert machine.wanted() == {"a": 0, "b": 1}


@FAKE_TIME
async def test_the_least_recently_used_model_makes_room(machines):
    machine = machines(gpus=2)
    for name in "abc":
        machine.serve(name)
    await machine.ask("a")
    await machine.ask("b")
    await machine.ask("a")
    await asyncio.sleep(5)
    await machine.ask("c")
    assert machine.wanted() == {"a": 1, "b": 0, "c": 1}


@FAKE_TIME
async def test_replicas_that_min_replicas_requires_are_kept(machines):
    machine = machines(gpus=2)
    machine.serve("a", minReplicas=1, replicas=2)
    machine.serve("b")
    await asyncio.sleep(LOAD_S + 5)
    await machine.ask("b")
    assert machine.wanted() == {"a": 1, "b": 1}
    machine.serve("c", gpus=2)
    asking = asyncio.create_task(machine.ask("c"))
    await asyncio.sleep(60)
    assert machine.wanted() == {"a": 1, "b": 1, "c": 1}
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)


@FAKE_TIME
async def test_a_model_whose_autoscaling_is_disabled_is_kept(machines):
    machine = machines()
    machine.serve("a", autoscalingDisabled=True, replicas=1)
    machine.serve("b")
    await asyncio.sleep(LOAD_S + 5)
    asking = asyncio.create_task(machine.ask("b"))
    await asyncio.sleep(60)
    assert machine.wanted() == {"a": 1, "b": 1}
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)


@FAKE_TIME
async def test_no_model_is_scaled_down_for_one_that_can_never_fit(machines):
    machine = machines()
    machine.serve("a")
    machine.serve("huge", gpus=2)
    await machine.ask("a")
    asking = asyncio.create_task(machine.ask("huge"))
    await asyncio.sleep(60)
    assert machine.swaps() == []
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)


# -- the decision ----------------------------------------------------------------------------------


def tenant(name, gpus=1, placed=0, *, going=0, spare=0, used_s=0.0, waits=None):
    return _Tenant(
        name=name,
        needs={GPU: gpus},
        placed=placed,
        going=going,
        spare=spare,
        used_s=used_s,
        waits_since_s=waits,
    )


def test_as_few_models_as_needed_are_scaled_down():
    idle = [tenant(n, placed=1, spare=1, used_s=t) for n, t in (("a", 3), ("b", 1), ("c", 2))]
    waiting = tenant("w", gpus=2, waits=0.0)
    assert make_room([*idle, waiting], {GPU: 3}) == [Eviction("b", "w"), Eviction("c", "w")]
    assert make_room([*idle, waiting], {GPU: 4}) == [Eviction("b", "w")]
    assert make_room([*idle, waiting], {GPU: 5}) == []


def test_replicas_that_end_already_are_counted_as_room():
    ending = tenant("a", placed=1, going=1)
    idle = tenant("b", placed=1, spare=1)
    assert make_room([ending, idle, tenant("w", waits=0.0)], {GPU: 2}) == []


def test_room_is_made_for_the_longest_waiting_first_and_only_once():
    idle = tenant("a", placed=1, spare=1)
    waiting = [tenant("late", waits=9.0), tenant("early", waits=1.0)]
    assert make_room([idle, *waiting], {GPU: 1}) == [Eviction("a", "early")]


def test_a_model_that_has_none_of_what_is_missing_is_kept():
    other = _Tenant(
        name="cpu", needs={}, placed=1, going=0, spare=1, used_s=0.0, waits_since_s=None
    )
    idle = tenant("a", placed=1, spare=1, used_s=5.0)
    assert make_room([other, idle, tenant("w", waits=0.0)], {GPU: 1}) == [Eviction("a", "w")]
