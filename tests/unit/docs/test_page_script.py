"""Steps of a page run in one shell; the first failure is reported with its line and output."""

from __future__ import annotations

import os

import pytest
from doc_pages import parse_page
from page_script import first_missing, run_steps

FRONT = "---\ndescription: Words.\ncommands: local\n---\n"


@pytest.fixture
def run(tmp_path):
    """Run a page with this text; returns its failure."""
    for name in ("work", "steps"):
        (tmp_path / name).mkdir()

    def run(text, timeout_s=30):
        page = parse_page("page.md", FRONT + text)
        return run_steps(
            page,
            tmp_path / "steps",
            cwd=tmp_path / "work",
            env={"PATH": os.environ["PATH"]},
            timeout_s=timeout_s,
        )

    return run


def block(text):
    return f"```sh\n{text}\n```\n"


def test_blocks_share_one_shell_and_files_are_saved_before_the_commands_after_them(run):
    file = '```text title="a/b.txt"\nsaved\n```\n'
    assert run(block("x=1; mkdir d; cd d") + file + block("grep saved a/b.txt\n((x == 1))")) is None


def test_a_failing_command_is_reported_with_its_line_and_output(run):
    failure = run(block("echo before") + "\n" + block("echo said\nfalse\necho not reached"))
    assert failure.line == 10
    assert failure.what == "exit status 1"
    assert failure.output.splitlines() == ["said", "line 11: exit status 1: false"]
    assert "not reached" in failure.command


@pytest.mark.parametrize(
    "command", ["false | cat", 'echo "$missing"', "if", "nothing-of-this-name"]
)
def test_failures_in_pipelines_unset_variables_and_bad_syntax_are_failures(run, command):
    assert run(block(command)).line == 6


def test_a_page_that_leaves_its_shell_fails(run):
    assert "has exited" in run(block("exit 0") + block("true")).what


def test_a_page_that_takes_too_long_fails_at_the_command(run):
    failure = run(block("true") + block("exec sleep 60"), timeout_s=1)
    assert (failure.line, failure.what) == (9, "not finished 1 s after the page was begun")


def test_background_blocks_run_on_once_they_are_ready(run):
    text = f"<!-- background: test -e ready -->\n{block('touch ready; exec sleep 60')}"
    assert run(text + block("kill %1")) is None


def test_a_background_block_that_ends_before_it_is_ready_fails(run):
    failure = run(f"<!-- background: test -e never -->\n{block('echo dies; exit 3')}")
    assert failure.line == 7
    assert "dies" in failure.output
    assert "it has ended" in failure.output


def test_missing_output_is_reported_with_the_line_of_the_expectation(run):
    expected = "<!-- output -->\n```text\nb\na\n```\n"
    failure = run(block("printf 'a\\nb\\n'") + expected)
    assert (failure.line, failure.what) == (10, "not in the output: 'a'")
    assert failure.command == "printf 'a\\nb\\n'\n"


@pytest.mark.parametrize(
    ("expected", "output", "missing"),
    [
        ("a\n\nb\n", "x a\nb\n", None),
        ("b\na", "a\nb\n", "a"),
        ("NAME READY", "NAME       READY", None),
        ("a … c", "a b c\n", None),
        ("a … c", "a\nc\n", "a … c"),
        ("{…}\nNAME", "{1}NAME\n", None),
        ("…", "", None),
        ("a.b", "axb", "a.b"),
    ],
)
def test_lines_of_output_must_occur_in_order(expected, output, missing):
    assert first_missing(expected, output) == missing
