"""SHA256SUMS: the checksum of every file of a release, which ``sha256sum -c`` reads."""

from __future__ import annotations

from pathlib import Path

from release.errors import ReleaseError
from release.files import run, sha256

NAME = "SHA256SUMS"
SIGNATURE = f"{NAME}.asc"


def files(out: Path) -> list[Path]:
    """Return the files that the list names: all but the list and its signature."""
    names = (path for path in out.rglob("*") if path.is_file())
    return sorted(path for path in names if path.name not in (NAME, SIGNATURE))


def build(out: Path, key: str | None = None) -> list[Path]:
    """Write the list, and sign it if `key` names a secret key of GnuPG."""
    target = out / NAME
    target.write_text(
        "".join(f"{sha256(path)}  {path.relative_to(out).as_posix()}\n" for path in files(out))
    )
    if not key:
        return [target]
    signature = out / SIGNATURE
    signing = ("gpg", "--batch", "--yes", "--local-user", key, "--armor", "--detach-sign")
    run((*signing, "--output", signature, target), cwd=out)
    return [target, signature]


def keyring(key: str, target: Path) -> Path:
    """Export the public key of `key`, in the form that Helm reads."""
    run(("gpg", "--batch", "--yes", "--output", target, "--export", key), cwd=target.parent)
    return target


def check(out: Path, *, signature: bool = True) -> None:
    """Refuse a list that misses a file, names a missing one, or has another checksum.

    ``signature``: whether the list's signature, if it has one, is checked, which needs the key.
    """
    lines = (line.split("  ", 1) for line in (out / NAME).read_text().splitlines())
    listed = {name: digest for digest, name in lines}
    found = {path.relative_to(out).as_posix(): sha256(path) for path in files(out)}
    wrong = sorted(
        name for name in listed.keys() | found.keys() if listed.get(name) != found.get(name)
    )
    if wrong:
        raise ReleaseError(f"{NAME} does not match: {', '.join(wrong)}")
    if signature and (out / SIGNATURE).exists():
        run(("gpg", "--batch", "--verify", out / SIGNATURE, out / NAME), cwd=out)
