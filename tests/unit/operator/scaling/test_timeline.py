"""The timeline says when spec.replicas of a Model changed, and why."""

import msgspec
import pytest

from kubeai.api.model import Model
from kubeai.operator.scaling.timeline import ANNOUNCED_S, STEPS_MAX, Timeline


class World:
    def __init__(self):
        self.now_s = 100.0
        self.timeline = Timeline(lambda: self.now_s)

    def observe(self, replicas, uid="u", **spec):
        value = {
            "metadata": {"name": "m", "uid": uid},
            "spec": {"url": "hf://a/b", "engine": "VLLM", "features": [], **spec},
        }
        if replicas is not None:
            value["spec"]["replicas"] = replicas
        self.timeline.observed(msgspec.convert(value, Model))

    def steps(self):
        return [(step.from_, step.to, step.reason) for step in self.timeline.steps("m")]


@pytest.fixture
def world():
    return World()


def test_an_announced_change_has_its_reason(world):
    world.observe(0)
    world.timeline.announce("m", 1, "a request is waiting")
    world.now_s = 105.0
    world.observe(1)
    world.observe(1)  # other changes of the Model
    (step,) = world.timeline.steps("m")
    assert (step.time_s, step.from_, step.to, step.reason) == (105.0, 0, 1, "a request is waiting")


def test_other_changes_were_made_by_someone_else(world):
    world.observe(1)
    world.timeline.announce("m", 2, "load")
    world.observe(5)
    world.observe(2)
    world.timeline.announce("m", 3, "load")
    world.now_s += ANNOUNCED_S
    world.observe(3)
    by_others = "changed by a user or another controller"
    assert world.steps() == [(2, 3, by_others), (5, 2, "load"), (1, 5, by_others)]


def test_bounds_and_the_first_number_are_the_operators(world):
    world.observe(None, minReplicas=2)
    world.observe(2, minReplicas=2)
    world.observe(2, minReplicas=3)
    world.observe(3, minReplicas=3)
    assert world.steps() == [
        (2, 3, "minReplicas and maxReplicas"),
        (0, 2, "replicas when the Model was created"),
    ]


def test_the_first_observation_and_an_unset_number_are_no_steps(world):
    world.observe(4)
    world.observe(None)
    world.observe(4)
    assert world.steps() == []


def test_the_number_of_steps_is_limited(world):
    for replicas in range(2 * STEPS_MAX):
        world.observe(replicas)
    assert len(world.steps()) == STEPS_MAX
    assert world.steps()[0][:2] == (2 * STEPS_MAX - 2, 2 * STEPS_MAX - 1)


def test_a_deleted_or_recreated_model_has_no_history(world):
    world.observe(0)
    world.observe(1)
    world.observe(2, uid="other")
    assert world.steps() == []
    world.observe(3, uid="other")
    world.timeline.forget("m")
    assert world.steps() == []
    world.timeline.announce("m", 1, "nobody knows it")
