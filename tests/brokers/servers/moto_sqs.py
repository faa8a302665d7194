"""An SQS server for tests, as a process: moto's, served one request at a time.

    python tests/brokers/servers/moto_sqs.py PORT QUEUE[,ATTRIBUTE=VALUE]…

moto's queues are lists without locks: in its own server, a delete that runs beside a send loses the
sent message. Its long polls go on after their client has closed the connection, and then hide a
message for its visibility timeout. Here requests run one after the other, and a long poll is a
series of short ones that ends with its connection, as in AWS.

Everything is in memory, so a restart would lose it. SIGUSR1 therefore closes the port and all
connections, and SIGUSR2 opens the port again: that is what an outage of SQS looks like, which keeps
its messages. Prints a line when it serves. Ends with its parent.

What this proves: the requests that are sent, the encoding of messages, visibility timeouts, receive
counts, FIFO groups, and the error codes that moto implements. What it does not prove: credentials
(none are checked), throttling, standard queues that deliver twice or out of order, and the
durability of a real queue.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import signal
import sys
import time

from aiohttp import web
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from moto.sqs import models
from werkzeug.test import Client, TestResponse

ACCOUNT, REGION = "123456789012", "us-east-1"  # the account is moto's own
POLL_S = 0.02
BODY_MAX_BYTES = 16 << 20
PR_SET_PDEATHSIG = 1

# moto looks at each message of a queue several times per request, and each time reads its clock.
models.unix_time_millis = lambda: time.time() * 1000


class Server:
    def __init__(self) -> None:
        self._moto = Client(DomainDispatcherApplication(create_backend_app))

    async def handle(self, request: web.Request) -> web.Response:
        body = await request.read()
        loop = asyncio.get_running_loop()
        deadline = loop.time()
        if request.headers.get("X-Amz-Target") == "AmazonSQS.ReceiveMessage":
            parameters = json.loads(body)
            deadline += parameters.get("WaitTimeSeconds", 0)
            body = json.dumps(parameters | {"WaitTimeSeconds": 0}).encode()
        while True:
            response = self._run(request, body)
            empty = response.status_code == 200 and b'"Messages"' not in response.data
            if loop.time() >= deadline or not empty:
                headers = {
                    name: value
                    for name, value in response.headers.items()
                    if name.lower() not in ("content-length", "connection")
                }
                return web.Response(
                    status=response.status_code, headers=headers, body=response.data
                )
            await asyncio.sleep(POLL_S)  # cancelled if the client closes the connection

    def _run(self, request: web.Request, body: bytes) -> TestResponse:
        return self._moto.open(
            request.path_qs,
            method=request.method,
            base_url=f"http://{request.host}",
            headers=list(request.headers.items()),
            data=body,
        )


def create_queue(text: str) -> None:
    name, *attributes = text.split(",")
    pairs = dict(attribute.split("=") for attribute in attributes)
    models.sqs_backends[ACCOUNT][REGION].create_queue(name, **pairs)


async def serve(port: int) -> None:
    loop = asyncio.get_running_loop()
    server = Server()
    outage, repair = asyncio.Event(), asyncio.Event()
    loop.add_signal_handler(signal.SIGUSR1, outage.set)
    loop.add_signal_handler(signal.SIGUSR2, repair.set)
    while True:
        application = web.Application(client_max_size=BODY_MAX_BYTES)
        application.router.add_route("*", "/{path:.*}", server.handle)
        runner = web.AppRunner(
            application, handler_cancellation=True, access_log=None, shutdown_timeout=0
        )
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        port = runner.addresses[0][1]
        print("serving", port, flush=True)
        await outage.wait()
        await runner.cleanup()
        await repair.wait()
        outage.clear()
        repair.clear()


def main(port: str, *queues: str) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() == 1:
        return  # the parent ended before prctl took effect
    for queue in queues:
        create_queue(queue)
    asyncio.run(serve(int(port)))


if __name__ == "__main__":
    main(*sys.argv[1:])
