"""A TCP proxy in the test's event loop, for a network that is cut or loses every packet."""

from __future__ import annotations

import asyncio
import contextlib

CHUNK_BYTES = 64 << 10


class Proxy:
    """Forwards connections on ``port`` of 127.0.0.1 to ``target_port``. The port never changes."""

    port: int

    def __init__(self, target_port: int) -> None:
        self.target_port = target_port
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._refusing = False
        self._moving = asyncio.Event()
        self._moving.set()

    async def start(self) -> None:
        """Listen on a free port."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    def cut(self) -> None:
        """Reset all connections, and every new one, until ``heal``."""
        self._refusing = True
        for writer in self._writers:
            writer.transport.abort()

    def stall(self) -> None:
        """Let no byte pass in either direction until ``heal``. New connections are accepted."""
        self._moving.clear()

    def heal(self) -> None:
        """Forward again. Connections that were only stalled continue."""
        self._refusing = False
        self._moving.set()

    async def close(self) -> None:
        """Close all connections and the port."""
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers = [writer]
        self._writers.add(writer)
        try:
            await self._moving.wait()
            if self._refusing:
                return
            with contextlib.suppress(OSError):
                target = await asyncio.open_connection("127.0.0.1", self.target_port)
                writers.append(target[1])
                self._writers.add(target[1])
                await self._forward((reader, writer), target)
        finally:
            for each in writers:
                self._writers.discard(each)
                each.transport.abort()

    async def _forward(
        self,
        one: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        two: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    ) -> None:
        """Copy in both directions, until either side ends."""
        pumps = [
            asyncio.create_task(self._pump(one[0], two[1])),
            asyncio.create_task(self._pump(two[0], one[1])),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(CHUNK_BYTES):
            await self._moving.wait()
            writer.write(data)
            await writer.drain()
