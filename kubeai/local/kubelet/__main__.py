"""``python -m kubeai.local.kubelet``: the process kubelet of one Node.

It writes ``ready <port of its server>`` to ``--ready-fd`` once the Node is registered and every pod
found in the API has a current status. With that option the process belongs to its parent: it
ignores Ctrl-C and exits when the parent does. SIGTERM ends every container within
``SHUTDOWN_GRACE_S`` and keeps the Pods in the API; the next kubelet restarts them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import secrets
import signal
import sys
from pathlib import Path

from kubeai.api.config.quantity import parse_quantity
from kubeai.errors import KubeAIError
from kubeai.kube.auth import UNREADABLE, current_context
from kubeai.kube.client import Kube
from kubeai.local.kubelet.agent import Agent, KubeObjects
from kubeai.local.kubelet.gpus import ALL, find_gpus
from kubeai.local.kubelet.node import Node
from kubeai.local.kubelet.pods.host import Host
from kubeai.local.kubelet.pods.pod import GPU
from kubeai.local.kubelet.pods.probes import Prober
from kubeai.local.kubelet.runtime.children import become_subreaper
from kubeai.local.kubelet.runtime.memory import MemoryGuard
from kubeai.local.kubelet.runtime.process_table import kill_leftovers
from kubeai.local.kubelet.server.access import Access, CertificateAccess, TokenAccess
from kubeai.local.kubelet.server.server import KubeletServer
from kubeai.local.locks import lock_data_dir
from kubeai.logs import get_logger, setup_logging
from kubeai.processes import set_death_signal

log = get_logger(__name__)

SHUTDOWN_GRACE_S = 5.0
HOST_IP = "127.0.0.1"


def main() -> None:
    """Run the kubelet. Exits with a message if it cannot start."""
    options = _parse(sys.argv[1:])
    try:
        setup_logging()
        if options.ready_fd is not None:
            os.set_inheritable(options.ready_fd, False)
            # Not SIGTERM: without the parent, nobody waits for a grace period, and the shims end
            # the engines.
            set_death_signal(signal.SIGKILL)
        become_subreaper()
        with lock_data_dir(options.data_dir, "kubelet.lock", "kubelet"):
            asyncio.run(_run(options))
    except KubeAIError as error:
        sys.exit(f"kubelet: {error}")


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.client_name and not options.client_ca_file:
        parser.error("--client-name requires --client-ca-file")
    for resource, quantity in options.capacity:
        try:
            parse_quantity(quantity)
        except ValueError:
            parser.error(f"argument --capacity: {resource}: {quantity!r} is not a quantity")
        if resource == GPU:  # so that the number of devices is that of the Node
            options.gpus = quantity
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kubeai.local.kubelet", description="run pods as processes of this machine"
    )
    parser.add_argument("--kubeconfig", help="default: $KUBECONFIG")
    parser.add_argument(
        "--data-dir", type=Path, required=True, help="directory for logs and volumes"
    )
    parser.add_argument("--node-name", default="local")
    parser.add_argument("--ready-fd", type=int)
    parser.add_argument(
        "--no-bind",
        action="store_true",
        help="run only pods that the cluster's scheduler has assigned to this node",
    )
    parser.add_argument(
        "--client-ca-file",
        type=Path,
        help="serve logs and exec over TLS to clients with a certificate from this CA (a real API "
        "server's --kubelet-client-certificate); default: to clients with the API's bearer token",
    )
    parser.add_argument(
        "--client-name", default="", help="required common name of the client certificate"
    )
    parser.add_argument(
        "--label", action="append", default=[], type=_pair, help="key=value: a label of the Node"
    )
    parser.add_argument(
        "--capacity",
        action="append",
        default=[],
        type=_pair,
        help="resource=quantity: capacity of the Node, such as nvidia.com/gpu=2; overrides what "
        "was detected",
    )
    parser.add_argument(
        "--gpus",
        default=ALL,
        help="GPUs to assign to pods: all (default), none, a number, or UUIDs",
    )
    parser.add_argument(
        "--engine-env",
        action="append",
        default=[],
        type=_pair,
        help="engine=directory: a virtual environment that holds the engine",
    )
    parser.add_argument(
        "--volume",
        action="append",
        default=[],
        type=_pair,
        help="claim=directory: serves as the volume of a claim",
    )
    return parser


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not key=value")
    return key, value


async def _run(options: argparse.Namespace) -> None:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stopping.set)
    loop.add_signal_handler(
        signal.SIGINT, (lambda: None) if options.ready_fd is not None else stopping.set
    )
    async with contextlib.AsyncExitStack() as stack:
        kube = await Kube.connect(options.kubeconfig)
        stack.push_async_callback(kube.close)
        prober = Prober()
        stack.push_async_callback(prober.close)
        host = Host(
            data_dir=options.data_dir.resolve(),
            objects=KubeObjects(kube),
            prober=prober,
            memory=MemoryGuard(),
            ip=HOST_IP,
            engine_envs={engine: Path(path) for engine, path in options.engine_env},
            volumes={claim: Path(path) for claim, path in options.volume},
            devices=await find_gpus(options.gpus),
        )
        if killed := kill_leftovers(host.marker):
            log.warning("killed processes of an earlier kubelet", count=killed)
        node = Node(
            kube,
            options.node_name,
            host.ip,
            lease=options.no_bind,
            labels=dict(options.label),
            capacity=dict(options.capacity),
            gpus=len(host.devices.ids),
        )
        agent = Agent(kube, host, options.node_name, node.capacity, bind=not options.no_bind)
        server = KubeletServer(agent, _access(options))
        stack.push_async_callback(server.close)
        port = await server.start()
        await node.register(port)
        tasks = [asyncio.create_task(agent.run()), asyncio.create_task(node.run())]
        tasks.append(asyncio.create_task(_report_ready(agent, port, options.ready_fd, stopping)))
        stop = asyncio.create_task(stopping.wait())
        await asyncio.wait([stop, *tasks[:2]], return_when=asyncio.FIRST_COMPLETED)
        for task in (*tasks, stop):
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        await agent.stop(SHUTDOWN_GRACE_S)
        for outcome in ended:  # the tasks end only with an error or by our cancellation
            if isinstance(outcome, Exception):
                raise outcome


async def _report_ready(
    agent: Agent, port: int, ready_fd: int | None, stopping: asyncio.Event
) -> None:
    await agent.synced.wait()
    log.info("kubelet ready", port=port)
    if ready_fd is not None:
        try:
            os.write(ready_fd, f"ready {port}\n".encode())
            os.close(ready_fd)
        except OSError:
            stopping.set()  # the parent exited before `set_death_signal` took effect


def _access(options: argparse.Namespace) -> Access:
    if options.client_ca_file is None:
        return TokenAccess(_token(options.kubeconfig or os.environ.get("KUBECONFIG", "")))
    return CertificateAccess(
        options.client_ca_file, options.client_name, HOST_IP, options.data_dir.resolve()
    )


def _token(kubeconfig: str) -> str:
    """The API's bearer token, which clients must present; else a random one."""
    try:
        _, _, user = current_context(Path(kubeconfig.split(os.pathsep)[0]))
        return str(user["token"])
    except UNREADABLE:
        return secrets.token_urlsafe()


if __name__ == "__main__":
    main()
