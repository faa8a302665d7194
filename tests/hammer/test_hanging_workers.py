"""A worker that hangs is replaced, and its successor serves the connections that wait for it."""

import asyncio
import os
import signal

import pytest
from fakes.fleet import Fleet
from fakes.wire import Engine, answer, connect, post, until

from kubeai.routing.routes import Endpoint, Route
from kubeai.supervisor import worker_process


async def respond(wire, _):
    await wire.send(answer(200, b"here"))


@pytest.mark.slow
async def test_connections_that_a_hanging_worker_has_not_accepted_are_served(monkeypatch):
    monkeypatch.setenv("LOG_LEVEL", "critical")
    monkeypatch.setattr(worker_process, "SILENCE_MAX_S", 8.0)
    engine = await Engine(respond).start()
    route = Route("m", "VLLM", endpoints=(Endpoint("pod", engine.address),))
    fleet = await Fleet.start([route], workers=1)
    try:
        (hanging,) = fleet.pids
        os.kill(hanging, signal.SIGSTOP)
        wires = [await connect(fleet.port) for _ in range(8)]
        for wire in wires:
            await wire.send(post(body=b'{"model":"m"}'))
        answers = await asyncio.gather(*(wire.answer() for wire in wires))
        assert {each.body for each in answers} == {b"here"}
        await until(lambda: fleet.ready)
        assert fleet.pids != [hanging]
        await until(lambda: not fleet.counts())
        for wire in wires:
            wire.close()
    finally:
        await fleet.close()
        await engine.stop()
