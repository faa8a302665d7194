"""Compare the CPU that a KubeAI worker and an nginx worker spend on the same requests.

    python bench/gateway_vs_nginx.py [--rounds 5] [--seconds 3] [--only chat] [--keys 10000]
        [--json FILE]

Both proxies run on one core, the load generator and the mock engines on another. Both proxy to
four engines (on 127.0.0.1 to 127.0.0.4). nginx uses ``proxy_pass`` with keep-alive upstream
connections, response buffering off, ``client_body_buffer_size 1m`` and no access log. KubeAI runs
the supervisor and one worker with a PrefixHash model and all limits and counters on; the
supervisor's CPU is included. There is no operator: a script provides the routes.

A closed loop of connections sends the same bodies to each proxy in turn, nginx first in even
rounds. CPU is the on-CPU time of all the proxy's processes from /proc/PID/task/*/schedstat, and the
kernel's share is from /proc/PID/stat; figures are medians over the rounds. Streams are counted by
their chunks, so that a stream which is open at the start or end of the measurement counts in part.

With ``--keys N``, KubeAI requires an API key, and each request has the next one of N keys that have
all limits. nginx gets the same requests and checks nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec
import uvloop

ENGINES = ("127.0.0.1", "127.0.0.2", "127.0.0.3", "127.0.0.4")
CHUNKS = 64
PACE_S = 0.02
BODIES = 256  # different conversations
START_TIMEOUT_S = 20.0
FLEET = Path(__file__).parents[1] / "tests" / "fakes" / "fleet.py"


@dataclass(frozen=True)
class Scenario:
    name: str
    unit: str
    body_bytes: int
    engine: str  # the mock engine's response: whole, burst or paced
    warmup_s: float = 0.5


SCENARIOS = (
    Scenario("chat", "request of 800 bytes", 800, "whole"),
    Scenario("burst", f"stream of {CHUNKS} chunks back to back", 800, "burst"),
    Scenario("paced", f"stream of {CHUNKS} chunks, one each 20 ms", 800, "paced", 2.0),
    Scenario("prompt", "request with a 400 KB prompt", 400_000, "whole"),
)
ANSWERS = ("whole", "burst", "paced")


# -- the mock engine -------------------------------------------------------------------------------


def chunk(data: str) -> bytes:
    event = f"data: {data}\n\n".encode()
    return b"%x\r\n%s\r\n" % (len(event), event)


def completion(key: str, value: object) -> str:
    return json.dumps(
        {
            "id": "chatcmpl-7a1f0f6c9d5e4b2ab8d0",
            "object": "chat.completion.chunk" if key == "delta" else "chat.completion",
            "created": 1760000000,
            "model": "bench",
            "choices": [{"index": 0, key: value, "logprobs": None, "finish_reason": None}],
        }
    )


ANSWER = completion("message", {"role": "assistant", "content": "All is well. " * 24}).encode()
WHOLE = (
    b"HTTP/1.1 200 OK\r\ndate: Thu, 09 Oct 2025 08:53:20 GMT\r\nserver: uvicorn\r\n"
    b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (len(ANSWER), ANSWER)
)
STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ndate: Thu, 09 Oct 2025 08:53:20 GMT\r\nserver: uvicorn\r\n"
    b"content-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
)
STREAM_CHUNK = chunk(completion("delta", {"content": " token"}))
STREAM_END = chunk("[DONE]") + b"0\r\n\r\n"


class Engine(asyncio.Protocol):
    """A mock engine with minimal CPU use; it writes each chunk separately, as real engines do."""

    def __init__(self, answer: str) -> None:
        self._answer = getattr(self, answer)
        self._loop = asyncio.get_running_loop()
        self._head = b""
        self._left = 0  # bytes of the request body not yet received

    def connection_made(self, transport: asyncio.Transport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if self._left == 0:
            data = self._head + data
            end = data.find(b"\r\n\r\n")
            if end < 0:
                self._head = data
                return
            head, self._head = data[:end].lower(), b""
            at = head.index(b"\r\ncontent-length:") + 17
            line_end = head.find(b"\r\n", at)
            self._left = int(head[at : line_end if line_end > 0 else None])
            data = data[end + 4 :]
        self._left -= len(data)
        if self._left == 0:
            self._answer()

    def whole(self) -> None:
        self._transport.write(WHOLE)

    def burst(self) -> None:
        self._transport.write(STREAM_HEAD)
        self._loop.call_soon(self._next, CHUNKS, 0.0)

    def paced(self) -> None:
        self._transport.write(STREAM_HEAD)
        self._loop.call_later(PACE_S, self._next, CHUNKS, PACE_S)

    def _next(self, left: int, pace_s: float) -> None:
        if self._transport.is_closing():
            return
        if left == 0:
            self._transport.write(STREAM_END)
            return
        self._transport.write(STREAM_CHUNK)
        if pace_s:
            self._loop.call_later(pace_s, self._next, left - 1, pace_s)
        else:
            self._loop.call_soon(self._next, left - 1, pace_s)


async def run_engines(ports: dict[str, int]) -> None:
    loop = asyncio.get_running_loop()
    for answer, port in ports.items():
        for host in ENGINES:
            await loop.create_server(lambda a=answer: Engine(a), host, port, backlog=1024)
    print("ready", flush=True)
    await asyncio.Event().wait()


# -- the load --------------------------------------------------------------------------------------


class Client(asyncio.Protocol):
    """A connection that sends the next request as soon as the previous response has ended."""

    def __init__(self, requests: Iterator[bytes], tally: dict[str, float]) -> None:
        self._requests = requests
        self._tally = tally
        self._buffer = b""

    def connection_made(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._send_next()

    def _send_next(self) -> None:
        self._left = -1  # bytes of the response body; -1: no complete head yet; -2: chunked
        self._transport.write(next(self._requests))

    def data_received(self, data: bytes) -> None:
        if self._left == -1:
            data = self._buffer + data
            end = data.find(b"\r\n\r\n")
            if end < 0:
                self._buffer = data
                return
            head, self._buffer = data[:end].lower(), b""
            if not head.startswith(b"http/1.1 200"):
                raise SystemExit(f"not a 200 response: {data[:400]!r}")
            data = data[end + 4 :]
            if b"\r\ntransfer-encoding: chunked" in head:
                self._left = -2
            else:
                at = head.index(b"\r\ncontent-length:") + 17
                line_end = head.find(b"\r\n", at)
                self._left = int(head[at : line_end if line_end > 0 else None])
        if self._left == -2:
            self._tally["chunks"] += data.count(b"data: {")
            self._buffer = (self._buffer + data)[-5:]
            whole = self._buffer == b"0\r\n\r\n"
        else:
            self._left -= len(data)
            whole = self._left == 0
        if whole:
            self._buffer = b""
            self._tally["answers"] += 1
            self._send_next()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._tally["over"]:
            raise SystemExit(f"a connection was closed unexpectedly: {exc}")


def make_requests(scenario: Scenario, port: int, keys: int = 0) -> list[bytes]:
    requests = []
    for conversation in range(max(BODIES, keys) if scenario.body_bytes < 10_000 else 16):
        text = f"Conversation {conversation}: "
        request = {
            "model": scenario.engine,
            "messages": [
                {"role": "system", "content": "You are a helpful assistant."},
                {"role": "user", "content": text},
            ],
            "temperature": 0.7,
            "max_tokens": 256,
            "stream": scenario.engine != "whole",
        }
        missing = scenario.body_bytes - len(json.dumps(request))
        request["messages"][1]["content"] += "The quick brown fox jumps. " * (missing // 27 + 1)
        body = json.dumps(request).encode()
        requests.append(
            b"POST /openai/v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n"
            b"Content-Type: application/json\r\nAccept: application/json\r\n"
            b"User-Agent: OpenAI/Python 2.0.0\r\nAuthorization: Bearer sk-%s\r\n"
            b"Content-Length: %d\r\n\r\n%s"
            % (port, b"%d" % (conversation % keys) if keys else b"none", len(body), body)
        )
    return requests


async def run_load(
    scenario: Scenario, port: int, connections: int, seconds: float, keys: int
) -> None:
    """Print a line when the measurement begins, and one with the counts when it ends."""
    loop = asyncio.get_running_loop()
    tally: dict[str, float] = {"answers": 0, "chunks": 0, "over": 0}
    requests = make_requests(scenario, port, keys)

    def some_requests(start: int) -> Iterator[bytes]:
        while True:
            yield requests[start % len(requests)]
            start += 7

    for i in range(connections):
        await loop.create_connection(lambda i=i: Client(some_requests(i), tally), "127.0.0.1", port)
        if scenario.engine == "paced":
            # Stagger the streams: otherwise all chunks would arrive in one wake-up.
            await asyncio.sleep(CHUNKS * PACE_S / connections)
    await asyncio.sleep(scenario.warmup_s)
    before = dict(tally)
    print("begin", flush=True)
    began = time.perf_counter()
    await asyncio.sleep(seconds)
    took_s = time.perf_counter() - began
    counted = {key: tally[key] - before[key] for key in ("answers", "chunks")}
    print(json.dumps({**counted, "took_s": took_s}), flush=True)
    tally["over"] = 1


# -- the proxies -----------------------------------------------------------------------------------


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


# -- measuring -------------------------------------------------------------------------------------


@dataclass
class Usage:
    total_us: float
    user_ticks: int
    system_ticks: int


def usage(pids: list[int]) -> Usage:
    total_ns = user = system = 0
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").iterdir():
            total_ns += int((task / "schedstat").read_text().split()[0])
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        user += int(fields[11])
        system += int(fields[12])
    return Usage(total_ns / 1000, user, system)


@dataclass
class Run:
    us: float  # CPU time per request or stream
    kernel_share: float
    rate: float  # per second


def measure(
    scenario: Scenario,
    pids: list[int],
    port: int,
    core: int,
    connections: int,
    seconds: float,
    keys: int = 0,
) -> Run:
    command = [sys.executable, __file__, "--load", scenario.name, "--load-port", str(port)]
    command += ["--connections", str(connections), "--seconds", str(seconds), "--keys", str(keys)]
    with process(command, core, stdout=subprocess.PIPE, text=True) as load:
        if load.stdout.readline() != "begin\n":
            raise SystemExit(f"{scenario.name}: the load generator failed")
        before = usage(pids)
        line = load.stdout.readline()
        after = usage(pids)
        if not line:
            raise SystemExit(f"{scenario.name}: the load generator failed")
    counted = json.loads(line)
    streamed = scenario.engine != "whole"
    done = counted["chunks"] / CHUNKS if streamed else counted["answers"]
    user = after.user_ticks - before.user_ticks
    system = after.system_ticks - before.system_ticks
    return Run(
        us=(after.total_us - before.total_us) / done,
        kernel_share=system / max(1, user + system),
        rate=done / counted["took_s"],
    )


def compare(options: argparse.Namespace) -> dict[str, dict]:
    scenarios = [s for s in SCENARIOS if not options.only or s.name in options.only]
    runs: dict[tuple[str, str], list[Run]] = {}
    proxy_core, load_core = options.cores
    engines = {answer: free_port() for answer in ANSWERS}
    with ExitStack() as stack:
        command = [sys.executable, __file__, "--engines", json.dumps(engines)]
        mock = stack.enter_context(process(command, load_core, stdout=subprocess.PIPE, text=True))
        if mock.stdout.readline() != "ready\n":
            raise SystemExit("the mock engines did not start")
        ours = stack.enter_context(
            kubeai(proxy_core, engines, options.mean_load_factor, keys=options.keys)
        )
        proxies = {
            "nginx": stack.enter_context(nginx(proxy_core, engines)),
            "kubeai": (ours.pids, ours.ports),
        }
        for turn in range(options.rounds):
            for scenario in scenarios:
                for name in sorted(proxies, reverse=turn % 2 == 0):
                    pids, ports = proxies[name]
                    run = measure(
                        scenario,
                        pids,
                        ports[scenario.engine],
                        load_core,
                        options.connections,
                        options.seconds,
                        options.keys,
                    )
                    runs.setdefault((scenario.name, name), []).append(run)
    return {
        scenario.name: summary(runs[scenario.name, "nginx"], runs[scenario.name, "kubeai"])
        for scenario in scenarios
    }


def summary(nginx_runs: list[Run], kubeai_runs: list[Run]) -> dict:
    median = statistics.median
    both = {"nginx": nginx_runs, "kubeai": kubeai_runs}
    return {
        **{f"{name}_us": median(run.us for run in runs) for name, runs in both.items()},
        **{f"{name}_rate": median(run.rate for run in runs) for name, runs in both.items()},
        **{f"{name}_kernel": median(run.kernel_share for run in r) for name, r in both.items()},
        # The ratio per round: disturbances longer than a run affect both runs of a round.
        "ratio": median(k.us / n.us for n, k in zip(nginx_runs, kubeai_runs, strict=True)),
        "runs": {name: [asdict(run) for run in runs] for name, runs in both.items()},
    }


def show(results: dict[str, dict]) -> None:
    print(
        f"{'µs of CPU (kernel share), rate per second':44}{'nginx':>20}{'kubeai':>20}{'ratio':>8}"
    )
    for scenario in SCENARIOS:
        if result := results.get(scenario.name):
            cells = (
                f"{result[f'{name}_us']:.1f} ({result[f'{name}_kernel']:.0%}) "
                f"{result[f'{name}_rate']:.0f}"
                for name in ("nginx", "kubeai")
            )
            print(f"{scenario.unit:44}{next(cells):>20}{next(cells):>20}{result['ratio']:8.2f}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="duration of each run")
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument(
        "--keys",
        type=int,
        default=0,
        metavar="N",
        help="require an API key of KubeAI's clients, and use N keys with all limits",
    )
    parser.add_argument(
        "--mean-load-factor",
        type=int,
        default=125,
        metavar="PERCENT",
        help="mean load factor of KubeAI's ring; at 125, a closed loop moves and logs many"
        " requests",
    )
    parser.add_argument("--quick", action="store_true", help="run a sample: 2 rounds of 1 second")
    parser.add_argument("--only", action="append", choices=[s.name for s in SCENARIOS])
    parser.add_argument(
        "--cores",
        type=int,
        nargs=2,
        default=(0, 1),
        help="CPU cores of the proxies and of the load",
    )
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--engines", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--load", help=argparse.SUPPRESS)
    parser.add_argument("--load-port", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    options = parse_arguments()
    if options.engines:
        uvloop.run(run_engines(options.engines))
        return 0
    if options.load:
        scenario = next(s for s in SCENARIOS if s.name == options.load)
        load = run_load(
            scenario, options.load_port, options.connections, options.seconds, options.keys
        )
        uvloop.run(load)
        return 0
    if find_nginx() is None:
        print("nginx is not installed: nothing to compare with (Debian: apt install nginx-light)")
        return 0
    if not set(options.cores) <= os.sched_getaffinity(0):
        print(f"cores {options.cores}: this process may not run on both (--cores)")
        return 2
    if options.quick:
        options.rounds, options.seconds = 2, 1.0
    results = compare(options)
    show(results)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
