"""How a form travels: in pieces from the client, under flow control to the engine."""

import asyncio
import json

import pytest
import uvloop
from fakes.wire import Engine, Message, Wire, answer, chunk, post, says, until

from kubeai.gateway.access_log import AccessLog, Observers
from kubeai.gateway.uploads import spool

LOOP_FACTORIES = {"uvloop": uvloop.new_event_loop}  # the event loop of the workers
PATH = "/openai/v1/audio/transcriptions"
MULTIPART = "Content-Type: multipart/form-data; boundary=b"
LARGE_BYTES = 16 << 20  # more than the buffers of two loopback connections


def form(content: bytes) -> bytes:
    return (
        b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nw\r\n'
        b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\n' + content + b"\r\n--b--\r\n"
    )


def in_chunks(*chunks: bytes) -> bytes:
    head = f"POST {PATH} HTTP/1.1\r\nHost: h\r\n{MULTIPART}\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head.encode() + b"".join(map(chunk, chunks))


ASK = post(PATH, form(b"RIFF"), MULTIPART)


class HeadReader(Engine):
    """An engine whose script is called once the head of a request has been read."""

    read_request = staticmethod(Wire.head)


# -- from the client -------------------------------------------------------------------------------


async def test_the_next_request_may_follow_a_form_on_the_same_connection(start):
    world = await start()
    engine = await world.engine(says(b"good"))
    world.route("w", {"a": engine})
    wire = await world.client()
    body = form(b"RIFF")
    await wire.send(in_chunks(body[:7], body[7:]), b"0\r\n\r\n", ASK, ASK)
    for _ in range(3):
        assert (await wire.answer()).body == b"good"
    first, second, _ = engine.requests
    assert len(first.body) == len(second.body)
    assert first.one("transfer-encoding") is None
    assert first.one("content-length") == str(len(first.body))
    assert engine.connections == 1


async def test_a_client_that_expects_it_is_told_to_continue(start):
    world = await start()
    world.route("w", {"a": await world.engine(says(b"good"))})
    wire = await world.client()
    head, _, body = post(PATH, form(b"RIFF"), MULTIPART, "Expect: 100-continue").partition(
        b"\r\n\r\n"
    )
    await wire.send(head + b"\r\n\r\n")
    assert (await wire.answer()).status == 100
    await wire.send(body)
    assert (await wire.answer()).body == b"good"


async def test_malformed_chunks_are_rejected(start):
    world = await start()
    wire = await world.client()
    await wire.send(in_chunks(form(b"RIFF")[:9]), b"nonsense\r\n")
    assert (await wire.answer()).status == 400
    assert world.context.spooled_bytes == 0


@pytest.mark.parametrize("content_bytes", [10, 2 * spool.SPOOL_MEMORY_MAX_BYTES])
async def test_a_client_that_leaves_within_its_form_leaves_nothing_behind(start, content_bytes):
    world = await start()
    wire = await world.client()
    await wire.send(post(PATH, form(b"x" * content_bytes), MULTIPART)[:-9])
    await until(lambda: world.context.spooled_bytes >= content_bytes)
    wire.reset()
    await world.at_rest()
    assert world.context.spooled_bytes == 0


async def test_an_upload_is_observed_like_any_other_request(start):
    written = []
    log = AccessLog(1.0, written.append)
    world = await start(observers=Observers(log, None))
    world.route("w", {"a": await world.engine(says(b"good"))})
    wire = await world.client()
    await wire.send(ASK)
    await wire.answer()
    await world.at_rest()
    log.close()
    line = json.loads(b"".join(written))
    assert (line["model"], line["endpoint"], line["status"]) == ("w", "a", 200)
    assert line["request_bytes"] == len(form(b"RIFF"))


# -- to the engine ---------------------------------------------------------------------------------


async def test_a_form_on_a_stale_connection_is_replayed_from_its_beginning(start):
    """The engine's close crosses the request in transit."""
    used: set[Wire] = set()

    async def script(wire: Wire, request: Message) -> None:
        if wire in used:
            wire.close()
        else:
            used.add(wire)
            await wire.send(answer(200, b"good"))

    world = await start(retries=0)
    engine = await world.engine(script)
    world.route("w", {"a": engine})
    wire = await world.client()
    content = b"x" * (2 * spool.SPOOL_MEMORY_MAX_BYTES)
    await wire.send(ASK)
    assert (await wire.answer()).body == b"good"
    await wire.send(post(PATH, form(content), MULTIPART))
    assert (await wire.answer()).body == b"good"
    _, lost, replayed = engine.requests
    assert lost.body == replayed.body
    assert content in replayed.body


async def test_an_engine_that_reads_slowly_slows_the_reads_from_disk(start, monkeypatch):
    read = []
    pread = spool.os.pread

    def counted(*args):
        read.append(1)
        return pread(*args)

    monkeypatch.setattr(spool.os, "pread", counted)
    world = await start()
    go_on = asyncio.Event()

    async def script(wire: Wire, request: Message) -> None:
        await go_on.wait()
        await wire.body(request)
        await wire.send(answer(200, b"good"))

    engine = HeadReader(script)
    world.route("w", {"a": await world.added(engine)})
    wire = await world.client()
    content = b"x" * LARGE_BYTES
    await wire.send(post(PATH, form(content), MULTIPART))
    await until(lambda: engine.requests)
    await asyncio.sleep(0.1)  # a gateway that did not wait would have read everything by now
    assert len(read) < LARGE_BYTES // spool.READ_BYTES
    go_on.set()
    assert (await wire.answer()).body == b"good"
    assert content in engine.requests[0].body


@pytest.mark.parametrize("status", [413, 503])
async def test_a_connection_with_half_a_form_on_it_is_not_used_again(start, status):
    async def script(wire: Wire, request: Message) -> None:
        await wire.send(answer(status, b"no"))
        await wire.reader.read()

    world = await start(retries=0 if status == 413 else 1)
    hasty = HeadReader(script)
    world.route("w", {"a": await world.added(hasty)})
    wire = await world.client()
    await wire.send(post(PATH, form(b"x" * LARGE_BYTES), MULTIPART))
    answered = await wire.answer()
    assert (answered.status, answered.body) == (status, b"no")
    assert hasty.connections == len(hasty.requests) == (1 if status == 413 else 2)
    await until(lambda: not hasty.open, "the connections are closed")


async def test_the_engine_has_its_time_once_it_has_the_whole_form(start):
    """``firstByteTimeout`` begins again with each piece that is sent."""
    # Three times what the buffers hold: the gateway has nothing to send for the last third only.
    pieces_count, pause_s, form_bytes = 12, 0.25, 2 * LARGE_BYTES

    async def script(wire: Wire, request: Message) -> None:
        left = int(request.one("content-length"))
        for _ in range(pieces_count):
            await asyncio.sleep(pause_s)
            piece_bytes = min(left, form_bytes // pieces_count)
            await wire.reader.readexactly(piece_bytes)
            left -= piece_bytes
        await wire.reader.readexactly(left)
        await wire.send(answer(200, b"good"))

    world = await start(first_byte_timeout_s=pieces_count * pause_s * 0.8, retries=0)
    world.route("w", {"a": await world.added(HeadReader(script))})
    wire = await world.client()
    await wire.send(post(PATH, form(b"x" * form_bytes), MULTIPART))
    assert (await wire.answer()).body == b"good"


async def test_a_disk_that_fails_is_no_fault_of_the_engine(start, monkeypatch):
    def fail(*_):
        raise OSError(5, "Input/output error")

    world = await start(eject_after_failures=1)
    monkeypatch.setattr(spool.os, "pread", fail)
    world.route("w", {"a": await world.engine(says(b"good"))})
    errors = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
    wire = await world.client()
    await wire.send(post(PATH, form(b"x" * (2 * spool.SPOOL_MEMORY_MAX_BYTES)), MULTIPART))
    assert (await wire.answer()).status == 500
    assert world.ejected("w") == set()
    assert world.outcomes("w")["5xx"] == 1
    assert [str(error["exception"]) for error in errors] == ["[Errno 5] Input/output error"]
