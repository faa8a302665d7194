"""The generated CRD: equal to the installed file, structural, and correct about valid Models.

Schema and rules are checked here without an API server, by a JSON schema validator and a CEL
interpreter. The contract tests check that a real kube-apiserver gives the same results.
"""

import copy
import re

import cel
import jsonschema_rs
import pytest
import yaml
from repository import REPOSITORY

from kubeai.api.crd import crd_yaml, model_crd

FILE = REPOSITORY / "charts/kubeai/files/kubeai.org_models.yaml"
VERSION = model_crd()["spec"]["versions"][0]
SCHEMA = VERSION["schema"]["openAPIV3Schema"]
SPEC = SCHEMA["properties"]["spec"]


def model(name="m", **change):
    spec = {"url": "hf://a/b", "engine": "VLLM", "features": ["TextGeneration"], **change}
    spec = {key: value for key, value in spec.items() if value is not None}
    return {
        "apiVersion": "kubeai.org/v1",
        "kind": "Model",
        "metadata": {"name": name},
        "spec": spec,
    }


def with_defaults(schema, value):
    """Apply defaults as the API server does before validation."""
    if isinstance(value, dict):
        for key, below in schema.get("properties", {}).items():
            if key not in value and "default" in below:
                value[key] = copy.deepcopy(below["default"])
            if key in value:
                value[key] = with_defaults(below, value[key])
    if isinstance(value, list):
        value = [with_defaults(schema.get("items", {}), item) for item in value]
    return value


def broken_rules(schema, value, old=None):
    """Messages of the violated CEL rules; transition rules need an old value."""
    messages = []
    for rule in schema.get("x-kubernetes-validations", []):
        if "oldSelf" in rule["rule"]:
            if old is None:
                continue
            context = {"self": value, "oldSelf": old}
        else:
            context = {"self": value}
        if not cel.evaluate(rule["rule"], context):
            messages.append(rule["message"])
    if isinstance(value, dict):
        for key, below in schema.get("properties", {}).items():
            if key in value:
                messages += broken_rules(below, value[key], (old or {}).get(key))
    if isinstance(value, list):
        for item in value:
            messages += broken_rules(schema.get("items", {}), item)
    return messages


def errors(obj, old=None):
    obj = with_defaults(SCHEMA, copy.deepcopy(obj))
    if old is not None:
        old = with_defaults(SCHEMA, copy.deepcopy(old))
    found = [e.message for e in jsonschema_rs.Draft7Validator(SCHEMA).iter_errors(obj)]
    return found or broken_rules(SCHEMA, obj, old)


def test_the_installed_file_equals_the_generated_crd():
    assert FILE.read_text() == crd_yaml(), "run: python -m kubeai.api.crd > " + str(FILE)
    assert yaml.safe_load(FILE.read_text()) == model_crd()


def walk(schema, path):
    yield path, schema
    for key, below in schema.get("properties", {}).items():
        yield from walk(below, f"{path}.{key}")
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            yield from walk(schema[key], f"{path}[]")


def test_each_field_has_a_type_and_a_description_for_explain():
    for path, schema in walk(SCHEMA, "model"):
        if path == "model.spec.jsonPatches[].value":
            assert schema["x-kubernetes-preserve-unknown-fields"]  # any JSON
            assert schema["nullable"]
            continue
        assert schema["type"] in ("object", "array", "string", "integer", "boolean"), path
        simple = path.endswith("[]") and schema["type"] == "string"
        if not simple and path not in ("model.apiVersion", "model.kind", "model.metadata"):
            assert schema.get("description"), path


def test_the_schema_has_every_field_in_the_reference():
    fields = """
        url adapters features engine resourceProfile cacheProfile image args env envFrom replicas
        minReplicas maxReplicas autoscalingDisabled targetRequests scaleDownDelaySeconds owner
        loadBalancing files priorityClassName
    """
    of_others = {"jsonPatches"}  # proposed for KubeAI in Go
    ours = {"aliases", "fallbacks", "waitBeforeFallback", "canary"}
    assert set(SPEC["properties"]) == set(fields.split()) | of_others | ours
    assert SPEC["required"] == ["url", "engine", "features"]


def test_subresources_and_printer_columns():
    assert VERSION["subresources"]["status"] == {}
    assert VERSION["subresources"]["scale"] == {
        "specReplicasPath": ".spec.replicas",
        "statusReplicasPath": ".status.replicas.all",
        "labelSelectorPath": ".status.selector",
    }
    columns = VERSION["additionalPrinterColumns"]
    narrow = [column["name"].upper() for column in columns if not column.get("priority")]
    assert narrow == ["ENGINE", "REPLICAS", "READY", "STATUS", "AGE"]
    conditions = SCHEMA["properties"]["status"]["properties"]["conditions"]
    assert conditions["x-kubernetes-list-map-keys"] == ["type"]


def test_the_api_server_applies_the_defaults_in_the_reference():
    spec = with_defaults(SCHEMA, model())["spec"]
    assert spec["minReplicas"] == 0
    assert spec["targetRequests"] == 100
    assert spec["scaleDownDelaySeconds"] == 30
    assert spec["loadBalancing"] == {
        "strategy": "LeastLoad",
        "prefixHash": {"meanLoadFactor": 125, "replication": 20, "prefixCharLength": 100},
    }
    for unset in ("replicas", "maxReplicas", "autoscalingDisabled", "owner", "args", "adapters"):
        assert unset not in spec


LORA = {"name": "a-1", "url": "s3://x/y"}
GOOD = {
    "minimal": model(),
    "maxReplicas alone": model(maxReplicas=3),
    "equal bounds": model(minReplicas=3, maxReplicas=3),
    "no features": model(features=[]),
    "reranking": model(engine="Infinity", features=["Reranking"]),
    "name of 40": model("a" * 40),
    "adapters": model(adapters=[LORA]),
    "adapter on a claim": model(adapters=[LORA | {"url": "pvc://claim/path"}]),
    "SGLang": model(engine="SGLang", cacheProfile="c"),
    "LlamaCpp": model(engine="LlamaCpp"),
    "no adapters on OLlama": model(engine="OLlama", url="ollama://x", adapters=[]),
    "hf cached": model(cacheProfile="c"),
    "s3 cached": model(url="s3://a/b", cacheProfile="c"),
    "s3 not cached": model(url="s3://a/b"),
    "gs cached": model(url="gs://a/b", cacheProfile="c"),
    "oss cached": model(url="oss://a/b", cacheProfile="c"),
    "pvc": model(url="pvc://claim/path"),
    "ollama": model(url="ollama://gemma2:2b", engine="OLlama"),
    "files": model(files=[{"path": f"/etc/{i}", "content": "x"} for i in range(10)]),
    "envFrom": model(envFrom=[{"secretRef": {"name": "s"}}]),
    "replicas 0": model(replicas=0),
    "factor 100": model(loadBalancing={"prefixHash": {"meanLoadFactor": 100}}),
}


@pytest.mark.parametrize("case", GOOD)
def test_a_valid_model_is_accepted(case):
    assert errors(GOOD[case]) == []


BAD = {
    "name of 41": (model("a" * 41), "not be longer than 40"),
    "no url": (model(url=None), '"url" is a required property'),
    "no engine": (model(engine=None), '"engine" is a required property'),
    "no features": (model(features=None), '"features" is a required property'),
    "unknown scheme": (model(url="http://x"), "url must start with one of"),
    "empty url": (model(url=""), "url must start with one of"),
    "unknown engine": (model(engine="vllm"), "is not one of"),
    "unknown feature": (model(features=["Singing"]), "is not one of"),
    "pvc cached": (model(url="pvc://c", cacheProfile="x"), "cacheProfile is only possible"),
    "ollama cached": (
        model(url="ollama://c", engine="OLlama", cacheProfile="x"),
        "cacheProfile is only possible",
    ),
    "gs not cached": (model(url="gs://a/b"), "gs:// needs a cacheProfile"),
    "oss not cached": (model(url="oss://a/b"), "oss:// needs a cacheProfile"),
    "oss with an empty cache": (model(url="oss://a/b", cacheProfile=""), "needs a cacheProfile"),
    "min over max": (model(minReplicas=3, maxReplicas=2), "less than or equal to maxReplicas"),
    "negative min": (model(minReplicas=-1), "less than the minimum of 0"),
    "max 0": (model(maxReplicas=0), "less than the minimum of 1"),
    "target 0": (model(targetRequests=0), "less than the minimum of 1"),
    "negative replicas": (model(replicas=-1), "less than the minimum of 0"),
    "replicas as text": (model(replicas="1"), 'not of type "integer"'),
    "factor 99": (
        model(loadBalancing={"prefixHash": {"meanLoadFactor": 99}}),
        "less than the minimum of 100",
    ),
    "unknown strategy": (model(loadBalancing={"strategy": "Random"}), "is not one of"),
    "adapter elsewhere": (
        model(engine="Infinity", adapters=[LORA]),
        "only possible with the VLLM engine",
    ),
    "adapter url": (model(adapters=[LORA | {"url": "oci://x"}]), "adapter's url must start with"),
    "llama.cpp cached": (
        model(engine="LlamaCpp", cacheProfile="c"),
        "not possible with the LlamaCpp engine",
    ),
    "adapter name": (model(adapters=[LORA | {"name": "A_1"}]), "does not match"),
    "adapter name of 64": (model(adapters=[LORA | {"name": "a" * 64}]), "longer than 63"),
    "eleven files": (
        model(files=[{"path": f"/{i}", "content": ""} for i in range(11)]),
        "has more than 10 items",
    ),
    "same path twice": (model(files=[{"path": "/a", "content": ""}] * 2), "must be unique"),
    "relative path": (model(files=[{"path": "a", "content": ""}]), "path must be absolute"),
    "colon in path": (model(files=[{"path": "/a:b", "content": ""}]), "not contain a colon"),
    "long path": (model(files=[{"path": "/" * 1025, "content": ""}]), "longer than 1024"),
    "long content": (model(files=[{"path": "/a", "content": "x" * 100_001}]), "than 100000"),
}


@pytest.mark.parametrize("case", BAD)
def test_an_invalid_model_is_rejected_with_a_reason(case):
    obj, reason = BAD[case]
    assert any(reason in message for message in errors(obj)), errors(obj)


CACHED = model(cacheProfile="c")
CHANGES = {
    "other cacheProfile": (CACHED, model(cacheProfile="d"), "cacheProfile is immutable"),
    "no cacheProfile": (CACHED, model(), "cacheProfile is immutable"),
    "empty cacheProfile": (CACHED, model(cacheProfile=""), "cacheProfile is immutable"),
    "other url": (CACHED, model(cacheProfile="c", url="hf://a/c"), "url is immutable while"),
    "other image": (CACHED, model(cacheProfile="c", image="i"), None),
    "url without a cache": (model(), model(url="hf://a/c"), None),
    "a first cacheProfile": (model(), CACHED, None),
    "replication": (model(), model(loadBalancing={"prefixHash": {"replication": 5}}), None),
}


@pytest.mark.parametrize("case", CHANGES)
def test_an_update_is_accepted_or_rejected(case):
    old, new, reason = CHANGES[case]
    found = errors(new, old)
    assert (found == []) if reason is None else any(reason in m for m in found)


def documented_leaves(schema, path=""):
    """Fields that the docs list: those below objects and lists of objects."""
    for name, below in schema["properties"].items():
        item = below.get("items", {})
        where = f"{path}{name}"
        if where.endswith("Ref") or where == "conditions":
            yield where, below, False
        elif "properties" in below:
            yield from documented_leaves(below, f"{where}.")
        elif "properties" in item:
            yield from documented_leaves(item, f"{where}[].")
        else:
            yield where, below, name in schema.get("required", ())


def test_the_docs_list_every_field_with_its_default():
    text = (FILE.parents[3] / "docs/reference/model.md").read_text()
    spec, status = (re.split(r"^## ", text, flags=re.MULTILINE)[i] for i in (1, 5))
    assert spec.startswith("spec\n")
    assert status.startswith("status\n")
    rows = re.findall(r"^\| `([^`]+)` \| (\w+) \| ([^|]+) \|", spec, re.MULTILINE)
    documented = {name: default for name, _, default in rows}
    fields = {name: (below, needed) for name, below, needed in documented_leaves(SPEC)}
    assert set(documented) == set(fields)
    for name, (below, needed) in fields.items():
        default = f"`{below['default']}`" if "default" in below else "—"
        if below.get("type") == "boolean":
            default = "`false`"
        assert documented[name] == ("required" if needed else default), name
    named = set(re.findall(r"^\| `([^`]+)` ", status, re.MULTILINE))
    assert named == {name for name, _, _ in documented_leaves(SCHEMA["properties"]["status"])}
