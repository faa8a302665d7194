"""nginx and the supervisor of KubeAI, each on one core, before the same engines."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
from closed_loop import ANSWERS, ENGINES

START_TIMEOUT_S = 20.0
FLEET = Path(__file__).parents[1] / "tests" / "fakes" / "fleet.py"


@contextmanager
def process(command: list[str], core: int, **options) -> Iterator:
    """Run a child on one core; it ends with the block or with this process."""

    def settle() -> None:
        os.sched_setaffinity(0, {core})
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG

    child = subprocess.Popen(command, preexec_fn=settle, **options)
    try:
        yield child
    finally:
        child.terminate()
        try:
            child.wait(timeout=5)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def wait_until(condition: Callable[[], bool], what: str) -> None:
    end_s = time.monotonic() + START_TIMEOUT_S
    while not condition():
        if time.monotonic() > end_s:
            raise SystemExit(f"{what}: timed out after {START_TIMEOUT_S} s")
        time.sleep(0.01)


def accepts(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def nginx_config(folder: Path, ports: dict[str, int], engines: dict[str, int]) -> str:
    servers = "".join(
        f"""
        upstream {answer} {{
            {" ".join(f"server {host}:{engines[answer]};" for host in ENGINES)}
            keepalive 256;
            keepalive_requests 1000000000;
        }}
        server {{
            listen 127.0.0.1:{ports[answer]} backlog=1024;
            keepalive_requests 1000000000;
            location /openai/ {{
                proxy_pass http://{answer}/;
                proxy_http_version 1.1;
                proxy_set_header Connection "";
                proxy_buffering off;
                proxy_read_timeout 600s;
            }}
        }}"""
        for answer in ANSWERS
    )
    temp_paths = "".join(
        f"{kind}_temp_path {folder}/{kind};"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    return f"""
    daemon off; worker_processes 1; pid {folder}/pid; error_log stderr warn;
    {"user root;" if os.geteuid() == 0 else ""}
    events {{ worker_connections 24000; }}
    http {{
        access_log off; tcp_nodelay on; {temp_paths}
        client_max_body_size 64m; client_body_buffer_size 1m;
        {servers}
    }}
    """


@contextmanager
def nginx(core: int, engines: dict[str, int]) -> Iterator[tuple[list[int], dict[str, int]]]:
    """Run nginx; yields its process IDs and the port for each kind of response."""
    ports = {answer: free_port() for answer in ANSWERS}
    with tempfile.TemporaryDirectory() as name:
        config = Path(name, "nginx.conf")
        config.write_text(nginx_config(Path(name), ports, engines))
        with process([find_nginx(), "-p", name, "-e", "stderr", "-c", str(config)], core) as master:
            children = Path(f"/proc/{master.pid}/task/{master.pid}/children")
            # The sockets are listening before the worker starts.
            wait_until(lambda: children.read_text() and all(map(accepts, ports.values())), "nginx")
            yield [master.pid, *map(int, children.read_text().split())], ports


@dataclass
class Kubeai:
    """A supervisor and its workers, with routes provided by a script."""

    pids: list[int]  # the supervisor is the first
    ports: dict[str, int]
    _child: subprocess.Popen

    def counts(self) -> dict[str, int]:
        """The nonzero gauges of the load table."""
        self._child.stdin.write("\n")
        self._child.stdin.flush()
        return json.loads(self._child.stdout.readline())


@contextmanager
def kubeai(
    core: int,
    engines: dict[str, int],
    mean_load_factor: int = 125,
    workers: int = 1,
    keys: int = 0,
) -> Iterator[Kubeai]:
    """Run the supervisor and its workers as `kubeai serve` does, without the operator."""
    from kubeai.routing.routes import Endpoint, Route

    routes = [
        Route(
            answer,
            "VLLM",
            ("TextGeneration",),
            strategy="PrefixHash",
            mean_load_factor=mean_load_factor,
            endpoints=tuple(
                Endpoint(f"model-{answer}-{i}", f"{host}:{port}") for i, host in enumerate(ENGINES)
            ),
        )
        for answer, port in engines.items()
    ]
    spec = {"workers": workers, "routes": msgspec.to_builtins(routes), "keys": keys}
    with (
        tempfile.TemporaryFile() as log,
        process(
            [sys.executable, str(FLEET), json.dumps(spec)],
            core,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        ) as child,
    ):
        line = child.stdout.readline()
        if not line:
            log.seek(0)
            raise SystemExit(f"kubeai did not start: {log.read().decode()[-2000:]}")
        started = json.loads(line)
        fleet = Kubeai(started["pids"], dict.fromkeys(ANSWERS, started["port"]), child)
        yield fleet
        wait_until(lambda: not fleet.counts(), "a request is still counted")


def find_nginx() -> str | None:
    return shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
