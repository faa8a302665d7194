"""A form is split as an engine's parser splits it, in whatever pieces it arrives."""

import asyncio

import aiohttp
import pytest
from aiohttp.base_protocol import BaseProtocol
from hypothesis import example, given, settings
from hypothesis import strategies as st
from multidict import CIMultiDict

from kubeai.gateway.multipart import (
    HEAD_MAX_BYTES,
    PARTS_MAX_COUNT,
    Content,
    End,
    Part,
    Splitter,
    boundary_of,
    form_type,
)
from kubeai.openai import BadRequest

FIELD = 'Content-Disposition: form-data; name="{}"'


def form(*parts, boundary="b"):
    """parts: (name or whole head, content)."""
    body = b""
    for head, content in parts:
        head = head if ":" in head else FIELD.format(head)
        body += f"--{boundary}\r\n{head}\r\n\r\n".encode() + content + b"\r\n"
    return body + f"--{boundary}--\r\n".encode()


def split(body, boundary=b"b", sizes=()):
    """[(name, head, content)], fed in pieces of these sizes, the last for the rest."""
    splitter, parts, ended, at = Splitter(boundary), [], False, 0
    for size in [*sizes, len(body)]:
        piece, at = body[at : at + size], at + size
        for event in splitter.feed(piece):
            assert not ended, "nothing comes after the end"
            if isinstance(event, Part):
                parts.append([event.name, event.head, b""])
            elif isinstance(event, Content):
                assert event.data
                parts[-1][2] += event.data
            else:
                ended = isinstance(event, End)
    splitter.finish()
    return [tuple(part) for part in parts]


def test_parts_come_with_their_heads_as_they_were():
    head = 'content-disposition:form-data; filename="a b.wav"; name="file"\r\nX-Y: \tz '
    assert split(form(("model", b"m"), (head, b"\r\n--\0"), ("empty", b""))) == [
        ("model", FIELD.format("model").encode(), b"m"),
        ("file", head.encode(), b"\r\n--\0"),
        ("empty", FIELD.format("empty").encode(), b""),
    ]
    assert split(b"--b--\r\n") == []


def test_what_follows_the_closing_delimiter_is_dropped():
    body = form(("a", b"1")) + b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nx'
    assert [name for name, _, _ in split(body, sizes=[60])] == ["a"]


contents = st.binary(max_size=12) | st.lists(
    st.sampled_from([b"\r", b"\n", b"-", b"--", b"b", b"\r\n", b"\r\n--", b"x", b"\r\n--c"]),
    max_size=8,
).map(b"".join)


@given(
    st.lists(st.tuples(st.sampled_from(["model", "file", "é[]"]), contents), max_size=4),
    st.lists(st.integers(0, 9), max_size=60),
)
def test_pieces_make_no_difference(parts, sizes):
    if any(b"\r\n--b" in b"\r\n" + content for _, content in parts):
        return
    assert [(name, content) for name, _, content in split(form(*parts), sizes=sizes)] == parts


@pytest.mark.parametrize(
    ("body", "place"),
    [
        (b"", "before the first part"),
        (b"hello", "before the first part"),
        (b"\r\n--b\r\n", "before the first part"),
        (b"preamble\r\n" + form(("a", b"")), "before the first part"),
        (form(("a", b"")).replace(b"\r\n", b"\n"), "before the first part"),
        (b"--c\r\n" + form(("a", b"")), "before the first part"),
        (b"--bb\r\n", "before the first part"),
        (b"--b", "before the first part"),
        (form(("a", b"1"))[:-4], "part 1 ('a')"),
        (form(("a", b"1"), ("file", b"2" * 50))[:-20], "part 2 ('file')"),
        (form(("a", b"1\r\n--b \r\n")), "part 1 ('a')"),
        (form(("a", b"1\r\n--bc\r\n")), "part 1 ('a')"),
        (form(("a", b"--b\r\n")), "part 1 ('a')"),
        (form(("a", b"1\r\n--b--c\r\n")), "part 1 ('a')"),
        (form(("a", b"1"), ("X-No: disposition", b"2")), "part 2"),
        (form(("no colon", b"")).replace(b'name="no colon"', b"name"), "part 1"),
        (form((FIELD.format("a") + "\r\n" + FIELD.format("b"), b"")), "part 1"),
        (form((FIELD.format("a") + '; name="model"', b"")), "part 1"),
        (form((FIELD.format("a") + "; name*=utf-8''model", b"")), "part 1"),
        (form(("Content-Disposition: form-data; name*=utf-8''model", b"")), "part 1"),
        (form((FIELD.format("mod\\el"), b"")), "part 1"),
        (form((FIELD.format("mod%65l"), b"")), "part 1"),
        (form((FIELD.format("a") + " junk", b"")), "part 1"),
        (form((FIELD.format("a").replace("form-data", "attachment"), b"")), "part 1"),
        (form((FIELD.format("a") + "\r\n folded: x", b"")), "part 1"),
        (form((FIELD.format("a") + "\nX: y", b"")), "part 1"),
        (form((FIELD.format("a") + "\r\nX: \0", b"")), "part 1"),
        (form((FIELD.format(""), b"")), "part 1"),
        (b'--b\r\nContent-Disposition: form-data; name="\xff"\r\n\r\n\r\n--b--', "part 1"),
        (form((FIELD.format("a") + "\r\nX: " + "y" * HEAD_MAX_BYTES, b"")), "part 1"),
        (form(*[("a", b"")] * (PARTS_MAX_COUNT + 1)), f"part {PARTS_MAX_COUNT + 1}"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("piece", [1, 1 << 20])
def test_a_malformed_form_is_refused_by_its_place(body, place, piece):
    with pytest.raises(BadRequest) as caught:
        split(body, sizes=[piece] * len(body))
    assert caught.value.status == 400
    assert f", {place}" in caught.value.message


def test_a_head_without_end_is_refused_before_it_is_collected():
    splitter = Splitter(b"b")
    splitter.feed(b"--b\r\nX: ")
    for _ in range(HEAD_MAX_BYTES - 3):
        splitter.feed(b"y")
    with pytest.raises(BadRequest, match="head is longer"):
        splitter.feed(b"y")


class _NoTransport(BaseProtocol):
    def __init__(self, loop):
        super().__init__(loop)


async def read_by_aiohttp(body):
    reader = aiohttp.StreamReader(_NoTransport(asyncio.get_running_loop()), 2**20)
    reader.feed_data(body)
    reader.feed_eof()
    headers = CIMultiDict({"Content-Type": form_type(b"b")})
    parts = []
    multipart = aiohttp.MultipartReader(headers, reader)
    while (part := await multipart.next()) is not None:
        parts.append((part.name, bytes(await part.read())))
    return parts


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["model", "file"]), contents), min_size=1, max_size=3),
    st.integers(0, 200),
    st.sampled_from([b"", b"-", b"\r\n", b"\n", b"--b", b"\r\n--b\r\n", b"--", b'"', b" ", b";"]),
    st.integers(0, 3),
)
@example([("model", b"\r\n--b--\r\n")], 0, b"", 0)
def test_what_is_taken_is_what_another_parser_reads(parts, at, insert, cut):
    body = form(*parts)
    at = min(at, len(body))
    body = body[:at] + insert + body[at + cut :]
    try:
        ours = [(name, content) for name, _, content in split(body)]
    except BadRequest:
        return
    assert ours == asyncio.run(read_by_aiohttp(body))


@pytest.mark.parametrize(
    ("content_type", "boundary"),
    [
        ("multipart/form-data; boundary=abc", b"abc"),
        ('Multipart/Form-Data;boundary="a b:c"', b"a b:c"),
        ("multipart/form-data; charset=utf-8; BOUNDARY=----x_1", b"----x_1"),
    ],
)
def test_a_boundary_is_read(content_type, boundary):
    assert boundary_of(content_type) == boundary
    assert boundary_of(form_type(boundary)) == boundary


@pytest.mark.parametrize(
    "content_type",
    [
        "", "application/json", "multipart/mixed; boundary=a", "multipart/form-data",
        "multipart/form-data; boundary=", "multipart/form-data; boundary=a; boundary=b",
        "multipart/form-data; boundary*=utf-8''a", 'multipart/form-data; boundary="a',
        "multipart/form-data; boundary=a b", 'multipart/form-data; boundary="a "',
        "multipart/form-data; boundary=" + "a" * 71, "multipart/form-data boundary=a",
        "multipart/form-data; boundary=é",
    ],
)  # fmt: skip
def test_a_type_without_one_plain_boundary_is_refused(content_type):
    with pytest.raises(BadRequest):
        boundary_of(content_type)
