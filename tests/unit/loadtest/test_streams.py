"""The poller's own counts equal those of the HTTP parser and the event reader."""

from __future__ import annotations

import itertools
import json
import socket
from collections.abc import Iterator
from typing import Any

import httptools
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kubeai.loadtest._streams import Poller, Stream
from kubeai.loadtest.sse import Reader

HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
USAGE = {"prompt_tokens": 9, "completion_tokens": 4}


def event(text: str | None, line_end: str = "\n", **more: Any) -> bytes:
    delta = {} if text is None else {"content": text}
    said = {"id": "c", "choices": [{"index": 0, "delta": delta}], **more}
    return f"data: {json.dumps(said, separators=(',', ':'))}{line_end * 2}".encode()


def chunk(data: bytes, size: str = "{:x}") -> bytes:
    return size.format(len(data)).encode() + b"\r\n" + data + b"\r\n"


class Wire:
    """A stream that arrives on a socket; its head has already been read."""

    def __init__(self, *, keep: bool = False) -> None:
        self.poller = Poller()
        self.theirs, self.ours = socket.socketpair()
        self.reader = Reader(keep=keep)
        self.on_body = self.reader.feed
        self.parser = httptools.HttpResponseParser(self)
        self.parser.feed_data(HEAD)
        self.others: list[bytes] = []
        self.is_whole = False
        self.poller.add(self.ours.fileno(), self.reader, self.take)

    def write(self, *pieces: bytes) -> None:
        for piece in pieces:
            self.theirs.sendall(piece)
            self.poller.run()

    def take(self, piece: bytes) -> None:
        self.others.append(piece)
        if piece:
            self.parser.feed_data(piece)
        else:
            self.poller.remove(self.ours.fileno(), self.reader)

    def on_chunk_header(self) -> None:
        self.reader.between_chunks = False

    def on_chunk_complete(self) -> None:
        self.reader.between_chunks = True

    def on_message_complete(self) -> None:
        self.is_whole = True

    def close(self) -> None:
        self.poller.close()
        self.theirs.close()
        self.ours.close()


@pytest.fixture
def wire() -> Iterator[Wire]:
    made = Wire(keep=True)
    yield made
    made.close()


texts = st.one_of(
    st.sampled_from(["", "a", " cat", "\\", '"', '"content":"', "\n\ndata: x", "é\u2028"]),
    st.text(max_size=8),
)
kinds = st.sampled_from([{}, {}, {}, {"usage": None}, {"usage": USAGE}])
events = st.lists(
    st.builds(
        lambda text, more, line_end: event(text, line_end, **more),
        st.none() | texts,
        kinds,
        st.sampled_from(["\n", "\n", "\r\n"]),
    ),
    max_size=30,
)
sizes = st.sampled_from(["{:x}", "{:X}", "{:04x}", "{:08x}", "{:x};a=b"])


@given(events, st.lists(st.integers(1, 400), max_size=30), sizes, st.data())
def test_a_stream_is_counted_the_same_however_it_is_split(said, lengths, size, data):
    """The body is split into chunks, mostly one per event, and the whole into pieces."""
    body = b"".join(said) + b"data: [DONE]\n\n"
    ends = set(itertools.accumulate(map(len, said)))
    if data.draw(st.booleans(), "chunks that are no events"):
        ends = set(itertools.accumulate(lengths))
    places = [0, *sorted(at for at in ends if at < len(body)), len(body)]
    whole = b"".join(chunk(body[a:b], size) for a, b in itertools.pairwise(places) if a < b)
    whole += b"0\r\n\r\n"
    cuts = data.draw(st.lists(st.integers(0, len(whole)), max_size=12), "cuts")
    pieces = [0, *sorted(cuts), len(whole)]

    wire = Wire(keep=True)
    wire.write(*(whole[a:b] for a, b in itertools.pairwise(pieces) if a < b))
    wire.close()
    assert wire.is_whole

    alone = Reader(keep=True)
    alone.feed(body)
    read, expected = (
        (one.tokens, one.others, one.done, one.usage, one.problem, one.body)
        for one in (wire.reader, alone)
    )
    assert read == expected


def test_the_parser_sees_nothing_of_a_regular_stream(wire):
    for text in "abcdefgh":
        wire.write(chunk(event(text)))
    assert wire.others == [chunk(event("a"))]
    wire.write(chunk(event("i")) + chunk(event("j")) + b"0\r\n")
    assert wire.others[1:] == [b"0\r\n"]
    wire.write(b"\r\n")
    assert wire.is_whole
    assert wire.reader.text == "abcdefghij"
    times_s = wire.reader.times_s
    assert len(times_s) == wire.reader.tokens == 10
    assert times_s == sorted(times_s)
    assert times_s[-3] < times_s[-2] == times_s[-1], "events read together have the same time"


@pytest.mark.parametrize(
    "piece",
    [
        chunk(event("")),
        chunk(event("b", usage=USAGE)),
        chunk(event("b") + event("c")),
        chunk(event("b"))[:-1],
        chunk(event("b"), "{:x};a=b"),
        chunk(event("b"), "{:07x}"),
        chunk(b"event: x\n" + event("b")),
    ],
    ids=["empty", "usage", "two", "cut", "extension", "long-size", "named"],
)
def test_the_parser_sees_every_irregular_piece(wire, piece):
    wire.write(chunk(event("a")), piece)
    assert wire.others == [chunk(event("a")), piece]


def test_no_chunk_is_counted_inside_an_incomplete_chunk_or_line(wire):
    wire.write(chunk(event("a")))
    head, tail = event("b")[:20], event("b")[20:]
    # What is inside a chunk or a line only looks like a chunk.
    inner = chunk(event("c"))
    wire.write(b"%x\r\n" % (len(inner) + 2), inner, b"\n\n\r\n")
    assert wire.others[2:] == [inner, b"\n\n\r\n"]
    before = wire.reader.tokens
    wire.write(chunk(head), chunk(event("d")), chunk(tail))
    assert wire.reader.tokens < before + 3
    assert len(wire.others) == 7


def test_text_is_not_kept_unless_requested():
    wire = Wire()
    wire.write(chunk(event("a")), chunk(event("b")))
    wire.close()
    assert wire.reader.tokens == 2
    assert wire.reader.kept is None


def test_the_end_and_the_loss_of_a_connection_are_reported(wire):
    wire.write(chunk(event("a")))
    wire.theirs.close()
    wire.poller.run()
    assert wire.others[1:] == [b""]


def test_a_removed_stream_is_not_read_and_its_descriptor_may_be_reused(wire):
    number = wire.ours.fileno()
    wire.poller.remove(number, Stream())  # a different stream's
    wire.write(chunk(event("a")))
    assert wire.reader.tokens == 1
    wire.poller.remove(number, wire.reader)
    wire.write(chunk(event("b")))
    assert wire.reader.tokens == 1
    other = Reader()
    wire.poller.add(number, other, other.feed)
    wire.poller.remove(number, wire.reader)  # the former one, once more
    wire.poller.run()
    assert other.rest or other.tokens
    wire.poller.remove(number + 1000, other)


def test_a_stream_removed_during_a_poll_is_not_read():
    """Both are ready at once; an irregular piece of one makes the callback remove both."""
    poller, pairs = Poller(), [socket.socketpair() for _ in range(2)]
    readers = [Reader(), Reader()]
    told = []

    def tell(number: int, _piece: bytes) -> None:
        told.append(number)
        for each, reader in zip(pairs, readers, strict=True):
            poller.remove(each[1].fileno(), reader)

    for number, (pair, reader) in enumerate(zip(pairs, readers, strict=True)):
        pair[0].sendall(b"x")
        poller.add(pair[1].fileno(), reader, lambda piece, number=number: tell(number, piece))
    poller.run()
    assert len(told) == 1
    poller.close()
    for end in itertools.chain(*pairs):
        end.close()


def test_a_file_that_cannot_be_polled_is_an_error(tmp_path, wire):
    with (tmp_path / "x").open("w") as file, pytest.raises(PermissionError):
        wire.poller.add(file.fileno(), Stream(), print)
    with pytest.raises(FileExistsError):
        wire.poller.add(wire.ours.fileno(), Stream(), print)


def test_an_event_without_text_at_the_given_position_is_rejected():
    with pytest.raises(ValueError, match="no text"):
        Stream().learn(b'"content":"', 0)
    with pytest.raises(ValueError, match="no text"):
        Stream().learn(b'data: "content":"', 6)
