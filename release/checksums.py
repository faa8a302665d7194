"""SHA256SUMS: the checksum of every file of a release, which ``sha256sum -c`` reads."""

from __future__ import annotations

from pathlib import Path

from release.errors import ReleaseError
from release.files import hashes, run, unequal

NAME = "SHA256SUMS"
SIGNATURE = f"{NAME}.asc"


def _hashes(out: Path) -> dict[str, str]:
    """Map the files that the list names, all but the list and its signature, to their SHA-256."""
    return {name: each for name, each in hashes(out).items() if name not in (NAME, SIGNATURE)}


def build(out: Path, key: str | None = None) -> list[Path]:
    """Write the list, and sign it if `key` names a secret key of GnuPG."""
    target = out / NAME
    lines = (f"{digest}  {name}\n" for name, digest in sorted(_hashes(out).items()))
    target.write_text("".join(lines))
    if not key:
        return [target]
    return [target, sign(target, out / SIGNATURE, key, "--armor", "--detach-sign")]


def sign(source: Path, target: Path, key: str, *options: str) -> Path:
    """Let GnuPG sign `source` with the secret key `key`; `options` say what it writes to `target`.

    Returns `target`.
    """
    signing = ("gpg", "--batch", "--yes", "--local-user", key)
    run((*signing, "--output", target, *options, source), cwd=Path.cwd())
    return target


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
    if wrong := unequal(listed, _hashes(out)):
        raise ReleaseError(f"{NAME} does not match: {', '.join(wrong)}")
    if signature and (out / SIGNATURE).exists():
        run(("gpg", "--batch", "--verify", out / SIGNATURE, out / NAME), cwd=out)
