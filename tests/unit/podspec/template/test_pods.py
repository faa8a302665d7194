"""The pod of every engine: labels, probes, the profile, settings of the Model, and the hash."""

import pytest
from fakes.engine_pods import CONFIG, each_engine, env, hash_label, model, patched, pod, server

from kubeai.api.config.system import parse_config
from kubeai.errors import ModelError
from kubeai.podspec import build_pod, pod_hash


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
