"""The client of `kubeai bench` against well-behaved and misbehaving servers."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import uvloop
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from harness import until

from kubeai.loadtest.client import Address, Client, EndpointError
from kubeai.loadtest.sse import Reader
from kubeai.local import certificates

LOOP_FACTORIES = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
WHOLE = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX-Who: a\r\n\r\n{}"
HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENT = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'
DONE = b"data: [DONE]\n\n"
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter, int], Awaitable[None]]


def chunked(*pieces: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)


@contextlib.asynccontextmanager
async def served(
    serve: Serve, *, timeout_s: float = 5.0, tls: ssl.SSLContext | None = None
) -> AsyncIterator[Client]:
    """Run ``serve(reader, writer, number)`` for each connection; closes them on return."""
    tasks, numbers = set(), iter(range(1000))

    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.current_task())
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await serve(reader, writer, next(numbers))
        writer.close()

    server = await asyncio.start_server(one, "127.0.0.1", 0, ssl=tls)
    port = server.sockets[0].getsockname()[1]
    client = Client(
        Address(f"https://localhost:{port}/v1" if tls else f"http://127.0.0.1:{port}/v1"),
        [("X-Label-Selector", "a=b")],
        timeout_s=timeout_s,
        endpoint_header="X-Who",
    )
    try:
        await client.resolve()
        yield client
        assert not client.readers
    finally:
        client.close()
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def request(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    return head + await reader.readexactly(2)


def answering(answer: bytes) -> Serve:
    """Send the same bytes in response to every request."""

    async def serve(reader, writer, _number):
        while True:
            await request(reader)
            writer.write(answer)

    return serve


def once(answer: bytes) -> Serve:
    """Send one response and close the connection."""

    async def serve(reader, writer, _number):
        await request(reader)
        writer.write(answer)

    return serve


async def ask(client: Client, reader: Reader | None = None):
    return await client.send(client.request("POST", "/x", b"{}"), reader)


async def test_a_request_and_its_response():
    seen = []

    async def serve(reader, writer, _number):
        seen.append(await request(reader))
        writer.write(WHOLE)
        await reader.read()

    async with served(serve) as client:
        answer = await ask(client)
        assert (answer.status, answer.error, answer.body) == (200, "", b"{}")
        assert answer.endpoint == "a"
    line, *rest = seen[0].split(b"\r\n")
    assert line == b"POST /v1/x HTTP/1.1"
    assert {b"X-Label-Selector: a=b", b"Content-Length: 2", b"{}"} <= set(rest)


async def test_connections_are_reused_with_one_request_at_a_time():
    async with served(answering(WHOLE)) as client:
        for _ in range(3):
            assert not (await ask(client)).error
        assert len(client.open) == 1
        answers = await asyncio.gather(*(ask(client) for _ in range(8)))
        assert [answer.error for answer in answers] == [""] * 8
        assert len(client.open) == len(client.idle) == 8
        # Requests that end free their connection for others at once.
        answers = await asyncio.gather(*(ask(client) for _ in range(40)))
        assert [answer.error for answer in answers] == [""] * 40


async def test_a_stream_is_read_in_pieces():
    async with served(answering(HEAD + chunked(EVENT, EVENT[:9], EVENT[9:], DONE, b""))) as client:
        for _ in range(2):
            reader = Reader(keep=True)
            answer = await ask(client, reader)
            assert (answer.error, len(reader.times_s), reader.text) == ("", 2, "aa")
        assert len(client.open) == 1


@pytest.mark.parametrize(
    "answer",
    [
        HEAD + chunked(EVENT),
        HEAD + chunked(EVENT, b""),
        HEAD + chunked(EVENT, b'data: {"error":{"message":"no"}}\n\n', DONE, b""),
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n{}",
    ],
    ids=["no-end", "not-done", "an-error", "too-short"],
)
async def test_a_response_that_ends_early_is_truncated(answer):
    async with served(once(answer)) as client:
        assert (await ask(client, Reader())).error == "cut"


@pytest.mark.parametrize(
    "answer",
    [
        HEAD + chunked(EVENT, DONE),
        b"HTTP/1.0 200 OK\r\n\r\n" + EVENT + DONE,
        b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + EVENT + DONE,
    ],
    ids=["chunks-without-an-end", "http-1.0", "connection-close"],
)
async def test_a_stream_that_sent_done_may_end_with_its_connection(answer):
    async with served(once(answer)) as client:
        reader = Reader()
        assert ((await ask(client, reader)).error, len(reader.times_s)) == ("", 1)
        assert not client.idle


async def test_a_failure_has_its_status_and_message():
    body = b'{"error": {"message": "busy"}}'
    head = b"HTTP/1.1 503 Unavailable\r\nContent-Length: %d\r\n\r\n" % len(body)
    async with served(answering(head + body)) as client:
        answer = await ask(client, Reader())
        assert (answer.status, answer.error, answer.error_message) == (
            503,
            "status 503",
            body.decode(),
        )
        assert (await ask(client, Reader())).error == "status 503"
        assert len(client.open) == 1


async def test_a_connection_closed_by_the_server_is_replaced():
    async with served(once(WHOLE)) as client:
        # `find` opened the first, which serves one request; the client may not know that it closed.
        for _ in range(5):
            assert (await ask(client)).error == ""


async def test_a_server_that_closes_every_connection_is_an_error():
    async def serve(reader, writer, _number):
        await request(reader)

    async with served(serve) as client:
        assert (await ask(client)).error == "connection: lost"


async def test_a_response_that_is_not_http_is_an_error():
    async with served(answering(b"SSH-2.0-x\r\n")) as client:
        assert (await ask(client)).error.startswith("not HTTP")
        assert not client.idle


async def test_a_slow_response_times_out():
    left = asyncio.Event()

    async def serve(reader, writer, _number):
        await request(reader)
        writer.write(HEAD + chunked(EVENT))
        await reader.read()
        left.set()

    async with served(serve, timeout_s=1.0) as client:
        reader = Reader()
        answer = await ask(client, reader)
        assert (answer.error, len(reader.times_s)) == ("timeout", 1)
        async with asyncio.timeout(5):
            await left.wait()


@pytest.mark.parametrize("after", [b"", chunked(EVENT, EVENT)], ids=["head", "events"])
async def test_malformed_http_in_a_stream_is_an_error(after):
    async with served(once(HEAD + after + b"no chunk")) as client:
        assert (await ask(client, Reader())).error.startswith("not HTTP: ")
        assert not client.idle


async def test_a_reset_stream_is_truncated():
    seen = asyncio.Event()

    async def serve(reader, writer, _number):
        await request(reader)
        writer.write(HEAD + chunked(EVENT, EVENT))
        await seen.wait()
        linger = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.transport.abort()

    async with served(serve) as client:
        reader = Reader()
        task = asyncio.create_task(ask(client, reader))
        await until("two events are read", lambda: reader.tokens == 2)
        seen.set()
        assert (await task).error == "cut"
        assert not client.open


async def test_a_cancelled_request_closes_its_connection():
    got, left = asyncio.Event(), asyncio.Event()

    async def serve(reader, writer, _number):
        await request(reader)
        got.set()
        with contextlib.suppress(ConnectionError):
            await reader.read()
        left.set()

    async with served(serve) as client:
        task = asyncio.create_task(ask(client, Reader()))
        async with asyncio.timeout(5):
            await got.wait()
            task.cancel()
            await left.wait()
        with pytest.raises(asyncio.CancelledError):
            await task


@pytest.fixture
def tls(tmp_path) -> ssl.SSLContext:
    """The TLS context of a server at localhost; its self-signed certificate is in server.crt."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = certificates.name("localhost")
    certificate = (
        certificates.builder(subject, subject, key.public_key())
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    certificates.write_private(tmp_path / "server.key", certificates.pem_of(key))
    (tmp_path / "server.crt").write_bytes(certificate.public_bytes(Encoding.PEM))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tmp_path / "server.crt", tmp_path / "server.key")
    return context


async def test_tls_works_with_a_certificate_that_the_machine_trusts(tls, tmp_path, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "server.crt"))
    async with served(answering(HEAD + chunked(EVENT, EVENT, DONE, b"")), tls=tls) as client:
        for _ in range(2):
            reader = Reader()
            assert ((await ask(client, reader)).error, len(reader.times_s)) == ("", 2)
        assert len(client.open) == 1


async def test_an_untrusted_certificate_is_an_error(tls):
    with pytest.raises(EndpointError, match=r"localhost:\d+/v1: certificate: self"):
        async with served(answering(WHOLE), tls=tls):
            raise AssertionError("it connected")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("127.0.0.1:80/v1", "must be http://host:port/path"),
        ("ftp://x/v1", "must be http://host:port/path"),
        ("http://x:99999/v1", "ort"),
        ("http://me:secret@x/v1", "must not have a user"),
    ],
)
def test_an_invalid_url_is_rejected(url, said):
    with pytest.raises(EndpointError, match=said) as raised:
        Address(url)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    ("url", "port", "tls", "path"),
    [
        ("http://x", 80, False, ""),
        ("https://x/v1/", 443, True, "/v1"),
        ("http://[::1]:8000/openai/v1", 8000, False, "/openai/v1"),
    ],
)
def test_a_url_is_parsed_into_port_tls_and_path(url, port, tls, path):
    address = Address(url)
    assert (address.port, address.tls, address.path) == (port, tls, path)
