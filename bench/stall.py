"""Measure how long one request body at the limit (64 MiB) blocks a worker's event loop.

    python bench/stall.py [--json FILE]

The gateway runs in this process; a second process is both client and engine. The figure is the
longest delay of any other task on the event loop, from the request's first byte to the response's
last: parsing, hashing, forwarding, freeing. It is the best of several rounds, since other load on
the machine adds delays.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import uvloop

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from fakes.world import World

LIMIT_BYTES = 64 << 20
ROUNDS = 5
PIECE_BYTES = 1 << 16
BEAT_S = 0.001
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
CHAT = b'{"model":"m","messages":[%s]}'
USER = b'{"role":"user","content":"%s"}'
SYSTEM = b'{"role":"system","content":"%s"}'
OTHER = b'{"model":"m","x":[%s]}'


def many(member: bytes) -> bytes:
    return b",".join([member] * ((LIMIT_BYTES - 200) // (len(member) + 1)))


def long(text: bytes) -> bytes:
    return text * ((LIMIT_BYTES - 200) // len(text))


# Worst-case bodies of each kind: how to build one, and the expected response.
BODIES: dict[str, tuple[Callable[[], bytes], int]] = {
    "one long prompt": (lambda: CHAT % (USER % long(b"x")), 200),
    "the same in chunks": (lambda: CHAT % (USER % long(b"x")), 200),
    "not ASCII": (lambda: CHAT % (USER % long("é".encode())), 200),
    "all escapes": (lambda: CHAT % (USER % long(b"\\n")), 200),
    "a million messages": (lambda: CHAT % many(USER % b"x"), 200),
    "a million odd messages": (lambda: CHAT % many(b'{"r\\u006fle":0}'), 200),
    "a long system text": (lambda: CHAT % (SYSTEM % long("é".encode())), 200),
    "many system texts": (lambda: CHAT % many(SYSTEM % (b"\\n" * 500)), 200),
    "numbers in a message": (lambda: CHAT % (b'{"role":"user","content":[%s]}' % many(b"1")), 200),
    "numbers": (lambda: OTHER % many(b"1"), 200),
    "empty strings": (lambda: OTHER % many(b'""'), 200),
    "deep nesting": (lambda: OTHER % many(b"[" * 100 + b"]" * 100), 200),
    "a long key": (lambda: b'{"model":"m","%s":0}' % long("é".encode()), 200),
    "for an adapter": (lambda: (CHAT % many(USER % b"x")).replace(b'"m"', b'"m_a"', 1), 200),
    "a long name: 400": (lambda: b'{"model":"%s"}' % long("é_".encode()), 400),
    "a byte missing: 400": (lambda: (CHAT % many(USER % b"x"))[:-1], 400),
    "bad UTF-8: 400": (lambda: CHAT % (USER % (long("é".encode()) + b"\xff")), 400),
    "a lone surrogate: 400": (lambda: CHAT % (USER % (long(b"\\ud83d\\ude00") + b"\\ud83d")), 400),
}


# -- the other process -----------------------------------------------------------------------------


def read_message(wire: socket.socket) -> bytes:
    """The head of a message of known length."""
    got = bytearray()
    while b"\r\n\r\n" not in got:
        got += wire.recv(PIECE_BYTES)
    head, _, rest = bytes(got).partition(b"\r\n\r\n")
    left = int(head.lower().partition(b"content-length:")[2].split()[0]) - len(rest)
    while left:
        left -= len(wire.recv(min(left, 1 << 20)))
    return head


def serve(listener: socket.socket) -> None:
    while True:
        wire, _ = listener.accept()
        with wire:
            read_message(wire)
            wire.sendall(OK)


def peer(name: str, port: int) -> None:
    """Run the engine, print its port, and act as a client once per line of stdin."""
    make, status = BODIES[name]
    body = make()
    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=serve, args=(listener,), daemon=True).start()
    print(listener.getsockname()[1], flush=True)
    chunked = "chunks" in name
    framing = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: %d" % len(body)
    for _ in sys.stdin:
        with socket.create_connection(("127.0.0.1", port)) as wire:
            wire.sendall(
                b"POST /openai/v1/chat/completions HTTP/1.1\r\nHost: h\r\n%s\r\n\r\n" % framing
            )
            for at in range(0, len(body), PIECE_BYTES):
                piece = body[at : at + PIECE_BYTES]
                wire.sendall(b"%x\r\n%s\r\n" % (len(piece), piece) if chunked else piece)
            if chunked:
                wire.sendall(b"0\r\n\r\n")
            head = read_message(wire)
        assert head.startswith(b"HTTP/1.1 %d " % status), head
        print(flush=True)


# -- the gateway -----------------------------------------------------------------------------------


class Heart:
    """A task that wakes every ``BEAT_S``; ``worst_s`` is its longest delay."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.worst_s = 0.0
        self._due_s = time.perf_counter()
        self._beat()

    def _beat(self) -> None:
        self.worst_s = max(self.worst_s, time.perf_counter() - self._due_s)
        self._due_s = time.perf_counter() + BEAT_S
        self._timer = self._loop.call_later(BEAT_S, self._beat)

    def stop(self) -> None:
        self._timer.cancel()


async def longest_ms(name: str) -> float:
    """The best of several rounds."""
    world = await World.start()
    other = await asyncio.create_subprocess_exec(
        *(sys.executable, __file__, "--peer", name, "--port", str(world.port)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert other.stdin is not None
    assert other.stdout is not None
    engine = f"127.0.0.1:{int(await other.stdout.readline())}"
    world.route("m", {"a": (engine, ["a"])}, adapters=("a",), strategy="PrefixHash")
    found = []
    for _ in range(ROUNDS):
        heart = Heart()
        other.stdin.write(b"\n")
        if not await other.stdout.readline():
            raise RuntimeError(f"{name}: another answer than was expected")
        await asyncio.sleep(BEAT_S)
        heart.stop()
        found.append(heart.worst_s)
    other.stdin.close()
    await other.wait()
    await world.close()
    return min(found) * 1000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        peer(options.peer, options.port)
        return 0
    found = {}
    for name in BODIES:
        found[name] = uvloop.run(longest_ms(name))
        print(f"{name:24}{found[name]:8.1f} ms", flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
