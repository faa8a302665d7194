"""Audio transcriptions that are held, retried or broken off, and what the client gets."""

import asyncio
import contextlib
import os

import aiohttp
import pytest
from aiohttp import web
from fakes.uploads import SPEECH, TRANSCRIPTIONS, Replica, client_of, error_of, form_of, started
from fakes.wire import until

from kubeai.gateway import retries as attempts
from kubeai.gateway.uploads import spool


async def test_a_selector_hides_the_model(stack, replica, client):
    _, address = await started(stack, 200)
    replica.publish("w", address, labels={"tenant": "a"})

    async def status(*selectors):
        headers = [("X-Label-Selector", selector) for selector in selectors]
        response = await client.post(TRANSCRIPTIONS, data=form_of(*SPEECH), headers=headers)
        return response.status

    assert await status("tenant=a") == 200
    assert await status("tenant=a", "env=x") == 404
    assert await status("a=b=c") == 400


async def test_a_request_for_a_cold_model_is_held_and_activates_it(stack, replica, client):
    _, address = await started(stack, 200)
    replica.publish("w")
    asking = asyncio.create_task(client.post(TRANSCRIPTIONS, data=form_of(*SPEECH)))
    await until(lambda: replica.held() == 1)
    assert (replica.active(), replica.demands, replica.context.held("w")) == (1, ["w"], 1)
    replica.publish("w", address)
    assert (await asking).status == 200
    assert (replica.held(), replica.active(), replica.context.held("w")) == (0, 0, 0)


async def test_a_held_request_times_out(stack):
    replica = Replica(hold_timeout_s=0.05)
    client = await client_of(stack, replica)
    replica.publish("w")
    response = await client.post(TRANSCRIPTIONS, data=form_of(*SPEECH))
    assert response.status == 504
    assert (await error_of(response))["type"] == "server_error"
    assert (replica.held(), replica.active()) == (0, 0)


async def test_the_number_of_held_requests_is_limited(stack):
    replica = Replica(hold_max_requests=1)
    client = await client_of(stack, replica)
    replica.publish("w")
    first = asyncio.create_task(client.post(TRANSCRIPTIONS, data=form_of(*SPEECH)))
    await until(lambda: replica.held() == 1)
    response = await client.post(TRANSCRIPTIONS, data=form_of(*SPEECH))
    assert (response.status, response.headers["Retry-After"]) == (503, "5")
    replica.publish("w", gone=True)
    assert (await first).status == 404


async def test_a_held_request_is_dropped_when_its_client_disconnects(stack, replica, client):
    replica.publish("w")
    asking = asyncio.create_task(client.post(TRANSCRIPTIONS, data=form_of(*SPEECH)))
    await until(lambda: replica.held() == 1)
    asking.cancel()
    await until(lambda: replica.held() == replica.active() == replica.context.held("w") == 0)


async def test_a_failed_attempt_is_retried_on_another_endpoint(stack, replica, client):
    bad, bad_address = await started(stack, 503)
    good, good_address = await started(stack, 200)
    replica.publish("w", "127.0.0.1:1", bad_address, good_address)
    for _ in range(4):
        response = await client.post(TRANSCRIPTIONS, data=form_of(*SPEECH))
        assert (response.status, await response.text()) == (200, "engine says 200")
    assert len(good.requests) == 4
    assert bad.requests
    assert await good.form() == await bad.form()
    assert replica.in_flight() == 0


async def test_the_last_response_passes_through(stack):
    replica = Replica(retries=1)
    client = await client_of(stack, replica)
    engine, address = await started(stack, 503, 502)
    replica.publish("w", address)
    response = await client.post(TRANSCRIPTIONS, data=form_of(*SPEECH))
    assert (response.status, await response.text()) == (502, "engine says 502")
    assert len(engine.requests) == 2


@pytest.mark.parametrize(("status", "times"), [(500, 2), (502, 4), (400, 1), (429, 1)])
async def test_a_failure_that_a_retry_cannot_fix_is_not_retried(
    stack, replica, client, status, times, monkeypatch
):
    monkeypatch.setattr(attempts, "RETRY_PAUSE_S", 0.001)
    engine, address = await started(stack, status)
    replica.publish("w", address)
    response = await client.post(TRANSCRIPTIONS, data=form_of(*SPEECH))
    assert (response.status, len(engine.requests)) == (status, times)


async def test_unreachable_engines_are_a_bad_gateway(stack, replica, client, monkeypatch):
    monkeypatch.setattr(attempts, "RETRY_PAUSE_S", 0.001)
    replica.publish("w", "127.0.0.1:1")
    response = await client.post(TRANSCRIPTIONS, data=form_of(*SPEECH))
    assert response.status == 502
    assert (await error_of(response))["code"] == "bad_gateway"
    assert (replica.in_flight(), replica.active()) == (0, 0)


async def never(request):
    await asyncio.Event().wait()


async def test_an_engine_that_never_responds_is_a_timeout(stack):
    replica = Replica(first_byte_timeout_s=0.5)  # long enough for the request to reach the engine
    client = await client_of(stack, replica)
    engine, address = await started(stack, never)
    replica.publish("w", address)
    response = await client.post(TRANSCRIPTIONS, data=form_of(*SPEECH))
    assert response.status == 504
    await until(lambda: engine.left == 1)
    assert (len(engine.requests), replica.in_flight()) == (1, 0)


async def test_a_client_disconnect_ends_the_attempt(stack, replica, client):
    engine, address = await started(stack, never)
    replica.publish("w", address)
    asking = asyncio.create_task(client.post(TRANSCRIPTIONS, data=form_of(*SPEECH)))
    await until(lambda: engine.requests)
    assert replica.in_flight() == 1
    asking.cancel()
    await until(lambda: engine.left == 1 and replica.in_flight() == replica.active() == 0)


@pytest.mark.parametrize("length", [None, 100])
async def test_a_truncated_response_never_looks_complete(stack, replica, client, length):
    async def half(request):
        response = web.StreamResponse()
        response.content_length = length
        await response.prepare(request)
        await response.write(b"half")
        request.transport.abort()
        return response

    engine, address = await started(stack, half)
    replica.publish("w", address)
    with pytest.raises((aiohttp.ClientPayloadError, aiohttp.ServerDisconnectedError, OSError)):
        async with client.post(TRANSCRIPTIONS, data=form_of(*SPEECH)) as response:
            await response.read()
    assert len(engine.requests) == 1
    await until(lambda: replica.in_flight() == replica.active() == 0)


async def test_an_engine_that_stalls_in_its_response_is_disconnected(stack, caplog):
    replica = Replica(between_bytes_timeout_s=0.05)
    client = await client_of(stack, replica)

    async def stall(request):
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"half")
        return await never(request)

    engine, address = await started(stack, stall)
    replica.publish("w", address)
    async with client.post(TRANSCRIPTIONS, data=form_of(*SPEECH)) as response:
        assert response.status == 200
        with pytest.raises((aiohttp.ClientPayloadError, OSError)):
            await response.read()
    await until(lambda: engine.left == 1 and replica.active() == 0)
    assert not caplog.records, "not an error of the gateway"


async def test_no_file_is_left_on_disk(stack, replica, client, tmp_path, monkeypatch):
    monkeypatch.setattr(spool.tempfile, "tempdir", str(tmp_path))
    names, spooled = [], []

    def opened():
        targets = []
        for number in os.listdir("/proc/self/fd"):
            with contextlib.suppress(FileNotFoundError):  # the one that listed them
                targets.append(os.readlink(f"/proc/self/fd/{number}"))
        return [target for target in targets if target.startswith(str(tmp_path))]

    async def look(request):
        names.extend(os.listdir(tmp_path))
        spooled.extend(opened())
        await request.read()
        return web.Response()

    _, address = await started(stack, look)
    replica.publish("w", address)
    form = form_of(("file", b"x" * (3 << 20)), ("model", "w"))
    assert (await client.post(TRANSCRIPTIONS, data=form)).status == 200
    assert names == []
    assert len(spooled) == 1, "it has no name"
    await until(lambda: not opened())
