"""A Kafka broker in KRaft mode: one node, which is its own controller."""

from __future__ import annotations

import subprocess
from pathlib import Path

from brokers.servers import BrokerServer, free_port, program

MESSAGE_MAX_BYTES = 1_048_588  # the broker's default
# Fast to start rather than fast, and small.
JAVA = "java -Xmx256m -Xss512k -XX:+UseSerialGC -XX:TieredStopAtLevel=1 -Djava.awt.headless=true"
SASL_PASSWORD = "hunter2-do-not-print"
LOGIN_MODULE = (
    "org.apache.kafka.common.security.plain.PlainLoginModule required "
    f'user_kubeai="{SASL_PASSWORD}";'
)
CLUSTER_ID = "kubeai-tests-0000000000"


class KafkaServer(BrokerServer):
    """``kafka.Kafka`` with its log in ``folder``. ``options``: of server.properties.

    A second listener is for clients behind a proxy: see ``advertise``.
    """

    def __init__(self, folder: Path, **options: str) -> None:
        super().__init__(folder)
        self._classes = program("kafka", "lib")
        self._properties = folder / "server.properties"
        self._options = {name.replace("_", "."): value for name, value in options.items()}
        self.port, self.proxied_port, self._controller_port = (free_port() for _ in range(3))
        self.environment = {"KAFKA_BROKERS": f"127.0.0.1:{self.port}"}
        self._sasl_port = free_port()
        self.sasl_environment = {
            "KAFKA_BROKERS": f"127.0.0.1:{self._sasl_port}",
            "KAFKA_SECURITY_PROTOCOL": "SASL_PLAINTEXT",
            "KAFKA_SASL_USERNAME": "kubeai",
            "KAFKA_SASL_PASSWORD": SASL_PASSWORD,
        }
        self.advertise(self.proxied_port)

    def advertise(self, port: int) -> None:
        """Before ``start``: tell clients of ``proxied_port`` that the broker is at ``port``."""
        self.proxied_environment = {"KAFKA_BROKERS": f"127.0.0.1:{port}"}
        self._advertised = port

    def start(self) -> None:
        """Start the server; the first time, format its storage."""
        settings = {
            "process.roles": "broker,controller",
            "node.id": "1",
            "controller.quorum.voters": f"1@127.0.0.1:{self._controller_port}",
            "controller.listener.names": "CONTROLLER",
            "inter.broker.listener.name": "CLIENTS",
            "listeners": f"CLIENTS://127.0.0.1:{self.port},PROXIED://127.0.0.1:{self.proxied_port},"
            f"SASL://127.0.0.1:{self._sasl_port},CONTROLLER://127.0.0.1:{self._controller_port}",
            "advertised.listeners": f"CLIENTS://127.0.0.1:{self.port},"
            f"PROXIED://127.0.0.1:{self._advertised},SASL://127.0.0.1:{self._sasl_port}",
            "listener.security.protocol.map": "CLIENTS:PLAINTEXT,PROXIED:PLAINTEXT,"
            "SASL:SASL_PLAINTEXT,CONTROLLER:PLAINTEXT",
            "listener.name.sasl.sasl.enabled.mechanisms": "PLAIN",
            "listener.name.sasl.plain.sasl.jaas.config": LOGIN_MODULE,
            "log.dirs": str(self.folder / "data"),
            "offsets.topic.num.partitions": "1",
            "offsets.topic.replication.factor": "1",
            "transaction.state.log.replication.factor": "1",
            "transaction.state.log.num.partitions": "1",
            "group.initial.rebalance.delay.ms": "0",
            "num.network.threads": "2",
            "num.io.threads": "4",
            "log.flush.interval.messages": "1",  # SIGKILL must lose nothing that was confirmed
            **self._options,
        }
        self._properties.write_text("".join(f"{key}={text}\n" for key, text in settings.items()))
        if not (self.folder / "data").exists():
            format_storage = ("format", "-t", CLUSTER_ID, "-c", str(self._properties))
            subprocess.run(
                [*self._java(), "kafka.tools.StorageTool", *format_storage],
                check=True,
                capture_output=True,
            )
        super().start()

    def command(self) -> list[str]:
        return [*self._java(), "kafka.Kafka", str(self._properties)]

    def _java(self) -> list[str]:
        return [*JAVA.split(), "-cp", f"{self._classes}/*"]
