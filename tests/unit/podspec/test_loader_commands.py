"""The loader's commands run without a shell, with nothing but `python3`."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kubeai.podspec import loader_commands

DEADLINE_S = 30


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    assert command[0] == "python3"
    return subprocess.run(
        [sys.executable, *command[1:]], capture_output=True, text=True, timeout=DEADLINE_S, env={}
    )


@pytest.mark.parametrize("arguments", [("wait",), ("remove", "/a"), ("link", "/a", "/b")])
def test_kubernetes_expands_nothing_in_a_command(arguments):
    name, *rest = arguments
    assert not any("$" in word for word in getattr(loader_commands, name)(*rest))


def test_remove_deletes_folders_files_and_links_and_ignores_what_is_missing(tmp_path):
    kept = tmp_path / "kept"
    (kept / "inner").mkdir(parents=True)
    folder, file, link = (tmp_path / name for name in ("folder", "file", "link"))
    (folder / "a/b").mkdir(parents=True)
    (folder / "a/b/weights").touch()
    (folder / "out").symlink_to(kept)
    file.touch()
    link.symlink_to(kept)
    missing = tmp_path / "missing"
    done = run(loader_commands.remove(*map(str, (folder, file, link, missing))))
    assert (done.returncode, done.stderr) == (0, "")
    assert list(tmp_path.iterdir()) == [kept]
    assert (kept / "inner").is_dir()


def test_link_leads_to_the_folder_and_replaces_a_former_link(tmp_path):
    target, path = tmp_path / "claim", tmp_path / "adapter"
    target.mkdir()
    for _ in range(2):
        assert run(loader_commands.link(str(target), str(path))).returncode == 0
        assert path.readlink() == target
    assert list(target.iterdir()) == []


def test_link_to_what_is_no_folder_says_so(tmp_path):
    missing = tmp_path / "missing"
    done = run(loader_commands.link(str(missing), str(tmp_path / "adapter")))
    assert done.returncode == 1
    assert done.stderr == f"{missing} is not a folder of the claim\n"
    assert list(tmp_path.iterdir()) == []


def test_wait_ends_with_success_on_sigterm():
    program, *options = loader_commands.wait()
    assert program == "python3"
    waiting = subprocess.Popen([sys.executable, *options])
    try:
        while not _ignores(waiting.pid, signal.SIGCHLD):  # it does once it waits
            assert waiting.poll() is None
        waiting.terminate()
        assert waiting.wait(DEADLINE_S) == 0
    finally:
        waiting.kill()
        waiting.wait()


def _ignores(pid: int, number: signal.Signals) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    (ignored,) = [line.split()[1] for line in status.splitlines() if line.startswith("SigIgn:")]
    return bool(int(ignored, 16) >> (number - 1) & 1)
