"""A replica on several nodes: the LeaderWorkerSet, its leader and its workers."""

import re

import pytest

from kubeai.api.config.profiles import replica_requests
from kubeai.api.config.system import parse_config
from kubeai.api.model import decode_model
from kubeai.errors import ModelError
from kubeai.podspec import build_replica
from kubeai.podspec.groups import set_name

CONFIG = parse_config("""
resourceProfiles: {gpu: {limits: {nvidia.com/gpu: 1}}}
cacheProfiles: {fast: {sharedFilesystem: {storageClassName: nfs}}}
""")


def model(profile="gpu:8:2", name="m", annotations=None, **spec):
    return decode_model(
        {
            "metadata": {
                "name": name, "namespace": "ns", "uid": "u-1", "annotations": annotations or {},
            },
            "spec": {
                "url": "hf://org/name", "engine": "VLLM", "features": ["TextGeneration"],
                "resourceProfile": profile, **spec,
            },
        }
    )  # fmt: skip


def templates(config=CONFIG, **spec):
    built = build_replica(model(**spec), config)
    group = built["spec"]["leaderWorkerTemplate"]
    return group["leaderTemplate"], group["workerTemplate"]


def server(template):
    return next(c for c in template["spec"]["containers"] if c["name"] == "server")


def test_a_replica_is_one_group_of_as_many_pods_as_nodes():
    built = build_replica(model(), CONFIG)
    assert (built["apiVersion"], built["kind"]) == (
        "leaderworkerset.x-k8s.io/v1",
        "LeaderWorkerSet",
    )
    assert built["spec"]["replicas"] == 1
    group = built["spec"]["leaderWorkerTemplate"]
    assert group["size"] == 2
    assert group["restartPolicy"] == "RecreateGroupOnPodRestart"
    (owner,) = built["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["name"], owner["uid"]) == ("Model", "m", "u-1")


def test_each_pod_has_the_resources_of_one_node():
    for template in templates():
        assert server(template)["resources"] == {"limits": {"nvidia.com/gpu": "8"}}
    assert replica_requests(CONFIG, model()) == {"nvidia.com/gpu": 16 * 10**9}


def test_the_pods_of_vllm_find_each_other_by_the_variables_of_lws():
    leader, worker = map(server, templates(args=["--max-model-len=9"]))
    shared = [
        "org/name",
        "--served-model-name=m",
        "--tensor-parallel-size=8",
        "--pipeline-parallel-size=2",
        "--nnodes=2",
        "--master-addr=$(LWS_LEADER_ADDRESS)",
        "--max-model-len=9",
    ]
    assert leader["command"] == worker["command"] == ["vllm", "serve"]
    assert leader["args"] == [*shared, "--node-rank=0"]
    assert worker["args"] == [*shared, "--node-rank=$(LWS_WORKER_INDEX)", "--headless"]


def test_only_the_leader_has_an_api():
    leader, worker = map(server, templates())
    assert leader["ports"] == [{"name": "http", "containerPort": 8000, "protocol": "TCP"}]
    assert "ports" not in worker
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert probe in leader
        assert probe not in worker


def test_workers_are_known_by_uid_but_not_selected_by_service_and_scale():
    leader, worker = (template["metadata"]["labels"] for template in templates())
    assert leader["kubeai.org/model"] == "m"
    assert leader["app"] == "model"
    assert worker["kubeai.org/model-uid"] == leader["kubeai.org/model-uid"] == "u-1"
    assert worker["model"] == "m"
    assert worker["app.kubernetes.io/managed-by"] == "kubeai"
    assert "kubeai.org/model" not in worker
    assert "app" not in worker


def test_files_cache_adapters_and_patches_are_in_every_pod():
    spec = {
        "files": [{"path": "/etc/a", "content": "x"}],
        "adapters": [{"name": "a", "url": "hf://org/lora"}],
        "cacheProfile": "fast",
        "jsonPatches": [{"op": "add", "path": "/spec/hostNetwork", "value": True}],
    }
    for template in templates(**spec):
        mounts = {mount["mountPath"] for mount in server(template)["volumeMounts"]}
        assert {"/etc/a", "/adapters", "/models/m-u-1", "/dev/shm"} <= mounts
        assert [c["name"] for c in template["spec"]["containers"]] == ["server", "loader"]
        assert template["spec"]["hostNetwork"] is True
        assert "--enable-lora" in server(template)["args"]


def test_one_node_needs_no_set_but_gets_arguments_to_use_its_gpus():
    pod = build_replica(model("gpu:4:1"), CONFIG)
    assert pod["kind"] == "Pod"
    assert server(pod)["args"][-2:] == ["--tensor-parallel-size=4", "--pipeline-parallel-size=1"]
    plain = build_replica(model("gpu:4"), CONFIG)
    assert not any("parallel" in argument for argument in server(plain)["args"])


def test_topology_annotations_of_the_model_reach_the_set():
    topology = {"leaderworkerset.sigs.k8s.io/exclusive-topology": "rack"}
    built = build_replica(model(annotations=topology | {"other": "x"}), CONFIG)
    assert built["metadata"]["annotations"] == topology


def test_a_change_of_the_nodes_is_a_new_version():
    def hash_of(profile):
        return build_replica(model(profile), CONFIG)["metadata"]["labels"]["pod-hash"]

    assert len({hash_of(profile) for profile in ("gpu:8", "gpu:8:1", "gpu:8:2", "gpu:8:3")}) == 4


@pytest.mark.parametrize(
    ("profile", "why"),
    [
        ("gpu:8:0", "the nodes of 'gpu:8:0' must be from 1 to"),
        ("gpu:8:999", "the nodes of 'gpu:8:999' must be from 1 to"),
        ("gpu:8:2:1", "must be <profile>:<count>"),
        ("gpu:8:", "must be <profile>:<count>"),
        ("gpu::2", "must be <profile>:<count>"),
        (":2", "must be <profile>:<count>"),
        (":2:2", "must be <profile>:<count>"),
        ("none:8:2", "no resource profile 'none'"),
    ],
)
def test_an_invalid_number_of_nodes_is_an_error_of_the_profile(profile, why):
    with pytest.raises(ModelError, match=re.escape(why)) as caught:
        build_replica(model(profile), CONFIG)
    assert (caught.value.field, caught.value.reason) == ("spec.resourceProfile", "InvalidProfile")


def test_nodes_and_topology_are_covered_by_the_hash_whatever_the_arguments():
    rack = {"leaderworkerset.sigs.k8s.io/exclusive-topology": "rack"}
    hashes = [
        build_replica(model(profile, annotations=given, image="kubeai/mock-engine"), CONFIG)[
            "metadata"
        ]["labels"]["pod-hash"]
        for profile in ("gpu:8", "gpu:8:2", "gpu:8:3")
        for given in ({}, rack)
    ]
    assert hashes[0] == hashes[1]  # there is no set
    assert len(set(hashes)) == 5


def test_arguments_and_ports_may_be_null_as_in_kubernetes():
    for what in ("args", "ports"):
        patch = {"op": "replace", "path": f"/spec/containers/0/{what}", "value": None}
        leader, worker = templates(jsonPatches=[patch])
        assert server(leader)[what] is None
        assert not server(worker).get("ports")


def test_an_engine_that_runs_on_one_node_says_so():
    with pytest.raises(ModelError, match="Infinity does not run on several nodes"):
        build_replica(model(engine="Infinity"), CONFIG)


@pytest.mark.parametrize("args", [["--model=org/other"], ["-x", "--model", "org/other"]])
def test_a_model_among_the_arguments_is_an_error_that_says_what_to_do(args):
    with pytest.raises(ModelError, match=r"use spec\.url") as caught:
        build_replica(model(args=args), CONFIG)
    assert (caught.value.field, caught.value.reason) == ("spec.args", "InvalidArgs")
    for profile in ("gpu:8:1", "gpu:8"):
        build_replica(model(profile, args=args), CONFIG)
    build_replica(model(args=["--model-impl=vllm"]), CONFIG)


@pytest.mark.parametrize(
    "name", ["m", "llama-3.1-8b", "a" * 40, "deepseek-r1-671b.with-a-long-name"]
)
def test_the_name_leaves_room_for_what_statefulsets_append(name):
    named = set_name(model(name=name), "abcdefgh", 0)
    assert re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", named)  # it names a Service
    assert len(f"{named}-0-0123456789") <= 63  # the label controller-revision-hash of the workers
    assert named != set_name(model(name=name), "abcdefgh", 1)
