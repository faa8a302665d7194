"""The supervisor's end of a worker that exits, or hangs."""

import asyncio
import json
import os
import socket

import msgspec
import pytest
from fakes.wire import until

from kubeai.api.config.system import GatewayConfig
from kubeai.framing import frame
from kubeai.routing.channel import SETTINGS_VARIABLE, STACK_SIGNAL, Heartbeat
from kubeai.routing.usage import UsageReport, UsageRow
from kubeai.supervisor.memory import Memory
from kubeai.supervisor.worker_process import (
    CHANNEL_END_TIMEOUT_S,
    SILENCE_MAX_S,
    START_MAX_S,
    Program,
    Reports,
    WorkerProcess,
)

DRAIN_MAX_S = GatewayConfig().drain_accept_s + GatewayConfig().drain_timeout_s
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


class Runs:
    """A process that runs until it is killed, and sends a heartbeat when it is told to."""

    pid = 1
    returncode = None

    def __init__(self, command):
        settings = json.loads(command.env[SETTINGS_VARIABLE])
        self.end = socket.socket(fileno=os.dup(settings["channel_fd"]))
        self.signals = []
        self.killed = asyncio.Event()

    def beat(self):
        self.end.sendall(frame(msgspec.msgpack.encode(Heartbeat())))

    async def wait(self):
        await self.killed.wait()
        self.end.close()
        return -9

    def send_signal(self, number):
        self.signals.append(number)

    def kill(self):
        self.killed.set()


@pytest.fixture
def make():
    """Make a WorkerProcess. ``spawn``: its arguments are the Command and the WorkerProcess."""
    memory = Memory.create(1, keys=False)

    def make(spawn, received=lambda _: None):
        process = WorkerProcess(
            0,
            None,
            memory,
            Program(GatewayConfig()),
            Reports(ready=lambda: None, demand=lambda _: None, usage=received),
            snapshot=lambda: (),
            spawn=lambda command: spawn(command, process),
        )
        return process

    yield make
    memory.close()


@pytest.fixture
def worker(make):
    async def run(reports, heirs=None):
        async def spawn(command, process):
            process.stopping = True
            return Exits(command, reports=reports, heirs=heirs)

        received = []
        await make(spawn, received.append).run()
        return received

    return run


@pytest.fixture
async def running(make):
    """A WorkerProcess and the process that it runs."""
    started = asyncio.Event()
    children = []

    async def spawn(command, _):
        children.append(Runs(command))
        started.set()
        return children[0]

    process = make(spawn)
    life = asyncio.create_task(process.run())
    await started.wait()
    yield process, children[0]
    process.stopping = True
    process.kill()
    await life


async def heard(process):
    """Return once the process's last message has been received."""
    await until(lambda: process._heard and process._silent_s == 0.0)


async def test_the_last_reports_of_a_worker_are_read_after_its_exit(worker):
    assert await worker(1000) == [UsageReport((ROW,))] * 1000


async def test_a_copy_of_the_workers_end_delays_its_successor_for_a_limited_time(worker):
    heirs = []
    began_s = asyncio.get_running_loop().time()
    assert len(await worker(3, heirs)) == 3
    assert asyncio.get_running_loop().time() - began_s < CHANNEL_END_TIMEOUT_S + 10
    for end in heirs:
        end.close()


async def test_a_process_that_sends_nothing_writes_its_stack_and_is_killed(running):
    process, child = running
    child.beat()
    await heard(process)
    process.check(SILENCE_MAX_S)
    assert not child.signals
    process.check(0.5)
    assert child.signals == [STACK_SIGNAL]
    assert not child.killed.is_set()
    process.check(0.5)
    assert child.killed.is_set()


async def test_a_process_that_starts_slowly_is_killed_only_after_minutes(running):
    """No signal comes first, because the process may not handle it yet."""
    process, child = running
    for _ in range(10):
        process.check(START_MAX_S / 10)
    assert not child.killed.is_set()
    process.check(0.5)
    assert not child.killed.is_set()
    process.check(0.5)
    assert child.killed.is_set()
    assert not child.signals


async def test_a_process_without_its_channel_has_time_to_drain(running):
    process, child = running
    child.beat()
    await heard(process)
    child.end.close()
    await until(process._channel.ended.is_set)
    process.check(DRAIN_MAX_S + SILENCE_MAX_S)
    process.check(0.5)
    assert not child.killed.is_set()
    process.check(0.5)
    assert child.killed.is_set()


async def test_a_process_that_has_exited_is_not_signalled(make):
    """Another process may keep the channel open, so that its end is not known for a second."""
    heirs = []

    class Exited(Exits):
        def kill(self):
            raise ProcessLookupError

        def send_signal(self, number):
            raise ProcessLookupError

    async def spawn(command, process):
        process.stopping = True
        return Exited(command, reports=1, heirs=heirs)

    received = []
    process = make(spawn, received.append)
    life = asyncio.create_task(process.run())
    await until(lambda: received)
    for _ in range(3):
        process.check(START_MAX_S + 1)
    assert not life.done()
    heirs.pop().close()
    await life


async def test_a_heartbeat_ends_the_silence(running):
    process, child = running
    for _ in range(5):
        child.beat()
        await heard(process)
        process.check(SILENCE_MAX_S)
    assert not child.signals
    child.beat()
    process.check(1.0)
    await heard(process)
    process.check(1.0)
    assert child.signals == [STACK_SIGNAL]
    assert not child.killed.is_set(), "it has gone on"
