"""`proxy.mode: external`: a headless Service for each Model, on both APIs."""

from __future__ import annotations

from operators import CONFIG, until

from kubeai.kube.errors import ApiError
from kubeai.kube.resources import MODELS, PODS, SERVICES

EXTERNAL = CONFIG + "proxy: {mode: external}\n"


async def service_of(world, name="m"):
    """The Model's Service, once it is there."""
    model = await world.model(name)
    service = f"{name.replace('.', '-')}-{model['metadata']['uid'][:6]}"

    found = []

    async def there():
        found[:] = await existing(world, service)
        return found

    await until(there, f"Service {service}")
    return found[0]


async def existing(world, service):
    """The Service in a list; an empty one if there is none."""
    try:
        return [await world.kube.get(SERVICES, service)]
    except ApiError as error:
        if error.status != 404:
            raise
        return []


async def test_each_model_has_a_headless_service_that_selects_its_pods(world):
    world.start(config=EXTERNAL)
    for name in ("m", "llama-3.1"):
        await world.create(name, minReplicas=1)
    for name in ("m", "llama-3.1"):
        service = await service_of(world, name)
        spec = service["spec"]
        assert spec["clusterIP"] == "None"
        (port,) = spec["ports"]
        assert (port["name"], port["port"], port["targetPort"]) == ("inference", 8000, 8000)
        (owner,) = service["metadata"]["ownerReferences"]
        assert (owner["kind"], owner["name"]) == ("Model", name)
        (pod,) = await world.pods_once(1, name)
        assert spec["selector"].items() <= pod["metadata"]["labels"].items()
        selector = ",".join(f"{key}={value}" for key, value in spec["selector"].items())
        found, _ = await world.kube.list(PODS, world.kube.namespace, labels=selector)
        assert [one["metadata"]["name"] for one in found] == [pod["metadata"]["name"]]


async def test_a_service_that_is_deleted_comes_back(world):
    world.start(config=EXTERNAL)
    await world.create()
    first = await service_of(world)
    await world.kube.delete(SERVICES, first["metadata"]["name"])

    async def another():
        return (await service_of(world))["metadata"]["uid"] != first["metadata"]["uid"]

    await until(another, "another Service")


async def test_pods_stay_when_the_mode_changes_and_services_go(world):
    first = world.start(config=EXTERNAL)
    await world.create(minReplicas=1)
    service = await service_of(world)
    (pod,) = await world.pods_once(1)
    await world.replicas_are(1, 1)
    await first.stop()
    world.replicas.remove(first)
    world.start("two", config=CONFIG)

    async def gone():
        return not await existing(world, service["metadata"]["name"])

    await until(gone, "no Service")
    (still,) = await world.pods_once(1)
    assert still["metadata"]["uid"] == pod["metadata"]["uid"]


async def test_pods_without_the_labels_get_them_and_are_not_replaced(world):
    first = world.start()
    await world.create(minReplicas=1)
    (pod,) = await world.pods_once(1)
    await world.replicas_are(1, 1)
    await first.stop()
    world.replicas.remove(first)
    name = pod["metadata"]["name"]
    bare = {"metadata": {"labels": {"kubeai.org/model": None, "kubeai.org/model-uid": None}}}
    await world.kube.patch(PODS, name, bare)  # as an earlier version made it
    world.start("two", config=EXTERNAL)

    async def labelled():
        labels = (await world.kube.get(PODS, name))["metadata"]["labels"]
        return labels.get("kubeai.org/model") == "m"

    await until(labelled, "labels")
    (still,) = await world.pods_once(1)
    assert still["metadata"]["uid"] == pod["metadata"]["uid"]


async def test_replicas_set_by_others_are_kept_within_their_bounds(world):
    replica = world.start(config=EXTERNAL)
    await world.create(minReplicas=0, maxReplicas=2, targetRequests=1)
    replica.loads.active_by_model["m"] = 9  # there is no autoscaler to see it

    async def not_ready():
        return await world.condition("Ready") == ("False", "ScaledToZero")

    await until(not_ready, "not ready at zero")
    await world.kube.patch(MODELS, "m", {"spec": {"replicas": 5}}, subresource="scale")
    await world.replicas_are(2, 2)
    await world.kube.patch(MODELS, "m", {"spec": {"replicas": 0}}, subresource="scale")
    await world.replicas_are(0, 0)
