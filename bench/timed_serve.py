"""`kubeai serve`, with timers that ``control_plane.py`` reads.

Run as a program, it is `kubeai serve`, which prints its measurements for each line on stdin.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import sys
import threading
import time
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from kubeai.kube.client import Kube
from kubeai.operator.controller import Controller
from kubeai.supervisor.supervisor import Supervisor

DEADLINE_S = 300.0


def serve_with_timers() -> None:
    """Run `kubeai serve`; for each line on stdin, print the measurements since the previous one."""
    reconciles: list[
        tuple[float, float]
    ] = []  # duration in total, and without API calls, in seconds
    published: list[tuple[float, str, int]] = []  # CLOCK_MONOTONIC, model, endpoints
    reconcile, publish, call = Controller.reconcile, Supervisor._publish, Kube._call
    calls: ContextVar[list[tuple[float, float]]] = ContextVar("calls")  # of one reconcile

    async def timed(controller: Controller, name: str) -> float | None:
        began_s = time.monotonic()
        calls.set([])
        try:
            return await reconcile(controller, name)
        finally:
            took_s = time.monotonic() - began_s
            reconciles.append((took_s, took_s - covered(calls.get())))

    async def called(kube: Kube, *arguments: Any, **options: Any) -> bytes:
        began_s = time.monotonic()
        try:
            return await call(kube, *arguments, **options)
        finally:
            calls.get([]).append((began_s, time.monotonic()))

    def timed_publish(supervisor: Supervisor, model: str, route: Any) -> None:
        publish(supervisor, model, route)
        count = 0 if route is None else len(route.endpoints)
        published.append((time.monotonic(), model, count))

    def answer() -> None:
        nonlocal reconciles, published
        for _ in sys.stdin:
            taken = {"reconciles": reconciles, "published": published}
            reconciles, published = [], []
            print(json.dumps(taken), flush=True)

    Controller.reconcile, Supervisor._publish, Kube._call = timed, timed_publish, called
    threading.Thread(target=answer, daemon=True).start()
    sys.argv = ["kubeai", "serve", "--host", "127.0.0.1", "--port", "0"]
    from kubeai.cli import main as kubeai

    kubeai()


def covered(spans: list[tuple[float, float]]) -> float:
    """The total time covered by the spans, which may overlap."""
    total_s, until_s = 0.0, -math.inf
    for began_s, ended_s in sorted(spans):
        total_s += max(0.0, ended_s - max(began_s, until_s))
        until_s = max(until_s, ended_s)
    return total_s


class Serve:
    """A `kubeai serve` process and its log lines with their arrival times."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.pid = process.pid
        self.log: list[tuple[float, dict[str, Any]]] = []
        self._news = asyncio.Event()

    async def read(self) -> None:
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            try:
                self.log.append((time.monotonic(), json.loads(line)))
            except ValueError:
                print(line.decode(), end="", file=sys.stderr)
            self._news.set()
            self._news = asyncio.Event()

    async def logged(self, event: str, after_s: float = 0.0) -> tuple[float, dict[str, Any]]:
        """Wait for a log line; returns its arrival time (CLOCK_MONOTONIC) and its fields."""
        async with asyncio.timeout(DEADLINE_S):
            while True:
                for at_s, entry in self.log:
                    if entry.get("event") == event and at_s >= after_s:
                        return at_s, entry
                if self.process.returncode is not None:
                    raise SystemExit(f"kubeai serve ended: {self.log[-3:]}")
                await self._news.wait()

    async def endpoint(self) -> str:
        return str((await self.logged("serving"))[1]["endpoint"])

    async def measured(self) -> dict[str, Any]:
        """The measurements since the previous call."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(b"\n")
        return json.loads(await self.process.stdout.readline())

    @property
    def resident_mb(self) -> float:
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

    @property
    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# -- load generator --------------------------------------------------------------------------------


if __name__ == "__main__":
    serve_with_timers()
