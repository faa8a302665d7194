"""Audio transcriptions through the relay: what reaches the engine, and what is rejected."""

import asyncio
import errno
import io
import os

import pytest
from aiohttp import web
from fakes.uploads import SPEECH, TRANSCRIPTIONS, Replica, client_of, error_of, form_of, started
from fakes.wire import until

from kubeai.gateway.uploads import spool
from kubeai.routing.routes import Endpoint


async def test_the_model_part_is_omitted_for_fasterwhisper(stack, replica, client):
    engine, address = await started(stack, 200)
    replica.publish("w", address)
    response = await client.post(TRANSCRIPTIONS, data=form_of(*SPEECH))
    assert (response.status, await response.text()) == (200, "engine says 200")
    assert await engine.form() == [
        ("file", "a.wav", b"RIFF\0\r\n--x"),
        ("language", None, b"de"),
    ]
    request, data = engine.requests[0]
    assert request.path == "/v1/audio/transcriptions"
    assert request.headers["Content-Length"] == str(len(data))
    assert replica.in_flight() == replica.active() == 0


async def test_speaches_gets_its_own_name_of_the_model(stack, replica, client):
    engine, address = await started(stack, 200)
    replica.publish("w", address, form_model="Systran/faster-whisper-small")
    form = form_of(("model", "w"), ("file", io.BytesIO(b"RIFF")))
    assert (await client.post(TRANSCRIPTIONS, data=form)).status == 200
    names = [content for name, _, content in await engine.form() if name == "model"]
    assert names == [b"Systran/faster-whisper-small"]


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize(("asked", "sent"), [("w", b"w"), ("w_fin", b"fin")])
async def test_other_engines_receive_the_model_name_that_they_serve(
    stack, replica, client, at, asked, sent
):
    engine, address = await started(stack, 200)
    replica.publish(
        "w", engine="VLLM", adapters=("fin",), endpoints=(Endpoint("w-0", address, ("fin",)),)
    )
    parts = [("file", b"RIFF"), ("language", "de")]
    parts.insert(at, ("model", asked))
    assert (await client.post(TRANSCRIPTIONS, data=form_of(*parts))).status == 200
    expected = [("file", "a.wav", b"RIFF"), ("language", None, b"de")]
    expected.insert(at, ("model", None, sent))
    assert await engine.form() == expected


ODD_FORMS = {
    "a line end before the first boundary": '\r\n--b\r\n{field}model"\r\n\r\nw_fin\r\n--b--\r\n',
    "text before the first boundary": 'Hi.\r\n--b\r\n{field}model"\r\n\r\nw_fin\r\n--b--\r\n',
    "a trailing semicolon": '--b\r\n{field}model";\r\n\r\nw_fin\r\n--b--\r\n',
    "blanks around =": (
        '--b\r\nContent-Disposition: form-data; name = "model"\r\n\r\nw_fin\r\n--b--\r\n'
    ),
    "no line end after the last boundary": '--b\r\n{field}model"\r\n\r\nw_fin\r\n--b--',
    "text after the last boundary": '--b\r\n{field}model"\r\n\r\nw_fin\r\n--b--\r\nBye.',
    "a name with %": (
        '--b\r\n{field}100%"\r\n\r\nx\r\n--b\r\n{field}model"\r\n\r\nw_fin\r\n--b--\r\n'
    ),
    "an empty name": ('--b\r\n{field}"\r\n\r\nx\r\n--b\r\n{field}model"\r\n\r\nw_fin\r\n--b--\r\n'),
    "a model that came as a file": ('--b\r\n{field}model"; filename="m"\r\n\r\nw_fin\r\n--b--\r\n'),
}


@pytest.mark.parametrize("boundary", ["b", "a$b", "x{y}"])
@pytest.mark.parametrize("odd", ODD_FORMS.values(), ids=ODD_FORMS)
async def test_odd_forms_reach_the_engine_in_order(stack, replica, client, odd, boundary):
    engine, address = await started(stack, 200)
    endpoints = (Endpoint("w-0", address, ("fin",)),)
    replica.publish("w", engine="VLLM", adapters=("fin",), endpoints=endpoints)
    body = odd.replace("{field}", 'Content-Disposition: form-data; name="')
    body = body.replace("--b", f"--{boundary}").encode()
    content_type = f"multipart/form-data; boundary={boundary}"
    async with client.post(TRANSCRIPTIONS, **raw(body, content_type)) as response:
        assert response.status == 200, await response.text()
    parts = await engine.form()
    assert [part for part in parts if part[0] == "model"] == [("model", None, b"fin")]
    assert [content for name, _, content in parts if name != "model"] in ([], [b"x"])
    request, data = engine.requests[0]
    assert f"--{boundary}".encode() not in data
    assert request.headers["Content-Length"] == str(len(data))


async def test_a_form_with_two_content_types_is_rejected(client):
    headers = [("Content-Type", f"multipart/form-data; boundary={b}") for b in "ab"]
    async with client.post(TRANSCRIPTIONS, data=b"--a--\r\n", headers=headers) as response:
        assert response.status == 400


@pytest.mark.parametrize("model_first", [True, False])
async def test_a_large_file_is_spooled_and_arrives_complete(
    stack, replica, client, model_first, monkeypatch
):
    spooled = []
    spill = spool.SpooledForm._spill

    async def watched(form):
        spooled.append(len(form._memory))
        await spill(form)

    monkeypatch.setattr(spool.SpooledForm, "_spill", watched)
    engine, address = await started(stack, 503, 200)
    replica.publish("w", address)
    sound = os.urandom(5 << 20) + b"\r\n--"
    parts = [("file", io.BytesIO(sound)), ("model", "w")]
    form = form_of(*parts[:: -1 if model_first else 1])
    assert (await client.post(TRANSCRIPTIONS, data=form)).status == 200
    assert [await engine.form(n) for n in (0, 1)] == [[("file", "a.wav", sound)]] * 2
    assert len(spooled) >= 3
    assert max(spooled) <= spool.SPOOL_MEMORY_MAX_BYTES + (1 << 20)


async def test_end_to_end_headers_and_the_query_are_forwarded(stack, replica, client):
    engine, address = await started(stack, 200)
    replica.publish("w", address)
    headers = {"Authorization": "Bearer x", "X-Drop": "1", "Connection": "x-drop", "TE": "gzip"}
    await client.post(TRANSCRIPTIONS + "?a=%20b&c", data=form_of(*SPEECH), headers=headers)
    request, _ = engine.requests[0]
    assert request.raw_path == "/v1/audio/transcriptions?a=%20b&c"
    assert request.headers["Authorization"] == "Bearer x"
    assert request.headers["Host"] == address
    assert not {"X-Drop", "TE", "Transfer-Encoding"} & set(request.headers)


async def test_a_response_is_streamed_with_its_own_headers(stack, replica, client):
    more = asyncio.Event()

    async def events(request):
        response = web.StreamResponse(status=201, headers={"X-Engine": "1", "Keep-Alive": "5"})
        response.content_type = "text/event-stream"
        await response.prepare(request)
        await response.write(b"data: 1\n\n")
        await more.wait()
        await response.write(b"data: 2\n\n")
        return response

    _, address = await started(stack, events)
    replica.publish("w", address)
    async with client.post(TRANSCRIPTIONS, data=form_of(*SPEECH)) as response:
        assert (response.status, response.headers["X-Engine"]) == (201, "1")
        assert response.content_type == "text/event-stream"
        assert "Keep-Alive" not in response.headers
        assert await response.content.readany() == b"data: 1\n\n"
        assert (replica.in_flight(), replica.active()) == (1, 1)
        more.set()
        assert await response.read() == b"data: 2\n\n"
    await until(lambda: replica.in_flight() == replica.active() == 0)


def raw(body, content_type="multipart/form-data; boundary=b"):
    return {"data": body, "headers": {"Content-Type": content_type}}


@pytest.mark.parametrize(
    ("request_", "status", "param", "says"),
    [
        ({"json": {"model": "w"}}, 400, None, "multipart/form-data"),
        (raw(b"--b--\r\n", "multipart/form-data"), 400, None, "boundary"),
        (raw(b"no form"), 400, None, "before the first part"),
        (raw(b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\nx'),
         400, "file", "part 1"),
        (raw(b"--b\r\nX: y\r\n\r\nx\r\n--b--\r\n"), 400, None, "part 1"),
        ({"data": form_of(("file", b"x"))}, 400, "model", "model"),
        ({"data": form_of(("model", "w"), ("model", "w"))}, 400, "model", "several"),
        ({"data": form_of(("model", ""))}, 400, "model", "model"),
        ({"data": form_of(("model", b"\xff"))}, 400, "model", "UTF-8"),
        ({"data": form_of(("model", "w" * 2000))}, 400, "model", "1024"),
        ({"data": form_of(("model", "none"))}, 404, "model", "none"),
        ({"data": form_of(("model", "w_none"))}, 404, "model", "w_none"),
    ],
)  # fmt: skip
async def test_a_bad_form_is_rejected_with_the_position(
    stack, replica, client, request_, status, param, says
):
    engine, address = await started(stack, 200)
    replica.publish("w", address)
    response = await client.post(TRANSCRIPTIONS, **request_)
    assert response.status == status
    error = await error_of(response)
    assert error["param"] == param
    assert says in error["message"]
    assert not engine.requests


async def test_a_form_over_the_limit_is_rejected(stack):
    replica = Replica(multipart_max_bytes=10_000)
    client = await client_of(stack, replica)
    engine, address = await started(stack, 200)
    replica.publish("w", address)

    async def chunks():
        yield b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\n'
        for _ in range(100):
            yield b"x" * 1000

    for data in (b"x" * 10_001, chunks()):
        async with client.post(TRANSCRIPTIONS, **raw(data)) as response:
            assert response.status == 413
            assert "10000" in (await error_of(response))["message"]
    async with client.post(TRANSCRIPTIONS, data=form_of(("model", "w"))) as response:
        assert response.status == 200
    assert len(engine.requests) == 1


async def test_all_forms_of_a_worker_share_the_spool_limit(stack):
    replica = Replica(multipart_max_bytes=10_000, spool_max_bytes=10_000)
    client = await client_of(stack, replica)
    _, address = await started(stack, 200)
    replica.publish("w")
    sound = ("file", b"x" * 6_000), ("model", "w")
    first = asyncio.create_task(client.post(TRANSCRIPTIONS, data=form_of(*sound)))
    await until(lambda: replica.held() == 1)

    async def chunks():  # of unknown length
        yield b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\n'
        yield b"x" * 6_000

    for form in ({"data": form_of(*sound)}, raw(chunks())):
        response = await client.post(TRANSCRIPTIONS, **form)
        assert (response.status, response.headers["Retry-After"]) == (503, "5")
        assert (await error_of(response))["code"] == "overloaded"
    replica.publish("w", address)
    assert (await first).status == 200
    assert (await client.post(TRANSCRIPTIONS, data=form_of(*sound))).status == 200
    assert replica.context.spooled_bytes == 0


async def test_a_full_disk_is_a_server_error(stack, replica, client, monkeypatch):
    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(spool.tempfile, "TemporaryFile", full)
    replica.publish("w")
    form = form_of(("file", b"x" * (3 << 20)), ("model", "w"))
    response = await client.post(TRANSCRIPTIONS, data=form)
    assert (response.status, response.headers["Retry-After"]) == (503, "5")
    assert replica.context.spooled_bytes == 0


async def test_an_incomplete_form_times_out(stack):
    replica = Replica(body_timeout_s=0.05)
    client = await client_of(stack, replica)
    more = asyncio.Event()

    async def chunks():
        yield b"--b\r\n"
        await more.wait()

    async with client.post(TRANSCRIPTIONS, **raw(chunks())) as response:
        assert response.status == 408
    more.set()


@pytest.mark.parametrize("codings", [["gzip"], ["identity", "br"], ["identity, gzip"]])
async def test_a_compressed_form_is_rejected(client, codings):
    headers = [("Content-Type", "multipart/form-data; boundary=b")]
    headers += [("Content-Encoding", coding) for coding in codings]
    async with client.post(TRANSCRIPTIONS, data=b"--b--\r\n", headers=headers) as response:
        assert (response.status, response.headers["Accept-Encoding"]) == (415, "identity")


@pytest.mark.parametrize("codings", [["Identity"], [""], ["identity, identity", "IDENTITY"]])
async def test_a_form_with_identity_encoding_is_forwarded(stack, replica, client, codings):
    engine, address = await started(stack, 200)
    replica.publish("w", address)
    form = form_of(*SPEECH)()
    headers = [("Content-Encoding", coding) for coding in codings]
    headers.append(("Content-Type", form.content_type))
    async with client.post(TRANSCRIPTIONS, data=form, headers=headers) as response:
        assert response.status == 200
    request, _ = engine.requests[0]
    assert "Content-Encoding" not in request.headers
