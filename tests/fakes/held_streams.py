"""Streaming requests that are held, and what their clients read.

Both times are short here, so that a held request is soon sent its first comments.
"""

import json

from fakes.chats import CHAT
from fakes.wire import CHUNKED, Message, Wire, chunk, post

SOON = {"hold_comment_after_s": 0.01, "hold_comment_interval_s": 0.01}
EVENTS = b'data: {"a":1}\n\ndata: [DONE]\n\n'
SSE = "Content-Type: text/event-stream"
WAITING = b": waiting for a replica: "


def ask(*headers: str, path: str = CHAT, version: str = "1.1", model: str = "m", **fields) -> bytes:
    body = json.dumps({"model": model, "stream": True, **fields}).encode()
    return post(path, body, *headers, version=version)


async def streams(wire: Wire, request: Message) -> None:
    await wire.send(CHUNKED + chunk(EVENTS[:9]) + chunk(EVENTS[9:]) + b"0\r\n\r\n")


def parts(body: bytes) -> tuple[list[bytes], bytes]:
    """The comments at the beginning of a stream, and what follows them."""
    comments = []
    while body.startswith(b":"):
        comment, separator, body = body.partition(b"\n\n")
        assert separator
        comments.append(comment)
    return comments, body


async def begun(start, *requests: bytes, route: dict | None = None, **config):
    """A world and a connection whose request is held, and the head of its response."""
    world = await start(**{**SOON, **config})
    world.route("m", {}, **(route or {}))
    wire = await world.client()
    await wire.send(*(requests or (ask(),)))
    return world, wire, await wire.head()


async def stream_of(wire: Wire, head: Message) -> bytes:
    """What follows the comments of a response that ends properly."""
    comments, rest = parts((await wire.body(head, until_close=True)).body)
    assert comments
    assert comments[0].startswith(WAITING)
    return rest


async def openai_error_of(wire: Wire, head: Message) -> dict:
    rest = await stream_of(wire, head)
    assert b"[DONE]" not in rest
    assert rest.startswith(b"data: ")
    assert rest.endswith(b"\n\n")
    assert rest.count(b"\n\n") == 1
    error = json.loads(rest[6:])["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error
