"""Google's fake of Pub/Sub. It keeps everything in memory, so a restart loses all messages."""

from __future__ import annotations

from pathlib import Path

from brokers.servers import BrokerServer, free_port, program


class PstestServer(BrokerServer):
    """The fake, for clients that use it as an emulator. Topics must be created by a client."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._program = program("pstest", "pstest")
        self.port = free_port()
        self.environment = {"PUBSUB_EMULATOR_HOST": f"127.0.0.1:{self.port}"}

    def command(self) -> list[str]:
        return [str(self._program), f"127.0.0.1:{self.port}"]
