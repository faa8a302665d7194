"""Random histories of a Model end in a steady state and exceed no limit on the way."""

from __future__ import annotations

import msgspec
from fakes.plans import NOW, config, hash_of, make_model
from hypothesis import example, given, settings
from hypothesis import strategies as st

from examples import some
from kubeai.operator.plan import (
    CreatePod,
    DeletePod,
    DrainPod,
    Observed,
    PatchStatus,
    UndrainPod,
    plan,
)
from kubeai.operator.pods import Pod


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
