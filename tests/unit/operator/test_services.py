"""The headless Services of `proxy.mode: external`, against an API in memory, on fake time."""

from __future__ import annotations

import asyncio
import copy

from fakes.kube import merge
from fakes.time import FAKE_TIME

from kubeai.api.config.system import parse_config
from kubeai.kube.errors import ApiError
from kubeai.kube.resources import PODS, SERVICES

pytestmark = FAKE_TIME
PROFILES = "resourceProfiles: {cpu: {requests: {cpu: 1}}}"
INTERNAL = parse_config(PROFILES)
EXTERNAL = parse_config(PROFILES + "\nproxy: {mode: external}")


def services(world):
    return {name: obj for (plural, name), obj in world.kube.objects.items() if plural == "services"}


async def test_each_model_gets_one_service_whatever_its_replicas(world):
    world.start(EXTERNAL)
    world.apply("a", replicas=1)
    world.apply("b", replicas=0)
    await world.until(lambda: len(services(world)) == 2)
    for service in services(world).values():
        (owner,) = service["metadata"]["ownerReferences"]
        model = world.model(owner["name"])
        assert owner["uid"] == model["metadata"]["uid"]
        assert service["spec"]["selector"] == {
            "kubeai.org/model": owner["name"],
            "kubeai.org/model-uid": owner["uid"],
        }
    await asyncio.sleep(5)
    before = len(world.kube.writes)
    world.controller.all_changed()
    await asyncio.sleep(60)
    assert world.kube.writes[before:] == []


async def test_a_service_that_is_deleted_or_edited_is_restored(world):
    world.start(EXTERNAL)
    world.apply(replicas=0)
    await world.until(lambda: services(world))
    ((name, made),) = services(world).items()
    world.kube._keep(SERVICES, copy.deepcopy(made), "DELETED")
    await world.until(lambda: name in services(world))
    wrong = {"spec": {"selector": {"kubeai.org/model": "other", "x": "y"}}}
    world.kube._keep(SERVICES, merge(copy.deepcopy(services(world)[name]), wrong), "MODIFIED")
    await world.until(lambda: services(world)[name]["spec"] == made["spec"])


async def test_without_external_gateways_there_are_none_and_former_ones_are_deleted(world):
    world.start(EXTERNAL)
    world.apply(replicas=1)
    await world.settled(1, 1)
    assert services(world)
    await world.stop()
    world.start(INTERNAL)
    await world.until(lambda: not services(world))
    assert world.replicas() == {"all": 1, "ready": 1}
    assert world.kube.count("delete", "pods") == 0


async def test_a_former_service_that_cannot_be_deleted_is_tried_again(world):
    world.start(EXTERNAL)
    world.apply(replicas=0)
    await world.until(lambda: services(world))
    await world.stop()
    fails = 2

    def before(verb, plural, name):
        nonlocal fails
        if (verb, plural) == ("delete", "services") and fails:
            fails -= 1
            raise ApiError(500, "InternalError", "try again")

    world.kube.before = before
    world.start(INTERNAL)
    await world.until(lambda: not services(world))


async def test_a_service_that_the_api_refuses_is_reported_and_delays_nothing_else(world):
    def before(verb, plural, name):
        if (verb, plural) == ("create", "services"):
            raise ApiError(403, "Forbidden", "exceeded quota: services")

    world.kube.before = before
    world.start(EXTERNAL)
    world.apply(replicas=1)
    await world.until(lambda: world.replicas() == {"all": 1, "ready": 1})
    await asyncio.sleep(300)
    reports = {message for _, reason, message in world.events.emitted if reason == "ServiceRefused"}
    assert len(reports) == 1
    assert "exceeded quota: services" in reports.pop()
    (name,) = world.pods()
    world.loads.used.add(name)
    world.apply(replicas=0)
    await asyncio.sleep(60)
    assert world.pods() == [name]  # it is being drained
    world.loads.used.clear()
    await asyncio.sleep(2)
    assert world.pods() == []
    world.kube.before = lambda *_: None
    await world.until(lambda: services(world))


async def test_services_that_may_not_be_listed_do_not_stop_the_reconciles(world):
    world.kube.missing.add("services")
    world.start(INTERNAL)
    world.apply(replicas=1)
    await world.settled(1, 1)


async def test_pods_of_an_earlier_version_get_the_labels_without_a_restart(world):
    world.start(INTERNAL)
    world.apply(replicas=1)
    await world.settled(1, 1)
    (name,) = world.pods()
    bare = {"metadata": {"labels": {"kubeai.org/model": None, "kubeai.org/model-uid": None}}}
    world.kube._keep(PODS, merge(copy.deepcopy(world.kube.objects["pods", name]), bare), "MODIFIED")
    await asyncio.sleep(5)
    labels = lambda: world.kube.objects["pods", name]["metadata"]["labels"]  # noqa: E731
    assert "kubeai.org/model" not in labels()  # nobody needs them
    await world.stop()
    world.start(EXTERNAL)
    await world.until(lambda: labels().get("kubeai.org/model") == "m")
    assert labels()["kubeai.org/model-uid"] == world.model()["metadata"]["uid"]
    await world.settled(1, 1)
    assert world.pods() == [name]


async def test_a_model_at_zero_is_not_ready_because_no_request_starts_it(world):
    world.start(EXTERNAL)
    world.apply(replicas=0)
    await world.until(lambda: world.condition("Ready") == ("False", "ScaledToZero"))
