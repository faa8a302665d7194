"""A peer that behaves as Service Bus does: ``amqp_peer.py``, which says what it proves."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from brokers.servers import START_TIMEOUT_S, BrokerServer, accepts, free_port, program

PROGRAM = Path(__file__).with_name("amqp_peer.py")


class ServiceBusServer(BrokerServer):
    """The peer, with queues: ``"requests"``, or ``"requests,lock_s=5"``.

    ``kill`` and ``stop`` only close the port and the connections, because the service loses no
    messages in an outage. ``end`` ends the process.
    """

    def __init__(self, folder: Path, *queues: str) -> None:
        super().__init__(folder)
        self._proton = program("servicebus", "proton").parent
        self.port = free_port()
        self._queues = queues
        self.environment = {"SERVICEBUS_CONNECTION_STRING": self.connection_string("secret")}

    def connection_string(self, key: str) -> str:
        """What a client connects with: without TLS, as for Microsoft's emulator."""
        return (
            f"Endpoint=sb://127.0.0.1:{self.port};SharedAccessKeyName=name;SharedAccessKey={key};"
            "UseDevelopmentEmulator=true"
        )

    def command(self) -> list[str]:
        return [sys.executable, str(PROGRAM), str(self.port), *self._queues]

    def process_environment(self) -> dict[str, str]:
        return os.environ | {"PYTHONPATH": str(self._proton)}

    def start(self) -> None:
        """Start the process, or end the outage."""
        if self._process is None:
            super().start()
        else:
            self._signal(signal.SIGUSR2)
            self._until("it serves again", self._serves, START_TIMEOUT_S)

    def kill(self) -> None:
        """Begin an outage."""
        self._signal(signal.SIGUSR1)
        self._until("it serves nobody", lambda: not accepts(self.port), START_TIMEOUT_S)

    def stop(self) -> None:
        """Begin an outage."""
        self.kill()

    def break_locks(self) -> None:
        """Take all locked messages back, as an overloaded service may do."""
        self._signal(signal.SIGHUP)

    def end(self) -> None:
        """End the process. No effect if it does not run."""
        self._end(signal.SIGKILL)
