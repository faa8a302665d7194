"""Sources of weights in the pod: URLs, credentials, claims, and images with weights."""

import re

import msgspec
import pytest
from fakes.engine_pods import CONFIG, ENGINES, each_engine, model, pod, secret, server

from kubeai.api.config.system import parse_config
from kubeai.api.model_url import URL_PATTERN, parse_url
from kubeai.errors import ModelError
from kubeai.podspec import sources


@pytest.mark.parametrize(
    ("engine", "url", "reason"),
    [
        ("VLLM", "ollama://x", "VLLM cannot load from ollama://"),
        ("VLLM", "gs://b/x", "and gs:// with a cacheProfile"),
        ("VLLM", "pvc://c?model=x", "VLLM does not support the parameter 'model'"),
        ("OLlama", "hf://a/b", "OLlama cannot load from hf://"),
        ("OLlama", "s3://a/b", "it loads from ollama://, pvc://"),
        ("OLlama", "pvc://c", "needs the model's name"),
        ("Infinity", "ollama://x", "Infinity cannot load from ollama://"),
        ("Infinity", "s3://b/x", "and s3:// with a cacheProfile"),
        ("FasterWhisper", "oss://b/x", "and oss:// with a cacheProfile"),
        ("FasterWhisper", "pvc://c?model=x", "does not support the parameter 'model'"),
        ("SGLang", "ollama://x", "SGLang cannot load from ollama://"),
        ("SGLang", "pvc://c?model=x", "SGLang does not support the parameter 'model'"),
        ("LlamaCpp", "ollama://x", "LlamaCpp cannot load from ollama://"),
        ("LlamaCpp", "s3://b/x", "LlamaCpp cannot load from s3://; it loads from hf://, pvc://"),
    ],
)
def test_a_url_that_the_engine_cannot_load_is_rejected(engine, url, reason):
    with pytest.raises(ModelError) as caught:
        pod(engine, url=url)
    assert caught.value.field == "spec.url"
    assert reason in str(caught.value)


@pytest.mark.parametrize("scheme", ["hf", "s3", "gs", "oss"])
def test_with_a_cache_most_engines_accept_every_scheme_of_the_loader(scheme):
    for engine in ENGINES:
        spec = model(engine, url=f"{scheme}://bucket/path", cacheProfile="c").spec
        if engine not in ("OLlama", "LlamaCpp"):
            assert sources.model_url(spec).scheme == scheme
            continue
        with pytest.raises(ModelError) as caught:
            sources.model_url(spec)
        if engine == "LlamaCpp" and scheme == "hf":
            assert "LlamaCpp does not support caches" in str(caught.value)
            assert caught.value.field == "spec.cacheProfile"
        else:
            assert f"{engine} cannot load from {scheme}://" in str(caught.value)
            assert (caught.value.field, caught.value.reason) == ("spec.url", "InvalidURL")


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("hf://a/b", {"HF_TOKEN": secret("kubeai-huggingface", "token")}),
        (
            "s3://a/b",
            {
                "AWS_ACCESS_KEY_ID": secret("kubeai-aws", "accessKeyID"),
                "AWS_SECRET_ACCESS_KEY": secret("kubeai-aws", "secretAccessKey"),
            },
        ),
        (
            "oss://a/b",
            {
                "OSS_ACCESS_KEY_ID": secret("kubeai-alibaba", "accessKeyID"),
                "OSS_ACCESS_KEY_SECRET": secret("kubeai-alibaba", "accessKeySecret"),
            },
        ),
        ("ollama://x", {}),
    ],
)
def test_credentials_come_from_optional_secrets(url, expected):
    source = sources.source(parse_url(url), CONFIG.secret_names)
    assert {variable["name"]: variable["valueFrom"] for variable in source.env} == expected
    assert (source.volumes, source.mounts) == ([], [])


def test_google_credentials_are_mounted_as_a_file():
    source = sources.source(parse_url("gs://a/b"), CONFIG.secret_names)
    assert source.env == [
        {
            "name": "GOOGLE_APPLICATION_CREDENTIALS",
            "value": "/secrets/gcp-credentials/credentials.json",
        }
    ]
    (volume,) = source.volumes
    assert volume["secret"]["items"] == [{"key": "jsonKeyfile", "path": "credentials.json"}]
    assert volume["secret"]["optional"] is True
    assert source.mounts == [{"name": volume["name"], "mountPath": "/secrets/gcp-credentials"}]


@pytest.mark.parametrize(
    ("scheme", "config"),
    [
        ("hf", "huggingface: mine"),
        ("s3", "aws: mine"),
        ("oss", "alibaba: mine"),
        ("gs", "gcp: mine"),
    ],
)
def test_the_secret_of_each_source_is_configurable(scheme, config):
    names = parse_config(f"secretNames: {{{config}}}").secret_names
    for url_scheme in ("hf", "s3", "oss", "gs"):
        source = sources.source(parse_url(f"{url_scheme}://a/b"), names)
        refs = [v["valueFrom"]["secretKeyRef"] for v in source.env if "valueFrom" in v]
        found = [(ref["name"], ref["optional"]) for ref in refs]
        found += [(v["secret"]["secretName"], v["secret"]["optional"]) for v in source.volumes]
        assert found
        for name, optional in found:
            assert optional is True
            assert (name == "mine") is (url_scheme == scheme)


def test_no_secret_is_referenced_if_none_is_configured():
    config = parse_config("secretNames: {huggingface: '', gcp: ''}")
    assert "env" not in server(pod(config=config))
    assert sources.source(parse_url("gs://a/b"), config.secret_names).env == []


def test_a_token_in_the_models_env_replaces_the_secrets():
    built = pod(env={"HF_TOKEN": "mine"})
    assert [v for v in server(built)["env"] if v["name"] == "HF_TOKEN"] == [
        {"name": "HF_TOKEN", "value": "mine"}
    ]


@each_engine
@pytest.mark.parametrize(("path", "sub_path"), [("", None), ("/", None), ("/a/b/", "a/b")])
def test_a_claim_is_mounted_at_slash_model(engine, path, sub_path):
    query = "?model=q" if engine in ("OLlama", "LlamaCpp") else ""
    built = pod(engine, url=f"pvc://claim{path}{query}")
    assert {"name": "model", "persistentVolumeClaim": {"claimName": "claim"}} in built["spec"][
        "volumes"
    ]
    (mount,) = (m for m in server(built)["volumeMounts"] if m["name"] == "model")
    assert (mount["mountPath"], mount.get("subPath")) == ("/model", sub_path)


@pytest.mark.parametrize(
    "url", ["s3://bucket/a=1/b+c~d", "pvc://claim/a@b", "hf://org/$(HF_TOKEN)"]
)
def test_a_stored_model_whose_url_would_be_refused_today_still_gets_pods(url):
    assert not re.match(URL_PATTERN, url)
    assert server(pod(url=url))["image"]


@pytest.mark.parametrize("engine", ["VLLM", "SGLang", "FasterWhisper", "Infinity", "LlamaCpp"])
def test_variable_references_in_a_url_are_escaped(engine):
    text = msgspec.json.encode(server(pod(engine, url="hf://org/$(HF_TOKEN)"))).decode()
    assert "org/$$(HF_TOKEN)" in text
    assert "org/$(HF_TOKEN)" not in text


@pytest.mark.parametrize("engine", ["VLLM", "SGLang", "FasterWhisper", "Infinity"])
def test_an_image_with_weights_is_mounted_read_only(engine):
    built = pod(engine, url="oci://registry.example/org/name:1")
    (volume,) = (v for v in built["spec"]["volumes"] if v["name"] == "model")
    assert volume["image"] == {"reference": "registry.example/org/name:1"}
    mount = {"name": "model", "mountPath": "/model", "readOnly": True}
    assert mount in server(built)["volumeMounts"]
    container = {k: v for k, v in server(built).items() if k != "volumeMounts"}
    assert "/model" in str(container)


def test_an_image_with_weights_is_pulled_with_its_secret_once():
    config = parse_config("""
secretNames: {oci: weights}
modelServerPods: {imagePullSecrets: [{name: engines}, {name: weights}]}
""")
    built = pod(config=config, url="oci://r/a:1")
    assert built["spec"]["imagePullSecrets"] == [{"name": "engines"}, {"name": "weights"}]
    assert "imagePullSecrets" not in pod()["spec"]
    assert "imagePullSecrets" not in pod(url="oci://r/a:1")["spec"]


def test_an_image_with_weights_needs_no_cache_and_no_parameters():
    for url, engine, why in (
        ("oci://r/a:1", "OLlama", "OLlama cannot load from oci://"),
        ("oci://r/a:1?model=q", "VLLM", "does not support the parameter 'model'"),
        ("oci://r/a:1", "LlamaCpp", "LlamaCpp needs the GGUF file"),
    ):
        with pytest.raises(ModelError, match=why):
            pod(engine, url=url)
