"""Aliases, fallbacks and canaries on both APIs: routes, conditions, and what the API rejects."""

from __future__ import annotations

import pytest
from model_fields import gateway, listed, refusal, told
from operators import until

from kubeai.kube.errors import ApiError
from kubeai.kube.resources import MODELS


def route_has(replica, name, **fields):
    """Whether a Model's route has these values."""
    route = replica.routes.get(name)
    return route is not None and all(getattr(route, key) == fields[key] for key in fields)


async def test_aliases_reach_the_route_and_the_lists_and_replace_no_pod(world):
    replica = world.start()
    await world.create("m", replicas=1, minReplicas=1)
    (before,) = await world.pods_once(1)
    aliases = ["meta-llama/Llama-3.1-8B-Instruct", "gpt-4o", "qwen2.5:7b", "my_model", "Ünïcode x"]
    await world.kube.patch(MODELS, "m", {"spec": {"aliases": aliases}})
    await until(lambda: route_has(replica, "m", aliases=tuple(aliases)), "the aliases are routed")
    await until(lambda: world.is_up_to_date(), "the Model is up to date")
    assert await world.condition("AliasesAccepted") == ("True", "Accepted")
    (after,) = await world.pods_once(1)
    assert before["metadata"]["uid"] == after["metadata"]["uid"]
    async with gateway(replica.routes) as session:
        assert set(await listed(session)) == {"m", *aliases}
    await world.kube.patch(MODELS, "m", {"spec": {"aliases": None}})
    await until(lambda: route_has(replica, "m", aliases=()), "no aliases")

    async def gone():
        return await world.condition("AliasesAccepted") is None

    await until(gone, "the condition is removed")


async def test_an_alias_belongs_to_the_older_model_until_that_is_gone(world):
    replica = world.start()
    await world.create("a", aliases=["x", "b"])
    await world.create("b", aliases=["x", "y"])  # of the same second, perhaps: then by name
    assert "the alias 'x' is ignored: it belongs to the Model 'a', which is older" in await told(
        world, "Conflict", "b", "AliasesAccepted"
    )
    assert "the alias 'b' is ignored: it is the name of a Model" in await told(
        world, "Conflict", "a", "AliasesAccepted"
    )
    await until(lambda: route_has(replica, "a", aliases=("x",)), "x belongs to a")
    await until(lambda: route_has(replica, "b", aliases=("y",)), "b has only y")
    await world.kube.delete(MODELS, "a")
    await until(lambda: route_has(replica, "b", aliases=("x", "y")), "x belongs to b")

    async def accepted():
        return await world.condition("AliasesAccepted", "b") == ("True", "Accepted")

    await until(accepted, "b has both")


async def test_fallbacks_and_the_canary_reach_the_route(world):
    replica = world.start()
    await world.create("b")
    await world.create("c")
    canary = {"model": "c", "percent": 5}
    await world.create("m", fallbacks=["b", "c"], waitBeforeFallback="1m30s", canary=canary)
    fields = {"wait_before_fallback_s": 90.0, "canary": "c", "canary_percent": 5}
    await until(lambda: route_has(replica, "m", fallbacks=("b", "c"), **fields), "the route")
    await until(lambda: world.is_up_to_date(), "the Model is up to date")
    assert await world.condition("FallbacksAccepted") == ("True", "Accepted")


async def test_references_that_do_not_count_are_reported(world):
    replica = world.start()
    await world.create("a", fallbacks=["a", "b"])
    await world.create("b", fallbacks=["a", "later"])
    message = await told(world, "SelfReference", "a", "FallbacksAccepted")
    assert message == "fallbacks: 'a' is ignored: it is this Model itself"
    message = await told(world, "Cycle", "b", "FallbacksAccepted")
    assert message.startswith("fallbacks: 'a' is ignored: it leads back to this Model")
    assert message.endswith("fallbacks: 'later' is ignored: there is no such Model")
    assert route_has(replica, "a", fallbacks=("b",))
    assert route_has(replica, "b", fallbacks=("later",))
    await world.create("later")
    await world.kube.patch(MODELS, "a", {"spec": {"fallbacks": []}})

    async def accepted():
        return await world.condition("FallbacksAccepted", "b") == ("True", "Accepted")

    await until(accepted, "all of b's fallbacks count")
    await until(lambda: route_has(replica, "b", fallbacks=("a", "later")), "b's route")


LIMITS = [
    ({"aliases": [""]}, "spec.aliases[0]"),
    ({"aliases": ["a\n"]}, "spec.aliases[0]"),
    ({"aliases": ["a" * 257]}, "spec.aliases[0]"),
    ({"aliases": ["a", "a"]}, "spec.aliases[1]"),
    ({"aliases": [str(n) for n in range(101)]}, "spec.aliases"),
    ({"fallbacks": ["b", "b"]}, "each entry of fallbacks must be unique"),
    ({"fallbacks": [f"m{n}" for n in range(11)]}, "spec.fallbacks"),
    ({"fallbacks": ["b" * 41]}, "spec.fallbacks[0]"),
    ({"waitBeforeFallback": "soon"}, "spec.waitBeforeFallback"),
    ({"waitBeforeFallback": "-1s"}, "spec.waitBeforeFallback"),
    ({"waitBeforeFallback": "10"}, "spec.waitBeforeFallback"),
    ({"canary": {"model": "b"}}, "spec.canary.percent"),
    ({"canary": {"percent": 5}}, "spec.canary.model"),
    ({"canary": {"model": "b", "percent": 101}}, "spec.canary.percent"),
    ({"canary": {"model": "b", "percent": -1}}, "spec.canary.percent"),
]


async def test_invalid_names_are_rejected_by_field(world):
    for change, named in LIMITS:
        said = await refusal(world, **change)
        assert named in said, said


async def test_names_at_the_bounds_are_accepted(world):
    await world.create("m", aliases=[f"{n}" + "é" * 253 for n in range(100)])
    await world.create("n", fallbacks=[f"m{n}" for n in range(10)], waitBeforeFallback="1h2m3.5s")
    await world.create("o", canary={"model": "m", "percent": 0}, waitBeforeFallback="0s")
    with pytest.raises(ApiError):
        await world.create("o")
