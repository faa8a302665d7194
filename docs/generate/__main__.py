"""Write the generated pages of docs/reference, or compare them with what they should be.

python docs/generate           # write
python docs/generate --check   # print a diff and fail if a page is out of date
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable
from pathlib import Path

import command_line
import errors
import helm
import openapi

REFERENCE = Path(__file__).resolve().parents[1] / "reference"
PAGES: dict[str, Callable[[], str]] = {
    "command-line.md": command_line.page,
    "errors.md": errors.page,
    "helm-values.md": helm.page,
    "openapi.json": openapi.document_file,
    "openapi.md": openapi.page,
}


def main(check: bool) -> int:
    stale = 0
    for name, make in PAGES.items():
        path, text = REFERENCE / name, make()
        before = path.read_text() if path.exists() else ""
        if before == text:
            continue
        if not check:
            path.write_text(text)
            continue
        stale += 1
        where = f"docs/reference/{name}"
        diff = list(
            difflib.unified_diff(
                before.splitlines(), text.splitlines(), where, "what is generated", lineterm=""
            )
        )
        print("\n".join(diff[:60]))
    if stale:
        print("Run `make reference`.", file=sys.stderr)
    return min(stale, 1)


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
