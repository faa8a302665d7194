"""The files of the console's page: small, complete, and without anything that its policy forbids.

tests/browser runs the page in Chromium.
"""

import re

import pytest
from fakes.scripted_console import STATIC
from repository import REPOSITORY

SIZE_MAX_BYTES = 150_000
FILES = sorted(STATIC.iterdir())
PAGE = (STATIC / "index.html").read_text()
SCRIPTS = [path for path in FILES if path.suffix == ".js"]
# Ways to turn text into markup or code.
UNSAFE = re.compile(
    r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|srcdoc"
    r"|DOMParser|createContextualFragment|setHTMLUnsafe|parseHTMLUnsafe"
)


def test_the_page_is_small():
    assert sum(path.stat().st_size for path in FILES) < SIZE_MAX_BYTES


def test_the_page_loads_nothing_from_elsewhere():
    allowed = {"http://www.w3.org/2000/svg"}  # the namespace of SVG
    for path in FILES:
        text = re.sub(r"(//|/\*) ?.*\(?https://\S+", "", path.read_text())
        found = set(re.findall(r"(?:https?:)?//[a-z][\w.-]+\.\w+[\w/.-]*", text))
        assert found <= allowed, path.name


def test_the_page_has_no_inline_script_or_style():
    assert re.findall(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)|javascript:", PAGE) == []


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_no_script_turns_text_into_markup_or_code(path):
    assert UNSAFE.findall(path.read_text()) == []


def test_every_file_that_is_named_exists_and_every_file_is_named():
    preloaded = re.findall(r'rel="modulepreload" href="static/([^"]+)"', PAGE)
    assert len(preloaded) == len(set(preloaded))
    named = set(re.findall(r'(?:src|href)="static/([^"]+)"', PAGE))
    imported = {
        name for path in SCRIPTS for name in re.findall(r'from "\./([^"]+)"', path.read_text())
    }
    assert imported <= named, "index.html preloads every module"
    assert named | {"index.html"} == {path.name for path in FILES}


@pytest.mark.parametrize("page", ["docs/how-to/console.md", "README.md"])
def test_every_picture_in_the_documentation_exists_in_both_themes_and_is_small(page):
    path = REPOSITORY / page
    pictures = re.findall(r'src(?:set)?="([^"]+\.png)"', path.read_text())
    assert pictures
    for picture in pictures:
        for theme in ("light", "dark"):
            file = path.parent / re.sub("-(?:light|dark)", f"-{theme}", picture)
            assert file.stat().st_size < 120_000
