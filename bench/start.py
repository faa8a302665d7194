"""Time from exec to the first 200 of `/healthz`, of `kubeai serve` in an image's root file system.

    python bench/start.py ROOT [--rounds 10]

ROOT is an unpacked image (docs/reference/image.md). The program runs as in a pod: as the image's
user, with a read-only root and without HOME. Each round is measured twice: after the image's files
were dropped from the page cache (cold), and again (warm). Needs root. The Kubernetes API is an
address at which nothing listens: `/healthz` does not depend on it.
"""

from __future__ import annotations

import argparse
import ctypes
import http.client
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests/contract"))

import contained

ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
CONFIG = "metricsAddr: 127.0.0.1:0\nhealthAddress: 127.0.0.1:{port}\n"
CONFIG += "resourceProfiles: {{}}\ncacheProfiles: {{}}\n"
LIMIT_S = 60.0
POLL_S = 0.002
POSIX_FADV_DONTNEED = 4


def forget(root: Path) -> None:
    """Drop the files below ``root`` from the page cache."""
    ctypes.CDLL(None).sync()
    for path in root.rglob("*"):
        if path.is_file() and not path.is_symlink():
            fd = os.open(path, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED)
            os.close(fd)


def start(root: Path, port: int, mounts: dict[str, Path]) -> float:
    """Start the image once; seconds until it is healthy."""
    command = contained.command(
        root,
        ["/opt/kubeai/bin/kubeai", "serve", "--host", "127.0.0.1", "--port", "0"],
        user="65532:65532",
        env={
            "PATH": "/opt/kubeai/bin:/usr/local/bin",
            "CONFIG_PATH": "/app/config/system.yaml",
            "TMPDIR": "/app/tmp",
            "POD_NAME": "kubeai-0",
            "POD_NAMESPACE": "default",
            "KUBERNETES_SERVICE_HOST": "127.0.0.1",
            "KUBERNETES_SERVICE_PORT": "1",
        },
        mounts=mounts,
    )
    begin = time.perf_counter()
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        while not _healthy(port):
            if process.poll() is not None or time.perf_counter() - begin > LIMIT_S:
                raise SystemExit("kubeai serve does not become healthy")
            time.sleep(POLL_S)
        return time.perf_counter() - begin
    finally:
        if process.poll() is None:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
            for child in children.split():
                os.kill(int(child), signal.SIGKILL)
        process.wait()


def _healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT_S)
    try:
        connection.request("GET", "/healthz")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def _mounts(folder: Path, port: int) -> dict[str, Path]:
    account, config, tmp = (folder / name for name in ("account", "config", "tmp"))
    for each in (account, config, tmp):
        each.mkdir()
        each.chmod(0o777)
    (account / "token").write_text("token")
    (account / "namespace").write_text("default")
    bundle = Path("/etc/ssl/certs/ca-certificates.crt")
    (account / "ca.crt").write_bytes(bundle.read_bytes())
    (config / "system.yaml").write_text(CONFIG.format(port=port))
    folder.chmod(0o755)
    return {ACCOUNT: account, "/app/config": config, "/app/tmp": tmp}


def main() -> None:
    """Measure and print minimum, median and maximum in milliseconds."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("root", type=Path)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--port", type=int, default=18081)
    options = parser.parse_args()
    found: dict[str, list[float]] = {"cold": [], "warm": []}
    with tempfile.TemporaryDirectory() as folder:
        mounts = _mounts(Path(folder), options.port)
        for _ in range(options.rounds):
            forget(options.root)
            for kind in found:
                found[kind].append(start(options.root.resolve(), options.port, mounts) * 1000)
    for kind, times in found.items():
        print(f"{kind}: {min(times):.0f} {statistics.median(times):.0f} {max(times):.0f} ms")


if __name__ == "__main__":
    main()
