"""Random response bytes in random pieces, ending at any point.

When the client has what h11 calls a whole answer of the engine's, then h11 calls what the engine
sent whole too, and it is the same answer. An answer that was cut never looks complete.
"""

import asyncio

import pytest
from fuzz.machine import CORPUS, EXAMPLES, End, Machine, corpus, read_answer, read_requests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

STORED = corpus("answers")
OWN = b"Content-Type: application/json\r\n"  # the relay's own answers have it; engines here do not

PARTS = [
    b"HTTP/1.1 200 OK\r\n",
    b"HTTP/1.1 200 OK\r\n",
    b"HTTP/1.0 200 OK\r\n",
    b"HTTP/1.1 404 \r\n",
    b"HTTP/1.1 204 No Content\r\n",
    b"HTTP/1.1 304 Not Modified\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\n",
    b"HTTP/1.1 500 Oh\r\n",
    b"Content-Length: 5\r\n",
    b"Content-Length: 0\r\n",
    b"Content-Length: 70000\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"Transfer-Encoding: gzip\r\n",
    b"Connection: close\r\n",
    b"Connection: keep-alive\r\n",
    b"Connection: X\r\nX: y\r\n",
    b"Keep-Alive: timeout=5\r\n",
    b"\r\n",
    b"\r\n",
    b"hello",
    b"5\r\nhello\r\n",
    b"5;a=b\r\nhello\r\n",
    b"0\r\n",
    b"0\r\n\r\n",
    b"0\r\nX: y\r\n\r\n",
    b"h" * 70000,
    b"\n",
    b"\0",
    b"zz\r\n",
]
CLIENTS = {
    "1.1": b"POST /openai/v1/completions HTTP/1.1\r\nHost: h\r\n",
    "1.0": b"POST /openai/v1/completions HTTP/1.0\r\n",
    "1.0, kept": b"POST /openai/v1/completions HTTP/1.0\r\nConnection: keep-alive\r\n",
    "closing": b"POST /openai/v1/completions HTTP/1.1\r\nHost: h\r\nConnection: close\r\n",
    "upload": (
        b"POST /openai/v1/audio/transcriptions HTTP/1.1\r\nHost: h\r\n"
        b"Content-Type: multipart/form-data; boundary=b\r\n"
    ),
    "local": b"POST /openai/v1/unknown HTTP/1.1\r\nHost: h\r\n",
    "HEAD": b"HEAD /openai/v1/models HTTP/1.1\r\nHost: h\r\n",
}
BODY = b'{"model":"m"}'
FORM = b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nm\r\n--b--\r\n'
ENDS = ["stay", "fin", "rst", "client"]  # of the engine's connection; the client's comes after


@st.composite
def cut_or_changed(draw: st.DrawFn, stream: bytes) -> bytes:
    if draw(st.booleans()):
        return stream[: draw(st.integers(0, len(stream)))]
    at = draw(st.integers(0, len(stream)))
    gone = draw(st.integers(0, 3))
    return stream[:at] + draw(st.sampled_from([b"", *PARTS])) + stream[at + gone :]


answers = st.one_of(
    st.sampled_from(STORED).flatmap(cut_or_changed),
    st.lists(st.sampled_from(PARTS), max_size=8).map(b"".join),
)
cuts = st.one_of(st.just([]), st.lists(st.integers(1, 60), max_size=30))


async def judge(kind: str, stream: bytes, sizes: list[int], end: str) -> None:
    asked: list[End] = []

    def engine_wrote(engine: End) -> None:
        if len(read_requests(engine.sent).messages) > len(asked):
            asked.append(engine)

    async with Machine(answers=engine_wrote) as machine:
        client = machine.client()
        request = CLIENTS[kind]
        body = FORM if kind == "upload" else BODY
        if kind != "HEAD":
            request += b"Content-Length: %d\r\n\r\n" % len(body) + body
        else:
            request += b"\r\n"
        client.receive(request)
        await machine.turn()
        assert len(asked) == 1
        (engine,) = asked
        sent = b""
        for size in [*sizes, len(stream)]:
            piece, stream = stream[:size], stream[size:]
            if piece and not engine.closed:
                engine.receive(piece)
                sent += piece
                await machine.turn()
        if end in ("fin", "rst"):
            engine.receive_end(reset=end == "rst")
            await machine.turn()
        judge_answer(kind, client, sent, engine_ended=end == "fin")
        client.receive_end(reset=end == "client")
        await machine.turn()
        assert engine.closed or engine.protocol.usable(), "it is closed, or kept"


def judge_answer(kind: str, client: End, sent: bytes, engine_ended: bool) -> None:
    method = CLIENTS[kind].split()[0].decode()
    tidy = client.finished and not client.was_reset
    broken = read_answer(client.sent, False, method).error
    assert not broken or client.closed, (broken, client.sent)
    got = read_answer(client.sent, tidy, method)
    if not got.messages:
        return
    status, headers, body = got.messages[0]
    names = [name for name, _ in headers]
    assert names.count(b"content-length") + names.count(b"transfer-encoding") <= 1
    if OWN in client.sent:
        assert status in (502, 504)
        return
    assert "1.0" not in kind or b"transfer-encoding" not in names
    assert not {b"keep-alive", b"upgrade", b"x"} & set(names) or b"\nConnection: X\r" not in sent
    reference = read_answer(sent, engine_ended, method)
    assert not reference.error, f"{reference.error}: yet it was passed on as whole"
    assert reference.messages, "it was not whole"
    assert (status, body) == (reference.messages[0][0], reference.messages[0][2])


LOOP = asyncio.new_event_loop()


@pytest.mark.timeout(0)
@settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None
)
@given(st.sampled_from(sorted(CLIENTS)), answers, cuts, st.sampled_from(ENDS))
def test_complete_client_answers_equal_complete_engine_answers(kind, stream, sizes, end):
    LOOP.run_until_complete(judge(kind, stream, sizes, end))


@pytest.mark.parametrize("name", sorted(path.name for path in (CORPUS / "answers").iterdir()))
@pytest.mark.parametrize("kind", CLIENTS)
def test_stored_answers_are_whole_or_cut(name, kind):
    stream = (CORPUS / "answers" / name).read_bytes()
    for end in ENDS:
        for piece in (1, 1 << 20):
            sizes = [piece] * (len(stream) // piece)
            LOOP.run_until_complete(judge(kind, stream, sizes, end))
