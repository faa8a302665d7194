"""Install the engines, each in an environment of its own, as `versions.toml` says.

An environment is kept for the next run as long as its entry in `versions.toml` is the same. Every
command is logged in ``install.log`` beside the environment, and has a limit.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
COMMAND_TIMEOUT_S = 3600.0  # Ollama compiles for eight minutes on two cores
PROBE_TIMEOUT_S = 10.0
_LINES_SHOWN = 15
_STAMP = "installed.json"

Versions = dict[str, Any]


class InstallError(Exception):
    """An engine could not be installed; the message has the command and its last output."""


def read_versions() -> Versions:
    return tomllib.loads((HERE / "versions.toml").read_text())


class Installer:
    """Installs into ``root``. ``python``: the interpreter of the environments."""

    def __init__(self, root: Path, python: str = "") -> None:
        self.root = root
        self.versions = read_versions()
        self._python = python or _python(self.versions["python"])
        self._uv = ""

    def weights(self) -> Path:
        """Make the models unless they exist; returns the directory with all of them."""
        python = self._environment("weights") / "bin" / "python"
        models = self.root / "models"
        self._run(self.root / "weights", [str(python), str(HERE / "make_weights.py"), str(models)])
        return models

    def engine(self, engine: str) -> Path:
        """Install an engine; returns the directory for ``--engine-env``."""
        if engine not in self.versions:
            raise InstallError(f"versions.toml has no entry {engine!r}")
        if "go" in self.versions[engine]:
            return self._ollama(engine)
        return self._environment(engine)

    def version(self, engine: str) -> str:
        """The version that is installed, as its package or tag says."""
        entry = self.versions[engine]
        if "go" in entry:
            return entry["go"].partition("@")[2].removeprefix("v")
        if "revision" in entry:
            return str(entry["revision"]).removeprefix("v")
        packages = [*entry["packages"], *entry.get("without_dependencies", ())]
        (pinned,) = (one for one in packages if re.split(r"[\[=]", one)[0] == entry["package"])
        return pinned.rpartition("==")[2]

    def source(self, engine: str) -> str:
        """Where an engine comes from, in words."""
        entry = self.versions[engine]
        if "go" in entry:
            return f"Go module `{entry['go'].partition('@')[0]}`"
        if "source" in entry:
            return f"repository {entry['source']}"
        return f"PyPI `{entry['package']}`"

    # -- Python packages ---------------------------------------------------------------------------

    def _environment(self, name: str) -> Path:
        """Create a virtual environment with the packages of an entry, or keep it."""
        entry, home = self.versions[name], self.root / name
        environment = home / "source" / ".venv" if "source" in entry else home / "env"
        if self._is_current(home, entry):
            return environment
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True)
        where = home
        if "source" in entry:
            where = home / "source"
            self._clone(home, entry, where)
        self._run(home, [self.uv, "venv", "--python", self._python, str(environment)])
        install = [self.uv, "pip", "install", "--python", str(environment / "bin" / "python")]
        command = [*install, *entry["packages"]]
        if "source" in entry:
            command += ["--requirement", str(self._locked(home, where, entry["skip"]))]
        for option in ("overrides", "constraints"):
            if option in entry:
                path = home / f"{option}.txt"
                path.write_text("\n".join(entry[option]) + "\n")
                command += [f"--{option.removesuffix('s')}", str(path)]
        self._run(home, command, cwd=home)  # not in a repository, whose overrides would apply
        if "without_dependencies" in entry:
            self._run(home, [*install, "--no-deps", *entry["without_dependencies"]], cwd=where)
        (packages,) = environment.glob("lib/python3*/site-packages")
        for module in entry.get("modules", ()):
            shutil.copy(HERE / module, packages)
        for program, path in entry.get("programs", {}).items():
            (packages / path).chmod(0o755)
            (environment / "bin" / program).symlink_to(packages / path)
        self._stamp(home, entry)
        return environment

    def _clone(self, home: Path, entry: Versions, where: Path) -> None:
        """Check a revision of a repository out. ``SPEACHES_SOURCE`` names another copy of it."""
        source = os.environ.get(f"{entry['package'].upper()}_SOURCE", entry["source"])
        self._run(home, ["git", "clone", "--quiet", source, str(where)])
        self._run(home, ["git", "-C", str(where), "checkout", "--quiet", entry["revision"]])

    def _locked(self, home: Path, source: Path, skip: list[str]) -> Path:
        """The requirements of a repository's uv.lock, in a file, without some packages."""
        path = home / "requirements.txt"
        export = ["export", "--frozen", "--no-dev", "--no-emit-project", "--no-hashes", "--quiet"]
        python = ["--python", self._python]
        self._run(home, [self.uv, *export, *python, "--output-file", str(path)], cwd=source)
        lines = path.read_text().splitlines()
        kept = [line for line in lines if re.split(r"[ =@;\[]", line)[0] not in skip]
        path.write_text("\n".join(kept) + "\n")
        return path

    @property
    def uv(self) -> str:
        """The path of uv, which is installed if it is not on PATH."""
        if not self._uv:
            self._uv = shutil.which("uv") or self._install_uv()
        return self._uv

    def _install_uv(self) -> str:
        home = self.root / "uv"
        program = home / "bin" / "uv"
        if not program.exists():
            self._run(home, [sys.executable, "-m", "venv", str(home)])
            pip = [str(home / "bin" / "pip"), "--disable-pip-version-check", "install", "-q"]
            self._run(home, [*pip, f"uv=={self.versions['uv']}"])
        return str(program)

    # -- Go ----------------------------------------------------------------------------------------

    def _ollama(self, engine: str) -> Path:
        """Compile Ollama; its directory ``bin`` then has the program."""
        entry, home = self.versions[engine], self.root / engine
        if self._is_current(home, entry):
            return home
        for program in ("go", "gcc", "g++"):
            if not shutil.which(program):
                raise InstallError(f"{program} is not on PATH; Ollama is compiled with it")
        headers = home / "headers"
        shutil.rmtree(headers, ignore_errors=True)
        headers.mkdir(parents=True)
        flags = " ".join(f"-I{path}" for path in self._headers(home, headers, entry))
        environment = {"GOBIN": str(home / "bin"), "CGO_CFLAGS": f"-O1 {flags}"}
        environment |= {"CGO_CXXFLAGS": f"-O1 {flags}"}
        self._run(home, ["go", "install", entry["go"]], environment)
        self._stamp(home, entry)
        return home

    def _headers(self, home: Path, headers: Path, entry: Versions) -> Iterator[Path]:
        """Fetch headers that Ollama's module lacks; yields the directories to search."""
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:"]
        for package in entry["headers"]:
            self._run(home, [*pip, "-d", str(headers), package])
        for archive in headers.glob("*.tar.gz"):
            shutil.unpack_archive(archive, headers, filter="data")
        for header in headers.rglob("miniaudio/miniaudio.h"):
            yield header.parent.parent
        for package, header in entry["debian"].items():
            if Path("/usr/include", header).exists():
                continue
            # Unpacked here instead of installed, which would need root.
            self._run(home, ["apt-get", "download", "-q", package], cwd=headers)
            (archive,) = headers.glob(f"{package}_*.deb")
            self._run(home, ["dpkg", "-x", str(archive), str(headers)])
            yield headers / "usr" / "include"

    # -- commands ----------------------------------------------------------------------------------

    def _is_current(self, home: Path, entry: Versions) -> bool:
        try:
            return json.loads((home / _STAMP).read_text()) == entry
        except (OSError, ValueError):
            return False

    def _stamp(self, home: Path, entry: Versions) -> None:
        (home / _STAMP).write_text(json.dumps(entry))

    def _run(
        self,
        home: Path,
        command: list[str],
        environment: dict[str, str] | None = None,
        cwd: Path | None = None,
    ) -> None:
        """Run a command with its output in ``home/install.log``; InstallError if it fails."""
        home.mkdir(parents=True, exist_ok=True)
        log = home / "install.log"
        started = time.monotonic()
        with log.open("a") as output:
            output.write(f"$ {' '.join(command)}\n")
            output.flush()
            try:
                code: int | str = subprocess.run(
                    command,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    env=os.environ | (environment or {}),
                    cwd=cwd,
                    timeout=COMMAND_TIMEOUT_S,
                    check=False,
                ).returncode
            except subprocess.TimeoutExpired:
                code = f"no end after {COMMAND_TIMEOUT_S:.0f} s"
            except OSError as error:
                code = str(error)
            output.write(f"# {time.monotonic() - started:.1f} s, exit status {code}\n")
        if code != 0:
            last = "\n  ".join(log.read_text(errors="replace").splitlines()[-_LINES_SHOWN:])
            raise InstallError(f"{' '.join(command)}: {code} (see {log})\n  {last}")


def _python(version: str) -> str:
    """An interpreter of this version on PATH, or the version itself, which uv then looks for."""
    program = shutil.which(f"python{version}")
    if program:
        try:
            probe = [program, "-c", ""]
            found = subprocess.run(probe, capture_output=True, timeout=PROBE_TIMEOUT_S, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return version
        if found.returncode == 0:  # a shim of pyenv may fail
            return program
    return version
