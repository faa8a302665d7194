"""A RabbitMQ server."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from brokers.servers import STOP_TIMEOUT_S, BrokerServer, accepts, free_port, program

MAX_MESSAGE_BYTES = 2_000_000  # the default is 128 MiB


class RabbitServer(BrokerServer):
    """One node, with a port mapper of its own (epmd), which Erlang needs. The user is guest."""

    def __init__(self, folder: Path, **settings: str) -> None:
        super().__init__(folder)
        root = program("rabbitmq", "usr/lib/rabbitmq/lib")
        (self._home,) = root.glob("rabbitmq_server-*")
        self._erlang = root.parents[1] / "erlang" / "bin"
        self.port = free_port()
        self._distribution_port, self._epmd_port = free_port(), free_port()
        self._epmd: subprocess.Popen[bytes] | None = None
        settings = {
            "listeners.tcp.local": f"127.0.0.1:{self.port}",
            "max_message_size": str(MAX_MESSAGE_BYTES),
            "log.console": "true",
            "log.file": "false",
            **settings,
        }
        lines = [f"{key} = {text}\n" for key, text in settings.items()]
        (folder / "rabbitmq.conf").write_text("".join(lines))
        (folder / "enabled_plugins").write_text("[].\n")
        self.environment = {"RABBIT_SERVER_URL": f"amqp://guest:guest@127.0.0.1:{self.port}/"}

    def command(self) -> list[str]:
        return [str(self._home / "sbin" / "rabbitmq-server")]

    def process_environment(self) -> dict[str, str]:
        # With RABBITMQ_ALLOW_INPUT, the shell script becomes Erlang instead of starting it.
        arguments = "-noinput -kernel inet_dist_use_interface {127,0,0,1}"
        return os.environ | {
            "PATH": f"{self._erlang}:{os.environ['PATH']}",
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_PORT": str(self._epmd_port),
            "HOME": str(self.folder),  # has Erlang's cookie
            "RABBITMQ_ALLOW_INPUT": "1",
            "RABBITMQ_CONFIG_FILE": str(self.folder / "rabbitmq.conf"),
            "RABBITMQ_DIST_PORT": str(self._distribution_port),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.folder / "enabled_plugins"),
            "RABBITMQ_LOG_BASE": str(self.folder / "logs"),
            "RABBITMQ_MNESIA_BASE": str(self.folder / "data"),
            "RABBITMQ_NODENAME": f"kubeai-{self.port}@localhost",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": arguments,
        }

    def start(self) -> None:
        """Start the port mapper and the server."""
        self._epmd = self.spawn([str(self._erlang / "epmd")])
        self._until("the port mapper runs", lambda: accepts(self._epmd_port), STOP_TIMEOUT_S)
        super().start()

    def _end(self, number: int) -> None:
        super()._end(number)
        if self._epmd is not None:
            self._epmd.kill()
            self._epmd.wait()
            self._epmd = None
