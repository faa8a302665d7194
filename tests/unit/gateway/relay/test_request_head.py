"""Where requests begin and end, compared with llhttp."""

import contextlib

import httptools
import uvloop
from hypothesis import example, given
from hypothesis import strategies as st

from kubeai.gateway.relay._downstream import Downstream
from kubeai.gateway.relay._exchange import Exchange
from kubeai.gateway.relay._relay import Relay

LOOP_FACTORIES = {"uvloop": uvloop.new_event_loop}  # the event loop of the workers


class _Loop:
    def call_exception_handler(self, context: dict) -> None:
        raise AssertionError(context["message"]) from context["exception"]

    def call_later(self, *_: object) -> None:
        return None


class _Transport:
    """Accepts writes without counting them; closes at once."""

    def __init__(self) -> None:
        self.written = b""
        self.closed = False

    def get_extra_info(self, name: str) -> tuple[str, int] | None:
        return ("10.0.0.1", 1) if name == "peername" else None

    def set_write_buffer_limits(self, high: int) -> None:
        pass

    def write(self, data: bytes) -> None:
        assert not self.closed
        self.written += data

    def close(self) -> None:
        self.closed = True

    abort = write_eof = close

    def pause_reading(self) -> None:
        raise AssertionError("every request is answered at once")

    resume_reading = pause_reading


class _Echo(Exchange):
    def __init__(self, downstream, taken) -> None:
        self.taken = taken

    def on_head(self) -> None:
        self.collect(1 << 20)

    def on_body(self) -> None:
        self.taken.append((self.method, self.target, self.body))
        self.answer(200, b"{}")


class _Requests:
    """llhttp's parse of the same bytes."""

    def __init__(self) -> None:
        self.whole: list[tuple[str, str, bytes]] = []
        self.parser = httptools.HttpRequestParser(self)

    def on_message_begin(self) -> None:
        self.target, self.body = b"", b""

    def on_url(self, url: bytes) -> None:
        self.target += url

    def on_body(self, data: bytes) -> None:
        self.body += data

    def on_message_complete(self) -> None:
        self.whole.append((self.parser.get_method().decode(), self.target.decode(), self.body))


PARTS = [
    b"POST /a HTTP/1.1\r\nHost: h\r\n",
    b"GET /b HTTP/1.1\r\nHost: h\r\n\r\n",
    b"POST /c HTTP/1.0\r\n",
    b"Content-Length: 5\r\n",
    b"content-length: 0\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"Connection: close\r\n",
    b"X: y\r\n",
    b"\r\n",
    b"\r",
    b"\n",
    b" ",
    b":",
    b"\0",
    b"hello",
    b"5\r\nhello\r\n",
    b"0\r\n\r\n",
    b"0\r\n",
    b"GET ",
]


@given(st.lists(st.sampled_from(PARTS), max_size=14).map(b"".join), st.integers(1, 200))
@example(b"POST /a HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nhelloGET /b HTTP/1.1\r\n", 1)
def test_requests_are_framed_as_in_llhttp_or_rejected(data, piece):
    taken: list[tuple[str, str, bytes]] = []
    relay = Relay(
        taken,
        lambda downstream: _Echo(downstream, taken),
        lambda status, message, target, request_id: (message.encode(), b""),
        head_max_bytes=10_000,
        head_max_count=100,
        head_timeout_s=60,
        body_timeout_s=60,
        keep_alive_timeout_s=60,
        stall_timeout_s=60,
        connections_max=1,
        buffer_max_bytes=1 << 20,
    )
    relay.start(_Loop())
    downstream = Downstream(relay)
    transport = _Transport()
    downstream.connection_made(transport)
    for i in range(0, len(data), piece):
        downstream.data_received(data[i : i + piece])
    downstream.connection_lost(None)
    assert relay.exchanges == relay.connections == 0

    reference = _Requests()
    with contextlib.suppress(httptools.HttpParserError):
        for i in range(len(data)):
            reference.parser.feed_data(data[i : i + 1])
    assert taken == reference.whole[: len(taken)]
    assert transport.written.count(b"HTTP/1.1 200 OK\r\n") == len(taken)
    if transport.closed and b"HTTP/1.1 4" not in transport.written:
        assert b"Connection: close\r\n" in transport.written
