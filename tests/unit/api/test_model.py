"""The Model type: decoding, defaults, errors, and the parts of a URL."""

from datetime import UTC, datetime

import msgspec
import pytest

from kubeai.api.model import Model, decode_model
from kubeai.api.model_url import parse_url
from kubeai.errors import ModelError

MINIMAL = {
    "metadata": {"name": "m"},
    "spec": {"url": "hf://org/name", "engine": "VLLM", "features": ["TextGeneration"]},
}


def test_a_minimal_model_has_the_defaults_in_the_reference():
    spec = decode_model(MINIMAL).spec
    assert (spec.min_replicas, spec.max_replicas, spec.replicas) == (0, None, None)
    assert spec.target_requests == 100
    assert spec.scale_down_delay_seconds == 30
    assert spec.load_balancing.strategy == "LeastLoad"
    assert spec.load_balancing.prefix_hash.mean_load_factor == 125
    assert spec.load_balancing.prefix_hash.replication == 20
    assert spec.load_balancing.prefix_hash.prefix_char_length == 100
    assert spec.autoscaling_disabled is False


WHOLE = {
    "metadata": {
        "name": "m",
        "namespace": "ns",
        "uid": "u",
        "resourceVersion": "7",
        "generation": 2,
        "creationTimestamp": "2026-01-02T03:04:05Z",
        "deletionTimestamp": None,
        "labels": {"a": "b"},
        "annotations": {"c": "d"},
        "finalizers": ["f"],
        "ownerReferences": [
            {"apiVersion": "v1", "kind": "K", "name": "o", "uid": "x", "controller": True}
        ],
    },
    "spec": {
        **MINIMAL["spec"],
        "features": ["TextGeneration", "TextEmbedding", "Reranking", "SpeechToText"],
        "adapters": [{"name": "a-1", "url": "hf://org/lora"}],
        "resourceProfile": "cpu:1",
        "cacheProfile": "efs",
        "image": "i",
        "args": ["--x"],
        "env": {"K": "V"},
        "envFrom": [{"prefix": "P_", "configMapRef": {"name": "c", "optional": True}}],
        "replicas": 2,
        "minReplicas": 1,
        "maxReplicas": 3,
        "autoscalingDisabled": True,
        "targetRequests": 5,
        "scaleDownDelaySeconds": 6,
        "owner": "me",
        "loadBalancing": {
            "strategy": "PrefixHash",
            "prefixHash": {"meanLoadFactor": 150, "replication": 8, "prefixCharLength": 9},
        },
        "files": [{"path": "/a", "content": "x"}],
        "priorityClassName": "high",
    },
    "status": {
        "replicas": {"all": 2, "ready": 1},
        "cache": {"loaded": True},
        "selector": "model=m",
        "conditions": [{"type": "Ready", "status": "False", "reason": "R"}],
    },
}


def test_every_field_is_read_from_its_camel_case_name():
    model = decode_model(WHOLE)
    meta, spec, status = model.metadata, model.spec, model.status
    assert meta.resource_version == "7"
    assert meta.creation_timestamp == datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    assert meta.deletion_timestamp is None
    assert meta.owner_references[0].controller is True
    assert spec.adapters[0].name == "a-1"
    assert spec.env_from[0].config_map_ref.optional is True
    assert (spec.replicas, spec.min_replicas, spec.max_replicas) == (2, 1, 3)
    assert spec.load_balancing.prefix_hash.mean_load_factor == 150
    assert spec.files[0].path == "/a"
    assert spec.priority_class_name == "high"
    assert (status.replicas.all, status.replicas.ready) == (2, 1)
    assert status.cache.loaded is True
    assert status.conditions[0].reason == "R"


def test_unknown_fields_are_ignored():
    model = decode_model({**MINIMAL, "spec": {**MINIMAL["spec"], "fromTheFuture": 1}})
    assert model.spec.engine == "VLLM"


def test_a_stored_object_outside_the_current_limits_still_decodes():
    """A single invalid object must not make its whole list unreadable."""
    odd = {**MINIMAL["spec"], "minReplicas": -1, "targetRequests": 0, "owner": "x" * 10_000}
    assert decode_model({"metadata": {"name": "m" * 60}, "spec": odd}).spec.min_replicas == -1


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"replicas": "3"}, "spec.replicas"),
        ({"engine": "vllm"}, "spec.engine"),
        ({"features": ["Singing"]}, "spec.features[0]"),
        ({"files": [{"path": "/a"}]}, "spec.files[0]"),
        ({"loadBalancing": {"prefixHash": {"replication": "x"}}}, "loadBalancing.prefixHash"),
    ],
)
def test_a_wrong_type_is_an_error_that_names_the_field(change, field):
    with pytest.raises(ModelError) as caught:
        decode_model({**MINIMAL, "spec": {**MINIMAL["spec"], **change}})
    assert field in caught.value.field


def test_malformed_json_is_a_model_error():
    with pytest.raises(ModelError, match="model: "):
        decode_model(b'{"spec": ')


def test_bytes_and_objects_decode_alike():
    assert decode_model(msgspec.json.encode(MINIMAL)) == decode_model(MINIMAL)


def test_encoding_a_decoded_model_gives_the_original():
    model = decode_model(MINIMAL)
    assert msgspec.convert(msgspec.to_builtins(model), Model) == model


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        ("hf://org/name", ("hf", "org/name", "org", "name", "", False, True)),
        ("s3://bucket/a/b", ("s3", "bucket/a/b", "bucket", "a/b", "", False, True)),
        ("gs://bucket/a", ("gs", "bucket/a", "bucket", "a", "", False, True)),
        ("oss://bucket/a", ("oss", "bucket/a", "bucket", "a", "", False, True)),
        ("pvc://claim", ("pvc", "claim", "claim", "", "", False, True)),
        ("pvc://claim/a/b", ("pvc", "claim/a/b", "claim", "a/b", "", False, True)),
        ("pvc://claim?model=qwen:0.5b", ("pvc", "claim", "claim", "", "qwen:0.5b", False, True)),
        ("ollama://gemma2:2b", ("ollama", "gemma2:2b", "gemma2:2b", "", "", False, True)),
        ("oci://r.io/a/b:1", ("oci", "r.io/a/b:1", "r.io", "a/b:1", "", False, True)),
        ("oci://r:5000/a", ("oci", "r:5000/a", "r:5000", "a", "", False, True)),
        ("oci://r/a:1?model=q.gguf", ("oci", "r/a:1", "r", "a:1", "q.gguf", False, True)),
        (
            "ollama://host:5000/x?insecure=true&pull=FALSE",
            ("ollama", "host:5000/x", "host:5000", "x", "", True, False),
        ),
    ],
)
def test_a_url_is_parsed_into_its_parts(url, parts):
    parsed = parse_url(url)
    assert parsed.original == url
    assert parts == (
        parsed.scheme,
        parsed.ref,
        parsed.name,
        parsed.path,
        parsed.model,
        parsed.insecure,
        parsed.pull,
    )


@pytest.mark.parametrize(
    ("url", "wrong"),
    [
        ("", "must be a URL with one of the schemes hf://"),
        ("org/name", "must be a URL with one of the schemes hf://"),
        ("http://host/x", "must be a URL with one of the schemes hf://"),
        ("hf://", "must be a URL with one of the schemes hf://"),
        ("hf://a b", "white space"),
        ("hf://a\nb", "white space"),
        ("hf://a?x\n", "must be a URL"),
        ("hf://-a/b", "must start with a letter"),
        ("pvc://Claim", "not a valid PersistentVolumeClaim name"),
        ("pvc://claim/../other", "must not contain '..'"),
        ("ollama://$(touch x)", "must start with a letter"),
        ("ollama://x;touch${IFS}y", "not a valid Ollama model name"),
        ("ollama://x`id`", "not a valid Ollama model name"),
        ("pvc://claim?model=--help", "not a valid name of a model"),
        ("pvc://claim?model=x;y", "not a valid name of a model"),
        ("pvc://claim?model=x@y", "not a valid name of a model"),
        ("oci://image", "must be an image with its registry"),
        ("oci://r/a:", "must be an image with its registry"),
        ("oci://r/$(a)", "must be an image with its registry"),
        ("oci://r/a:1?via=llmman", "the parameter 'via' is not supported"),
        ("oci://r/a:1?pull=false", "unknown parameter 'pull' for oci:// (known: model)"),
        ("ollama://x?pull=maybe", "pull must be true or false"),
        ("ollama://x?pull=true&pull=false", "duplicate parameter 'pull'"),
        ("ollama://x?model=y", "unknown parameter 'model' for ollama://"),
        ("hf://org/name?revision=abc", "unknown parameter 'revision' for hf://"),
    ],
)
def test_an_unsupported_url_is_an_error_of_its_field(url, wrong):
    with pytest.raises(ModelError) as caught:
        parse_url(url)
    assert caught.value.field == "spec.url"
    assert wrong in str(caught.value)
