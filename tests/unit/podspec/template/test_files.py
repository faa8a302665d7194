"""A Model's files in the pod."""

import pytest
from fakes.engine_pods import model, pod, server

from kubeai.errors import ModelError
from kubeai.podspec import files_config_map, pod_hash

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
