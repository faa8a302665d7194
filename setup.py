"""Builds the compiled core: the load table and the ring, the relay and the fast path of a request,
the scanner of JSON bodies, and the reader of streams for ``kubeai bench``.

``KUBEAI_CYTHON_STRICT=1`` turns warnings of Cython and the C compiler into errors (``make check``);
``KUBEAI_SANITIZE=address`` builds with AddressSanitizer. ``KUBEAI_BUILD_PROGRESS=/dev/pts/0`` shows
the progress on this terminal: pip hides what a build prints.
"""

import contextlib
import os
from pathlib import Path

from Cython.Build import cythonize
from Cython.Compiler import Options
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

root = Path(__file__).parent
terminal = os.environ.get("KUBEAI_BUILD_PROGRESS")


def show(text: str) -> None:
    """Replace the line at the bottom of the terminal, if there is one."""
    if terminal:
        with contextlib.suppress(OSError), open(terminal, "w") as out:
            out.write(f"\r\x1b[K{text}")


class BuildWithProgress(build_ext):
    """Shows how many modules have been compiled. Several are compiled at a time, in threads."""

    compiled = 0

    def run(self) -> None:
        """Build all modules, then remove the progress."""
        try:
            super().run()
        finally:
            show("")

    def build_extension(self, ext: Extension) -> None:
        """Build one module."""
        show(f"  compiled {self.compiled} of {len(self.extensions)} modules")
        super().build_extension(ext)
        self.compiled += 1


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

modules = sorted(
    path.relative_to(root).with_suffix("").as_posix() for path in (root / "kubeai").rglob("*.pyx")
)

show("  translating the modules to C")
setup(
    cmdclass={"build_ext": BuildWithProgress},
    options={"build_ext": {"parallel": os.cpu_count()}},
    ext_modules=cythonize(
        [
            Extension(
                name.replace("/", "."),
                [f"{name}.pyx"],
                extra_compile_args=compile_args,
                extra_link_args=link_args,
            )
            for name in modules
        ],
        language_level=3,
        compiler_directives={
            "boundscheck": False,
            "wraparound": False,
            "cdivision": True,
            "initializedcheck": False,
            "freethreading_compatible": False,
        },
        annotate=False,
    ),
)
