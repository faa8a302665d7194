"""Progress of `kubeai load`: a bar on a terminal, lines elsewhere."""

import subprocess
import sys

from fakes.terminal import PtyProcess
from harness import until

PROGRAM = """
import asyncio, importlib, sys

load = importlib.import_module("kubeai.loading.load")
load.BAR_INTERVAL_S = load.PROGRESS_INTERVAL_S = 0.05

class Staging:
    calls = 0
    def held_bytes(self):
        self.calls += 1
        return 100_000_000 * self.calls

async def main():
    async with load._progress(Staging(), 2_000_000_000):
        await asyncio.to_thread(sys.stdin.readline)
    print("done", file=sys.stderr)

asyncio.run(main())
"""


async def test_a_terminal_shows_a_bar_which_is_removed_at_the_end():
    async with PtyProcess(sys.executable, "-c", PROGRAM) as ran:
        await until("the bar", lambda: b"/2.0 GB" in ran.raw)
        ran.type("\x04")  # without an echo, which would move the bar
        assert await ran.end() == 0
        assert ran.terminal.seen().split() == ["done"]
        assert ran.terminal.cursor_shown


def test_elsewhere_each_report_is_a_line():
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as ran:
        lines = [ran.stderr.readline() for _ in range(3)]
        ran.stdin.write("\n")
        ran.stdin.close()
        ran.stderr.read()
    assert lines[0] == "resuming with 0.10 GB from an earlier attempt\n"
    assert lines[1].startswith("0.20 of 2.00 GB, ")
    assert lines[2].startswith("0.30 of 2.00 GB, ")
