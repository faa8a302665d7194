"""The directories of --volume, and pvc:// URLs that refer to them."""

import pytest

from kubeai.api.model_url import parse_url
from kubeai.errors import KubeAIError
from kubeai.local.volumes import check_claim, read_volumes


def test_each_volume_is_a_directory(tmp_path):
    (tmp_path / "a=b").mkdir()
    given = [f"weights={tmp_path}", f"more.x={tmp_path}/a=b"]
    assert read_volumes(given) == {"weights": tmp_path, "more.x": tmp_path / "a=b"}


def test_a_relative_directory_is_that_of_the_caller(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_volumes(["weights=."]) == {"weights": tmp_path}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("weights", "must be NAME=DIR"),
        ("weights=", "must be NAME=DIR"),
        ("=/tmp", "must consist of lower-case letters"),
        ("Weights={}", "'Weights' must consist of lower-case letters"),
        ("weights={}/missing", "/missing is not a directory"),
    ],
)
def test_a_wrong_volume_is_an_error_that_names_the_option(tmp_path, value, message):
    with pytest.raises(KubeAIError, match=f"^--volume .*: .*{message}"):
        read_volumes([value.format(tmp_path)])


def test_a_claim_has_one_directory(tmp_path):
    with pytest.raises(KubeAIError, match="weights is given twice"):
        read_volumes([f"weights={tmp_path}", f"weights={tmp_path}"])


def check(url, tmp_path, applied=(), **volumes):
    check_claim(parse_url(url), volumes, tmp_path / "kept", applied)


def test_a_claim_without_a_directory_is_an_error_that_says_what_to_write(tmp_path):
    with pytest.raises(KubeAIError, match="no volume 'weights'; add --volume weights=DIR"):
        check("pvc://weights/small", tmp_path)
    check("pvc://weights/small", tmp_path, applied={"weights"})  # a manifest creates it
    (tmp_path / "kept" / "weights" / "small").mkdir(parents=True)
    check("pvc://weights/small", tmp_path)
    check("hf://org/name", tmp_path)


def test_a_path_that_the_volume_lacks_is_an_error_that_names_it(tmp_path):
    with pytest.raises(KubeAIError, match=f"pvc://weights/smal: {tmp_path}/smal does not exist"):
        check("pvc://weights/smal", tmp_path, weights=tmp_path)
    (tmp_path / "small").mkdir()
    check("pvc://weights/small", tmp_path, weights=tmp_path)
    check("pvc://weights", tmp_path, weights=tmp_path)
