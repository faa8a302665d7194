"""The supervisor's end of a worker that exits."""

import asyncio
import json
import os
import socket

import msgspec
import pytest

from kubeai.api.config.system import GatewayConfig
from kubeai.framing import frame
from kubeai.routing.channel import SETTINGS_VARIABLE
from kubeai.routing.usage import UsageReport, UsageRow
from kubeai.supervisor.memory import Memory
from kubeai.supervisor.worker_process import (
    CHANNEL_END_TIMEOUT_S,
    Program,
    Reports,
    WorkerProcess,
)

ROW = UsageRow("alice", "acme", "m", 1, 0, 10, 2, 5)


class Exits:
    """A process that writes reports to its channel and exits at once."""

    pid = 1
    returncode = 0

    def __init__(self, command, *, reports, heirs):
        """``heirs``: where to keep another copy of its end of the channel."""
        settings = json.loads(command.env[SETTINGS_VARIABLE])
        end = socket.socket(fileno=os.dup(settings["channel_fd"]))
        end.sendall(frame(msgspec.msgpack.encode(UsageReport((ROW,)))) * reports)
        if heirs is not None:
            heirs.append(end.dup())
        end.close()

    async def wait(self):
        return 0

    def kill(self):
        pass


@pytest.fixture
def worker():
    memory = Memory.create(1, keys=False)
    received = []

    async def run(reports, heirs=None):
        async def spawn(command):
            process.stopping = True
            return Exits(command, reports=reports, heirs=heirs)

        process = WorkerProcess(
            0,
            None,
            memory,
            Program(GatewayConfig()),
            Reports(ready=lambda: None, demand=lambda _: None, usage=received.append),
            snapshot=lambda: (),
            spawn=spawn,
        )
        await process.run()
        return received

    yield run
    memory.close()


async def test_the_last_reports_of_a_worker_are_read_after_its_exit(worker):
    assert await worker(1000) == [UsageReport((ROW,))] * 1000


async def test_a_copy_of_the_workers_end_delays_its_successor_for_a_limited_time(worker):
    heirs = []
    began_s = asyncio.get_running_loop().time()
    assert len(await worker(3, heirs)) == 3
    assert asyncio.get_running_loop().time() - began_s < CHANNEL_END_TIMEOUT_S + 10
    for end in heirs:
        end.close()
