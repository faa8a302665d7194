"""The messenger's process: ``python -m kubeai.messenger``, started by the supervisor.

It is a worker (gateway/worker.py) without a listener: it has a column of the load table and a
routing table, and its requests go through a Server of its own, so that routing, holding, retries,
metrics and logs are those of HTTP. They are counted as messages. Each stream of the config has a
task. On ``Drain``, on SIGTERM and when the channel closes, it stops receiving, finishes what
engines are serving, publishes and acknowledges that, and gives everything else back to the brokers.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

from aiohttp import web
from typing_extensions import override

from kubeai.api.config.system import Messaging
from kubeai.brokers.streams import open_streams
from kubeai.gateway.worker import Worker, run_worker
from kubeai.logs import get_logger
from kubeai.messenger.relay_client import RelayClient
from kubeai.messenger.stream import IN_HAND_MAX_BYTES, Stream, StreamSettings
from kubeai.routing.channel import REPORT_INTERVAL_S, Drain, Streams, WorkerSettings
from kubeai.routing.routes import RequestType

log = get_logger(__name__)

ALL_IN_HAND_MAX_BYTES = 256 << 20  # of the messages in hand of all streams, shared equally


class Messenger(Worker):
    """See the module."""

    request_type: RequestType = "message"

    def __init__(self, settings: WorkerSettings) -> None:
        super().__init__(settings)
        messaging = settings.messaging or Messaging()
        client = RelayClient(self._server)
        self._context.hold_watcher = client
        streams = open_streams(messaging)
        in_hand_max_bytes = min(IN_HAND_MAX_BYTES, ALL_IN_HAND_MAX_BYTES // max(1, len(streams)))
        self._streams = [
            Stream(
                StreamSettings(
                    stream.name,
                    stream.requests,
                    stream.responses,
                    stream.max_handlers,
                    messaging.error_max_backoff_s,
                    in_hand_max_bytes,
                ),
                client.send,
            )
            for stream in streams
        ]

    @override
    async def _serve(self, local_routes: web.Server) -> None:
        await self._server.serve(local_routes, None)
        self._announce()
        running = [asyncio.create_task(stream.run()) for stream in self._streams]
        running.append(asyncio.create_task(self._report()))
        stopped = asyncio.ensure_future(self._stopped)
        ends: list[asyncio.Future[Any]] = [*running, stopped]
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            for task in running:
                if task.done():  # a bug: end the process, and be restarted
                    task.result()
            await self._drain(stopped.result())
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            self._send_report()

    async def _drain(self, drain: Drain) -> None:
        log.info("draining", in_hand=sum(stream.report().in_hand for stream in self._streams))
        timeout_s = drain.accept_s + drain.timeout_s
        await asyncio.gather(*(stream.drain(timeout_s) for stream in self._streams))

    async def _report(self) -> None:
        while True:
            self._send_report()
            await asyncio.sleep(REPORT_INTERVAL_S)

    def _send_report(self) -> None:
        self._channel.send(Streams(tuple(stream.report() for stream in self._streams)))


def main() -> int:
    """Run the messenger; returns the exit status."""
    return run_worker(Messenger)


if __name__ == "__main__":
    sys.exit(main())
