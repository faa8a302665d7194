"""The version of a release: what is one, how versions are ordered, and what git's tags forbid."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess

import pytest
from packaging.version import Version as PythonVersion
from repository import REPOSITORY

from release import versions
from release.errors import ReleaseError

SETUP = runpy.run_path(str(REPOSITORY / "setup.py"))
AUTHOR = {
    "GIT_AUTHOR_NAME": "A",
    "GIT_AUTHOR_EMAIL": "a@example.com",
    "GIT_COMMITTER_NAME": "A",
    "GIT_COMMITTER_EMAIL": "a@example.com",
    "GIT_CONFIG_GLOBAL": "/dev/null",
}


class Tree:
    """A git repository with one file."""

    def __init__(self, folder):
        self.folder = folder
        self.git("init", "-q", "-b", "main")
        self.commit("one")

    def git(self, *arguments):
        environment = os.environ | AUTHOR
        done = subprocess.run(
            ("git", *arguments), cwd=self.folder, env=environment, capture_output=True, check=True
        )
        return done.stdout.decode().strip()

    def commit(self, text):
        (self.folder / "file").write_text(text)
        self.git("add", "file")
        self.git("commit", "-q", "-m", text)

    def tag(self, name):
        self.git("tag", name)

    @property
    def version(self):
        return SETUP["version"](self.folder)


@pytest.fixture
def tree(tmp_path, monkeypatch):
    monkeypatch.delenv("KUBEAI_VERSION", raising=False)
    (tmp_path / "tree").mkdir()
    return Tree(tmp_path / "tree")


@pytest.mark.parametrize(
    ("text", "python"),
    [
        ("1.2.3", "1.2.3"),
        ("0.1.0", "0.1.0"),
        ("1.0.0-rc.1", "1.0.0rc1"),
        ("1.0.0-beta.2", "1.0.0b2"),
    ],
)
def test_a_version_is_printed_as_written_and_as_python_writes_it(text, python):
    version = versions.parse(text)
    assert str(version) == text
    assert version.python == python == str(PythonVersion(text))


@pytest.mark.parametrize(
    "text",
    ["", "1", "1.2", "v1.2.3", "01.2.3", "1.2.3.4", "1.2.3-rc1", "1.2.3-x.1", "1.2.3+b", "1.2.3\n"],
)
def test_what_is_not_a_version_of_semver_is_refused(text):
    with pytest.raises(ReleaseError, match=r"X\.Y\.Z"):
        versions.parse(text)


def test_pre_releases_come_before_their_release_in_order():
    names = [
        "0.9.9",
        "1.0.0-alpha.2",
        "1.0.0-alpha.10",
        "1.0.0-beta.1",
        "1.0.0-rc.1",
        "1.0.0",
        "1.0.1",
    ]
    parsed = [versions.parse(name) for name in reversed(names)]
    parsed.sort(key=lambda each: each.order)
    assert [str(each) for each in parsed] == names


@pytest.mark.parametrize(
    ("before", "after", "allowed"),
    [
        ("1.2.3", "2.0.0", True),
        ("1.2.3", "1.3.0", False),
        ("1.2.3", "1.2.4", False),
        ("0.1.0", "0.2.0", True),
        ("0.1.0", "0.1.1", False),
        ("0.9.0", "1.0.0", True),
    ],
)
def test_a_major_version_may_break_and_before_the_first_also_a_minor_one(before, after, allowed):
    assert versions.parse(after).may_break(versions.parse(before)) is allowed


def test_the_tag_on_head_is_the_version(tree):
    tree.tag("v1.2.3")
    assert tree.version == "1.2.3"
    versions.check(tree.folder, versions.parse("1.2.3"))
    with pytest.raises(ReleaseError, match=r"HEAD is tagged v1\.2\.3"):
        versions.check(tree.folder, versions.parse("1.2.4"))


def test_a_dirty_tree_is_refused(tree):
    (tree.folder / "new").write_text("")
    with pytest.raises(ReleaseError, match=r"\?\? new"):
        versions.check(tree.folder, versions.parse("1.0.0"))


def test_a_version_must_follow_the_tags_that_head_contains(tree):
    tree.tag("v1.2.3")
    tree.tag("unrelated")
    tree.commit("two")
    versions.check(tree.folder, versions.parse("1.2.4"))
    for text in ("1.2.3", "1.2.2", "1.2.3-rc.1"):
        with pytest.raises(ReleaseError, match=r"another commit|does not follow"):
            versions.check(tree.folder, versions.parse(text))


def test_an_older_line_may_get_a_patch_after_a_newer_release(tree):
    tree.tag("v1.2.3")
    tree.git("checkout", "-q", "-b", "old")
    tree.git("checkout", "-q", "main")
    tree.commit("newer")
    tree.tag("v2.0.0")
    tree.git("checkout", "-q", "old")
    tree.commit("fix")
    versions.check(tree.folder, versions.parse("1.2.4"))
    assert str(versions.latest(tree.folder)) == "1.2.3"


def test_commits_after_a_tag_are_development_versions_of_the_next_patch(tree):
    tree.tag("v1.2.3")
    tree.commit("two")
    short = tree.git("rev-parse", "--short", "HEAD")
    assert tree.version == f"1.2.4.dev1+g{short}"
    assert PythonVersion("1.2.3") < PythonVersion(tree.version) < PythonVersion("1.2.4")
    (tree.folder / "file").write_text("changed")
    assert tree.version == f"1.2.4.dev1+g{short}.dirty"


def test_commits_after_a_candidate_lie_between_it_and_the_next(tree):
    tree.tag("v1.2.3-rc.1")
    assert tree.version == "1.2.3rc1"
    tree.commit("two")
    assert PythonVersion("1.2.3rc1") < PythonVersion(tree.version) < PythonVersion("1.2.3rc2")


def test_a_repository_without_tags_has_a_development_version(tree):
    tree.commit("two")
    assert tree.version == f"0.1.0.dev2+g{tree.git('rev-parse', '--short', 'HEAD')}"


@pytest.mark.parametrize("name", ["v1", "v1.2", "v1.2.3.4", "v1.2.3rc1", "v9.9.9-x.1", "v1-docs"])
def test_tags_that_are_no_versions_are_ignored(tree, name):
    first = tree.version
    tree.git("tag", "-a", "-m", "a tag with a message is preferred", name)
    assert tree.version == first
    tree.tag("v1.2.3")
    assert tree.version == "1.2.3"
    tree.commit("two")
    tree.git("tag", "-f", name)
    assert tree.version == f"1.2.4.dev1+g{tree.git('rev-parse', '--short', 'HEAD')}"


def test_a_shallow_clone_does_not_guess_by_the_commits_that_it_has(tree, tmp_path):
    tree.tag("v1.2.3")
    tree.commit("two")
    tree.commit("three")
    short = tree.git("rev-parse", "--short", "HEAD")
    tree.git("clone", "-q", "--depth=1", "--no-tags", f"file://{tree.folder}", tmp_path / "clone")
    assert SETUP["version"](tmp_path / "clone") == f"0.0.0+g{short}"


def test_a_worktree_has_the_version_of_its_commit(tree, tmp_path):
    tree.tag("v1.2.3")
    tree.commit("two")
    tree.git("worktree", "add", "-q", "--detach", tmp_path / "other", "v1.2.3")
    assert SETUP["version"](tmp_path / "other") == "1.2.3"


@pytest.mark.parametrize("stated", ["79abcb1f", "7910422"])
def test_a_commit_may_be_stated_as_the_version(tree, monkeypatch, stated):
    """`git describe --always` prints it where there is no tag."""
    monkeypatch.setenv("KUBEAI_VERSION", stated)
    assert tree.version == f"0.0.0+g{stated}"


def test_without_a_repository_the_version_is_stated_or_unknown(tree, monkeypatch):
    shutil.rmtree(tree.folder / ".git")
    assert tree.version == "0.0.0+unknown"
    monkeypatch.setenv("KUBEAI_VERSION", "v1.2.3-rc.1")
    assert tree.version == "1.2.3rc1"
    (tree.folder / "PKG-INFO").write_text("Metadata-Version: 2.4\nVersion: 3.2.1\n\nText\n")
    assert tree.version == "3.2.1", "a source distribution knows its version"


def test_an_archive_of_git_knows_its_version(tree, tmp_path, monkeypatch):
    """As the archives of a tag that repositories' hosts offer."""
    for name in ("setup.py", ".gitattributes"):
        shutil.copy(REPOSITORY / name, tree.folder / name)
        tree.git("add", name)
    tree.git("commit", "-q", "-m", "setup")
    tree.tag("v1.2.3")
    tree.git("archive", "-o", str(tmp_path / "a.tar"), "HEAD")
    shutil.unpack_archive(tmp_path / "a.tar", tmp_path / "unpacked")
    archived = runpy.run_path(str(tmp_path / "unpacked/setup.py"))
    assert archived["version"](tmp_path / "unpacked") == "1.2.3"
    archived["version"].__globals__["ARCHIVED"] = "v1.2.3rc1"
    assert archived["version"](tmp_path / "unpacked") == "0.0.0+unknown"


def test_the_repository_around_the_tree_does_not_name_its_version(tree):
    inner = tree.folder / "vendored"
    inner.mkdir()
    tree.tag("v1.2.3")
    assert SETUP["version"](inner) == "0.0.0+unknown"
