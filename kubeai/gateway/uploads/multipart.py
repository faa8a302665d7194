"""Parses a multipart/form-data body incrementally, and rewrites its framing. Pure: no I/O.

python-multipart, which vLLM and other Python engines use, splits the body into parts. This module
adds limits, and ensures that the gateway and the engine agree on which part is ``model``.

The engine never parses the bytes that the client sent. The parts are forwarded under a boundary
that the client cannot know, each with a rewritten ``Content-Disposition``, so that no parser finds
other parts or names than this one did. A rewritten part has one name, quoted parameters, and no
Content-Length; its content and other headers are unchanged.

A form that common parsers interpret differently is rejected with 400, because the client's intent
is unclear: several Content-Disposition headers or names in one part, ``name*``, a disposition other
than form-data, unbalanced quotes, a name that is "model" only after decoding, a transfer encoding
on ``model``, and a delimiter without CRLF at the start of a part's content. python-multipart
accepts these. It also accepts control characters in headers, a delimiter in the middle of a line
before the first part, and non-ASCII boundaries, which are rejected too. Text before the first
delimiter is skipped, as RFC 2046 requires; python-multipart skips only line breaks.

Memory use: the preamble, a part's headers, and the chunk being parsed, each with a limit.
"""

from __future__ import annotations

import logging
import re
import secrets
from typing import NamedTuple
from urllib.parse import unquote

import msgspec
from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from kubeai.errors import QUOTED_MAX_CHARS
from kubeai.openai.errors import ErrorResponse

BOUNDARY_MAX_BYTES = 256  # python-multipart's limit; RFC 2046 has 70
PREAMBLE_MAX_BYTES = 8 << 10
HEAD_MAX_BYTES = 8 << 10
HEADERS_MAX_COUNT = 32  # in one part
PARTS_MAX_COUNT = 100

# One parameter after its ";": a key and a quoted or bare value. Possessive, so it runs in linear
# time.
_PARAMETER = re.compile(r';([^=;"]*+)(?:=[ \t]*+("(?:[^"\\]|\\.)*+"[ \t]*+|[^;"]*+))?+(?=;|$)')
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_CONTROL = re.compile(rb"[\0-\x08\x0a-\x1f\x7f]")
_PLAIN_ENCODINGS = (b"7bit", b"8bit", b"binary")

# It would log a warning for each malformed form. That is the client's error, not the operator's.
logging.getLogger("python_multipart").setLevel(logging.CRITICAL)


class Part(msgspec.Struct, frozen=True):
    """The start of a part. ``head``: its header lines for the engine, without the empty line."""

    name: str
    head: bytes


class Content(msgspec.Struct, frozen=True):
    """A chunk of the current part's content."""

    data: bytes


class End(msgspec.Struct, frozen=True):
    """The closing delimiter: the form is complete."""


Event = Part | Content | End


def boundary_of(content_type: str) -> bytes:
    """The boundary in a Content-Type; ErrorResponse if that is not a valid multipart/form-data."""
    kind, separator, rest = content_type.partition(";")
    if kind.strip().lower() != "multipart/form-data":
        raise ErrorResponse("The Content-Type must be multipart/form-data.")
    parameters = _parameters(separator + rest)
    boundary = None if parameters is None else _only(parameters, "boundary")
    if (
        boundary is None
        or not boundary.isascii()
        or not boundary.isprintable()
        or not 0 < len(boundary) <= BOUNDARY_MAX_BYTES
        or parse_options_header(content_type)[1].get(b"boundary") != boundary.encode()
    ):
        raise ErrorResponse(
            "The Content-Type must have one boundary of 1 to"
            f" {BOUNDARY_MAX_BYTES} printable ASCII characters."
        )
    return boundary.encode()


def new_boundary() -> bytes:
    """A random boundary, which no client can put into a part's content."""
    return b"kubeai-" + secrets.token_hex(16).encode()


def form_type(boundary: bytes) -> str:
    """The Content-Type of a form with a boundary from :func:`new_boundary`."""
    return f"multipart/form-data; boundary={boundary.decode()}"


class Splitter:
    """Parses one body. Call :meth:`feed` with its chunks in order, then :meth:`finish`."""

    def __init__(self, boundary: bytes) -> None:
        self._delimiter = b"--" + boundary
        self._preamble: bytearray | None = bytearray(b"\n")  # the body starts a line
        self._events: list[Event] = []
        self._ended = False
        self._parts_count = 0
        self._name = ""
        self._headers: list[tuple[bytes, bytes]] = []
        self._field = b""
        self._value = b""
        self._head_bytes = 0
        self._opening = b""  # start of the content, up to the length of a delimiter
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._on_part_begin,
                "on_header_field": self._on_header_field,
                "on_header_value": self._on_header_value,
                "on_header_end": self._on_header_end,
                "on_headers_finished": self._on_headers_finished,
                "on_part_data": self._on_part_data,
                "on_end": self._on_end,
            },
            max_header_count=HEADERS_MAX_COUNT,
            max_header_size=2 * HEAD_MAX_BYTES,  # of one header; _count_head limits all of them
        )

    @property
    def place(self) -> str:
        """The current position in the form, for error messages."""
        if not self._parts_count:
            return "before the first part"
        name = f" ('{self._name[:QUOTED_MAX_CHARS]}')" if self._name else ""
        return f"part {self._parts_count}{name}"

    def feed(self, data: bytes) -> list[Event]:
        """Parse the next bytes of the body and return their events.

        ErrorResponse if the form is malformed; the message names the part.
        """
        if self._preamble is not None:
            data = self._skip_preamble(self._preamble, data)
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise self._bad(f"it cannot be parsed ({error})") from None
        events, self._events = self._events, []
        return events

    def finish(self) -> None:
        """Call at the end of the body; ErrorResponse unless there was a closing delimiter."""
        if not self._ended:
            raise self._bad("the closing boundary is missing")

    def _skip_preamble(self, preamble: bytearray, data: bytes) -> bytes:
        """The data after the preamble, or b"" while the preamble has not ended."""
        preamble += data
        at = preamble.find(self._delimiter)
        if at >= 0:
            if preamble[at - 1] != ord("\n"):  # only some parsers treat this as a delimiter
                raise self._bad("the boundary is not at the start of a line")
            self._preamble = None
            return bytes(preamble[at:])
        if len(preamble) > PREAMBLE_MAX_BYTES:
            raise self._bad(f"no boundary within {PREAMBLE_MAX_BYTES} bytes")
        return b""

    def _on_part_begin(self) -> None:
        self._parts_count += 1
        self._name = ""
        self._headers = []
        self._head_bytes = 0
        self._opening = b""
        if self._parts_count > PARTS_MAX_COUNT:
            raise self._bad(f"more than {PARTS_MAX_COUNT} parts")

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._count_head(end - start)
        self._field += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._count_head(end - start)
        self._value += data[start:end]

    def _count_head(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > HEAD_MAX_BYTES:
            raise self._bad(f"its headers are longer than {HEAD_MAX_BYTES} bytes")

    def _on_header_end(self) -> None:
        if _CONTROL.search(self._value):
            raise self._bad("a header contains a control character")
        self._headers.append((self._field, self._value.strip(b" \t")))
        self._field = self._value = b""

    def _on_headers_finished(self) -> None:
        dispositions = [
            value for name, value in self._headers if name.lower() == b"content-disposition"
        ]
        if len(dispositions) != 1:
            raise self._bad("it must have exactly one Content-Disposition header")
        disposition = _read_disposition(dispositions[0].decode("latin-1"))
        if isinstance(disposition, str):
            raise self._bad(disposition)
        self._name = disposition.name
        lines = [disposition.line]
        for name, value in self._headers:
            lower = name.lower()
            encoded = value.lower() not in _PLAIN_ENCODINGS
            if lower == b"content-transfer-encoding" and self._name == "model" and encoded:
                raise self._bad("'model' must not have a Content-Transfer-Encoding")
            # Some parsers would use a part's Content-Length.
            if lower not in (b"content-disposition", b"content-length"):
                lines.append(name + b": " + value)
        self._events.append(Part(self._name, b"\r\n".join(lines)))

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        missing = len(self._delimiter) - len(self._opening)
        if missing:
            self._opening += data[start : min(end, start + missing)]
            if self._opening == self._delimiter:  # Go's parser treats this as a new part
                raise self._bad("its content begins with the boundary")
        self._events.append(Content(data[start:end]))

    def _on_end(self) -> None:
        self._ended = True
        self._events.append(End())

    def _bad(self, problem: str) -> ErrorResponse:
        param = self._name or None
        return ErrorResponse(f"The multipart form is malformed, {self.place}: {problem}.", param)


class _Disposition(NamedTuple):
    name: str
    line: bytes  # the rewritten header


def _read_disposition(value: str) -> _Disposition | str:
    """Parse a Content-Disposition, decoded as Latin-1. Returns a message if it is invalid."""
    kind, separator, rest = value.partition(";")
    parameters = _parameters(separator + rest)
    if kind.strip().lower() != "form-data":
        return "its Content-Disposition is not form-data"
    if parameters is None:
        return "its Content-Disposition cannot be parsed"
    name = _only(parameters, "name")
    if name is None or parse_options_header(value)[1].get(b"name") != name.encode("latin-1"):
        return "its Content-Disposition must have exactly one name"
    raw = dict(parameters)["name"].strip('"')
    readings = {name, raw, raw.lstrip("\\/")}  # aiohttp removes slashes at the start
    readings |= {re.sub(r"\\(.)", r"\1", reading) for reading in readings}
    readings |= {unquote(reading) for reading in readings}
    if "model" in readings and len(readings) > 1:
        return "its name is ambiguous: only some parsers read it as 'model'"
    # The last of several parameters with the same key wins. Invalid parameters are dropped.
    written = [_written(key, value) for key, value in dict(parameters).items()]
    line = "; ".join(["Content-Disposition: form-data", *filter(None, written)])
    return _Disposition(name.encode("latin-1").decode("utf-8", "replace"), line.encode("latin-1"))


def _parameters(text: str) -> list[tuple[str, str]] | None:
    """(lower-case key, value with its quotes) of each ``;key=value``; None if any is malformed."""
    found = []
    position = 0
    while match := _PARAMETER.match(text, position):
        position = match.end()
        if match[2] is not None:
            found.append((match[1].strip(" \t").lower(), match[2].strip(" \t")))
    return found if position == len(text) else None


def _only(parameters: list[tuple[str, str]], key: str) -> str | None:
    """The unquoted value of a parameter; None unless it has exactly one value.

    RFC 7578 forbids the extended notation ``key*``, which parsers handle differently.
    """
    values = {value for name, value in parameters if name == key}
    extended = any(name.startswith(key + "*") for name, _ in parameters)
    return _unquoted(values.pop()) if len(values) == 1 and not extended else None


def _unquoted(value: str) -> str:
    if not value.startswith('"'):
        return value
    return value[1:-1].replace("\\\\", "\\").replace('\\"', '"')


def _written(key: str, value: str) -> str | None:
    """The parameter as sent to the engine; None if it is dropped."""
    if not _TOKEN.fullmatch(key):
        return None
    if "*" in key:  # its value is a token, by definition
        return f"{key}={value}" if _TOKEN.fullmatch(value) else None
    if not value.startswith('"'):
        value = '"' + value.replace("\\", "\\\\") + '"'
    return f"{key}={value}"
