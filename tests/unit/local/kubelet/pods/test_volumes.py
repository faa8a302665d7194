"""A pod's volumes on this machine's disk."""

import pytest

from kubeai.local.kubelet.pods.pod import PodError, decode_pod
from kubeai.local.kubelet.pods.volumes import (
    Claims,
    config_map_data,
    mounts_of,
    prepare_volumes,
    secret_data,
)
from kubeai.local.kubelet.runtime.process import Mount


class Objects:
    def __init__(self, maps=None, secrets=None, claims=()):
        self.maps, self.secrets, self.claims = maps or {}, secrets or {}, claims

    async def config_map(self, namespace, name):
        return self.maps.get(name)

    async def secret(self, namespace, name):
        return self.secrets.get(name)

    async def open_claim(self, namespace, name):
        return name in self.claims


def pod(volume, restart_policy="Always", **mount):
    mounts = [{"name": "v", "mountPath": "/m", **mount}]
    return decode_pod(
        {
            "metadata": {"name": "p", "namespace": "default", "uid": "u"},
            "spec": {
                "restartPolicy": restart_policy,
                "containers": [{"name": "server", "volumeMounts": mounts}],
                "volumes": [{"name": "v", **volume}],
            },
        }
    )


async def prepare(of, tmp_path, given=None, **objects):
    claims = Claims(tmp_path / "claims", given or {})
    places = await prepare_volumes(of, tmp_path / "pod", claims, Objects(**objects))
    return places["v"]


def mounts(of, place):
    return mounts_of(of, of.spec.containers[0], {"v": place}, {"N": "n"})


async def test_a_config_map_is_written_as_files(tmp_path):
    of = pod({"configMap": {"name": "c"}})
    place = await prepare(of, tmp_path, maps={"c": {"a": b"A", "b": b"\xff"}})
    assert {f.name: f.read_bytes() for f in place.iterdir()} == {"a": b"A", "b": b"\xff"}
    assert (place / "a").stat().st_mode & 0o777 == 0o644


async def test_a_secret_is_readable_by_its_owner_only(tmp_path):
    of = pod({"secret": {"secretName": "s", "items": [{"key": "k", "path": "deep/er"}]}})
    place = await prepare(of, tmp_path, secrets={"s": {"k": b"K", "other": b""}})
    assert (place / "deep/er").read_bytes() == b"K"
    assert (place / "deep/er").stat().st_mode & 0o777 == 0o400
    assert not (place / "other").exists()


async def test_the_mode_in_the_manifest_is_used(tmp_path):
    of = pod({"configMap": {"name": "c", "defaultMode": 0o755}})
    place = await prepare(of, tmp_path, maps={"c": {"run": b""}})
    assert (place / "run").stat().st_mode & 0o777 == 0o755


async def test_the_next_kubelet_writes_the_volume_again(tmp_path):
    of = pod({"secret": {"secretName": "s"}})
    await prepare(of, tmp_path, secrets={"s": {"old": b"1", "k": b"1"}})
    place = await prepare(of, tmp_path, secrets={"s": {"k": b"2"}})
    assert {f.name: f.read_bytes() for f in place.iterdir()} == {"k": b"2"}


async def test_an_empty_dir_keeps_its_content_across_kubelet_restarts(tmp_path):
    of = pod({"emptyDir": {}})
    (await prepare(of, tmp_path) / "f").write_text("x")
    assert (await prepare(of, tmp_path) / "f").read_text() == "x"


async def test_a_claim_is_a_directory_that_outlives_the_pod(tmp_path):
    of = pod({"persistentVolumeClaim": {"claimName": "models"}})
    place = await prepare(of, tmp_path, claims=["models"])
    assert place == tmp_path / "claims" / "default" / "models"
    assert place.is_dir()


WEIGHTS = {"persistentVolumeClaim": {"claimName": "weights"}}


async def test_the_volume_of_a_claim_can_be_any_directory(tmp_path):
    (tmp_path / "srv").mkdir()
    given = {"weights": tmp_path / "srv"}
    assert await prepare(pod(WEIGHTS), tmp_path, given) == tmp_path / "srv"
    assert await prepare(pod(WEIGHTS), tmp_path, given, claims=["weights"]) == tmp_path / "srv"


async def test_a_directory_among_the_volumes_needs_no_claim(tmp_path):
    place = tmp_path / "claims" / "default" / "weights"
    place.mkdir(parents=True)
    assert await prepare(pod(WEIGHTS), tmp_path) == place


async def test_a_claim_that_does_not_exist_says_which_option_to_write(tmp_path):
    with pytest.raises(PodError, match=r"'weights' not found.*--volume weights=DIR") as caught:
        await prepare(pod(WEIGHTS), tmp_path)
    assert caught.value.reason == "VolumeNotFound"
    assert not (tmp_path / "claims").exists()


async def test_a_directory_that_was_removed_is_reported(tmp_path):
    with pytest.raises(PodError, match=r"--volume weights=.*/srv: is not a directory") as caught:
        await prepare(pod(WEIGHTS), tmp_path, {"weights": tmp_path / "srv"})
    assert caught.value.reason == "VolumeNotFound"


def test_a_path_that_a_claim_lacks_is_an_error_and_not_a_new_directory(tmp_path):
    with pytest.raises(PodError, match=rf"'weights' has no 'a/b': {tmp_path}/a/b does") as caught:
        mounts(pod(WEIGHTS, subPath="a/b"), tmp_path)
    assert caught.value.reason == "VolumeNotFound"
    assert list(tmp_path.iterdir()) == []


def test_the_pod_of_a_job_may_create_directories_in_a_claim(tmp_path):
    made = mounts(pod(WEIGHTS, "OnFailure", subPath="a/b"), tmp_path)
    assert made == (Mount(str(tmp_path / "a/b"), "/m"),)
    assert (tmp_path / "a/b").is_dir()


@pytest.mark.parametrize(
    ("volume", "message"),
    [
        ({"configMap": {"name": "c"}}, "configmap 'c' not found"),
        ({"secret": {"secretName": "s"}}, "secret 's' not found"),
        ({"persistentVolumeClaim": {"claimName": "m"}}, "persistentvolumeclaim 'm' not found"),
        ({"hostPath": {"path": "/no/such"}}, "hostPath /no/such does not exist"),
        ({"nfs": {"server": "x"}}, "unsupported type"),
        ({"image": {"reference": "r/a:1"}}, "image r/a:1 cannot be mounted.*--volume NAME=DIR"),
        ({"configMap": {"name": "have", "items": [{"key": "x", "path": "x"}]}}, "missing key 'x'"),
        (
            {"configMap": {"name": "have", "items": [{"key": "k", "path": "../k"}]}},
            "is outside the volume",
        ),
        (
            {"configMap": {"name": "have", "items": [{"key": "k", "path": "/k"}]}},
            "is outside the volume",
        ),
    ],
)
async def test_an_unavailable_volume_is_reported_by_name(tmp_path, volume, message):
    with pytest.raises(PodError, match=f"volume 'v'.*{message}"):
        await prepare(pod(volume), tmp_path, maps={"have": {"k": b""}})


@pytest.mark.parametrize(
    "volume",
    [
        {"configMap": {"name": "c", "optional": True}},
        {"secret": {"secretName": "s", "optional": True}},
    ],
)
async def test_a_missing_optional_source_is_an_empty_directory(tmp_path, volume):
    assert list((await prepare(pod(volume), tmp_path)).iterdir()) == []


def test_a_mount_shows_the_volume_or_a_part_of_it(tmp_path):
    (tmp_path / "f").write_text("")
    assert mounts(pod({"emptyDir": {}}), tmp_path) == (Mount(str(tmp_path), "/m"),)
    part = pod({"configMap": {"name": "c"}}, subPath="f", readOnly=True)
    assert mounts(part, tmp_path) == (Mount(str(tmp_path / "f"), "/m", True),)
    made = mounts(pod({"emptyDir": {}}, subPathExpr="$(N)/x"), tmp_path)
    assert made == (Mount(str(tmp_path / "n/x"), "/m"),)
    assert (tmp_path / "n/x").is_dir()


def test_shared_memory_uses_the_machines_dev_shm(tmp_path):
    assert mounts(pod({"emptyDir": {"medium": "Memory"}}, mountPath="/dev/shm"), tmp_path) == ()


@pytest.mark.parametrize(
    ("mount", "message"),
    [
        ({"name": "w"}, "volume 'w' not found"),
        ({"mountPath": "m"}, "'m' is not absolute"),
        ({"subPath": "nope"}, "subPath 'nope' does not exist"),
        ({"subPath": "../x"}, "is outside the volume"),
    ],
)
def test_an_invalid_mount_is_reported_by_name(tmp_path, mount, message):
    with pytest.raises(PodError, match=message):
        mounts(pod({"configMap": {"name": "c"}}, **mount), tmp_path)


def test_the_apis_encodings_of_data_are_decoded():
    assert config_map_data({"data": {"a": "é"}, "binaryData": {"b": "/w=="}}) == {
        "a": "é".encode(),
        "b": b"\xff",
    }
    assert secret_data({"data": {"k": "c2VjcmV0"}}) == {"k": b"secret"}
    assert secret_data({"data": None}) == {}
