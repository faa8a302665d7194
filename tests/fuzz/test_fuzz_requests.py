"""Random streams of requests, in random pieces: nothing is framed otherwise than h11 frames it.

What the relay takes is what h11 reads from the same bytes, request by request, until one of the
two refuses; what it sends to an engine h11 and llhttp read as just those requests.
"""

import asyncio
import contextlib
import json
import re
from collections.abc import Iterator

import httptools
import pytest
from fuzz.machine import CORPUS, EXAMPLES, End, Machine, corpus, read_requests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from json_oracle import replace_model

from kubeai.openai.errors import ErrorResponse

STORED = corpus("requests")

# -- streams ---------------------------------------------------------------------------------------

JSON_BODIES = [
    b'{"model":"m"}',
    b'{"model":"m_x","stream":true}',
    b'{"prompt":"p","model": "m" }',
    b'{"model":"cold"}',
    b'{"model":"none"}',
    b'{"model":"m","model":"x"}',
    b'{"model":"m"',
    b"GET /evil HTTP/1.1\r\nHost: evil\r\n\r\n",
    b"0\r\n\r\nGET /evil HTTP/1.1\r\nHost: evil\r\n\r\n",
    b"",
]
LINES = [
    b"POST /openai/v1/chat/completions HTTP/1.1",
    b"POST /openai/v1/completions?a=b HTTP/1.1",
    b"POST http://h/openai/v1/embeddings HTTP/1.1",
    b"POST /openai/v1/chat/completions HTTP/1.0",
    b"POST /openai/v1/audio/transcriptions HTTP/1.1",
    b"GET /openai/v1/models HTTP/1.1",
    b"HEAD /openai/v1/models HTTP/1.1",
    b"OPTIONS * HTTP/1.1",
    b"POST /v1/load_lora_adapter HTTP/1.1",
    b"POST /openai/v1/../v1/chat/completions HTTP/1.1",
    b"GET  / HTTP/1.1",
    b"POST /openai/v1/completions HTTP/1.1 ",
    b"POST /openai/v1/completions\tHTTP/1.1",
    b"POST /\xff HTTP/1.1",
]
HEADERS = [
    b"Transfer-Encoding: chunked",
    b"transfer-encoding:chunked",
    b"Transfer-Encoding: \tChunked ",
    b"Transfer-Encoding: identity",
    b"Transfer-Encoding: gzip, chunked",
    b"Transfer-Encoding: chunked, chunked",
    b"Transfer-Encoding: x\x0bchunked",
    b"Transfer-Encoding : chunked",
    b"Transfer_Encoding: chunked",
    b"Transfer-Encoding:",
    b"Content-Length: 0",
    b"Content-Length: 5",
    b"Content-Length: 05",
    b"Content-Length: +5",
    b"Content-Length: 5, 5",
    b"Content-Length: 5 5",
    b"Content-Length: 0x5",
    b"Content-Length: -1",
    b"Content-Length: 99999999999999999999",
    b"Content-Length : 5",
    b"Content-Length:",
    b"Connection: close",
    b"Connection: keep-alive, Content-Length, X",
    b"Connection: Transfer-Encoding",
    b"Connection: upgrade\r\nUpgrade: websocket",
    b"Expect: 100-continue",
    b"Expect: x",
    b"Host: other",
    b"X: y",
    b"X: y\r\n folded",
    b"X: y\nContent-Length: 5",
    b"X: y\rContent-Length: 5",
    b"X:\0",
    b"X\xff: y",
    b"X: \xff",
    b"X:\t y  z \t",
    b"x:y:z",
    b"X:",
    b"Content-Length:\t5 ",
    b"no colon",
    b": no name",
    b" Content-Length: 5",
    b"X-Forwarded-For: 1.2.3.4\r\nX-Forwarded-Proto: https",
    b"X-Label-Selector: a=b",
    b"Content-Encoding: identity",
    b"TE: trailers\r\nTrailer: X",
    b"X: " + b"z" * 3000,
]
BITS = [
    b"\r\n",
    b"\n",
    b"\r",
    b"\0",
    b" ",
    b"\t",
    b":",
    b"0",
    b"5",
    b"\r\n\r\n",
    b";",
    b",",
    b"\xff",
]


@st.composite
def chunked(draw: st.DrawFn, body: bytes) -> bytes:
    out, at = b"", 0
    while at < len(body):
        size = draw(st.integers(1, len(body) - at))
        line = draw(st.sampled_from([b"%x", b"%X", b"0%x", b"%x;a=b", b'%x;a="\r\n"', b"%x ;a"]))
        out += line % size + b"\r\n" + body[at : at + size] + b"\r\n"
        at += size
    end = draw(
        st.sampled_from([b"0\r\n\r\n", b"000\r\nX: y\r\n\r\n", b"0\r\nX: y\n\r\n", b"0\n\n"])
    )
    return out + end


@st.composite
def request(draw: st.DrawFn) -> bytes:
    body = draw(st.sampled_from(JSON_BODIES))
    lines = [draw(st.sampled_from(LINES)), b"Host: h"]
    framing = draw(st.sampled_from(["length", "chunked", "length", "chunked", "none"]))
    if framing == "length":
        lines.append(b"Content-Length: %d" % len(body))
    elif framing == "chunked":
        lines.append(b"Transfer-Encoding: chunked")
        body = draw(chunked(body))
    lines += draw(st.lists(st.sampled_from(HEADERS), max_size=2))
    if draw(st.booleans()):
        lines[1:] = draw(st.permutations(lines[1:]))
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


@st.composite
def mutated(draw: st.DrawFn, stream: bytes) -> bytes:
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(stream)))
        gone = draw(st.integers(0, 3))
        stream = stream[:at] + draw(st.sampled_from([b"", *BITS])) + stream[at + gone :]
    return stream


streams = st.one_of(
    st.lists(request(), min_size=1, max_size=4).map(b"".join),
    st.lists(request(), min_size=1, max_size=3).map(b"".join).flatmap(mutated),
    st.lists(st.sampled_from(STORED), min_size=1, max_size=2).map(b"".join).flatmap(mutated),
    st.binary(max_size=60),
)
cuts = st.one_of(st.just([]), st.lists(st.integers(1, 60), max_size=30))

# -- the property ----------------------------------------------------------------------------------


def pieces_of(stream: bytes, sizes: list[int]) -> list[bytes]:
    pieces = []
    for size in sizes:
        pieces.append(stream[:size])
        stream = stream[size:]
    return [piece for piece in (*pieces, stream) if piece]


class Llhttp:
    """llhttp's view of what an engine gets."""

    def __init__(self, data: bytes) -> None:
        self.messages: list[tuple[str, bytes, bytes]] = []
        self.refused = False
        self.parser = httptools.HttpRequestParser(self)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            self.refused = True

    def on_message_begin(self) -> None:
        self.target = self.body = b""

    def on_url(self, url: bytes) -> None:
        self.target += url

    def on_body(self, data: bytes) -> None:
        self.body += data

    def on_message_complete(self) -> None:
        self.messages.append((self.parser.get_method().decode(), self.target, self.body))


def answer_requests(end: End) -> None:
    """Answer each whole request that an engine has got."""
    done = end.answered
    got = read_requests(end.sent)
    assert not got.error, (got.error, end.sent)
    end.answered = len(got.messages)
    for method, _, _, _ in got.messages[done:]:
        body = b"" if method == "HEAD" else b"{}"
        answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n" + body
        asyncio.get_running_loop().call_soon(end.receive, answer)


async def judge(stream: bytes, sizes: list[int]) -> None:
    async with Machine(answers=answer_requests) as machine:
        client = machine.client()
        for piece in pieces_of(stream, sizes):
            client.receive(piece)
            await machine.turn()
        await machine.turn()
        judge_taken(machine, stream)
        for where, end in machine.engines:
            judge_sent(machine, where, end.sent)
        judge_answered(client.sent)
        client.receive_end(reset=len(stream) % 2 == 0)
        await machine.turn()


def judge_taken(machine: Machine, stream: bytes) -> None:
    reference = read_requests(stream)
    taken = machine.taken
    for ours, (method, target, headers, body) in zip(taken, reference.messages, strict=False):
        assert (ours.method, ours.target.encode("latin-1")) == (method, target)
        assert ours.body is None or ours.body == body
        for name, values in ours.headers.items():
            assert values == end_to_end(headers, name)
    if reference.closed:
        assert len(taken) <= len(reference.messages)
    if not reference.error and any(
        ours.body is not None for ours in taken[len(reference.messages) :]
    ):
        raise AssertionError("a body was taken for whole that is not")


def end_to_end(headers: list[tuple[bytes, bytes]], name: bytes) -> list[bytes]:
    """A header's values, unless it was meant for one hop."""
    tokens = b",".join(value for key, value in headers if key == b"connection").lower().split(b",")
    if name in {token.strip() for token in tokens}:
        return []
    return [value for key, value in headers if key == name]


def judge_sent(machine: Machine, where: str, sent: bytes) -> None:
    got = read_requests(sent)
    assert not got.error
    messages = [(method, target, body) for method, target, _, body in got.messages]
    llhttp = Llhttp(sent)
    assert llhttp.messages == messages[: len(llhttp.messages)]
    # The pages' parser may refuse what is passed on: a Content-Length among the trailers, say.
    assert len(llhttp.messages) == len(messages) or (llhttp.refused and where == "localhost")
    for method, target, headers, body in got.messages:
        names = [name for name, _ in headers]
        assert names.count(b"content-length") + names.count(b"transfer-encoding") <= 1
        assert [v for k, v in headers if k == b"host"] == [where.encode()]
        assert not {b"connection", b"upgrade", b"te", b"expect", b"keep-alive"} & set(names)
        if where == "localhost":  # the pages, which judge for themselves
            continue
        assert method == "POST"
        assert re.fullmatch(rb"/v1/(chat/completions|completions|embeddings)(\?.*)?", target)
        model = json.loads(body)["model"]
        assert model in ("m", "x")
        original = [t.body for t in machine.taken if t.body is not None]
        if model == "m":
            assert body in original
        else:
            assert body in list(adapted(original))


def adapted(bodies: list[bytes]) -> Iterator[bytes]:
    """What an engine gets of the bodies that ask for the adapter; some cannot be read."""
    for body in bodies:
        with contextlib.suppress(ErrorResponse):
            yield replace_model(body, "x")


def judge_answered(sent: bytes) -> None:
    """Every answer has its own beginning; the first is HTTP."""
    assert sent == b"" or sent.startswith(b"HTTP/1.1 ")


LOOP = asyncio.new_event_loop()


@pytest.mark.timeout(0)
@settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None
)
@given(streams, cuts)
def test_requests_are_framed_as_h11_frames_them_or_refused(stream, sizes):
    LOOP.run_until_complete(judge(stream, sizes))


@pytest.mark.parametrize("name", sorted(path.name for path in (CORPUS / "requests").iterdir()))
@pytest.mark.parametrize("piece", [1, 3, 1 << 20])
def test_stored_requests_are_framed_as_h11_frames_them_or_refused(name, piece):
    stream = (CORPUS / "requests" / name).read_bytes()
    LOOP.run_until_complete(judge(stream, [piece] * (len(stream) // piece)))
