"""Builds the compiled core: the load table and the ring, the relay and the fast path of a request,
the scanner of JSON bodies, and the reader of streams for ``kubeai bench``.

``KUBEAI_CYTHON_STRICT=1`` turns warnings of Cython and the C compiler into errors (``make check``);
``KUBEAI_SANITIZE=address`` builds with AddressSanitizer. ``KUBEAI_BUILD_PROGRESS=/dev/pts/0`` shows
the progress on this terminal: pip hides what a build prints.

The version comes from git's tags; see `version`.
"""

import contextlib
import email.parser
import multiprocessing
import os
import re
import subprocess
from pathlib import Path

from Cython.Build import cythonize
from Cython.Compiler import Options
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

root = Path(__file__).parent
terminal = os.environ.get("KUBEAI_BUILD_PROGRESS")
FIRST_VERSION = "0.1.0"  # what is developed until there is a tag
# `git archive` replaces this with the output of `git describe`; see .gitattributes.
ARCHIVED = "$Format:%(describe:tags=true,match=v[0-9]*.[0-9]*.[0-9]*)$"
TAGS = "v[0-9]*.[0-9]*.[0-9]*"  # not `v1`, which may move from release to release
DESCRIPTION = re.compile(
    r"v(?P<core>\d+\.\d+\.)(?P<patch>\d+)(-(?P<stage>alpha|beta|rc)\.(?P<number>\d+))?"
    r"(-(?P<commits>\d+)-(?P<commit>g[0-9a-f]+))?(?P<dirty>-dirty)?"
)
COMMIT = re.compile(r"[0-9a-f]{7,64}")
STAGES = {"alpha": "a", "beta": "b", "rc": "rc"}


def described(description: str) -> str:
    """Translate the output of ``git describe`` into a Python version.

    On a tag it is the tag's version. Later commits are development versions of the next patch
    release: ``v1.2.3-4-gabc`` is ``1.2.4.dev4+gabc``, and ``v1.2.3-rc.1-4-gabc`` is
    ``1.2.3rc2.dev4+gabc``. Anything else is a ValueError.
    """
    match = DESCRIPTION.fullmatch(description)
    if not match:
        raise ValueError(f"not a version: {description!r}")
    commits, stage = match["commits"], match["stage"]
    later = bool(commits or match["dirty"])
    patch = int(match["patch"]) + (later and not stage)
    text = f"{match['core']}{patch}"
    if stage:
        text += f"{STAGES[stage]}{int(match['number']) + later}"
    if later:
        local = ".".join(filter(None, (match["commit"], match["dirty"] and "dirty")))
        text += f".dev{commits or 0}+{local}"
    return text


def from_git(folder: Path) -> str | None:
    """Return the version of the commit that is checked out in `folder`, if it is a repository."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ("git", *arguments), cwd=folder, capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    if not (folder / ".git").exists():  # the folder may lie in a repository of something else
        return None
    describe = ["describe", "--tags", f"--match={TAGS}"]
    while description := git(*describe, "--dirty"):
        with contextlib.suppress(ValueError):
            return described(description)
        describe.append(f"--exclude={git(*describe, '--abbrev=0')}")  # such as v1.2.3rc1
    commits, commit = git("rev-list", "--count", "HEAD"), git("rev-parse", "--short", "HEAD")
    if not commits or not commit:
        return None
    if git("rev-parse", "--is-shallow-repository") == "true":  # tags and commits may be missing
        return f"0.0.0+g{commit}"
    return f"{FIRST_VERSION}.dev{commits}+g{commit}"


def from_environment(stated: str) -> str:
    """Return the version that is stated: as Python or ``git describe --always`` writes it."""
    if COMMIT.fullmatch(stated):
        return f"0.0.0+g{stated}"
    return described(f"v{stated.removeprefix('v')}") if "-" in stated else stated


def version(folder: Path) -> str:
    """Return the version of the source tree in `folder`.

    The first of: ``PKG-INFO`` (in a source distribution), ``KUBEAI_VERSION`` in the environment (in
    the image's build, which has no repository), the git tag, and what ``git archive`` has written
    into this file. Without any of them it is ``0.0.0+unknown``.
    """
    with contextlib.suppress(FileNotFoundError):
        text = (folder / "PKG-INFO").read_text(encoding="utf-8")
        return str(email.parser.HeaderParser().parsestr(text)["Version"])
    if stated := os.environ.get("KUBEAI_VERSION"):
        return from_environment(stated)
    if found := from_git(folder):
        return found
    with contextlib.suppress(ValueError):
        return described(ARCHIVED)
    return "0.0.0+unknown"


def show(text: str) -> None:
    """Replace the line at the bottom of the terminal, if there is one."""
    if terminal:
        with contextlib.suppress(OSError), open(terminal, "w") as out:
            out.write(f"\r\x1b[K{text}")


compile_args = ["-O3"]
link_args = []
if os.environ.get("KUBEAI_CYTHON_STRICT"):
    Options.warning_errors = True
    # Cython's own C has unused parameters and helpers everywhere; the rest of -Wextra is meant.
    compile_args += [
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-unused-parameter",
        "-Wno-unused-function",
        "-Wno-cast-function-type",
        "-Wno-missing-field-initializers",
    ]
if sanitize := os.environ.get("KUBEAI_SANITIZE"):
    compile_args += [f"-fsanitize={sanitize}", "-fno-omit-frame-pointer", "-g", "-O1"]
    link_args += [f"-fsanitize={sanitize}"]


def modules() -> list[Extension]:
    """Return the compiled modules, not yet translated: a source distribution needs no more."""
    names = sorted(
        path.relative_to(root).with_suffix("").as_posix()
        for path in (root / "kubeai").rglob("*.pyx")
    )
    return [
        Extension(
            name.replace("/", "."),
            [f"{name}.pyx"],
            extra_compile_args=compile_args,
            extra_link_args=link_args,
        )
        for name in names
    ]


def translate(extensions: list[Extension]) -> list[Extension]:
    """Translate modules to C. `release/wheels.py` compiles the result for other machines."""
    show("  translating the modules to C")
    # A process that is not forked would not know `Options.warning_errors`.
    parallel = not Options.warning_errors or multiprocessing.get_start_method() == "fork"
    return cythonize(
        extensions,
        nthreads=min(len(extensions), os.cpu_count() or 1) if parallel else 0,
        language_level=3,
        compiler_directives={
            "boundscheck": False,
            "wraparound": False,
            "cdivision": True,
            "initializedcheck": False,
            "freethreading_compatible": False,
        },
        annotate=False,
    )


class BuildWithProgress(build_ext):
    """Translates the modules, and shows how many have been compiled: several at a time."""

    compiled = 0

    def run(self) -> None:
        """Build all modules, then remove the progress."""
        try:
            sources = {module.name: module.sources for module in translate(self.extensions)}
            for extension in self.extensions:
                extension.sources = sources[extension.name]
            super().run()
        finally:
            show("")

    def build_extension(self, ext: Extension) -> None:
        """Build one module."""
        show(f"  compiled {self.compiled} of {len(self.extensions)} modules")
        super().build_extension(ext)
        self.compiled += 1


if __name__ == "__main__":  # also in setuptools' build backend
    setup(
        version=version(root),
        cmdclass={"build_ext": BuildWithProgress},
        options={"build_ext": {"parallel": os.cpu_count()}},
        ext_modules=modules(),
    )
