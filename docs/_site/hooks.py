"""MkDocs hooks: the conventions of docs/contribute/documentation.md, links, and preview images.

MkDocs calls the functions named on_…. A warning fails the build, which is strict.
"""

from __future__ import annotations

import logging
import os
import posixpath
import re
import sys
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit
from xml.etree.ElementTree import Element

from markdown import Extension, Markdown
from markdown.treeprocessors import Treeprocessor
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
sys.path[:0] = [str(HERE), str(REPOSITORY / "tests"), str(REPOSITORY / "tests/docs")]

import previews  # noqa: E402
from doc_pages import COMMENT, PageError, markdown_tokens, parse_page  # noqa: E402

# An attribute of raw HTML with a relative URL.
RELATIVE = re.compile(r'\b(src|srcset|href)="(?![a-z]+:|[/#])([^"]+)"')
NOT_RUN = "Not run in CI: "
log = logging.getLogger("mkdocs.hooks.kubeai")


class Links(Treeprocessor):
    """Rewrites relative links to files outside docs/ to URLs of the repository.

    Without a repository URL, they become plain text. External links are checked for syntax.
    """

    page: Page
    repository_url: str | None = None
    ref: str = "main"

    def run(self, root: Element) -> None:
        """Rewrite all links of a page."""
        for element in root.iter():
            for attribute in ("href", "src"):
                if (url := element.get(attribute)) is not None:
                    self._check(element, attribute, url)

    def _check(self, element: Element, attribute: str, url: str) -> None:
        name = self.page.file.src_uri
        try:
            parts = urlsplit(url)
        except ValueError as error:
            log.warning("%s: the link %r is malformed: %s", name, url, error)
            return
        if parts.scheme in ("http", "https") and (not parts.hostname or " " in url):
            log.warning("%s: the link %r is malformed", name, url)
        if parts.scheme or parts.netloc or not parts.path or parts.path.startswith("/"):
            return
        outside = _outside(PurePosixPath("docs", name).parent / unquote(parts.path))
        if outside is None:
            return
        path = REPOSITORY / outside
        if not path.exists() or element.tag != "a":
            log.warning("%s: the link %r is neither a page nor a file of the repository", name, url)
        elif self.repository_url:
            kind = "tree" if path.is_dir() else "blob"
            fragment = f"#{parts.fragment}" if parts.fragment else ""
            url = f"{self.repository_url}/{kind}/{self.ref}/{outside}{fragment}"
            element.set(attribute, url)
        else:
            element.tag = "span"
            del element.attrib[attribute]


def _outside(path: PurePosixPath) -> str | None:
    """The normalised path, relative to the repository, if it is not in docs/."""
    parts: list[str] = []
    for part in path.parts:
        if part == "..":
            if not parts:
                return None
            parts.pop()
        elif part != ".":
            parts.append(part)
    return None if parts[:1] == ["docs"] else "/".join(parts)


class LinksExtension(Extension):
    """Runs `Links` before MkDocs resolves the links between pages (priority 0)."""

    def __init__(self, links: Links) -> None:
        super().__init__()
        self.links = links

    def extendMarkdown(self, md: Markdown) -> None:
        """Called by Python-Markdown for each page."""
        md.treeprocessors.register(self.links, "kubeai-links", 5)


_links = Links()


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the extension, and the URL of a page's source."""
    _links.repository_url = (config.repo_url or "").rstrip("/") or None
    _links.ref = config.extra["ref"]
    config.markdown_extensions.append(LinksExtension(_links))  # type: ignore[arg-type]
    if _links.repository_url:
        config.edit_uri = f"{_links.repository_url}/edit/{_links.ref}/docs/"
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add Mermaid, which `make docs` has fetched."""
    uri = "assets/javascripts/mermaid.min.js"
    files.append(File.generated(config, uri, abs_src_path=str(REPOSITORY / os.environ["MERMAID"])))
    return files


def on_page_markdown(markdown: str, *, page: Page, files: Files, **_: Any) -> str:
    """Check the conventions; turn their comments into captions, or drop them."""
    name = f"docs/{page.file.src_uri}"
    _links.page = page
    try:
        parse_page(name, page.file.content_string)
    except PageError as error:
        log.warning("%s", error)
    page.meta["social_image"] = previews.uri(page.file.src_uri)
    return with_captions(with_urls(markdown, page.file, files))


def with_urls(markdown: str, file: File, files: Files) -> str:
    """The page with the relative URLs in its HTML, which MkDocs leaves as they are, resolved."""

    def resolved(found: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(file.src_uri), found[2]))
        target = files.get_file_from_path(path)
        if target is None:
            log.warning("%s: there is no %r, to which its HTML refers", file.src_uri, found[2])
            return found[0]
        return f'{found[1]}="{target.url_relative_to(file)}"'

    lines = markdown.splitlines()
    for token in markdown_tokens(markdown):
        if token.type == "html_block" and token.map is not None:
            for number in range(*token.map):
                lines[number] = RELATIVE.sub(resolved, lines[number])
    return "\n".join(lines) + "\n"


def with_captions(markdown: str) -> str:
    """The page without our comments, and the reason below each block that CI does not run."""
    lines = markdown.splitlines()
    dropped: set[int] = set()
    captions: dict[int, list[str]] = {}  # after this line
    reason = ""
    for token in markdown_tokens(markdown):
        if token.map is None:
            continue
        if token.type == "html_block" and (found := COMMENT.match(token.content.strip())):
            dropped.update(range(*token.map))
            reason = " ".join((found[2] or "").split()) if found[1] == "not run" else ""
        elif token.type == "fence":
            if reason:
                start, end = token.map
                indent = lines[start][: len(lines[start]) - len(lines[start].lstrip())]
                caption = ("", f"{NOT_RUN}{reason}", "{ .not-run }", "")
                captions[end - 1] = [f"{indent}{line}".rstrip() for line in caption]
            reason = ""
    written: list[str] = []
    for number, line in enumerate(lines):
        if number not in dropped:
            written.append(line)
        written += captions.get(number, ())
    return "\n".join(written) + "\n"


def on_page_content(html: str, **_: Any) -> str:
    """Let wide drawings scroll; show `|` in the code of tables, where GitHub needs it escaped."""
    html = re.sub(
        r'<pre class="mermaid">.*?</pre>',
        r'<div class="drawing" role="region" aria-label="Drawing" tabindex="0">\g<0></div>',
        html,
        flags=re.DOTALL,
    )
    cell = re.compile(r"<td\b[^>]*>.*?</td>", re.DOTALL)
    return cell.sub(lambda found: found[0].replace(r"\|", "|"), html)


def on_post_page(output: str, **_: Any) -> str:
    """Name the theme's search dialog, which screen readers announce."""
    return output.replace(
        'data-md-component="search" role="dialog"',
        'data-md-component="search" role="dialog" aria-label="Search"',
    )


def on_page_context(context: dict[str, Any], *, page: Page, config: MkDocsConfig, **_: Any) -> None:
    """Draw the preview image of a page."""
    section = page.ancestors[-1].title if page.ancestors else ""
    folder = Path(config.site_dir)
    previews.draw(
        folder / page.meta["social_image"],
        section=section or "",
        title=str(page.title),
        description=str(page.meta.get("description", "")),
    )
