"""The distribution's name: hints and build files use ours, never that of another project."""

import importlib.metadata
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from repository import REPOSITORY

import kubeai
from kubeai.errors import DISTRIBUTION, install_hint

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
# `kubeai` or `kubeai[extra]` where pip would look up a distribution of that name.
FOREIGN = re.compile(r"(?<![\w./-])kubeai\[\w|pip install (?:-\S+ )*'?kubeai(?![\w-])")


def test_the_distribution_name_equals_the_one_used_to_look_up_the_version():
    assert PROJECT["name"] == DISTRIBUTION != "kubeai"
    assert kubeai.__version__ == importlib.metadata.version(DISTRIBUTION)
    assert PROJECT["dynamic"] == ["version"], "setup.py reads it from git's tags"


@pytest.mark.parametrize("extra", ["load", "otel"])
def test_a_hint_names_an_extra_of_this_distribution(extra):
    assert extra in PROJECT["optional-dependencies"]
    assert f"'{PROJECT['name']}[{extra}]'" in install_hint(extra)
    assert f"-e '.[{extra}]'" in install_hint(extra)


def test_make_run_passes_its_port_and_arguments_to_kubeai_local():
    def command(*variables):
        done = subprocess.run(
            ["make", "-n", "--no-print-directory", "run", *variables],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
        )
        return done.stdout.splitlines()[-1].strip()

    assert command().endswith("kubeai local examples --data-dir .kubeai")
    passed = command("PORT=9000", "ARGS=--workers 2")
    assert passed.endswith("kubeai local examples --data-dir .kubeai --port 9000 --workers 2")


def test_no_file_asks_pip_for_the_unrelated_distribution_kubeai():
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    if listing.returncode:
        pytest.skip("not a git checkout")
    found = []
    for name in listing.stdout.splitlines():
        path = REPOSITORY / name
        if name == "CHANGELOG.md" or path == Path(__file__) or not path.is_file():
            continue
        text = path.read_text(errors="ignore")
        found += [f"{name}: {match[0]}" for match in FOREIGN.finditer(text)]
    assert not found
