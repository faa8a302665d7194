"""Read a page of the documentation: its front matter, and its commands, files and expected output.

docs/contribute/documentation.md describes the conventions. Whatever does not follow them is a
:class:`PageError` with the page and the line. Pages are parsed with the rule for indented code
switched off, so that fences in content tabs and admonitions, which are indented, are found.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token
from mdit_py_plugins.front_matter import front_matter_plugin
from repository import REPOSITORY

DOCS = REPOSITORY / "docs"
DESCRIPTION_MAX_CHARS = 150
SURROUNDINGS = ("local", "cluster", "none")
# What a page may start itself, by the value of `commands`.
STARTS = {"local": {"kubeai local"}, "cluster": {"chart", "port-forward"}, "none": set()}
FOLDERS, STORES = {"charts", "examples"}, "stores"
NEEDS = {*FOLDERS, STORES}
OURS = {"description", "commands", "starts", "needs", "pip", "npm"}
THEMES = {"hide", "icon", "search", "status", "tags", "template", "title"}
COMMENT = re.compile(r"<!--\s*(not run|run|output|background)\s*(?::(.*?))?-->\s*\Z", re.DOTALL)
# A comment that begins like one of ours, or is misspelt.
SIMILAR = re.compile(r"<!--\s*(not[ _-]?run|skip|run|output|background|terminal)\b", re.IGNORECASE)
SHELLS = {"bash", "shell", "console", "shell-session", "zsh"}
CONTAINER = re.compile(r"(===|!!!|\?\?\?\+?|///)(\s|$)")


class PageError(Exception):
    """What is wrong with a page, and where."""

    def __init__(self, page: str, line: int, message: str) -> None:
        super().__init__(f"{page}:{line}: {message}")


@dataclass(frozen=True)
class Step:
    """Something that the runner does; ``line`` is the first line of ``text`` in the page."""

    line: int
    text: str


@dataclass(frozen=True)
class Command(Step):
    """A shell block. ``hidden``: readers do not see it. ``ready``: runs in the background, and is
    ready once this command succeeds."""

    hidden: bool = False
    ready: str | None = None


@dataclass(frozen=True)
class NotRun(Step):
    """A shell block that is only shown."""

    reason: str = ""


@dataclass(frozen=True)
class File(Step):
    """A file that the reader saves."""

    name: str = ""


@dataclass(frozen=True)
class Output(Step):
    """Lines that the output of the command before must contain."""


@dataclass(frozen=True)
class Page:
    """A page and its steps, in order."""

    name: str
    description: str
    commands: str
    starts: frozenset[str]
    needs: frozenset[str]
    pip: tuple[str, ...]
    npm: tuple[str, ...]
    steps: tuple[Step, ...]

    @property
    def runs(self) -> bool:
        """Whether the page has something to run."""
        return any(isinstance(step, Command) for step in self.steps)


def page_names() -> list[str]:
    """All pages, as paths relative to docs/."""
    return sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


def read_page(name: str) -> Page:
    """The page docs/<name>; raises PageError."""
    return parse_page(f"docs/{name}", (DOCS / name).read_text())


def parse_page(name: str, text: str) -> Page:
    """The page with this text; raises PageError."""
    tokens = markdown_tokens(text)
    if not tokens or tokens[0].type != "front_matter":
        raise PageError(name, 1, "no front matter")
    front = _front_matter(name, tokens[0].content)
    steps = tuple(_Reader(name, text, tokens[1:]).steps())
    page = Page(name=name, steps=steps, **front)
    if page.commands == "none":
        for step in steps:
            if isinstance(step, Command | Output):
                raise PageError(name, step.line, "a page with `commands: none` runs nothing")
    elif not page.runs:
        raise PageError(name, 1, f"`commands: {page.commands}`, but the page runs nothing")
    return page


def markdown_tokens(text: str) -> list[Token]:
    """The tokens of a page, with those in content tabs and admonitions."""
    return MarkdownIt().use(front_matter_plugin).enable("table").disable("code").parse(text)


def language_and_title(fence: Token) -> tuple[str, str]:
    """Those of ``yaml title="a.yaml"`` or ``{ .yaml title="…" }``; raises ValueError."""
    words = shlex.split(fence.info.strip().strip("{}"))
    language = words[0].removeprefix(".") if words else ""
    titles = [word.removeprefix("title=") for word in words if word.startswith("title=")]
    return language, titles[0] if titles else ""


def sections(name: str) -> dict[str, str]:
    """The text of docs/<name> below each heading of the second level."""
    parts = re.split(r"^## ", (DOCS / name).read_text(), flags=re.MULTILINE)[1:]
    return dict(part.split("\n", 1) for part in parts)


def rows(text: str) -> list[list[str]]:
    """The cells of each row of the tables in a text, with those of the heads and the rules."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def _front_matter(page: str, text: str) -> dict[str, Any]:
    try:
        front = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise PageError(page, 1, f"front matter: {error}") from None
    if not isinstance(front, dict):
        raise PageError(page, 1, "front matter is no mapping")
    return check_front_matter(page, front)


def check_front_matter(page: str, front: Mapping[str, Any]) -> dict[str, Any]:
    """The values that are ours; raises PageError."""
    if unknown := front.keys() - OURS - THEMES:
        raise PageError(page, 1, f"unknown in front matter: {', '.join(sorted(unknown))}")
    description, commands = front.get("description"), front.get("commands")
    if not isinstance(description, str) or not description.strip():
        raise PageError(page, 1, "front matter lacks `description`")
    if len(description) > DESCRIPTION_MAX_CHARS or "\n" in description.strip():
        raise PageError(
            page, 1, f"description: one line, at most {DESCRIPTION_MAX_CHARS} characters"
        )
    if commands not in SURROUNDINGS:
        raise PageError(page, 1, f"commands: one of {', '.join(SURROUNDINGS)}, not {commands!r}")
    return {
        "description": description.strip(),
        "commands": commands,
        "starts": _choices(page, front, "starts", STARTS[commands]),
        "needs": _choices(page, front, "needs", NEEDS),
        "pip": _packages(page, front, "pip"),
        "npm": _packages(page, front, "npm"),
    }


def _choices(page: str, front: Mapping[str, Any], key: str, known: set[str]) -> frozenset[str]:
    """A value, or a list of them."""
    given = front.get(key, [])
    values = given if isinstance(given, list) else [given]
    for value in values:
        if value not in known:
            allowed = ", ".join(sorted(known)) or "nothing"
            raise PageError(page, 1, f"{key}: {value!r}; allowed with these commands: {allowed}")
    return frozenset(values)


def _packages(page: str, front: dict[str, Any], key: str) -> tuple[str, ...]:
    given = front.get(key, [])
    if not isinstance(given, list) or not all(isinstance(each, str) for each in given):
        raise PageError(page, 1, f"{key}: a list of packages")
    return tuple(given)


class _Reader:
    """The steps of one page's tokens."""

    def __init__(self, page: str, text: str, tokens: Sequence[Token]) -> None:
        self._page, self._lines, self._tokens = page, text.splitlines(), tokens
        # The comment on the lines before the current token: (line after it, kind, argument).
        self._comment: tuple[int, str, str] | None = None

    def steps(self) -> Iterator[Step]:
        last: Step | None = None  # the last shell block
        for token in self._tokens:
            if token.map is None:
                continue
            line = token.map[0] + 1
            if token.type == "html_block":
                yield from self._html(token, line)
                continue
            if any(SIMILAR.match(one.content) for one in _inline_html(token)):
                raise PageError(self._page, line, "put the comment on lines of its own")
            if token.type == "paragraph_open":
                self._check_indentation(token)
            step = self._fence(token, line) if token.type == "fence" else None
            self._check_unused(line)
            if isinstance(step, Output) and not isinstance(last, Command):
                raise PageError(self._page, line, "there is no command before that is run")
            if isinstance(step, Command | NotRun):
                last = step
            if step is not None:
                yield step
        self._check_unused(0)

    def _html(self, token: Token, line: int) -> Iterator[Step]:
        text = token.content.strip()
        self._check_unused(line)
        found = COMMENT.match(text)
        if found is None:
            if SIMILAR.match(text):
                raise PageError(self._page, line, f"this comment is not understood: {text!r}")
            return
        kind, argument = found[1], (found[2] or "").strip()
        if bool(argument) != (kind != "output"):
            rule = "takes no argument" if kind == "output" else "needs an argument after `:`"
            raise PageError(self._page, line, f"`{kind}` {rule}")
        if kind == "run":
            command = _dedented(found[2] or "")
            first = token.content[: token.content.index(command.split("\n", 1)[0])].count("\n")
            yield Command(line + first, command, hidden=True)
        else:
            end = token.map[0] + token.content.rstrip().count("\n") + 2 if token.map else 0
            self._comment = end, kind, argument

    def _check_unused(self, line: int) -> None:
        """A comment about a block must be directly before that block."""
        if self._comment is not None:
            end, kind, _ = self._comment
            raise PageError(self._page, end - 1, f"`{kind}` is not directly before its code block")

    def _take(self, line: int, *kinds: str) -> tuple[str, str]:
        """The comment directly before a block, if it is one of these kinds."""
        if self._comment is None or self._comment[0] != line or self._comment[1] not in kinds:
            return "", ""
        _, kind, argument = self._comment
        self._comment = None
        return kind, argument

    def _fence(self, token: Token, line: int) -> Step | None:
        try:
            language, title = language_and_title(token)
        except ValueError as error:
            raise PageError(self._page, line, f"code block: {error}") from None
        first, text = line + 1, token.content
        if language in SHELLS:
            raise PageError(self._page, line, f"write `sh` instead of `{language}`")
        if not language:
            raise PageError(self._page, line, "a code block without a language: use `text`")
        if title:
            path = PurePosixPath(title)
            if path.is_absolute() or ".." in path.parts:
                raise PageError(self._page, line, f"a file outside the working directory: {title}")
            return File(first, text, title)
        if language == "sh":
            kind, argument = self._take(line, "not run", "background")
            if kind == "not run":
                return NotRun(first, text, argument)
            return Command(first, text, ready=argument or None)
        if language == "text" and self._take(line, "output")[0]:
            return Output(first, text)
        return None

    def _check_indentation(self, token: Token) -> None:
        """Reject indented code: its commands would not be run. Containers are indented as well."""
        start = token.map[0] if token.map else 0
        indent = _indent(self._lines[start])
        if token.level or indent < 4:
            return
        for above in reversed(self._lines[:start]):
            if above.strip() and _indent(above) < indent:
                if _indent(above) <= indent - 4 and CONTAINER.match(above.strip()):
                    return
                break
        raise PageError(self._page, start + 1, "indented code: use ```sh, ```text or ```yaml")


def _inline_html(token: Token) -> list[Token]:
    return [one for one in token.children or () if one.type == "html_inline"]


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip(" "))


def _dedented(text: str) -> str:
    """A hidden command without the indentation of its first line."""
    lines = [line.rstrip() for line in text.strip("\n").splitlines()]
    while lines and not lines[0]:
        del lines[0]
    indent = _indent(lines[0])
    return "\n".join(
        [lines[0].strip(), *(line[min(indent, _indent(line)) :] for line in lines[1:])]
    )
