"""The effect of Model fields on the route, on the list of models, and on labels."""

from __future__ import annotations

from model_fields import gateway, listed, pod_of
from operators import CONFIG, until

from kubeai.kube.resources import MODELS


async def test_load_balancing_reaches_the_route_and_rolls_no_pod(world):
    replica = world.start()
    await world.create(minReplicas=1)
    await until(lambda: replica.endpoints("m"), "an endpoint")

    def balancing():
        route = replica.routes["m"]
        factors = route.mean_load_factor, route.replication, route.prefix_char_length
        return (route.strategy, *factors, route.cache_load_factor)

    assert replica.routes["m"].capacity == 0
    assert balancing() == ("LeastLoad", 125, 20, 100, 0)
    before = replica.endpoints("m")
    hashed = {"meanLoadFactor": 150, "replication": 256, "prefixCharLength": 0}
    wanted = {"strategy": "PrefixHash", "prefixHash": hashed}
    await world.kube.patch(MODELS, "m", {"spec": {"loadBalancing": wanted}})
    await until(lambda: balancing() == ("PrefixHash", 150, 256, 0, 0), "the route has it")
    cached = {
        "strategy": "PrefixCache",
        "prefixCache": {"meanLoadFactor": 140},
        "maxRequestsPerReplica": 12,
    }
    await world.kube.patch(MODELS, "m", {"spec": {"loadBalancing": cached}})
    await until(lambda: balancing()[-1] == 140, "the route has the bound")
    assert replica.routes["m"].capacity == 12
    await until(world.is_up_to_date, "told")
    assert replica.endpoints("m") == before
    assert world.nodes.most == 1
    await world.kube.patch(MODELS, "m", {"spec": {"loadBalancing": None}})
    await until(lambda: balancing() == ("LeastLoad", 125, 20, 100, 0), "the defaults are back")


async def test_model_list_shows_owner_and_filters_by_features_and_labels(world):
    replica = world.start()
    for name, features, owner, labels in (
        ("chat", ["TextGeneration"], "meta", {"tenancy": "a"}),
        ("both", ["TextEmbedding", "TextGeneration"], "", {"tenancy": "b", "tier": "gold"}),
        ("rank", ["Reranking"], "baai", {"tenancy": "b"}),
        ("speech", ["SpeechToText"], "", {}),
        ("nothing", [], "", {}),
    ):
        await world.create(name, features=features, owner=owner)
        await world.kube.patch(MODELS, name, {"metadata": {"labels": labels}})
    labelled = {"features.kubeai.org/Reranking": "true", "tenancy": "b"}
    await until(lambda: len(replica.routes) == 5, "all routes")
    await until(lambda: replica.routes["rank"].labels == labelled, "labels")
    await until(lambda: "features.kubeai.org/TextEmbedding" in replica.routes["both"].labels, "")
    async with gateway(replica.routes) as session:
        found = await listed(session)
        assert set(found) == {"chat", "both"}
        assert (found["chat"]["owned_by"], found["both"]["owned_by"]) == ("meta", "")
        assert found["chat"]["features"] == ["TextGeneration"]
        made = await world.model("chat")
        assert made["metadata"]["creationTimestamp"].startswith("20")
        assert found["chat"]["created"] == replica.routes["chat"].created_s > 1_600_000_000
        for feature, names in (
            ("Reranking", {"rank"}),
            ("SpeechToText", {"speech"}),
            ("TextEmbedding", {"both"}),
        ):
            assert set(await listed(session, f"?feature={feature}")) == names
        assert set(await listed(session, "", "tenancy=b")) == {"both"}
        assert set(await listed(session, "", "tenancy in (a,b)", "tier!=gold")) == {"chat"}
        assert set(await listed(session, "?feature=Reranking", "tenancy=b")) == {"rank"}
        selector = "features.kubeai.org/TextEmbedding=true"
        assert set(await listed(session, "", selector)) == {"both"}


async def test_models_can_be_selected_by_their_features(world):
    world.start()
    await world.create("a", features=["TextGeneration", "Reranking"])
    await world.create("b", features=["TextGeneration"])

    async def names(feature):
        selector = f"features.kubeai.org/{feature}=true"
        models, _ = await world.kube.list(MODELS, world.kube.namespace, labels=selector)
        return {model["metadata"]["name"] for model in models}

    async def selected(feature, expected):
        async def as_expected():
            return await names(feature) == expected

        await until(as_expected, f"{feature}: {expected}")

    await selected("Reranking", {"a"})
    await selected("TextGeneration", {"a", "b"})
    await world.kube.patch(MODELS, "a", {"spec": {"features": ["SpeechToText"]}})
    await selected("SpeechToText", {"a"})
    await selected("TextGeneration", {"b"})
    await selected("Reranking", set())


async def test_annotations_say_where_the_endpoint_is_if_the_config_allows_it(world):
    given = {"model-pod-ip": "127.9.9.9", "model-pod-port": "4321", "other": "x"}
    model = {"metadata": {"name": "m", "annotations": given}}
    model["spec"] = {"url": "hf://org/name", "engine": "VLLM", "features": [], "minReplicas": 1}
    replica = world.start(config=CONFIG + "allowPodAddressOverride: true")
    await world.kube.create(MODELS, model)
    await until(lambda: replica.endpoints("m"), "an endpoint")
    (endpoint,) = replica.routes["m"].endpoints
    assert endpoint.address == "127.9.9.9:4321"
    assert "other" not in (await pod_of(world))["metadata"]["annotations"]
