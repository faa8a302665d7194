"""The command line: ``python -m release --help``. The Makefile's targets call it."""

from __future__ import annotations

import argparse
import os
import sys
from datetime import UTC, datetime
from pathlib import Path

from release import compatibility, notes, pipeline, publish, versions, wheels
from release.errors import ReleaseError
from release.files import differences, run


def arguments(values: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m release", description="Build a release.")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text)
        made.add_argument("version", metavar="VERSION", help="X.Y.Z or X.Y.Z-rc.N, without v")
        return made

    for name, text in (
        ("build", "Build and check a release from a clean clone of HEAD."),
        ("check", "Build twice under different circumstances and compare the bytes."),
    ):
        made = command(name, text)
        made.add_argument("--out", type=Path, help="default dist/VERSION; replaced")
        made.add_argument("--parts", default=",".join(pipeline.PARTS), help="default: %(default)s")
        made.add_argument(
            "--pythons", default=",".join(wheels.PYTHONS), help="default: %(default)s"
        )
        made.add_argument(
            "--architectures", default=",".join(wheels.ARCHITECTURES), help="default: %(default)s"
        )
        if name == "build":
            made.add_argument("--no-check", action="store_true", help="build only")
    made = command("publish", "Push the image and the charts to registries.")
    made.add_argument("--out", type=Path, help="default dist/VERSION")
    made.add_argument("--image", metavar="REPOSITORY", help="registry.example.com/kubeai")
    made.add_argument("--charts", metavar="REPOSITORY", help="registry.example.com/charts")
    made.add_argument("--plain-http", action="store_true", help="the registry has no TLS")
    command("prepare", "Give the entries of Unreleased in CHANGELOG.md to VERSION.")
    command("notes", "Print the release notes.")
    compare = commands.add_parser("compare", help="List files that differ between two folders.")
    compare.add_argument("one", type=Path)
    compare.add_argument("other", type=Path)
    base = commands.add_parser(
        "compatibility", help="List what was removed since a release and not announced."
    )
    base.add_argument("base", nargs="?", help="a tag or commit; default: the last release")
    return parser.parse_args(values)


def split(text: str, allowed: tuple[str, ...] | None = None) -> list[str]:
    """Split a list at commas or spaces, and refuse values that are not allowed."""
    found = text.replace(",", " ").split()
    for each in found:
        if allowed and each not in allowed:
            raise ReleaseError(f"{each}: use some of {', '.join(allowed)}")
    return found


def build(options: argparse.Namespace, repository: Path) -> None:
    """Build a release, and for `check` a second time."""
    version = versions.parse(options.version)
    plan = pipeline.Plan(
        version,
        (options.out or repository / "dist" / str(version)).resolve(),
        split(options.parts, pipeline.PARTS),
        split(options.pythons),
        split(options.architectures, wheels.ARCHITECTURES),
        os.environ.get("GPG_KEY") or None,
        lambda text: print(text, flush=True),
        checked=not getattr(options, "no_check", False),
    )
    for path in pipeline.build(repository, plan):
        size = sum(each.stat().st_size for each in (path, *path.rglob("*")) if each.is_file())
        print(f"{size:>12,}  {path.name}")
    if options.command == "check":
        same = [options.version, "--parts", ",".join(plan.parts)]
        same += ["--pythons", ",".join(plan.pythons)]
        same += ["--architectures", ",".join(plan.architectures)]
        if different := pipeline.reproduce(repository, plan.out, same):
            raise ReleaseError("the second build differs in: " + ", ".join(different))
        print("both builds have the same bytes")


def run_command(options: argparse.Namespace) -> None:
    """Carry out a command."""
    repository = Path(run(("git", "rev-parse", "--show-toplevel"), cwd=Path.cwd()).strip())
    changelog = repository / "CHANGELOG.md"
    match options.command:
        case "build" | "check":
            build(options, repository)
        case "publish":
            version = versions.parse(options.version)
            for reference in publish.publish(
                repository,
                version,
                (options.out or repository / "dist" / str(version)).resolve(),
                image_repository=options.image,
                charts_repository=options.charts,
                plain_http=options.plain_http,
            ):
                print(reference)
        case "prepare":
            version = versions.parse(options.version)
            text = changelog.read_text(encoding="utf-8")
            today = datetime.now(UTC).date().isoformat()
            changelog.write_text(notes.prepare(text, version, today), encoding="utf-8")
        case "notes":
            text = changelog.read_text(encoding="utf-8")
            print(notes.section(text, versions.parse(options.version)))
        case "compare":
            if different := differences(options.one, options.other):
                raise ReleaseError("different: " + ", ".join(different))
        case "compatibility":
            compatibility.check(repository, options.base)


def main() -> int:
    """Run a command; a ReleaseError is its message and status 1."""
    try:
        run_command(arguments())
    except ReleaseError as error:
        print(f"release: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
