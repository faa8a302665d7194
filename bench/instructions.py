"""Count instructions per request with callgrind: the same on a busy machine as on an idle one.

    python bench/instructions.py [--against REVISION] [--json FILE]

Drives a client connection and an engine connection directly, as in ``test_gateway.py``: relay,
exchange, routing and counting are real, but there are no sockets and no event loop. After a
warm-up, counts the instructions of a few hundred requests and divides by their number, in total
and per library. The interpreter's share includes the cost of driving the connections.

``--against`` builds another revision in a separate folder and counts there too. The exit status is
1 if a scenario needs over 5 % more in this tree.
Needs valgrind (Debian: apt install valgrind) and gcc; without valgrind it prints a notice and exits
with status 0.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOLERANCE = 0.05
WARMUP = 50
# valgrind's client requests are instruction sequences that are only available from C.
MARKS = r"""
#include <valgrind/callgrind.h>
void begin(void) { CALLGRIND_START_INSTRUMENTATION; CALLGRIND_ZERO_STATS; }
void end(const char *name) { CALLGRIND_DUMP_STATS_AT(name); CALLGRIND_STOP_INSTRUMENTATION; }
"""


def scenarios() -> dict[str, tuple[int, Callable[[], None]]]:
    """The scenarios: name → (repetitions, function)."""
    import test_gateway
    from test_gateway import CHUNK, STREAM, WHOLE, chat, ends

    answer = getattr(test_gateway, "ANSWER", b"x" * 300)  # older revisions have none

    make_ends = ends.__wrapped__ if hasattr(ends, "__wrapped__") else ends
    made = {}
    keep = []
    keyed = ["LeastLoad" + test_gateway.KEYED] if hasattr(test_gateway, "KEYED") else []
    for strategy in ("LeastLoad", "PrefixHash", "PrefixCache", *keyed):
        request = type("Request", (), {"param": strategy})
        generator = make_ends(request)
        keep.append(generator)
        to_gateway, from_engine = next(generator)

        def whole(request: bytes, to=to_gateway, back=from_engine) -> None:
            to(request)
            back(WHOLE + answer)

        def exchange(request: bytes, response: bytes, to=to_gateway, back=from_engine) -> None:
            to(request)
            back(response)

        def stream(request: bytes, to=to_gateway, back=from_engine) -> None:
            to(request)
            back(STREAM)
            for _ in range(64):
                back(CHUNK)
            back(b"0\r\n\r\n")

        small, large = chat(560), chat(400_000)
        made[f"chat, {strategy}"] = (300, lambda f=whole, r=small: f(r))
        if strategy == "PrefixHash":
            made["400 KB prompt"] = (10, lambda f=whole, r=large: f(r))
            made["stream of 64 chunks"] = (30, lambda f=stream, r=small: f(r))
        elif strategy == "LeastLoad" and hasattr(test_gateway, "ALIAS"):  # else an older revision
            aliased = chat(560, test_gateway.ALIAS)
            named = b'{"model":"m",' + answer[1:]
            head = WHOLE.replace(b"300", b"%d" % len(named))
            made["chat by alias"] = (300, lambda f=exchange, r=aliased, w=head + named: f(r, w))
        elif strategy == "PrefixCache":
            made["400 KB prompt, PrefixCache"] = (10, lambda f=whole, r=large: f(r))
    scenarios.keep = keep  # garbage-collecting a generator would close its connections
    return made


def count_here(marks: str) -> None:
    """Run as the program under callgrind."""
    library = ctypes.CDLL(marks)
    for name, (times, act) in scenarios().items():
        for _ in range(min(WARMUP, times)):
            act()
        library.begin()
        for _ in range(times):
            act()
        library.end(f"{times} {name}".encode())
    os._exit(0)  # interpreter shutdown is slow and not counted


def by_library(profile: str) -> Counter[str]:
    """Instructions per library, from a file in callgrind's format."""
    names: dict[str, str] = {}
    counts: Counter[str] = Counter()
    library, of_callee = "", False
    for line in profile.splitlines():
        if found := re.match(r"(c?)ob=(\(\d+\))(?: (.*))?", line):
            caller, number, name = found.groups()
            if name:  # names are defined on first use
                names[number] = Path(name).name.partition(".")[0]
            if not caller:
                library = names[number]
        elif line.startswith("calls="):
            of_callee = True  # the next line is the callee's cost, which is listed there too
        elif re.match(r"[\d+*-]", line):
            if not of_callee:
                counts[library] += int(line.split()[-1])
            of_callee = False
    return counts


def count(checkout: Path, work: Path) -> dict[str, dict[str, float]]:
    """Instructions per request in a built checkout: scenario → library → count."""
    out = work / f"callgrind-{checkout.name}"
    marks = work / "marks.so"
    if not marks.exists():
        source = work / "marks.c"
        source.write_text(MARKS)
        subprocess.run(["gcc", "-shared", "-fPIC", "-o", marks, source], check=True)
    command = ["valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={out}"]
    # -P: use the checkout's own bench/test_gateway.py, which matches its relay.
    command += [sys.executable, "-P", __file__, "--count", str(marks)]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{checkout}:{checkout / 'bench'}",
        "PYTHONHASHSEED": "0",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run(
        command, env=environment, cwd=work, capture_output=True, text=True, check=False
    )
    counted = {}
    for path in sorted(work.glob(f"{out.name}.*")):
        text = path.read_text(errors="replace")
        name = re.search(r"^desc: Trigger: Client Request: (\d+) (.*)$", text, re.MULTILINE)
        if name:
            counted[name[2]] = {
                library: instructions / int(name[1])
                for library, instructions in by_library(text).most_common()
            }
    if not counted:
        raise RuntimeError(f"nothing was counted: {done.stderr[-2000:]}")
    return counted


def build(revision: str, folder: Path) -> Path:
    """Build another revision of the package in a folder."""
    archive = subprocess.run(
        ["git", "archive", revision, "kubeai", "bench", "setup.py", "pyproject.toml"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    folder.mkdir()
    subprocess.run(["tar", "-xf", "-", "-C", folder], input=archive.stdout, check=True)
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=folder, check=True
    )
    return folder


def shares(libraries: dict[str, float]) -> str:
    """Each library's share, without those of 1 % or less."""
    total = sum(libraries.values())
    return ", ".join(f"{name} {n / total:.0%}" for name, n in libraries.items() if n > 0.01 * total)


def show(here: dict[str, dict[str, float]], there: dict[str, dict[str, float]]) -> bool:
    """Print the counts; returns whether all are within the limits."""
    well = True
    print(f"{'instructions':24}{'before':>12}{'now':>12}{'change':>9}")
    for name, libraries in here.items():
        now, before = sum(libraries.values()), sum(there.get(name, {}).values())
        change = now / before - 1 if before else 0.0
        slower = change > TOLERANCE
        well = well and not slower
        told = f"{before:12.0f}{now:12.0f}{change:+9.1%}" if before else f"{'':12}{now:12.0f}"
        print(f"{name:24}{told}{'  slower' if slower else ''}")
        print(f"{'':24}  {shares(libraries)}")
    return well


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--against", metavar="REVISION", help="git revision to compare with")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--count", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.count:
        count_here(options.count)
    if shutil.which("valgrind") is None:
        print("valgrind is not installed: no instructions are counted (apt install valgrind)")
        return 0
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        here = count(ROOT, work)
        there = {}
        if options.against:
            try:
                there = count(build(options.against, work / "before"), work)
            except (RuntimeError, subprocess.CalledProcessError) as error:
                print(f"{options.against} cannot be compared with: {error}")
    if options.json:
        options.json.write_text(json.dumps(here, indent=1))
    return 0 if show(here, there) else 1


if __name__ == "__main__":
    sys.exit(main())
