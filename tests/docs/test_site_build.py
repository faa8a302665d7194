"""The hooks of the documentation's site, and its versions. Needs the extra `docs`."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from repository import REPOSITORY

pytestmark = [pytest.mark.docs, pytest.mark.timeout(600)]
pytest.importorskip("mkdocs")
sys.path.append(str(REPOSITORY / "docs/_site"))

from hooks import Links, LinksExtension, on_page_markdown, with_captions  # noqa: E402
from markdown import Markdown  # noqa: E402
from previews import draw  # noqa: E402


def rendered(text, *, repository_url="https://git.example.org/kubeai", page="how-to/page.md"):
    links = Links()
    links.page = SimpleNamespace(file=SimpleNamespace(src_uri=page))
    links.repository_url, links.ref = repository_url, "v1.0.0"
    return Markdown(extensions=[LinksExtension(links)]).convert(text)


def test_links_to_files_outside_the_documentation_lead_to_the_repository():
    assert 'href="https://git.example.org/kubeai/blob/v1.0.0/README.md#x"' in rendered(
        "[a](../../README.md#x)"
    )
    assert 'href="https://git.example.org/kubeai/tree/v1.0.0/charts"' in rendered(
        "[a](../../charts)"
    )
    assert 'href="../reference/model.md"' in rendered("[a](../reference/model.md)")


def test_without_a_repository_such_links_are_plain_text():
    assert rendered("[a](../../README.md)", repository_url=None) == "<p><span>a</span></p>"


@pytest.mark.parametrize("link", ["../../no-such-file", "https://", "https://[x"])
def test_broken_and_malformed_links_are_warnings(link, caplog):
    with caplog.at_level(logging.WARNING):
        rendered(f"[a](<{link}>)")
    assert link in caplog.text


def test_a_page_that_breaks_the_conventions_is_a_warning(caplog):
    text = "---\ndescription: A page.\ncommands: none\n---\n```sh\nls\n```\n"
    page = SimpleNamespace(file=SimpleNamespace(src_uri="a.md", content_string=text), meta={})
    with caplog.at_level(logging.WARNING):
        on_page_markdown(text, page=page, files=None)
    assert "docs/a.md:6: a page with `commands: none` runs nothing" in caplog.text


def test_reasons_become_captions_and_other_comments_are_dropped():
    text = (
        "<!-- not run: needs\na cloud -->\n```sh\na\n```\n<!-- run: b -->\nWords.\n\n"
        "=== x\n\n    <!-- not run: y -->\n    ```sh\n    c\n    ```\n\n"
        "<!-- output -->\n```text\nd\n```\n<!-- table: begin -->\n"
    )
    assert with_captions(text) == (
        "```sh\na\n```\n\nNot run in CI: needs a cloud\n{ .not-run }\n\nWords.\n\n"
        "=== x\n\n    ```sh\n    c\n    ```\n\n    Not run in CI: y\n    { .not-run }\n\n\n"
        "```text\nd\n```\n<!-- table: begin -->\n"
    )


def test_preview_images_have_the_same_bytes_each_time_and_hold_long_texts(tmp_path):
    texts = {"section": "Start", "title": "A long title " * 12, "description": "words " * 90}
    for name in ("one", "two"):
        draw(tmp_path / f"{name}.png", **texts)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def test_versions_are_added_to_the_branch_that_is_served(tmp_path):
    """What `make docs-version VERSION=1.2 ALIASES=latest` does, in a clone."""
    clone = tmp_path / "clone"
    mermaid = tmp_path / "mermaid.js"
    mermaid.write_text("")
    programs = Path(sys.executable).parent
    environment = os.environ | {
        "MERMAID": str(mermaid),
        "NO_MKDOCS_2_WARNING": "1",
        "PATH": f"{programs}:{os.environ['PATH']}",
    }
    for role in ("AUTHOR", "COMMITTER"):
        environment |= {f"GIT_{role}_NAME": "test", f"GIT_{role}_EMAIL": "test@example.org"}

    def run(*command, cwd=clone):
        return subprocess.run(
            command, cwd=cwd, env=environment, check=True, stdout=subprocess.PIPE, text=True
        ).stdout

    run("git", "clone", "-q", "--shared", str(REPOSITORY), str(clone), cwd=tmp_path)
    deploy = (str(programs / "mike"), "deploy", "--branch", "pages")
    run(*deploy, "--update-aliases", "--alias-type", "copy", "1.2", "latest")
    files = run("git", "ls-tree", "-r", "--name-only", "pages").splitlines()
    assert {"1.2/index.html", "1.2/start/local/index.html", "latest/index.html"} <= set(files)
    versions = json.loads(run("git", "show", "pages:versions.json"))
    assert versions == [{"version": "1.2", "title": "1.2", "aliases": ["latest"]}]
