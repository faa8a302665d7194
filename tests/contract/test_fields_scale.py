"""The effect of a Model's scaling fields in a cluster: bounds, targets, delays."""

from __future__ import annotations

from kubeai.kube.resources import MODELS, PODS


async def test_replicas_set_by_scale_stay_within_their_bounds(world):
    world.start()
    await world.create(minReplicas=1, maxReplicas=3, scaleDownDelaySeconds=3600)
    await world.replicas_are(1, 1)
    await world.kube.patch(MODELS, "m", {"spec": {"replicas": 2}}, subresource="scale")
    await world.replicas_are(2, 2)
    await world.kube.patch(MODELS, "m", {"spec": {"replicas": 9}}, subresource="scale")
    await world.replicas_are(3, 3)
    assert (await world.model())["spec"]["replicas"] == 3
    await world.kube.patch(MODELS, "m", {"spec": {"replicas": 0}}, subresource="scale")
    await world.replicas_are(1, 1)
    assert (await world.model())["spec"]["replicas"] == 1


async def test_new_bounds_move_the_replicas(world):
    world.start()
    await world.create(minReplicas=0, scaleDownDelaySeconds=3600)
    await world.replicas_are(0, 0)
    await world.kube.patch(MODELS, "m", {"spec": {"minReplicas": 3}})
    await world.replicas_are(3, 3)
    await world.kube.patch(MODELS, "m", {"spec": {"minReplicas": 0, "maxReplicas": 2}})
    await world.replicas_are(2, 2)


async def test_scale_subresource_reports_replicas_and_selector(world):
    world.start()
    await world.create(minReplicas=2)
    await world.replicas_are(2, 2)
    path = MODELS._replace(plural="models/m")  # `get` of a subresource
    scale = await world.kube.get(path, "scale")
    assert scale["spec"]["replicas"] == 2
    assert scale["status"] == {"replicas": 2, "selector": "app=model,model=m"}
    found, _ = await world.kube.list(PODS, world.kube.namespace, labels=scale["status"]["selector"])
    assert len(found) == 2


async def test_lower_target_requests_adds_replicas(world):
    replica = world.start()
    await world.create(targetRequests=30)
    await world.replicas_are(0, 0)
    replica.loads.active_by_model["m"] = 25
    await world.replicas_are(1, 1)
    await world.kube.patch(MODELS, "m", {"spec": {"targetRequests": 5}})
    await world.replicas_are(5, 5)  # no maxReplicas: no limit


async def test_scale_down_waits_for_the_models_delay(world):
    replica = world.start()
    for name, delay_s in (("quick", 0), ("patient", 3600)):
        await world.create(name, targetRequests=1, scaleDownDelaySeconds=delay_s)
        replica.loads.active_by_model[name] = 3
    for name in ("quick", "patient"):
        await world.replicas_are(3, 3, name)
    replica.loads.active_by_model.clear()
    await world.replicas_are(0, 0, "quick")
    await world.replicas_are(3, 3, "patient")
    assert (await world.model("patient"))["spec"]["replicas"] == 3
    await world.kube.patch(MODELS, "patient", {"spec": {"scaleDownDelaySeconds": 0}})
    await world.replicas_are(0, 0, "patient")


async def test_load_does_not_scale_when_autoscaling_is_disabled(world):
    replica = world.start()
    fixed = {"autoscalingDisabled": True, "replicas": 1, "minReplicas": 0, "maxReplicas": 1}
    await world.create("fixed", targetRequests=1, **fixed)
    await world.create("other", targetRequests=1)
    for name in ("fixed", "other"):
        replica.loads.active_by_model[name] = 4
    await world.replicas_are(4, 4, "other")
    await world.replicas_are(1, 1, "fixed")
    await world.kube.patch(MODELS, "fixed", {"spec": {"replicas": 2}}, subresource="scale")
    await world.replicas_are(2, 2, "fixed")  # the bounds are the autoscaler's
    assert (await world.model("fixed"))["spec"]["replicas"] == 2
    await world.kube.patch(MODELS, "fixed", {"spec": {"autoscalingDisabled": False}})
    await world.replicas_are(1, 1, "fixed")
