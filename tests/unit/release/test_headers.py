"""The headers of CPython that wheels are compiled with."""

import pytest

from release import headers
from release.errors import ReleaseError

VERSION = "3.14"
PLAIN = "#define SIZEOF_LONG 8\n"
# Debian and Ubuntu have one for each architecture; this one includes it.
DEBIAN = """
#if defined(__linux__)
# if defined(__x86_64__) && defined(__LP64__)
#  include <x86_64-linux-gnu/python3.14/pyconfig.h>
# elif defined(__x86_64__) && defined(__ILP32__)
#  include <x86_64-linux-gnux32/python3.14/pyconfig.h>
# elif defined(__aarch64__) && defined(__AARCH64EL__)
#  include <aarch64-linux-gnu/python3.14/pyconfig.h>
# endif
#endif
"""


def write_headers(folder, config):
    folder.mkdir(parents=True)
    (folder / "Python.h").write_text("/* Python.h */\n")
    (folder / "patchlevel.h").write_text('#define PY_VERSION              "3.14.2"\n')
    (folder / "pyconfig.h").write_text(config)


@pytest.fixture
def interpreter(tmp_path, monkeypatch):
    """A `python3.14` on PATH, whose headers are in the returned folder."""
    include = tmp_path / f"usr/include/python{VERSION}"
    program = tmp_path / f"bin/python{VERSION}"
    program.parent.mkdir()
    program.write_text(
        f"#!/bin/sh\nprintf '%s\\n' '{VERSION} False' {include} {include}/pyconfig.h\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    monkeypatch.delenv("PYTHON_HEADERS", raising=False)
    return include


def test_the_headers_of_an_interpreter_are_copied(interpreter, tmp_path):
    write_headers(interpreter, PLAIN)
    staged = headers.stage(VERSION, tmp_path / "staged")
    assert (staged / "pyconfig.h").read_text() == PLAIN
    assert (staged / "Python.h").exists()
    assert headers.release(VERSION) == "3.14.2"


def test_of_debian_the_pyconfig_of_the_architecture_is_copied(interpreter, tmp_path):
    write_headers(interpreter, DEBIAN)
    own = interpreter.parent / f"x86_64-linux-gnu/python{VERSION}/pyconfig.h"
    own.parent.mkdir(parents=True)
    own.write_text(PLAIN)
    staged = headers.stage(VERSION, tmp_path / "staged")
    assert (staged / "pyconfig.h").read_text() == PLAIN


def test_a_pyconfig_without_that_of_the_architecture_is_refused(tmp_path, monkeypatch):
    """As copied from Debian's /usr/include/python3.14 alone."""
    write_headers(tmp_path / VERSION, DEBIAN)
    monkeypatch.setenv("PYTHON_HEADERS", str(tmp_path))
    with pytest.raises(ReleaseError, match=r"x86_64-linux-gnu/python3\.14/pyconfig\.h"):
        headers.stage(VERSION, tmp_path / "staged")


def test_the_folder_of_headers_comes_before_the_interpreter(interpreter, tmp_path, monkeypatch):
    write_headers(interpreter, "")
    write_headers(tmp_path / "headers" / VERSION, PLAIN)
    monkeypatch.setenv("PYTHON_HEADERS", str(tmp_path / "headers"))
    staged = headers.stage(VERSION, tmp_path / "staged")
    assert (staged / "pyconfig.h").read_text() == PLAIN


def test_a_version_without_headers_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHON_HEADERS", str(tmp_path))
    with pytest.raises(ReleaseError, match=r"no headers of Python 3\.99"):
        headers.find("3.99")
