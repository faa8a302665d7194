"""Splits a multipart/form-data body into its parts while it arrives. Pure: bytes in, events out.

The gateway reads a form's ``model`` and hands every other part on as it came, so it must see the
parts that an engine's parser sees. Hence stricter than RFC 2046: no preamble, CRLF alone ends a
line, nothing but CRLF or ``--`` follows a delimiter, every part has one ``Content-Disposition:
form-data`` with one plain ``name``, and a part's own Content-Length is not believed. What comes
after the closing delimiter is dropped.

Memory: one part's head (``HEAD_MAX_BYTES``) and a delimiter's length beyond the chunk that is fed.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import msgspec

from kubeai.openai import BadRequest

HEAD_MAX_BYTES = 8 << 10
PARTS_MAX_COUNT = 100

_CONTENT_TYPE = re.compile(r"multipart/form-data[ \t]*((?:;[^;]*)*)", re.IGNORECASE)
_BOUNDARY = re.compile(
    r"""[ \t]*boundary=(?:([0-9A-Za-z'+_.-]{1,70})|"([0-9A-Za-z'()+_,./:=? -]{1,70})")[ \t]*""",
    re.IGNORECASE,
)
_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_HEADER = re.compile(rb"(" + _TOKEN + rb"):[ \t]*([^\r\n\0]*)")
_PARAMETER = re.compile(rb';[ \t]*([A-Za-z*]+)=("(?:[^"\\]|\\.)*"|[^\s;"\\]+)[ \t]*')
_PLAIN_NAME = re.compile(rb'[^"\\%*\0-\x1f]{1,200}')


class Part(msgspec.Struct, frozen=True):
    """A part begins. ``head``: its header lines as they came, without the empty line."""

    name: str
    head: bytes


class Content(msgspec.Struct, frozen=True):
    """More of the part that began last."""

    data: bytes


class End(msgspec.Struct, frozen=True):
    """The closing delimiter: the form is whole."""


Event = Part | Content | End


def boundary_of(content_type: str) -> bytes:
    """The boundary that a Content-Type names; BadRequest when it is no plain form."""
    form = _CONTENT_TYPE.fullmatch(content_type.strip())
    if form is None:
        raise BadRequest("The Content-Type must be multipart/form-data.")
    found = [
        parameter
        for parameter in form[1].split(";")
        if parameter.strip().lower().startswith("boundary")
    ]
    match = _BOUNDARY.fullmatch(found[0]) if len(found) == 1 else None
    if match is None or (match[1] or match[2]).endswith(" "):
        raise BadRequest("The Content-Type must name one boundary of 1 to 70 characters.")
    return (match[1] or match[2]).encode()


def form_type(boundary: bytes) -> str:
    """The Content-Type of a form with this boundary."""
    return f'multipart/form-data; boundary="{boundary.decode()}"'


class Splitter:
    """One body. Feed it chunks, in order, then :meth:`finish`.

    States: delimiter → head → start → content → delimiter → … → end. The reader of a state takes
    what it can from the buffer and says whether there is more to do with what is there.
    """

    def __init__(self, boundary: bytes) -> None:
        self._delimiter = b"\r\n--" + boundary
        # A body begins with a delimiter that has no CRLF before it.
        self._buffer = bytearray(b"\r\n")
        self._read: Callable[[], bool] = self._read_delimiter
        self._events: list[Event] = []
        self._ended = False
        self._parts_count = 0
        self._name = ""

    @property
    def place(self) -> str:
        """Where in the form the reading is, for messages."""
        if not self._parts_count:
            return "before the first part"
        return f"part {self._parts_count}" + (f" ('{self._name}')" if self._name else "")

    def feed(self, data: bytes) -> list[Event]:
        """What the next bytes of the body bring; BadRequest, which names the part."""
        self._buffer += data
        while self._read():
            pass
        events, self._events = self._events, []
        return events

    def finish(self) -> None:
        """The body has ended; BadRequest unless its closing delimiter came."""
        if not self._ended:
            raise self._bad("the form ends without its closing delimiter")

    def _read_delimiter(self) -> bool:
        buffer, delimiter = self._buffer, self._delimiter
        if not buffer.startswith(delimiter[: len(buffer)]):
            raise self._bad("the form does not begin with its boundary")
        if len(buffer) < len(delimiter) + 2:
            return False
        after = bytes(buffer[len(delimiter) : len(delimiter) + 2])
        del buffer[: len(delimiter) + 2]
        if after == b"--":
            self._read = self._read_end
            self._ended = True
            self._events.append(End())
            return True
        if after != b"\r\n":
            raise self._bad("a boundary is followed by neither -- nor the line's end")
        self._name = ""
        self._parts_count += 1
        if self._parts_count > PARTS_MAX_COUNT:
            raise self._bad(f"more than {PARTS_MAX_COUNT} parts")
        self._read = self._read_head
        return True

    def _read_head(self) -> bool:
        end = self._buffer.find(b"\r\n\r\n")
        if max(end, len(self._buffer) if end < 0 else 0) > HEAD_MAX_BYTES:
            raise self._bad(f"its head is longer than {HEAD_MAX_BYTES} bytes")
        if end < 0:
            return False
        head = bytes(self._buffer[:end])
        del self._buffer[: end + 4]
        self._name = self._name_in(head)
        self._events.append(Part(self._name, head))
        self._read = self._read_start
        return True

    def _read_start(self) -> bool:
        """Some parsers would take a delimiter without its CRLF here: nobody sends one."""
        bare = self._delimiter[2:]
        if self._buffer.startswith(bare):
            raise self._bad("a boundary stands where its content should begin")
        if bare.startswith(self._buffer):
            return False
        self._read = self._read_content
        return True

    def _read_content(self) -> bool:
        """Up to the next delimiter, or as far as surely no delimiter begins."""
        buffer = self._buffer
        end = buffer.find(self._delimiter)
        safe = end if end >= 0 else len(buffer) - len(self._delimiter) + 1
        if safe > 0:
            self._events.append(Content(bytes(buffer[:safe])))
            del buffer[:safe]
        if end < 0:
            return False
        self._read = self._read_delimiter
        return True

    def _read_end(self) -> bool:
        if not b"\r\n".startswith(self._buffer[:2]):
            raise self._bad("a closing boundary is followed by more than the line's end")
        del self._buffer[2:]
        return False

    def _name_in(self, head: bytes) -> str:
        dispositions = []
        for line in head.split(b"\r\n"):
            header = _HEADER.fullmatch(line)
            if header is None:
                raise self._bad("a header cannot be read")
            if header[1].lower() == b"content-disposition":
                dispositions.append(header[2])
        if len(dispositions) != 1:
            raise self._bad("it must have one Content-Disposition")
        kind, separator, rest = dispositions[0].partition(b";")
        parameters, position = separator + rest, 0
        names = []
        while match := _PARAMETER.match(parameters, position):
            position = match.end()
            if match[1].lower().startswith(b"name"):
                names.append((match[1].lower(), match[2]))
        if kind.strip().lower() != b"form-data" or position != len(parameters):
            raise self._bad("its Content-Disposition cannot be read")
        if len(names) != 1 or names[0][0] != b"name":
            raise self._bad("its Content-Disposition must have one name")
        value = names[0][1]
        name = value[1:-1] if value.startswith(b'"') else value
        if not _PLAIN_NAME.fullmatch(name):
            raise self._bad("its name has other than 1 to 200 plain characters")
        try:
            return name.decode()
        except UnicodeDecodeError:
            raise self._bad("its name is not valid UTF-8") from None

    def _bad(self, problem: str) -> BadRequest:
        param = self._name or None
        return BadRequest(f"The multipart form is malformed, {self.place}: {problem}.", param)
