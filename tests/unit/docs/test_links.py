"""Relative links of every page lead to files of the repository. `make docs` also checks anchors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from doc_pages import DOCS, markdown_tokens
from markdown_it.token import Token
from repository import REPOSITORY

PAGES = sorted(
    path.relative_to(REPOSITORY).as_posix()
    for pattern in ("*.md", ".github/**/*.md", "examples/**/*.md", "tests/*/README.md")
    for path in REPOSITORY.glob(pattern)
) + [f"docs/{path.relative_to(DOCS).as_posix()}" for path in sorted(DOCS.rglob("*.md"))]


def urls(tokens: Sequence[Token]) -> Iterator[str]:
    """Those of links and images, also of links to definitions elsewhere on the page."""
    for token in tokens:
        url = token.attrGet("href") or token.attrGet("src")
        if url:
            yield str(url)
        yield from urls(token.children or ())


def broken(page: Path, text: str) -> list[str]:
    """The relative links of a page that lead nowhere, or out of the repository."""
    found = []
    for url in urls(markdown_tokens(text)):
        parts = urlsplit(url)
        if parts.scheme or parts.netloc or not parts.path:
            continue
        path = (page.parent / unquote(parts.path)).resolve()
        if not (path.is_relative_to(REPOSITORY) and path.exists()):
            found.append(url)
    return found


@pytest.mark.parametrize("name", PAGES)
def test_relative_links_of_a_page_lead_to_files(name: str) -> None:
    page = REPOSITORY / name
    assert broken(page, page.read_text()) == []


def test_broken_links_are_found_wherever_they_are() -> None:
    text = (
        "[a](none.md) [b](/none) ![c](none.png) [d][e] [f](index.md#anchor) [g](#here)\n"
        "[h](https://example.com/none) [i](../../none)\n\n"
        "| table |\n|---|\n| [j](k%20l.md) |\n\n- > [m](n.md)\n\n[e]: o.md\n"
    )
    assert broken(DOCS / "index.md", text) == [
        "none.md",
        "/none",
        "none.png",
        "o.md",
        "../../none",
        "k%20l.md",
        "n.md",
    ]
