"""The effect of a Model's URL in a cluster: schemes, parameters, credentials, images, caches."""

from __future__ import annotations

from fakes.engine_pods import ENGINES, server
from model_fields import FAST, env, pod_of, refusal, told
from operators import CONFIG, until

from kubeai.kube.resources import PVCS

# What comes of a scheme on an engine. "told": in the Model's conditions; "refused": by the API.
SCHEMES = {
    "hf": dict.fromkeys(ENGINES, "pod") | {"OLlama": "told"},
    "pvc": dict.fromkeys(ENGINES, "pod"),
    "ollama": dict.fromkeys(ENGINES, "told") | {"OLlama": "pod"},
    "s3": dict.fromkeys(ENGINES, "told") | {"VLLM": "pod", "SGLang": "pod"},
    "oci": dict.fromkeys(ENGINES, "pod") | {"OLlama": "told"},
    "gs": dict.fromkeys(ENGINES, "refused"),  # these two need a cache
    "oss": dict.fromkeys(ENGINES, "refused"),
}


def url_of(scheme, engine):
    if (scheme, engine) == ("pvc", "OLlama"):
        return "pvc://claim/sub/path?model=qwen:0.5b"
    if (scheme, engine) == ("pvc", "LlamaCpp"):
        return "pvc://claim/sub/path?model=a.gguf"
    if (scheme, engine) == ("oci", "LlamaCpp"):
        return "oci://org/name?model=a.gguf"
    return f"{scheme}://{'claim/sub/path' if scheme == 'pvc' else 'org/name'}"


def source_in(pod, engine):
    """Where the pod says that its weights are."""
    match engine:
        case "VLLM":
            return server(pod)["args"][0].removeprefix("--model=")
        case "OLlama":
            return server(pod)["startupProbe"]["exec"]["command"][4]
        case "SGLang":
            return server(pod)["args"][0].removeprefix("--model-path=")
        case "LlamaCpp":
            return server(pod)["args"][8]
        case "FasterWhisper":  # speaches: the name in a hub, or a folder
            name, folder = server(pod)["startupProbe"]["exec"]["command"][3:]
            return folder or name
        case "Infinity":
            return env(pod)["INFINITY_MODEL_ID"]


async def test_each_engine_accepts_only_its_url_schemes(world):
    world.start(config=FAST)
    cases = [(s, e, comes) for s, by_engine in SCHEMES.items() for e, comes in by_engine.items()]
    assert len(cases) == 7 * len(ENGINES)
    for scheme, engine, comes in cases:
        wanted = {"engine": engine, "url": url_of(scheme, engine), "minReplicas": 1}
        wanted |= {"name": f"{engine}-{scheme}".lower(), "image": "", "resourceProfile": ""}
        if comes == "refused":
            said = await refusal(world, **wanted)
            assert f"a url that starts with {scheme}:// needs a cacheProfile" in said
        else:
            await world.create(**wanted)
    for scheme, engine, comes in cases:
        name = f"{engine}-{scheme}".lower()
        if comes == "told":
            said = await told(world, "InvalidURL", name)
            assert said.startswith(f"spec.url: {engine} cannot load from {scheme}://")
            assert await world.pods(name) == []
        elif comes == "pod":
            assert_source(await pod_of(world, name), engine, scheme)


def assert_source(pod, engine, scheme):
    expected = {"pvc": "/model", "oci": "/model", "s3": "s3://org/name"}.get(scheme, "org/name")
    if (engine, scheme) == ("OLlama", "pvc"):
        expected = "qwen:0.5b"
        assert env(pod)["OLLAMA_MODELS"] == "/model"
    if engine == "LlamaCpp" and scheme in ("pvc", "oci"):
        expected = "/model/a.gguf"
    assert source_in(pod, engine) == expected
    claims = [v for v in pod["spec"]["volumes"] if "persistentVolumeClaim" in v]
    mounts = [m for m in server(pod)["volumeMounts"] if m["name"] == "model"]
    if scheme == "oci":
        (volume,) = (v for v in pod["spec"]["volumes"] if v["name"] == "model")
        assert volume["image"]["reference"] == "org/name"
        assert [(m["mountPath"], m["readOnly"]) for m in mounts] == [("/model", True)]
        assert claims == []
        return
    if scheme != "pvc":
        assert claims == mounts == []
        return
    (claim,), (mount,) = claims, mounts
    assert claim["persistentVolumeClaim"]["claimName"] == "claim"
    assert (mount["mountPath"], mount["subPath"]) == ("/model", "sub/path")


async def test_api_rejects_unloadable_urls(world):
    for url in ("", "name", "http://host/name", "HF://org/name", "file:///x"):
        assert "spec.url" in (said := await refusal(world, url=url)), said
        assert "url must start with one of hf://" in said
    # As in KubeAI in Go since 0.23.
    for url in ("hf://", "hf://org/name@main", "hf://a b", "ollama://q;id", "hf://a?x\ny"):
        said = await refusal(world, url=url)
        assert "between the scheme and the parameters, url may contain only" in said, said
    assert "spec.url" in await refusal(world, url="hf://" + "x" * 2048)
    for engine in ENGINES:
        for scheme in ("pvc", "ollama"):
            said = await refusal(world, engine=engine, url=url_of(scheme, engine), cacheProfile="c")
            assert "cacheProfile is only possible with urls that start with hf://" in said


PARAMETERS = {
    "ollama-model": ("OLlama", "ollama://q?model=x", "unknown parameter 'model' for ollama://"),
    "ollama-odd": ("OLlama", "ollama://q?pull=maybe", "pull must be true or false"),
    "claim-alone": ("OLlama", "pvc://claim", "OLlama needs the model's name on the claim"),
    "claim-pull": ("OLlama", "pvc://claim?model=q&pull=false", "unknown parameter 'pull'"),
    "vllm-model": ("VLLM", "pvc://claim?model=q", "VLLM does not support the parameter 'model'"),
    "vllm-revision": ("VLLM", "hf://org/name?revision=1", "unknown parameter 'revision' for hf://"),
    "no-claim": ("Infinity", "pvc://No_Claim", "not a valid PersistentVolumeClaim name"),
    "outside": ("FasterWhisper", "pvc://claim/../other", "must not contain '..'"),
    "name": ("OLlama", "pvc://claim?model=q;id", "'q;id' is not a valid name of a model"),
    "llmman": ("VLLM", "oci://r/a:1?via=llmman", "the parameter 'via' is not supported"),
    "registry": ("VLLM", "oci://a", "must be an image with its registry"),
    "llama-file": ("LlamaCpp", "pvc://claim/folder", "LlamaCpp needs the GGUF file"),
}


async def test_invalid_url_or_parameters_are_reported(world):
    world.start(config=FAST)
    for name, (engine, url, _) in PARAMETERS.items():
        await world.create(name, engine=engine, url=url, minReplicas=1)
    for name, (_, _, why) in PARAMETERS.items():
        said = await told(world, "InvalidURL", name)
        assert said.startswith("spec.url: ")
        assert why in said
        assert await world.pods(name) == []


async def test_url_parameters_control_how_ollama_pulls_its_model(world):
    world.start(config=FAST)
    urls = {
        "plain": ("ollama://host:5000/q:1b", ["host:5000/q:1b", "plain", "pull", "load"]),
        "insecure": ("ollama://q?insecure=true", ["q", "insecure", "pull-insecure", "load"]),
        "builtin": ("ollama://q?pull=false", ["q", "builtin", "present", "load"]),
    }
    for name, (url, _) in urls.items():
        await world.create(name, engine="OLlama", url=url, image="mine", minReplicas=1)
    for name, (_, arguments) in urls.items():
        probe = server(await pod_of(world, name))["startupProbe"]
        assert probe["exec"]["command"][4:] == arguments


async def test_credentials_come_from_the_secrets_that_the_config_names(world):
    world.start(config=FAST + "secretNames: {aws: keys, huggingface: ''}")
    for name, url in (("bucket", "s3://bucket/path"), ("hub", "hf://org/name")):
        await world.create(name, url=url, image="", resourceProfile="", minReplicas=1)
    assert env(await pod_of(world, "bucket")) == {
        name: {"secretKeyRef": {"name": "keys", "key": key, "optional": True}}
        for name, key in (
            ("AWS_ACCESS_KEY_ID", "accessKeyID"),
            ("AWS_SECRET_ACCESS_KEY", "secretAccessKey"),
        )
    }
    assert env(await pod_of(world, "hub")) == {}


async def test_images_with_weights_are_pulled_with_the_configured_secret(world):
    pull = "modelServerPods: {imagePullSecrets: [{name: engines}]}"
    world.start(config=FAST + "secretNames: {oci: weights}\n" + pull)
    for name, url in (("image", "oci://registry.example/org/name:1"), ("hub", "hf://org/name")):
        await world.create(name, url=url, image="", resourceProfile="", minReplicas=1)
    secrets = {"image": ["engines", "weights"], "hub": ["engines"]}
    for name, expected in secrets.items():
        spec = (await pod_of(world, name))["spec"]
        assert [secret["name"] for secret in spec["imagePullSecrets"]] == expected


async def test_the_claim_of_a_cache_has_the_size_of_its_profile(world):
    shared = "sharedFilesystem: {storageClassName: nfs"
    profiles = f"a: {{{shared}, storageSize: 500Gi}}}}, b: {{{shared}}}}}"
    world.start(config=CONFIG + f"cacheProfiles: {{{profiles}}}")
    for profile, size in (("a", "500Gi"), ("b", "10Gi")):
        await world.create(profile, cacheProfile=profile)
        name = f"shared-model-cache-{profile}"

        async def claimed(name=name):
            claims, _ = await world.kube.list(PVCS, world.kube.namespace)
            return name in [claim["metadata"]["name"] for claim in claims]

        await until(claimed, f"claim {name}")
        claim = await world.kube.get(PVCS, name)
        assert claim["spec"]["resources"]["requests"]["storage"] == size
