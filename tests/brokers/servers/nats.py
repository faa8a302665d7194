"""A NATS server with JetStream."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from brokers.servers import BrokerServer, free_port, program

MAX_PAYLOAD_BYTES = 1 << 20  # the server's default


class NatsServer(BrokerServer):
    """``nats-server`` with its stream data in ``folder``. ``options``: of its configuration."""

    def __init__(
        self, folder: Path, *, scheme: str = "nats", login: str = "", **options: Any
    ) -> None:
        super().__init__(folder)
        self._program = program("nats", "nats-server")
        self.port = free_port()
        self._config = folder / "nats.conf"
        settings: dict[str, Any] = {
            "listen": f"127.0.0.1:{self.port}",
            "jetstream": {"store_dir": str(folder / "data"), "sync_interval": "always"},
            **options,
        }
        self._config.write_text(json.dumps(settings))  # a NATS configuration may be JSON
        self.environment = {"NATS_SERVER_URL": f"{scheme}://{login}127.0.0.1:{self.port}"}

    def command(self) -> list[str]:
        return [str(self._program), "-c", str(self._config)]
