"""Where chunks begin and end, compared with llhttp."""

import httptools
from fakes.wire import chunk
from hypothesis import given
from hypothesis import strategies as st

from kubeai.gateway.relay._chunked import unchunk


class _Reference:
    def __init__(self) -> None:
        self.data = b""
        self.ended = False
        self.parser = httptools.HttpRequestParser(self)
        self.parser.feed_data(b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n")

    def on_body(self, data: bytes) -> None:
        self.data += data

    def on_message_complete(self) -> None:
        self.ended = True


noise = st.lists(
    st.sampled_from(
        [b"\r\n", b"0", b"1", b"a", b"3\r\nabc\r\n", b"0\r\n", b";x=y", b"X: y\r\n", b" ", b"\n"]
    ),
    max_size=12,
).map(b"".join)
tidy = st.lists(st.binary(min_size=1, max_size=40), max_size=5).map(
    lambda chunks: b"".join(map(chunk, chunks)) + b"0\r\n\r\n"
)


@given(st.one_of(noise, tidy), st.integers(1, 20))
def test_chunks_end_where_llhttp_ends_them_or_are_rejected(body, piece):
    reference = _Reference()
    bad = False
    at = 0
    try:
        while at < len(body) and not reference.ended:
            reference.parser.feed_data(body[at : at + 1])
            at += 1
    except httptools.HttpParserError:
        bad = True
    try:
        data, used, ended = unchunk(*(body[i : i + piece] for i in range(0, len(body), piece)))
    except ValueError:
        return  # stricter than llhttp is fine
    assert not bad
    assert (data, ended) == (reference.data, reference.ended)
    if ended:
        assert used == at


@given(st.lists(st.binary(min_size=1, max_size=40), max_size=5), st.integers(1, 20))
def test_well_formed_chunks_are_accepted(chunks, piece):
    body = b"".join(map(chunk, chunks)) + b"0\r\n\r\n"
    pieces = [body[i : i + piece] for i in range(0, len(body), piece)]
    assert unchunk(*pieces, b"next") == (b"".join(chunks), len(body), True)
