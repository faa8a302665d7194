"""A peer that behaves as Service Bus does: ``amqp_peer.py``, which says what it proves."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from brokers.servers import QueueServer, program


class ServiceBusServer(QueueServer):
    """The peer, with queues: ``"requests"``, or ``"requests,lock_s=5"``."""

    script = Path(__file__).with_name("amqp_peer.py")

    def __init__(self, folder: Path, *queues: str) -> None:
        super().__init__(folder, *queues)
        self._proton = program("servicebus", "proton").parent
        self.environment = {"SERVICEBUS_CONNECTION_STRING": self.connection_string("secret")}

    def connection_string(self, key: str) -> str:
        """What a client connects with: without TLS, as for Microsoft's emulator."""
        return (
            f"Endpoint=sb://127.0.0.1:{self.port};SharedAccessKeyName=name;SharedAccessKey={key};"
            "UseDevelopmentEmulator=true"
        )

    def process_environment(self) -> dict[str, str]:
        return os.environ | {"PYTHONPATH": str(self._proton)}

    def break_locks(self) -> None:
        """Take all locked messages back, as an overloaded service may do."""
        self._signal(signal.SIGHUP)
