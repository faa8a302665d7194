"""CHANGELOG.md: which section is a version's, what it announces, and how one is cut."""

from __future__ import annotations

import pytest
from repository import REPOSITORY

from release import notes, versions
from release.errors import ReleaseError

CHANGELOG = """# Changelog

## Unreleased

### Added

- A thing, which takes
  two lines.

## 1.1.0 - 2026-02-01

### Changed

- **Breaking:** `spec.x` is gone.
- `spec.y` is
  new.

### Fixed

- A fault.

## [1.0.0] - 2026-01-01

### Added

- Everything.
"""
V = versions.parse


def test_each_section_ends_at_the_next_one():
    found = notes.sections(CHANGELOG)
    assert list(found) == ["Unreleased", "1.1.0", "1.0.0"]
    assert found["1.0.0"] == "### Added\n\n- Everything."
    assert "Everything" not in found["1.1.0"]


def test_entries_are_joined_lines_and_breaking_ones_are_found():
    text = notes.section(CHANGELOG, V("1.1.0"))
    assert notes.entries(text) == [
        "**Breaking:** `spec.x` is gone.",
        "`spec.y` is new.",
        "A fault.",
    ]
    assert notes.breaking(text) == ["**Breaking:** `spec.x` is gone."]


def test_a_version_without_entries_is_refused():
    with pytest.raises(ReleaseError, match=r"no entries for 2\.0\.0; .* prepare 2\.0\.0"):
        notes.section(CHANGELOG, V("2.0.0"))
    with pytest.raises(ReleaseError, match="no entries"):
        notes.section("## 2.0.0 - 2026-01-01\n\n### Added\n", V("2.0.0"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("## 1.0.0\n\n- A\n", "needs a date"),
        ("## 1.0.0 - 2026-01-01\n\n### News\n\n- A\n", "### News"),
        ("## Unreleased\n\n## Unreleased\n", "two sections"),
    ],
)
def test_what_is_not_keep_a_changelog_is_refused(text, said):
    with pytest.raises(ReleaseError, match=said):
        notes.sections(text)


def test_breaking_changes_need_a_version_that_allows_them():
    notes.check(CHANGELOG, V("1.1.0"), None)
    notes.check(CHANGELOG, V("1.1.0"), V("0.9.0"))
    with pytest.raises(ReleaseError, match=r"1 breaking changes.*`spec\.x` is gone"):
        notes.check(CHANGELOG, V("1.1.0"), V("1.0.0"))


def test_preparing_moves_the_unreleased_entries_to_the_version():
    made = notes.prepare(CHANGELOG, V("1.2.0"), "2026-03-01")
    found = notes.sections(made)
    assert list(found) == ["Unreleased", "1.2.0", "1.1.0", "1.0.0"]
    assert found["Unreleased"] == ""
    assert notes.entries(found["1.2.0"]) == ["A thing, which takes two lines."]
    for again, said in ((V("1.2.0"), "already has"), (V("1.3.0"), "no entries")):
        with pytest.raises(ReleaseError, match=said):
            notes.prepare(made, again, "2026-03-02")


def test_the_notes_are_the_section_below_a_title(tmp_path):
    (tmp_path / "CHANGELOG.md").write_text(CHANGELOG)
    (made,) = notes.build(tmp_path, V("1.0.0"), tmp_path)
    assert made.read_text() == "# KubeAI 1.0.0\n\n### Added\n\n- Everything.\n"


def test_the_changelog_of_this_tree_can_be_released():
    text = (REPOSITORY / "CHANGELOG.md").read_text()
    assert next(iter(notes.sections(text))) == "Unreleased"
    if notes.entries(notes.sections(text)["Unreleased"]):
        prepared = notes.prepare(text, V("999.0.0"), "2026-03-01")
        assert len(notes.entries(notes.section(prepared, V("999.0.0")))) > 0
