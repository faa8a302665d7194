"""Run the commands of a page of the documentation.

    .venv/bin/python tests/docs/run_page.py [--times] docs/how-to/chat.md

The page runs in namespaces of its own (network, mounts, processes; without root also users), with
an empty home and working directory. Everything that it has started ends with it.
docs/contribute/documentation.md describes what pages may assume.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from os import environ
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "contract"), str(TESTS / "docs")]

import packages  # noqa: E402
from doc_pages import DOCS, FOLDERS, Page, PageError, read_page  # noqa: E402
from page_script import durations, run_steps  # noqa: E402
from repository import REPOSITORY  # noqa: E402
from servers import assets  # noqa: E402
from surroundings import SURROUNDINGS, Surroundings  # noqa: E402

INSIDE, TIMES = "--inside", "--times"
TIMEOUT_S, INSTALL_TIMEOUT_S = 300.0, 600.0  # of a page; of one that installs packages
NAMESPACES = ("--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
LOG_LINES = 30
COLUMNS = "100"


def command(name: str, *options: str) -> list[str]:
    """The command that runs the page docs/<name> in new namespaces; first downloads packages."""
    packages.prepare(read_page(name))
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    program = [sys.executable, str(Path(__file__).resolve()), INSIDE, name, *options]
    return ["unshare", *user, *NAMESPACES, "--", *program]


def _run_inside(name: str, *, times: bool) -> int:
    begun = time.monotonic()
    try:
        page = read_page(name)
    except PageError as error:
        print(error)
        return 1
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    with tempfile.TemporaryDirectory(prefix="page-", ignore_cleanup_errors=True) as folder:
        return _run_in(Path(folder), page, begun, times=times)


def _run_in(folder: Path, page: Page, begun: float, *, times: bool) -> int:
    home, work, steps = (folder / name for name in ("home", "work", "steps"))
    for each in (home, work, steps, folder / "tmp"):
        each.mkdir()
    for name in page.needs & FOLDERS:
        shutil.copytree(REPOSITORY / name, work / name)
    environment = _environment(folder)
    if (downloaded := packages.prepare(page)) is not None:  # here already, see `command`
        environment |= packages.environment(downloaded)
    surroundings = SURROUNDINGS[page.commands](folder, page, environment)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(surroundings)
            ready = time.monotonic()
            timeout_s = INSTALL_TIMEOUT_S if page.pip or page.npm else TIMEOUT_S
            failure = run_steps(
                page, steps, cwd=work, env=surroundings.environment, timeout_s=timeout_s
            )
            if failure is not None:
                print(f"{page.name}:{failure}")
                _print_logs(surroundings)
                return 1
            if times:
                for step, took in durations(page, steps):
                    print(f"{took:8.2f} s  {page.name}:{step.line}  {step.text.splitlines()[0]}")
    except Exception:
        _print_logs(surroundings)
        raise
    took = time.monotonic() - begun
    print(f"{page.name}: {took:.1f} s, {ready - begun:.1f} s of which to prepare")
    return 0


def _print_logs(surroundings: Surroundings) -> None:
    for name, path in surroundings.logs():
        with contextlib.suppress(FileNotFoundError):
            lines = path.read_text(errors="replace").splitlines()[-LOG_LINES:]
            print(f"  {name}, the last lines of its log:")
            print("\n".join(f"    {line}" for line in lines))


def _environment(folder: Path) -> dict[str, str]:
    """What a reader's shell has: KubeAI, kubectl, helm, and the system's programs."""
    programs = folder / "bin"
    programs.mkdir()
    (programs / "kubectl").symlink_to(TESTS / "docs" / "kubectl")
    environment = {
        "HOME": str(folder / "home"),
        "TMPDIR": str(folder / "tmp"),
        "PATH": ":".join([str(programs), str(Path(sys.executable).parent), *_SYSTEM]),
        "LANG": "C.UTF-8",
        "TERM": "dumb",
        "COLUMNS": COLUMNS,
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
    }
    if brokers := environ.get("BROKERS"):
        environment["PATH"] += f":{brokers}/nats"  # nats-server, if tests/brokers/build.sh built it
    if (binaries := assets("kubectl")) is not None:
        (programs / "kubectl-itself").symlink_to(binaries / "kubectl")
    if (binaries := assets("helm")) is not None:
        (programs / "helm").symlink_to(binaries / "helm")
    return environment


_SYSTEM = ("/usr/local/bin", "/usr/bin", "/bin", "/usr/sbin", "/sbin")


def main() -> int:
    if sys.argv[1:2] == [INSIDE]:
        return _run_inside(sys.argv[2], times=TIMES in sys.argv)
    *options, page = sys.argv[1:] or [""]
    if not page or set(options) - {TIMES}:
        print(f"usage: run_page.py [{TIMES}] docs/PAGE.md", file=sys.stderr)
        return 2
    name = Path(page).resolve().relative_to(DOCS).as_posix()
    if "KUBEBUILDER_ASSETS" not in os.environ:  # builds kubectl and the control plane at first
        built = subprocess.run(
            [TESTS / "cluster/build.sh"], stdout=subprocess.PIPE, text=True, check=True
        )
        os.environ["KUBEBUILDER_ASSETS"] = built.stdout.strip()
    return subprocess.run(command(name, *options)).returncode


if __name__ == "__main__":
    sys.exit(main())
