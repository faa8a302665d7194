"""Release notes: a version's section of CHANGELOG.md, in the form of Keep a Changelog."""

from __future__ import annotations

import re
from pathlib import Path

from release.errors import ReleaseError
from release.versions import Version

HEADING = re.compile(r"^## \[?(?P<name>[^\]\s]+)\]?(?: - (?P<date>\d{4}-\d\d-\d\d))?[ \t]*$", re.M)
SECTIONS = ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")
NAME = "RELEASE_NOTES.md"


def sections(changelog: str) -> dict[str, str]:
    """Map the name of each section, Unreleased or a version, to its text. Newest first."""
    headings = list(HEADING.finditer(changelog))
    found: dict[str, str] = {}
    for heading, following in zip(headings, [*headings[1:], None], strict=True):
        name = heading["name"]
        if name in found:
            raise ReleaseError(f"CHANGELOG.md has two sections ## {name}")
        if name != "Unreleased" and not heading["date"]:
            raise ReleaseError(f"CHANGELOG.md: ## {name} needs a date: ## {name} - YYYY-MM-DD")
        end = following.start() if following else len(changelog)
        text = changelog[heading.end() : end].strip("\n")
        unknown = [
            each for each in re.findall(r"^### (.+?)\s*$", text, re.M) if each not in SECTIONS
        ]
        if unknown:
            raise ReleaseError(
                f"CHANGELOG.md: ## {name} has ### {unknown[0]}; use one of {', '.join(SECTIONS)}"
            )
        found[name] = text
    return found


def section(changelog: str, version: Version) -> str:
    """Return the text of a version's section. A missing or empty one is a ReleaseError."""
    text = sections(changelog).get(str(version), "")
    if not re.search(r"^- ", text, re.M):
        raise ReleaseError(
            f"CHANGELOG.md has no entries for {version}; `python -m release prepare {version}` "
            "gives it those of Unreleased"
        )
    return text


def entries(text: str) -> list[str]:
    """Return the list items of a section, each as one line."""
    items = re.split(r"^- ", text, flags=re.M)[1:]
    return [" ".join(re.split(r"\n(?=#)|\n\n", item)[0].split()) for item in items]


def breaking(text: str) -> list[str]:
    """Return the entries that announce an incompatible change."""
    return [entry for entry in entries(text) if entry.startswith("**Breaking:**")]


def check(changelog: str, version: Version, before: Version | None) -> None:
    """Refuse a version without a section, and breaking changes in a step that promises none."""
    broken = breaking(section(changelog, version))
    if broken and before and not version.may_break(before):
        raise ReleaseError(
            f"CHANGELOG.md announces {len(broken)} breaking changes, which the step from {before} "
            f"to {version} does not allow. The first one: {broken[0]}"
        )


def prepare(changelog: str, version: Version, date: str) -> str:
    """Give the entries of Unreleased to `version`, and leave an empty Unreleased above it."""
    if str(version) in sections(changelog):
        raise ReleaseError(f"CHANGELOG.md already has a section for {version}")
    heading = "## Unreleased\n"
    if heading not in changelog:
        raise ReleaseError("CHANGELOG.md has no section ## Unreleased")
    made = changelog.replace(heading, f"{heading}\n## {version} - {date}\n", 1)
    section(made, version)
    return made


def build(source: Path, version: Version, out: Path) -> list[Path]:
    """Write the release notes."""
    text = section((source / "CHANGELOG.md").read_text(encoding="utf-8"), version)
    target = out / NAME
    target.write_text(f"# KubeAI {version}\n\n{text}\n", encoding="utf-8")
    return [target]
