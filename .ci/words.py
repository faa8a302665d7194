"""Fail on words that the documentation and the code avoid: archaic, or of several meanings.

    python .ci/words.py [FILE …]

Without arguments, all tracked text files are read. Prints each place as ``file:line: text``.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

# What not to write: what to write instead.
WORDS = {
    r"\banew\b": "again",
    r"\bset(?:s|ting)? aside\b": "eject",
    r"\bput(?:s|ting)? down\b": "record",
    r"\brelaps(?:e|es|ed|ing)\b": "fail again; ejection count",
    r"\bsparingly\b": "rate-limited",
    r"\bso many\b": "the number",
    r"\bwho (?:asks|speaks|writes|wants|reads|sends|comes)\b": "the client, the caller",
    r"\bwhoever (?:asks|speaks|wants)\b": "the caller",
    r"\b(?:is|are|was|were) told of\b": "is notified of, learns of",
    r"\bof late\b": "recently",
    r"\bif need be\b": "if needed",
    r"\bgone on with\b": "continued",
    r"\bmend(?:s|ed|ing)?\b": "fix, repair",
    r"\bfor ever\b": "forever, indefinitely",
    r"\bby and by\b": "gradually",
    r"\bup the hinge\b": "to the supervisor",
    r"\bstraight way\b": "fast path",
}
SUFFIXES = {".py", ".pyx", ".pxd", ".pyi", ".md", ".yaml", ".yml", ".tpl", ".txt", ".toml", ".sh"}
NAMES = {"Makefile", "Dockerfile", "run"}
PATTERN = re.compile("|".join(WORDS), re.IGNORECASE)


def tracked() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], capture_output=True, check=True, text=True
    ).stdout
    paths = [Path(name) for name in listed.split("\0") if name]
    return [path for path in paths if path.exists()]  # one may be deleted and not yet committed


def instead(found: str) -> str:
    return next(text for word, text in WORDS.items() if re.fullmatch(word, found, re.IGNORECASE))


def main() -> int:
    paths = [Path(name) for name in sys.argv[1:]] or tracked()
    count = 0
    for path in paths:
        if (path.suffix not in SUFFIXES and path.name not in NAMES) or path.name == "words.py":
            continue
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            for match in PATTERN.finditer(line):
                count += 1
                print(f"{path}:{number}: {match[0]!r}: write {instead(match[0])!r}")
    return min(count, 1)


if __name__ == "__main__":
    sys.exit(main())
