"""`kubectl port-forward` where the pods' addresses are on this machine.

    forward.py KUBECTL port-forward [-n NAMESPACE] svc/NAME|deployment/NAME|pod/NAME [LOCAL:]REMOTE…

Unlike kubectl, it looks for a pod at each connection, so that it survives the end of one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
from functools import partial
from typing import Any

CHUNK_BYTES = 1 << 16
KINDS = {"svc", "service", "services", "deploy", "deployment", "deployments", "pod", "pods", "po"}


class NoPod(Exception):
    """There is no pod to forward to."""


class Target:
    """What is forwarded to: a pod, or the ready pods that a Service or Deployment selects."""

    def __init__(self, kubectl: list[str], kind: str, name: str) -> None:
        self._kubectl, self._kind, self._name = kubectl, kind, name

    def _get(self, *arguments: str) -> Any:
        done = subprocess.run(
            [*self._kubectl, "get", "-o", "json", *arguments], capture_output=True, text=True
        )
        if done.returncode != 0:
            raise NoPod(done.stderr.strip())
        return json.loads(done.stdout)

    def address(self, port: str) -> tuple[str, int]:
        """Where a ready pod listens; raises NoPod."""
        found = self._get(self._kind, self._name)
        if found["kind"] == "Pod":
            return self._port(found, port)
        selector = found["spec"]["selector"]
        if found["kind"] == "Service":
            port = self._target_port(found, port)
        labels = ",".join(f"{k}={v}" for k, v in selector.get("matchLabels", selector).items())
        for pod in self._get("pods", "-l", labels)["items"]:
            if is_ready(pod):
                return self._port(pod, port)
        raise NoPod(f"no pod of {self._kind}/{self._name} is ready")

    def _target_port(self, service: Any, port: str) -> str:
        for each in service["spec"]["ports"]:
            if port in (str(each["port"]), each.get("name")):
                return str(each.get("targetPort", each["port"]))
        raise NoPod(f"Service {self._name} does not have a service port {port}")

    def _port(self, pod: Any, port: str) -> tuple[str, int]:
        named = {
            each.get("name"): each["containerPort"]
            for container in pod["spec"]["containers"]
            for each in container.get("ports", ())
        }
        return pod["status"]["podIP"], int(named.get(port, port))


def is_ready(pod: Any) -> bool:
    conditions = pod["status"].get("conditions", ())
    ready = any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)
    return ready and "deletionTimestamp" not in pod["metadata"]


async def _serve(
    target: Target, port: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    try:
        address = await asyncio.to_thread(target.address, port)
        up_reader, up_writer = await asyncio.open_connection(*address)
    except (NoPod, OSError) as error:
        print(f"error forwarding port {port}: {error}", file=sys.stderr)
        writer.close()
        return
    await asyncio.gather(_pump(reader, up_writer), _pump(up_reader, writer))
    for each in (writer, up_writer):
        each.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(CHUNK_BYTES):
            writer.write(data)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()
    except OSError:
        writer.close()


async def _forward(target: Target, ports: list[str]) -> None:
    servers = []
    for pair in ports:
        local, _, remote = pair.rpartition(":")
        address = await asyncio.to_thread(target.address, remote)
        serve = partial(_serve, target, remote)
        server = await asyncio.start_server(serve, "127.0.0.1", int(local or remote))
        bound = server.sockets[0].getsockname()[1]
        print(f"Forwarding from 127.0.0.1:{bound} -> {address[1]}", flush=True)
        servers.append(server)
    await asyncio.gather(*(server.serve_forever() for server in servers))


def main() -> None:
    parser = argparse.ArgumentParser(prog="kubectl port-forward")
    parser.add_argument("kubectl", help="the program")
    parser.add_argument("words", nargs="+", metavar="KIND/NAME [LOCAL:]REMOTE")
    parser.add_argument("-n", "--namespace")
    parser.add_argument("--kubeconfig")
    options = parser.parse_intermixed_args()
    words = [word for word in options.words if word != "port-forward"]
    kind, _, name = words[0].rpartition("/")
    kind = (kind or "pod").partition(".")[0]
    if kind not in KINDS:
        parser.error(f"{words[0]}: forward.py does not know this kind")
    passed = {"namespace": options.namespace, "kubeconfig": options.kubeconfig}
    kubectl = [options.kubectl, *(f"--{name}={value}" for name, value in passed.items() if value)]
    try:
        asyncio.run(_forward(Target(kubectl, kind, name), words[1:]))
    except NoPod as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
