"""The engines' pods as built from a Model and the system config."""

import copy
import re

import msgspec
import pytest
import yaml
from fakes.engine_pods import CONFIG, ENGINES, URLS, env, hash_label, model, pod, server
from repository import REPOSITORY

from kubeai.api.config.system import parse_config
from kubeai.api.model import decode_model
from kubeai.api.model_url import URL_PATTERN, parse_url
from kubeai.errors import ModelError
from kubeai.podspec import build_pod, files_config_map, pod_hash, sources


def patched(*patches):
    return parse_config(msgspec.json.encode({"modelServerPods": {"jsonPatches": patches}}).decode())


each_engine = pytest.mark.parametrize("engine", ENGINES)


# -- what all engines share ----------------------------------------------------------------------


@each_engine
def test_labels_name_the_model_and_engine_of_a_pod(engine):
    metadata = pod(engine)["metadata"]
    hash_ = metadata["labels"].pop("pod-hash")
    assert metadata["labels"] == {
        "app": "model",
        "model": "m",
        "app.kubernetes.io/name": engine.lower(),
        "app.kubernetes.io/instance": f"{engine.lower()}-m",
        "app.kubernetes.io/managed-by": "kubeai",
        "kubeai.org/model": "m",
        "kubeai.org/model-uid": "u-1",
    }
    assert hash_ == pod(engine)["metadata"]["labels"]["pod-hash"]
    assert "name" not in metadata
    assert metadata["namespace"] == "ns"
    (owner,) = metadata["ownerReferences"]
    assert (owner["kind"], owner["name"], owner["uid"]) == ("Model", "m", "u-1")
    assert owner["controller"] is True


@each_engine
def test_a_pod_has_port_8000_shared_memory_and_probes(engine):
    built = pod(engine)
    container = server(built)
    assert container["ports"] == [{"name": "http", "containerPort": 8000, "protocol": "TCP"}]
    assert {"name": "dshm", "emptyDir": {"medium": "Memory"}} in built["spec"]["volumes"]
    assert {"name": "dshm", "mountPath": "/dev/shm"} in container["volumeMounts"]
    path = "/" if engine == "OLlama" else "/health"
    for kind, period, timeout in (("readinessProbe", 10, 2), ("livenessProbe", 30, 3)):
        probe = container[kind]
        assert probe["httpGet"] == {"path": path, "port": "http"}
        assert (probe["periodSeconds"], probe["failureThreshold"]) == (period, 3)
        assert probe["timeoutSeconds"] == timeout


@pytest.mark.parametrize(
    ("engine", "image", "failures"),
    [
        ("VLLM", "", 5400),
        ("SGLang", "", 5400),
        ("LlamaCpp", "", 5400),
        ("FasterWhisper", "fedirz/faster-whisper-server:latest-cpu", 900),
        ("Infinity", "", 600),
    ],
)
def test_each_engine_has_its_startup_timeout(engine, image, failures):
    probe = server(pod(engine, image=image))["startupProbe"]
    assert probe["httpGet"] == {"path": "/health", "port": "http"}
    assert (probe["periodSeconds"], probe["failureThreshold"]) == (2, failures)


SETTINGS = """
modelServerPods:
  serviceAccountName: models
  podSecurityContext: {fsGroup: 7}
  securityContext: {runAsUser: 7}
  imagePullSecrets: [{name: pull}]
resourceProfiles:
  gpu:
    imageName: nvidia-gpu
    requests: {cpu: 500m, memory: 1Gi}
    limits: {nvidia.com/gpu: 1}
    nodeSelector: {pool: gpu}
    affinity: {podAntiAffinity: {x: [1]}}
    tolerations: [{key: nvidia.com/gpu, operator: Exists}]
    schedulerName: special
    runtimeClassName: nvidia
gateway: {drainTimeout: 90500ms}
"""


@each_engine
def test_profile_and_pod_settings_reach_the_pod_of_every_engine(engine):
    config = parse_config(SETTINGS)
    built = pod(engine, config, resourceProfile="gpu:3", priorityClassName="high")
    spec, container = built["spec"], server(built)
    assert container["resources"] == {
        "requests": {"cpu": "1500m", "memory": "3Gi"},
        "limits": {"nvidia.com/gpu": "3"},
    }
    assert container["securityContext"] == {"runAsUser": 7}
    assert container["image"] == config.model_servers.images(engine)["nvidia-gpu"]
    assert spec["securityContext"] == {"fsGroup": 7}
    assert spec["serviceAccountName"] == "models"
    assert spec["imagePullSecrets"] == [{"name": "pull"}]
    assert spec["nodeSelector"] == {"pool": "gpu"}
    assert spec["affinity"] == {"podAntiAffinity": {"x": [1]}}
    assert spec["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists"}]
    assert spec["schedulerName"] == "special"
    assert spec["runtimeClassName"] == "nvidia"
    assert spec["priorityClassName"] == "high"
    assert spec["terminationGracePeriodSeconds"] == 91


def test_unset_settings_are_omitted():
    built = pod()
    assert set(built["spec"]) == {"terminationGracePeriodSeconds", "containers", "volumes"}
    assert "resources" not in server(built)
    assert "securityContext" not in server(built)


@pytest.mark.parametrize(
    ("drain", "grace_s"), [("5m", 300), ("1s", 10), ("0", 10), ("10001ms", 11)]
)
def test_the_grace_period_covers_the_drain_timeout(drain, grace_s):
    config = parse_config(f"gateway: {{drainAccept: 0, drainTimeout: {drain}}}")
    assert pod(config=config)["spec"]["terminationGracePeriodSeconds"] == grace_s


def test_the_models_image_overrides_the_profiles_which_overrides_the_default():
    config = parse_config("modelServers: {VLLM: {images: {default: d, cpu: c}}}")
    assert server(pod(config=config, resourceProfile="cpu:1", image="mine"))["image"] == "mine"
    assert server(pod(config=config, resourceProfile="cpu:1"))["image"] == "c"
    assert server(pod(config=config, resourceProfile="nvidia-gpu-l4:1"))["image"] == "d"
    assert server(pod(config=config))["image"] == "d"


def test_an_unknown_profile_is_reported():
    with pytest.raises(ModelError, match=r"spec\.resourceProfile: .*'gpu-l5'") as caught:
        pod(resourceProfile="gpu-l5:1")
    assert caught.value.reason == "InvalidProfile"


@each_engine
def test_the_models_env_takes_precedence_and_comes_last_in_order(engine):
    built = pod(engine, env={"ZED": "1", "ABLE": "$(HF_TOKEN)", "OLLAMA_HOST": "h"})
    names = [variable["name"] for variable in server(built)["env"]]
    assert names[-3:] == ["ABLE", "OLLAMA_HOST", "ZED"]
    assert len(names) == len(set(names))
    assert env(built)["OLLAMA_HOST"] == "h"
    assert env(built)["ABLE"] == "$(HF_TOKEN)"


def test_env_from_refers_to_config_maps_and_secrets():
    built = pod(
        envFrom=[
            {"prefix": "P_", "configMapRef": {"name": "c"}},
            {"secretRef": {"name": "s", "optional": True}},
        ]
    )
    assert server(built)["envFrom"] == [
        {"prefix": "P_", "configMapRef": {"name": "c"}},
        {"secretRef": {"name": "s", "optional": True}},
    ]


def test_annotations_with_the_endpoints_address_reach_the_pod():
    given = {"model-pod-ip": "10.0.0.9", "model-pod-port": "9000", "other": "x"}
    assert build_pod(model(annotations=given), CONFIG)["metadata"]["annotations"] == {
        "model-pod-ip": "10.0.0.9",
        "model-pod-port": "9000",
    }
    assert pod()["metadata"]["annotations"] == {"model-pod-port": "8000"}


# -- where weights come from ---------------------------------------------------------------------


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


def secret(name, key):
    return {"secretKeyRef": {"name": name, "key": key, "optional": True}}


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


# -- files ---------------------------------------------------------------------------------------

FILES = [{"path": "/etc/a/b.txt", "content": "one"}, {"path": "/c", "content": "two"}]


def test_each_file_is_mounted_from_the_models_config_map():
    built = pod(files=FILES)
    assert {"name": "model-files", "configMap": {"name": "model-m-files"}} in built["spec"][
        "volumes"
    ]
    mounts = [m for m in server(built)["volumeMounts"] if m["name"] == "model-files"]
    assert [(m["mountPath"], m["subPath"], m["readOnly"]) for m in mounts] == [
        ("/etc/a/b.txt", "_etc_a_b.txt", True),
        ("/c", "_c", True),
    ]
    config_map = files_config_map(model(files=FILES))
    assert config_map["metadata"]["name"] == "model-m-files"
    assert config_map["metadata"]["ownerReferences"][0]["uid"] == "u-1"
    assert config_map["data"] == {"_etc_a_b.txt": "one", "_c": "two"}
    assert files_config_map(model()) is None


def test_an_edited_file_changes_the_pod_hash():
    edited = [FILES[0], {"path": "/c", "content": "three"}]
    assert pod_hash(pod(files=FILES)) != pod_hash(pod(files=edited))
    assert pod_hash(pod(files=FILES)) != pod_hash(pod())


@pytest.mark.parametrize(
    ("paths", "field", "reason"),
    [
        (["/a/b", "/a_b"], "spec.files[1].path", "map to the same key '_a_b'"),
        (["/a b"], "spec.files[0].path", "may contain only letters"),
        (["/" + "a" * 300], "spec.files[0].path", "at most 253"),
        (["/x", "/dev/shm"], "spec.files[1].path", "is already the mount path"),
    ],
)
def test_a_path_invalid_for_a_config_map_or_pod_is_reported(paths, field, reason):
    with pytest.raises(ModelError) as caught:
        pod(files=[{"path": path, "content": ""} for path in paths])
    assert (caught.value.field, caught.value.reason) == (field, "InvalidFile")
    assert reason in str(caught.value)


# -- patches -------------------------------------------------------------------------------------


def test_patches_are_applied_in_order_and_change_the_hash():
    config = patched(
        {"op": "add", "path": "/spec/containers/0/env/-", "value": {"name": "A", "value": "1"}},
        {"op": "add", "path": "/spec/priorityClassName", "value": "low"},
        {"op": "replace", "path": "/spec/priorityClassName", "value": "high"},
        {"op": "add", "path": "/metadata/annotations/x~1y", "value": "z"},
        {"op": "remove", "path": "/spec/containers/0/livenessProbe"},
    )
    built = pod(config=config)
    assert env(built)["A"] == "1"
    assert built["spec"]["priorityClassName"] == "high"
    assert built["metadata"]["annotations"]["x/y"] == "z"
    assert "livenessProbe" not in server(built)
    assert hash_label(built) != hash_label(pod())


def test_building_pods_does_not_modify_the_config():
    config = patched(
        {"op": "add", "path": "/spec/tolerations", "value": [{"key": "a"}]},
        {"op": "add", "path": "/spec/tolerations/-", "value": {"key": "b"}},
        {"op": "replace", "path": "/spec/tolerations/0/key", "value": "c"},
    )
    before = copy.deepcopy(config)
    first, second = pod(config=config), pod(config=config)
    assert first == second
    assert first["spec"]["tolerations"] == [{"key": "c"}, {"key": "b"}]
    first["spec"]["tolerations"].clear()
    assert config == before
    assert pod(config=config) == second


OK = {"op": "add", "path": "/spec/hostname", "value": "x"}


@pytest.mark.parametrize(
    "bad",
    [
        {"op": "remove", "path": "/spec/nosuch"},
        {"op": "replace", "path": "/spec/nosuch", "value": 1},
        {"op": "add", "path": "/spec/nosuch/below", "value": 1},
        {"op": "add", "path": "/spec/containers/7/image", "value": "x"},
        {"op": "add", "path": "/spec/containers/first/image", "value": "x"},
        {"op": "add", "path": "/spec/hostname/below", "value": 1},
        {"op": "test", "path": "/spec/hostname", "value": "y"},
        {"op": "move", "from": "/spec/nosuch", "path": "/spec/x"},
        {"op": "remove", "path": "/spec/containers/0"},
        {"op": "replace", "path": "/spec/containers", "value": 5},
        {"op": "remove", "path": "/metadata/labels/model"},
        {"op": "replace", "path": "", "value": []},
    ],
)
def test_a_patch_that_cannot_be_applied_is_reported_with_its_path(bad):
    with pytest.raises(ModelError) as caught:
        pod(config=patched(OK, bad))
    assert caught.value.field == "modelServerPods.jsonPatches[1]"
    assert caught.value.reason == "InvalidPatch"
    assert f"{bad['op']} {bad['path']!r}" in str(caught.value)


def test_a_models_patches_may_move_and_replace():
    patches = [
        {"op": "move", "from": "/spec/containers/0/livenessProbe", "path": "/spec/probe"},
        {"op": "replace", "path": "/spec/probe/periodSeconds", "value": 7},
        {"op": "move", "from": "/spec/probe", "path": "/spec/containers/0/livenessProbe"},
    ]
    built = pod(jsonPatches=patches)
    assert server(built)["livenessProbe"]["periodSeconds"] == 7
    assert hash_label(built) != hash_label(pod())
    assert built == pod(jsonPatches=patches)  # the patches themselves are unchanged


COPY = {"op": "copy", "from": "/spec", "path": "/spec/x"}


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ({"op": "remove", "path": "/spec/nosuch"}, "remove '/spec/nosuch' cannot be applied"),
        ({"op": "remove", "path": "/metadata/annotations"}, "not the manifest of a pod"),
        ({"op": "replace", "path": "/metadata/labels", "value": []}, "$.metadata.labels"),
        ({"op": "add", "path": "/spec/initContainers", "value": ["x"]}, "$.spec.initContainers[0]"),
        ({"op": "add", "path": "/spec/initContainers", "value": [{}]}, "$.spec.initContainers[0]"),
        ({"op": "replace", "path": "/spec/containers/0", "value": 1}, "$.spec.containers[0]"),
        ({"op": "replace", "path": "/spec/containers/0/args", "value": "x"}, "containers[0].args"),
        ({"op": "add", "path": "/spec/containers/0/ports/-", "value": "x"}, "[0].ports[1]"),
        ({"op": "remove", "path": "/kind"}, "`kind`"),
        ({"op": "replace", "path": "/kind", "value": "Service"}, "$.kind"),
        ({"op": "add", "path": "/metadata/labels/x", "value": 3}, "$.metadata.labels[...]"),
        (
            {
                "op": "add",
                "path": "/metadata/labels/leaderworkerset.sigs.k8s.io~1name",
                "value": "x",
            },
            "'leaderworkerset.sigs.k8s.io/name' is reserved",
        ),
        (
            {"op": "add", "path": "/metadata/labels/kubeai.org~1job", "value": "x"},
            "'kubeai.org/job' is reserved",
        ),
        (
            {"op": "add", "path": "/metadata/annotations/kubeai.org~1draining-since", "value": "1"},
            "'kubeai.org/draining-since' is reserved",
        ),
        ({"op": "add", "path": "/spec/x", "value": "y" * (1 << 20)}, "larger than 1048576 bytes"),
    ],
)
def test_a_models_patch_that_cannot_be_applied_is_reported_with_its_path(bad, why):
    with pytest.raises(ModelError) as caught:
        pod(config=patched(OK), jsonPatches=[OK, bad])
    assert caught.value.field == "spec.jsonPatches[1]"
    assert caught.value.reason == "InvalidPatch"
    assert why in str(caught.value)


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ({"op": "add", "path": "/spec/nosuch/x", "value": 1}, "member 'nosuch' not found"),
        ({"op": "test", "path": "/spec/nosuch", "value": 1}, "member 'nosuch' not found"),
        ({"op": "test", "path": "/spec/containers/0/env", "value": []}, "the value is different"),
        ({"op": "copy", "from": "/spec/containers/0/env/x/y", "path": "/spec/x"}, "'x' is not"),
        ({"op": "move", "from": "/spec/nosuch", "path": "/spec/x"}, "member 'nosuch' not found"),
    ],
)
def test_a_patch_that_cannot_be_applied_does_not_show_the_content_of_the_pod(bad, why):
    # Clients of the API get this message.
    with pytest.raises(ModelError) as caught:
        pod(env={"TOKEN": "secret"}, jsonPatches=[bad])
    assert why in str(caught.value)
    assert "secret" not in str(caught.value)
    assert len(str(caught.value)) < 200


def test_patches_that_double_the_pod_again_and_again_are_stopped():
    with pytest.raises(ModelError, match="jsonPatches"):
        pod(jsonPatches=[COPY, *({**COPY, "path": f"/spec/x{n}"} for n in range(60))])


# -- weights in an image -------------------------------------------------------------------------


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


# -- hash ----------------------------------------------------------------------------------------


def test_the_hash_is_stable_and_valid_in_a_label_and_a_name():
    assert pod_hash(pod()) == pod_hash(pod())
    assert pod_hash({"metadata": {}, "spec": {"a": 1, "b": 2}}) == pod_hash(
        {"metadata": {}, "spec": {"b": 2, "a": 1}}
    )
    hash_ = pod_hash({"metadata": {}, "spec": {"containers": []}})
    assert hash_ == "cnmyvzfm"  # a new release must not replace every pod
    assert len(f"model-{'a' * 40}-{hash_}-12345") <= 63


ADAPTERS = [{"name": "a", "url": "hf://a/b"}]


@pytest.mark.parametrize(
    ("engine", "image", "hash_"),
    [
        ("VLLM", "registry.example/engine:v1", "pim5cbv6"),
        ("VLLM", "vllm/vllm-openai:v0.5.5", "caqyp5lm"),
        ("FasterWhisper", "fedirz/faster-whisper-server:latest-cpu", "iy6nxgjx"),
        ("Infinity", "", "gxrnzvcd"),
    ],
)
def test_an_upgrade_does_not_replace_existing_pods(engine, image, hash_):
    """These hashes are older than `vllm serve`, and than a terminationMessagePolicy."""
    assert hash_label(pod(engine, image=image)) == hash_


def test_a_failing_container_leaves_the_end_of_its_log_in_the_pods_status():
    config = patched(
        {"op": "add", "path": "/spec/initContainers", "value": [{"name": "first"}]},
    )
    spec = pod(config=config, adapters=ADAPTERS)["spec"]
    containers = [*spec["initContainers"], *spec["containers"]]
    assert [container["name"] for container in containers] == ["first", "server", "loader"]
    policies = {container["terminationMessagePolicy"] for container in containers}
    assert policies == {"FallbackToLogsOnError"}


def test_a_patch_may_set_another_termination_message_policy():
    path = "/spec/containers/0/terminationMessagePolicy"
    built = pod(config=patched({"op": "add", "path": path, "value": "File"}))
    assert server(built)["terminationMessagePolicy"] == "File"
    assert hash_label(built) != hash_label(pod())


@pytest.mark.parametrize(
    "change",
    [{"image": "i"}, {"args": ["--x"]}, {"env": {"A": "1"}}, {"resourceProfile": "cpu:1"}],
)
def test_a_change_to_the_pod_changes_the_hash(change):
    assert pod_hash(pod(**change)) != pod_hash(pod())


@pytest.mark.parametrize(
    "change",
    [
        {"replicas": 3},
        {"minReplicas": 1},
        {"targetRequests": 5},
        {"owner": "x"},
        {"loadBalancing": {"strategy": "PrefixHash"}},
    ],
)
def test_scaling_and_routing_fields_do_not_change_the_hash(change):
    assert pod_hash(pod(**change)) == pod_hash(pod())


# -- the mock ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "image",
    [
        "mock-engine",
        "kubeai/mock-engine",
        "registry:5000/x/mock-engine:v1.2",
        "kubeai/mock-engine@sha256:abc",
    ],
)
@each_engine
def test_the_mock_engine_can_stand_in_for_any_engine_and_the_pod_shows_it(engine, image):
    built = pod(engine, image=image, args=["--startup-delay=2s"])
    container, real = server(built), pod(engine)
    assert container["command"] == ["kubeai", "mock-engine"]
    assert container["args"] == [
        f"--engine={engine}",
        f"--model={URLS.get(engine, 'hf://org/name')}",
        "--served-model-name=m",
        "--port=8000",
        "--startup-delay=2s",
    ]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": "http"}
    assert built["metadata"]["annotations"]["kubeai.org/mock-engine"] == "true"
    added = {"POD_IP": None}
    assert env(built) == env(real) | added if "env" in server(real) else added
    assert "kubeai.org/mock-engine" not in real["metadata"]["annotations"]


def test_the_mock_engine_can_be_configured():
    config = parse_config("modelServers: {VLLM: {images: {default: kubeai/mock-engine}}}")
    assert server(pod(config=config, resourceProfile="cpu:1"))["command"][1] == "mock-engine"


@pytest.mark.parametrize("image", ["kubeai/mock-engine-2", "mock-engine/vllm", "vllm", "my-mock"])
def test_other_images_are_not_the_mock_engine(image):
    assert "kubeai.org/mock-engine" not in pod(image=image)["metadata"]["annotations"]


# -- the examples --------------------------------------------------------------------------------

EXAMPLES = sorted([*REPOSITORY.glob("examples/*.yaml"), *REPOSITORY.glob("examples/real/*.yaml")])


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.name)
def test_each_example_is_a_model_that_builds_a_pod(file):
    for document in yaml.safe_load_all(file.read_text()):
        built = build_pod(decode_model(document), CONFIG)
        mock = built["metadata"]["annotations"].get("kubeai.org/mock-engine")
        assert (mock == "true") == (file.parent.name == "examples")
