"""The bytes of archives depend on contents only; differing and unlisted files are found."""

from __future__ import annotations

import os
import subprocess
import tarfile

import pytest

from release import checksums, files
from release.errors import ReleaseError

EPOCH = 1_700_000_000


def tree(folder, umask, names):
    """Write a tree under a umask, in the order of `names`."""
    before = os.umask(umask)
    try:
        for name in names:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"text of {name}")
        (folder / "run").chmod(0o777 & ~umask)
    finally:
        os.umask(before)
    return folder


def test_an_archive_has_the_same_bytes_whatever_order_umask_and_times(tmp_path):
    names = ["a/b", "a/a", "run", "z"]
    one = tree(tmp_path / "one", 0o022, names)
    other = tree(tmp_path / "other", 0o077, reversed(names))
    os.utime(other / "z", (1, 1))
    for folder in (one, other):
        files.write_tar_gz(folder, tmp_path / f"{folder.name}.tar.gz", "prefix", EPOCH)
    first, second = (tmp_path / f"{name}.tar.gz" for name in ("one", "other"))
    assert first.read_bytes() == second.read_bytes()
    with tarfile.open(first) as archive:
        entries = archive.getmembers()
    assert [each.name for each in entries] == [f"prefix/{name}" for name in sorted(names)]
    assert {each.name: each.mode for each in entries} == {
        **{f"prefix/{name}": 0o644 for name in names},
        "prefix/run": 0o755,
    }
    assert {(each.mtime, each.uid, each.uname) for each in entries} == {(EPOCH, 0, "")}


def test_another_time_of_the_commit_makes_another_archive(tmp_path):
    folder = tree(tmp_path / "one", 0o022, ["run"])
    for epoch in (1, 2):
        files.write_tar_gz(folder, tmp_path / str(epoch), "prefix", epoch)
    assert (tmp_path / "1").read_bytes() != (tmp_path / "2").read_bytes()


def test_differences_are_files_with_other_bytes_or_on_one_side_only(tmp_path):
    one = tree(tmp_path / "one", 0o022, ["a/same", "a/changed", "only-one", "run"])
    other = tree(tmp_path / "other", 0o022, ["a/same", "a/changed", "only-other", "run"])
    (other / "a/changed").write_text("changed")
    assert files.differences(one, other) == ["a/changed", "only-one", "only-other"]
    assert files.differences(one, one) == []


def test_a_build_sees_neither_time_zone_nor_locale_nor_unrelated_variables(monkeypatch):
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    monkeypatch.setenv("LC_ALL", "C")
    monkeypatch.setenv("CFLAGS", "-O0")
    monkeypatch.setenv("PIP_CERT", "/ca")
    env = files.environment(EPOCH, EXTRA="1")
    assert "CFLAGS" not in env
    assert env["PIP_CERT"] == "/ca"
    assert (env["TZ"], env["LC_ALL"], env["EXTRA"]) == ("UTC", "C.UTF-8", "1")
    assert env["SOURCE_DATE_EPOCH"] == str(EPOCH)


def test_a_failing_command_is_an_error_with_its_output(tmp_path):
    with pytest.raises(ReleaseError, match="it broke"):
        files.run(("sh", "-c", "echo it broke >&2; exit 3"), cwd=tmp_path)


def test_commands_run_with_one_umask(tmp_path):
    before = os.umask(0o077)
    try:
        files.run(("touch", "made"), cwd=tmp_path)
    finally:
        os.umask(before)
    assert (tmp_path / "made").stat().st_mode & 0o777 == 0o644


@pytest.fixture
def release(tmp_path):
    folder = tree(tmp_path / "dist", 0o022, ["a.whl", "image/index.json", "run"])
    checksums.build(folder)
    return folder


def test_checksums_list_all_files_and_are_those_of_sha256sum(release):
    listed = (release / "SHA256SUMS").read_text().splitlines()
    assert [line.split("  ")[1] for line in listed] == ["a.whl", "image/index.json", "run"]
    checksums.check(release)
    done = subprocess.run(
        ("sha256sum", "--check", "--strict", "SHA256SUMS"), cwd=release, capture_output=True
    )
    assert done.returncode == 0


@pytest.mark.parametrize("fault", ["changed", "missing", "not listed"])
def test_checksums_that_do_not_match_are_refused(release, fault):
    if fault == "changed":
        (release / "a.whl").write_text("changed")
    elif fault == "missing":
        (release / "a.whl").unlink()
    else:
        (release / "b.whl").write_text("new")
    with pytest.raises(ReleaseError, match=r"[ab]\.whl"):
        checksums.check(release)
