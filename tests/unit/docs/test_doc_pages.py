"""Pages of the documentation are parsed by the conventions; what breaks them is an error."""

from __future__ import annotations

import pytest
from doc_pages import Command, File, NotRun, Output, PageError, parse_page

FRONT = "---\ndescription: Words.\ncommands: {}\n---\n"


def steps(text, commands="local"):
    return parse_page("page.md", FRONT.format(commands) + text).steps


def error(text, commands="local"):
    with pytest.raises(PageError) as caught:
        steps(text, commands)
    return str(caught.value)


def test_shell_blocks_are_commands_in_the_pages_order_with_their_lines():
    first, second = steps("# Title\n```sh\none\n```\n\n- item\n\n    ```sh\n    two\n    ```\n")
    assert first == Command(7, "one\n")
    assert second == Command(13, "two\n")


def test_fences_in_tabs_and_admonitions_are_found_without_their_indentation():
    text = (
        '=== "curl"\n\n    ```sh\n    if x; then\n      y\n    fi\n    ```\n\n'
        "!!! note\n    Words.\n\n    ```sh\n    z\n    ```\n"
    )
    assert [step.text for step in steps(text)] == ["if x; then\n  y\nfi\n", "z\n"]


def test_titled_blocks_are_files_and_others_are_only_shown():
    text = (
        '```yaml title="a/b.yaml"\nx: 1\n```\n```yaml\ny: 1\n```\n'
        '``` { .json title="c.json" }\n{}\n```\n```sh\ntrue\n```\n'
    )
    first, second, _ = steps(text)
    assert first == File(6, "x: 1\n", "a/b.yaml")
    assert second == File(12, "{}\n", "c.json")


def test_a_reason_before_a_block_keeps_it_from_running():
    shown, _ = steps("<!-- not run: needs a\ncloud -->\n```sh\none\n```\n```sh\ntwo\n```\n")
    assert shown == NotRun(8, "one\n", "needs a\ncloud")


def test_hidden_commands_may_have_one_line_or_several():
    one, several = steps("<!-- run: wait -->\n\n<!-- run:\n  if x; then\n    y\n  fi\n-->\n")
    assert one == Command(5, "wait", hidden=True)
    assert several == Command(8, "if x; then\n  y\nfi", hidden=True)


def test_a_background_block_has_the_command_that_says_it_is_ready():
    (step,) = steps("<!-- background: curl -sf a -->\n```sh\nserve\n```\n")
    assert step == Command(7, "serve\n", ready="curl -sf a")


def test_comments_in_code_are_text():
    (step,) = steps("Write `<!-- run: x -->`.\n\n```sh\na\n```\n")
    assert step == Command(8, "a\n")


def test_output_is_compared_only_after_the_comment():
    text = "```sh\na\n```\n```text\nshown\n```\n<!-- output -->\n```text\ncompared\n```\n"
    _, output = steps(text)
    assert output == Output(13, "compared\n")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "```sh\na\n```\n<!-- not run: why -->\n\n```sh\nb\n```\n",
            ":8: `not run` is not directly",
        ),
        ("```sh\na\n```\n<!-- not run: why -->\n", ":8: `not run` is not directly"),
        ("<!-- output -->\n```sh\na\n```\n", "`output` is not directly"),
        ("<!-- not run -->\n```sh\na\n```\n", ":5: `not run` needs an argument"),
        ("<!-- run: -->\n", "`run` needs an argument"),
        ("<!-- output: x -->\n", "`output` takes no argument"),
        ("<!-- notrun: x -->\n", "is not understood"),
        ("Words <!-- run: x -->\n", "on lines of its own"),
        ("```bash\na\n```\n", "write `sh` instead of `bash`"),
        ("```\na\n```\n", "without a language"),
        ('```sh\na\n```\n```yaml title="../a"\na\n```\n', "outside the working directory"),
        ("Run:\n\n    a\n", ":7: indented code"),
        ("<!-- output -->\n```text\na\n```\n```sh\na\n```\n", "no command before"),
        (
            "<!-- not run: x -->\n```sh\na\n```\n<!-- output -->\n```text\na\n```\n",
            "no command before",
        ),
        ("Only words.\n", "the page runs nothing"),
    ],
)
def test_what_breaks_the_conventions_is_an_error_with_its_line(text, words):
    assert words in error(text)


def test_pages_without_commands_may_only_show_some():
    assert steps("<!-- not run: x -->\n```sh\na\n```\n", "none")
    assert "runs nothing" in error("```sh\na\n```\n", "none")
    assert "runs nothing" in error("<!-- run: a -->\n", "none")


@pytest.mark.parametrize(
    ("front", "words"),
    [
        ("", "no front matter"),
        ("---\ncommands: none\n---\n", "lacks `description`"),
        ("---\ndescription: x\ncommands: some\n---\n", "commands: one of"),
        ("---\ndescription: x\n---\n", "commands: one of"),
        (f"---\ndescription: {'x' * 151}\ncommands: none\n---\n", "at most 150"),
        ("---\ndescription: x\ncommands: none\nother: 1\n---\n", "unknown in front matter: other"),
        ("---\ndescription: x\ncommands: none\nstarts: chart\n---\n", "starts: 'chart'"),
        ("---\ndescription: x\ncommands: local\nneeds: [all]\n---\n", "needs: 'all'"),
        ("---\n[\n---\n", "front matter: "),
    ],
)
def test_wrong_front_matter_is_an_error(front, words):
    with pytest.raises(PageError, match=words):
        parse_page("page.md", f"{front}# Title\n")
