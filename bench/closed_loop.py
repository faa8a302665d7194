"""A closed loop of connections, and mock engines that respond at little cost.

``gateway_vs_nginx.py`` and ``gateway_at_scale.py`` run both in processes of their own.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass

ENGINES = ("127.0.0.1", "127.0.0.2", "127.0.0.3", "127.0.0.4")
CHUNKS = 64
PACE_S = 0.02
BODIES = 256  # different conversations


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
