"""A form is split as an engine's parser would split it, in whatever pieces it arrives."""

import asyncio
import re

import aiohttp
import pytest
from aiohttp.base_protocol import BaseProtocol
from hypothesis import example, given, settings
from hypothesis import strategies as st
from multidict import CIMultiDict
from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from examples import some
from kubeai.gateway.uploads.multipart import (
    HEAD_MAX_BYTES,
    HEADERS_MAX_COUNT,
    PARTS_MAX_COUNT,
    PREAMBLE_MAX_BYTES,
    Content,
    End,
    Part,
    Splitter,
    boundary_of,
    form_type,
    new_boundary,
)
from kubeai.openai.errors import ErrorResponse

FIELD = 'Content-Disposition: form-data; name="{}"'


def form(*parts, boundary="b"):
    """Build a form from parts: (name or complete head, content)."""
    body = b""
    for head, content in parts:
        head = head if ":" in head else FIELD.format(head)
        body += f"--{boundary}\r\n{head}\r\n\r\n".encode() + content + b"\r\n"
    return body + f"--{boundary}--\r\n".encode()


def split(body, boundary=b"b", sizes=()):
    """Split a body into [(name, head, content)], fed in pieces of ``sizes``, then the remainder."""
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


def test_parts_have_a_rewritten_disposition_and_otherwise_unchanged_headers():
    head = 'content-disposition:form-data; filename="a b.wav"; name="file"\r\nX-Y: \tz '
    assert split(form(("model", b"m"), (head, b"\r\n--\0"), ("empty", b""))) == [
        ("model", FIELD.format("model").encode(), b"m"),
        (
            "file",
            b'Content-Disposition: form-data; filename="a b.wav"; name="file"\r\nX-Y: z',
            b"\r\n--\0",
        ),
        ("empty", FIELD.format("empty").encode(), b""),
    ]
    assert split(b"--b--\r\n") == []


@pytest.mark.parametrize(
    ("disposition", "name", "sent"),
    [
        ('form-data; name="model";', "model", 'form-data; name="model"'),
        ("form-data; name=model", "model", 'form-data; name="model"'),
        ('form-data ; name = "model" ; ', "model", 'form-data; name="model"'),
        ('Form-Data;NAME="model"', "model", 'form-data; name="model"'),
        ('form-data;; flag; name="a"; name="a"', "a", 'form-data; name="a"'),
        ('form-data; name=""', "", 'form-data; name=""'),
        ('form-data; name="100%"', "100%", 'form-data; name="100%"'),
        ('form-data; name="a%22b"', "a%22b", 'form-data; name="a%22b"'),
        (r'form-data; name="a\"b"', 'a"b', r'form-data; name="a\"b"'),
        (r"form-data; name=a\b", "a\\b", r'form-data; name="a\\b"'),
        ('form-data; name="é[]"', "é[]", 'form-data; name="é[]"'),
        (
            'form-data; name="file"; filename="; name=model;"',
            "file",
            'form-data; name="file"; filename="; name=model;"',
        ),
        (
            "form-data; name=file; filename=a b.wav; filename*=utf-8''a%20b.wav",
            "file",
            'form-data; name="file"; filename="a b.wav"; filename*=utf-8\'\'a%20b.wav',
        ),
    ],
)
def test_a_disposition_is_parsed_and_rewritten(disposition, name, sent):
    [(read, head, content)] = split(form((f"Content-Disposition: {disposition}", b"x")))
    assert (read, head.decode(), content) == (name, f"Content-Disposition: {sent}", b"x")


def test_a_parts_content_length_is_not_forwarded():
    head = FIELD.format("file") + "\r\nContent-Length: 1\r\nContent-Type: audio/wav"
    [(_, sent, content)] = split(form((head, b"four")))
    assert sent.decode() == FIELD.format("file") + "\r\nContent-Type: audio/wav"
    assert content == b"four"


@pytest.mark.parametrize(
    "preamble", [b"\r\n", b"\r\n\r\n", b"\n", b"A form follows.\r\n", b"-\r\n--\r\n"]
)
@pytest.mark.parametrize("piece", [1, 1 << 20])
def test_the_preamble_is_skipped(preamble, piece):
    body = preamble + form(("model", b"m"))
    assert [part[::2] for part in split(body, sizes=[piece] * len(body))] == [("model", b"m")]


def test_the_headers_of_a_part_are_limited():
    headers = "\r\n".join([FIELD.format("a"), *["X: y"] * HEADERS_MAX_COUNT])
    with pytest.raises(ErrorResponse, match=r"part 1: .*header count"):
        split(form((headers, b"")))


def test_the_preamble_is_limited():
    splitter = Splitter(b"b")
    splitter.feed(b"x" * (PREAMBLE_MAX_BYTES - 1))
    with pytest.raises(ErrorResponse, match="before the first part: no boundary within"):
        splitter.feed(b"x" * 100)


@pytest.mark.parametrize("content", [b"1\r\n--bc\r\n", b"1\r\n--b-\r\n", b"\n--b\r\n", b"\r\n-"])
def test_a_near_delimiter_is_content(content):
    assert [part[2] for part in split(form(("a", content)))] == [content]


@pytest.mark.parametrize("end", [b" \t\r\n", b"\r\n"])
def test_blanks_may_follow_a_delimiter(end):
    head = FIELD.format("c").encode()
    body = form(("a", b"1\r\n--b" + end + head + b"\r\n\r\n2"))
    assert [(name, content) for name, _, content in split(body)] == [("a", b"1"), ("c", b"2")]


def test_the_epilogue_is_dropped():
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
def test_a_form_is_split_the_same_in_any_pieces(parts, sizes):
    if any(b"\r\n--b" in b"\r\n" + content for _, content in parts):
        return
    assert [(name, content) for name, _, content in split(form(*parts), sizes=sizes)] == parts


@pytest.mark.parametrize(
    ("body", "place"),
    [
        (b"", "before the first part"),
        (b"hello", "before the first part"),
        (form(("a", b"")).replace(b"\r\n", b"\n"), "before the first part"),
        (b"--bb\r\n", "before the first part"),
        (b"x--b\r\n" + form(("a", b"")), "before the first part"),
        (b"\r" + form(("a", b"")), "before the first part"),
        (b"--b", "before the first part"),
        (form(("a", b"1"))[:-4], "part 1 ('a')"),
        (form(("a", b"1"), ("file", b"2" * 50))[:-20], "part 2 ('file')"),
        (form(("a", b"--b\r\n")), "part 1 ('a')"),
        (form(("a", b"1"), ("X-No: disposition", b"2")), "part 2"),
        (form(("no colon", b"")).replace(b'name="no colon"', b"name"), "part 1"),
        (form((FIELD.format("a") + "\r\n" + FIELD.format("b"), b"")), "part 1"),
        (form((FIELD.format("a") + '; name="model"', b"")), "part 1"),
        (form((FIELD.format("a") + "; name*=utf-8''model", b"")), "part 1"),
        (form(("Content-Disposition: form-data; name*=utf-8''model", b"")), "part 1"),
        (form((FIELD.format("mod\\el"), b"")), "part 1"),
        (form((FIELD.format("/model"), b"")), "part 1"),  # aiohttp removes leading slashes
        (form((FIELD.format("\\\\model"), b"")), "part 1"),
        (form((FIELD.format("/\\\\mod\\el"), b"")), "part 1"),
        (form((FIELD.format("mod%65l"), b"")), "part 1"),
        (form((FIELD.format("a") + " junk", b"")), "part 1"),
        (form((FIELD.format("a") + "; name*0=model", b"")), "part 1"),
        (form((r'Content-Disposition: form-data; filename="a\\"; name="model"', b"")), "part 1"),
        (form((FIELD.format('a"b'), b"")), "part 1"),
        (form((FIELD.format("model") + "\r\nContent-Transfer-Encoding: base64", b"")), "part 1"),
        (form(("a", b"1\r\n--b \t-\r\n")), "part 1 ('a')"),
        (form((FIELD.format("a").replace("form-data", "attachment"), b"")), "part 1"),
        (form((FIELD.format("a") + "\r\n folded: x", b"")), "part 1"),
        (form((FIELD.format("a") + "\nX: y", b"")), "part 1"),
        (form((FIELD.format("a") + "\r\nX: \0", b"")), "part 1"),
        (form((FIELD.format("a") + "\r\nX: " + "y" * HEAD_MAX_BYTES, b"")), "part 1"),
        (form(*[("a", b"")] * (PARTS_MAX_COUNT + 1)), f"part {PARTS_MAX_COUNT + 1}"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("piece", [1, 1 << 20])
def test_a_malformed_form_is_rejected_with_the_position(body, place, piece):
    with pytest.raises(ErrorResponse) as caught:
        split(body, sizes=[piece] * len(body))
    assert caught.value.status == 400
    assert f", {place}" in caught.value.message


def test_an_endless_part_head_is_rejected_before_it_is_buffered():
    splitter = Splitter(b"b")
    splitter.feed(b"--b\r\nX: ")
    for _ in range(HEAD_MAX_BYTES - 1):
        splitter.feed(b"y")
    with pytest.raises(ErrorResponse, match="headers are longer"):
        splitter.feed(b"y")


# -- compared with other parsers -------------------------------------------------------------------


def read_by_python_multipart(body, boundary):
    """Return [(name, content)] as Starlette reads them, or None if it rejects the form."""
    parts, ended, headers, header = [], [], {}, {"field": b"", "value": b""}

    def add(key):
        def callback(data, start, end):
            header[key] += data[start:end]

        return callback

    def header_end():
        headers[header["field"].lower()] = header["value"]  # the last one if repeated
        header.update(field=b"", value=b"")

    def headers_finished():
        _, options = parse_options_header(headers.get(b"content-disposition"))
        if b"name" not in options:
            raise FormParserError("no name")
        parts.append([options[b"name"], b""])
        headers.clear()

    def part_data(data, start, end):
        parts[-1][1] += data[start:end]

    callbacks = {
        "on_header_field": add("field"),
        "on_header_value": add("value"),
        "on_header_end": header_end,
        "on_headers_finished": headers_finished,
        "on_part_data": part_data,
        "on_end": lambda: ended.append(True),
    }
    try:
        MultipartParser(boundary, callbacks).write(body)
    except FormParserError:
        return None
    return [tuple(part) for part in parts] if ended else None


class _NoTransport(BaseProtocol):
    def __init__(self, loop):
        super().__init__(loop)


async def read_by_aiohttp(body, boundary):
    reader = aiohttp.StreamReader(_NoTransport(asyncio.get_running_loop()), 2**20)
    reader.feed_data(body)
    reader.feed_eof()
    headers = CIMultiDict({"Content-Type": form_type(boundary)})
    parts = []
    multipart = aiohttp.MultipartReader(headers, reader)
    while (part := await multipart.next()) is not None:
        parts.append((part.name, bytes(await part.read())))
    return parts


def sent_form(parts, boundary):
    """The bytes that spool.py sends for the parts returned by :func:`split`."""
    body = b"".join(
        b"--%b\r\n%b\r\n\r\n%b\r\n" % (boundary, head, content) for _, head, content in parts
    )
    return body + b"--%b--\r\n" % boundary


def spaced(text):
    """Add optional blanks to ``text`` wherever python-multipart's header grammar allows them."""
    blank = st.sampled_from(["", " ", "\t", "  "])
    pieces = re.split("(~)", text)
    return st.tuples(*(blank if piece == "~" else st.just(piece) for piece in pieces)).map("".join)


names = st.sampled_from(
    ["model", "file", "", "a b", "100%", "a%22", "é", "timestamp_granularities[]", "Model"]
)
parameters = names.flatmap(
    lambda name: st.sampled_from([f'~;~name~=~"{name}"~', f"~;~NAME~=~{name}~"])
).flatmap(
    lambda own: (
        st.permutations(
            [own, '~;~filename~=~"a;\\"b.wav"~', "~;~filename*~=~utf-8''a%20b~", "~;~flag~"]
        )
        .map(lambda found: found[: found.index(own) + 1])
        .map("".join)
    )
)
heads = st.tuples(
    st.sampled_from(["Content-Disposition", "content-disposition"]),
    parameters,
    st.sampled_from(["", "~;~"]),
    st.sampled_from(["", "\r\nContent-Type: audio/wav", "\r\nX:"]),
).flatmap(lambda head: spaced(f"{head[0]}:~form-data{head[1]}{head[2]}").map(lambda t: t + head[3]))
boundaries = st.sampled_from(
    ["b", "a$b", "x{}|~^", "=_?:()", "----WebKitFormBoundary7MA4", "b" * 90]
)
preambles = st.sampled_from([b"", b"\r\n", b"\r\n\r\n"])


@settings(max_examples=some(200), deadline=None)
@given(st.lists(st.tuples(heads, contents), max_size=4), boundaries, preambles)
def test_every_form_that_python_multipart_reads_is_read_alike(parts, boundary, preamble):
    if any(f"--{boundary}".encode() in content for _, content in parts):
        return
    body = preamble + form(*parts, boundary=boundary)
    theirs = read_by_python_multipart(body, boundary)
    assert theirs is not None, "the reference accepts every generated form"
    content_type = f'multipart/form-data; boundary="{boundary}"; charset=utf-8'
    ours = split(body, boundary_of(content_type))
    assert [(name.encode(), content) for name, _, content in ours] == theirs


TRICKS = [
    *(b"", b"-", b"\r\n", b"\n", b"\r", b"--b", b"\r\n--b\r\n", b"--", b'"', b" ", b";", b"\\"),
    *(b"\\\\", b"=", b"*", b"%", b"\t", b":", b"\0", b"name", b"name*=utf-8''model"),
    *(b"; name=model", b'; name="model"', b'filename="', b"\r\n--b \r\n", b"\r\n--b--"),
    b"\r\nContent-Length: 1",
    b'\r\nContent-Disposition: form-data; name="model"',
    b'\r\n--b\r\nContent-Disposition: form-data; name="model"',
]
mutations = st.lists(
    st.tuples(st.integers(0, 300), st.sampled_from(TRICKS), st.integers(0, 3)), max_size=4
)


def mutated(parts, changes):
    body = form(*parts)
    for at, insert, cut in changes:
        at = min(at, len(body))
        body = body[:at] + insert + body[at + cut :]
    return body


ENGINE_BOUNDARY = b"kubeai-0123456789abcdef"


@pytest.mark.filterwarnings("ignore::aiohttp.BadContentDispositionParam")
# aiohttp reads no name from some quoted file names with semicolons, and warns.
@pytest.mark.filterwarnings("error::aiohttp.BadContentDispositionHeader")
@settings(max_examples=some(300), deadline=None)
@given(st.lists(st.tuples(heads, contents), min_size=1, max_size=3), mutations)
@example([("model", b"\r\n--b--\r\n")], [])
@example([('Content-Disposition: form-data; filename="a;\\"b;av"; name="model"', b"x")], [])
def test_an_engine_reads_the_same_parts_as_the_gateway(parts, changes):
    body = mutated(parts, changes)
    try:
        ours = split(body)
    except ErrorResponse:
        return
    sent = sent_form(ours, ENGINE_BOUNDARY)
    theirs = read_by_python_multipart(sent, ENGINE_BOUNDARY)
    assert theirs is not None
    assert [name == b"model" for name, _ in theirs] == [name == "model" for name, _, _ in ours]
    assert [content for _, content in theirs] == [content for _, _, content in ours]
    try:
        others = asyncio.run(read_by_aiohttp(sent, ENGINE_BOUNDARY))
    except aiohttp.BadContentDispositionHeader:
        return
    assert [name == "model" for name, _ in others] == [name == "model" for name, _, _ in ours]
    assert [content for _, content in others] == [content for _, _, content in ours]


def result(body, sizes=()):
    try:
        return split(body, sizes=sizes)
    except ErrorResponse as error:
        return error.status


@settings(max_examples=some(200), deadline=None)
@given(
    st.lists(st.tuples(heads, contents), max_size=3),
    mutations,
    st.lists(st.integers(0, 9), max_size=60),
)
def test_an_odd_form_is_split_the_same_in_any_pieces(parts, changes, sizes):
    body = mutated(parts, changes)
    assert result(body, sizes) == result(body)


# -- the request's Content-Type --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content_type", "boundary"),
    [
        ("multipart/form-data; boundary=abc", b"abc"),
        ('Multipart/Form-Data;boundary="a b:c"', b"a b:c"),
        ("multipart/form-data; charset=utf-8; BOUNDARY=----x_1", b"----x_1"),
        ("multipart/form-data; boundary=a$b;", b"a$b"),
        ('multipart/form-data ; boundary = "a$b" ; ', b"a$b"),
        ("multipart/form-data; boundary=a b", b"a b"),
        ("multipart/form-data; boundary=" + "a" * 71, b"a" * 71),
        ("multipart/form-data; boundary=a; boundary=a", b"a"),
    ],
)
def test_the_boundary_is_parsed_from_the_content_type(content_type, boundary):
    assert boundary_of(content_type) == boundary


def test_the_content_type_of_a_sent_form_has_its_boundary():
    boundary = new_boundary()
    assert boundary_of(form_type(boundary)) == boundary
    assert boundary != new_boundary()


@pytest.mark.parametrize(
    "content_type",
    [
        "", "application/json", "multipart/mixed; boundary=a", "multipart/form-data",
        "multipart/form-data; boundary=", "multipart/form-data; boundary=a; boundary=b",
        "multipart/form-data; boundary*=utf-8''a", 'multipart/form-data; boundary="a',
        'multipart/form-data; boundary="a" b', 'multipart/form-data; boundary="a"b"',
        "multipart/form-data; boundary=" + "a" * 257, "multipart/form-data boundary=a",
        "multipart/form-data; boundary=é", "multipart/form-data; boundary=a\tb",
    ],
)  # fmt: skip
def test_a_content_type_without_exactly_one_plain_boundary_is_rejected(content_type):
    with pytest.raises(ErrorResponse):
        boundary_of(content_type)
