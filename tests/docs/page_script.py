"""Run the steps of a page in one shell, and compare outputs.

Every block becomes a file of its own that the shell sources, with the page's name, and blank lines
before it: so what the shell reports has the page's line numbers.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

from doc_pages import Command, File, Output, Page, Step

READY_TIMEOUT_S = 90
OUTPUT_MAX_CHARS = 6000
PROLOGUE = r"""
set -Eeuo pipefail
begin() {
    printf '%s' "$1" >"$STEPS/at"
    echo "$1 $EPOCHREALTIME" >>"$STEPS/times"
    exec >>"$STEPS/$1.out" 2>&1
}
# until_ready PROCESS STEP: wait for the background step, whose condition is in a file
until_ready() {
    local deadline=$((SECONDS + READY_TIMEOUT_S))
    until (set +Ee; trap - ERR; . "$STEPS/$2.ready") >"$STEPS/$2.waiting" 2>&1; do
        if ! kill -0 "$1" 2>/dev/null; then echo "it has ended"; return 1; fi
        if ((SECONDS > deadline)); then
            echo "not ready after $READY_TIMEOUT_S s:"; cat "$STEPS/$2.waiting"; return 1
        fi
        sleep 0.1
    done
}
trap 'echo "line $LINENO: exit status $?: $BASH_COMMAND"' ERR
"""


@dataclass(frozen=True)
class Failure:
    """What failed: where, and its output."""

    line: int
    what: str
    command: str
    output: str

    def __str__(self) -> str:
        output = self.output[-OUTPUT_MAX_CHARS:].rstrip() or "(none)"
        return (
            f"{self.line}: {self.what}\n{_indented(self.command)}\n  output:\n{_indented(output)}"
        )


def run_steps(
    page: Page, steps: Path, *, cwd: Path, env: dict[str, str], timeout_s: float
) -> Failure | None:
    """Run a page; returns its first failure, or None. ``steps``: for scripts and outputs."""
    script = steps / "script.sh"
    script.write_text(_script(page, steps))
    begun = subprocess.Popen(
        ["bash", str(script)],
        cwd=cwd,
        env={**env, "STEPS": str(steps), "READY_TIMEOUT_S": str(READY_TIMEOUT_S)},
        stdin=subprocess.DEVNULL,
    )
    try:
        status = begun.wait(timeout_s)
    except subprocess.TimeoutExpired:
        begun.kill()
        begun.wait()
        return _failed(page, steps, f"not finished {timeout_s:.0f} s after the page was begun")
    at = (steps / "at").read_text()
    if status != 0:
        return _failed(page, steps, f"exit status {status}")
    if at != "done":
        return _failed(page, steps, "the page's shell has exited here")
    return _compare_outputs(page, steps)


def _script(page: Page, steps: Path) -> str:
    lines = [PROLOGUE]
    for number, step in enumerate(page.steps):
        if isinstance(step, File):
            (steps / f"{number}.file").write_text(step.text)
            name = shlex.quote(step.name)
            lines.append(f'begin {number}; mkdir -p "$(dirname {name})"')
            lines.append(f'cp "$STEPS/{number}.file" {name}')
        elif isinstance(step, Command):
            source = steps / str(number) / page.name
            source.parent.mkdir(parents=True)
            source.write_text("\n" * (step.line - 1) + step.text)
            run = f". {shlex.quote(str(source))}"
            if step.ready is None:
                lines.append(f"begin {number}; {run}")
                continue
            (steps / f"{number}.ready").write_text(step.ready)
            # With job control, `kill %%` reaches what the block has started.
            lines.append(f"begin {number}; set -m; {run} & set +m")
            lines.append(f"until_ready $! {number}")
    return "\n".join([*lines, "begin done", ""])


def _failed(page: Page, steps: Path, what: str) -> Failure:
    at = (steps / "at").read_text() if (steps / "at").exists() else "0"
    if not at.isdigit():
        return Failure(0, what, "", "")
    step = page.steps[int(at)]
    return Failure(step.line, what, step.text, _output(steps, int(at)))


def _output(steps: Path, number: int) -> str:
    path = steps / f"{number}.out"
    text = path.read_text(errors="replace") if path.exists() else ""
    return text.replace(f"{steps}/{number}/", "")


def durations(page: Page, steps: Path) -> list[tuple[Step, float]]:
    """How long each step took, in seconds, after a page has run."""
    marks = [line.split() for line in (steps / "times").read_text().splitlines()]
    ends = marks[1:]
    return [
        (page.steps[int(number)], float(end) - float(begun))
        for (number, begun), (_, end) in zip(marks, ends, strict=False)
    ]


def _compare_outputs(page: Page, steps: Path) -> Failure | None:
    before = 0
    for number, step in enumerate(page.steps):
        if isinstance(step, Command) and not step.hidden:
            before = number
        elif isinstance(step, Output):
            output = _output(steps, before)
            if (missing := first_missing(step.text, output)) is not None:
                command = page.steps[before].text
                return Failure(step.line, f"not in the output: {missing!r}", command, output)
    return None


def first_missing(expected: str, output: str) -> str | None:
    """The first line of ``expected`` that ``output`` lacks after the lines before it, or None.

    ``…`` stands for any text in a line. The amount of white space between words does not matter.
    """
    position = 0
    for wanted in filter(str.strip, expected.splitlines()):
        parts = (r"[^\S\n]+".join(map(re.escape, part.split())) for part in wanted.split("…"))
        found = re.compile("[^\n]*?".join(parts)).search(output, position)
        if found is None:
            return wanted.strip()
        position = found.end()
    return None


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.rstrip().splitlines())
