"""What takes long to make is made once and kept in the user's cache."""

from __future__ import annotations

import pytest
from caches import made_once


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_a_folder_is_made_once_and_one_for_each_key():
    made = []

    def make(folder):
        made.append(folder)
        (folder / "file").write_text(str(len(made)))

    first = made_once("cache", "a", make)
    assert made_once("cache", "a", make) == first
    assert (first / "file").read_text() == "1"
    assert (made_once("cache", "b", make) / "file").read_text() == "2"


def test_a_folder_that_could_not_be_made_is_made_from_the_beginning_next_time():
    def fail(folder):
        (folder / "half").touch()
        raise RuntimeError("no network")

    with pytest.raises(RuntimeError, match="no network"):
        made_once("cache", "a", fail)
    folder = made_once("cache", "a", lambda folder: (folder / "whole").touch())
    assert [path.name for path in folder.iterdir()] == ["whole"]
