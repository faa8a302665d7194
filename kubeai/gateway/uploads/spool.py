"""Keeps a received form until an engine has responded, so that an attempt can be repeated.

About ``SPOOL_MEMORY_MAX_BYTES`` of a form are in memory, the rest is in an unnamed temporary file.
``model`` may be anywhere in the form and is kept apart, because it differs between the client and
the engine.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator
from typing import IO

from kubeai.gateway.context import Context
from kubeai.gateway.uploads.multipart import Content, Part, Splitter, form_type, new_boundary
from kubeai.logs import get_logger
from kubeai.openai.errors import ErrorResponse

log = get_logger(__name__)

SPOOL_MEMORY_MAX_BYTES = 1 << 20
MODEL_MAX_BYTES = 1024
MODEL_HEAD = b'Content-Disposition: form-data; name="model"'
READ_BYTES = 256 << 10
# A body full of almost-delimiters is parsed at 6 MB/s, so the event loop blocks for 5 ms at most.
PARSED_AT_ONCE_BYTES = 32 << 10


def no_room(reason: str) -> ErrorResponse:
    """The error of an upload for which there is no space; logs the reason."""
    log.warning("cannot spool upload", reason=reason)
    return ErrorResponse("Too many uploads in progress.", status=503, code="overloaded")


class SpooledForm:
    """A received form: the name of the model, and all other parts, spooled."""

    def __init__(self, boundary: bytes, context: Context) -> None:
        self.received_bytes = 0
        self._context = context  # limits the spool space
        self._boundary = new_boundary()  # of the form to send
        self._splitter = Splitter(boundary)
        self._model: bytearray | None = None
        self._model_at = 0  # its offset in the other parts
        self._in_model = False
        self._in_part = False
        self._written_bytes = 0
        self._memory = bytearray()
        self._file: IO[bytes] | None = None

    def close(self) -> None:
        """Delete the form, and release its space."""
        self._context.unspool(self.received_bytes)
        self.received_bytes = 0
        if self._file is not None:
            # In a thread: deleting a large file takes time, and so may a write that still runs.
            asyncio.get_running_loop().run_in_executor(None, self._file.close)

    @property
    def model(self) -> str:
        """The ``model`` part's value."""
        try:
            return (self._model or b"").decode()
        except UnicodeDecodeError:
            raise ErrorResponse("'model' is not valid UTF-8.", "model") from None

    @property
    def content_type(self) -> str:
        """The Content-Type of the form to send."""
        return form_type(self._boundary)

    async def feed(self, data: bytes) -> None:
        """Add the next bytes of the received body; ErrorResponse if malformed or too many."""
        if not self._context.spool(len(data)):
            raise no_room("gateway.spoolMaxBytes is used up")
        self.received_bytes += len(data)
        for at in range(0, len(data), PARSED_AT_ONCE_BYTES):
            if at:
                await asyncio.sleep(0)
            self._parse(data[at : at + PARSED_AT_ONCE_BYTES])
        if len(self._memory) > SPOOL_MEMORY_MAX_BYTES:
            await self._spill()

    def _parse(self, data: bytes) -> None:
        for event in self._splitter.feed(data):
            if isinstance(event, Content):
                self._take(event.data)
                continue
            if self._in_part:
                self._write(b"\r\n")
            self._in_part = False
            if isinstance(event, Part):
                self._begin(event)

    def finish(self) -> None:
        """Call at the end of the body; ErrorResponse if the form is incomplete."""
        self._splitter.finish()
        if self._model is None:
            raise ErrorResponse("You must provide a model parameter.", "model")

    def pieces(self, model: str | None) -> tuple[bytes, bytes]:
        """(the ``model`` part, the closing delimiter) to send; the part is empty for None."""
        end = b"--" + self._boundary + b"--\r\n"
        if model is None:
            return b"", end
        return self._head(MODEL_HEAD) + model.encode() + b"\r\n", end

    def length_bytes(self, model: str | None) -> int:
        """The length of the form to send."""
        return self._written_bytes + sum(map(len, self.pieces(model)))

    async def chunks(self, model: str | None) -> AsyncIterator[bytes]:
        """The form to send, with ``model`` replaced in place, or removed for None."""
        part, end = self.pieces(model)
        if self._file is None:  # one write instead of four
            at = self._model_at
            yield bytes(self._memory[:at]) + part + bytes(self._memory[at:]) + end
            return
        async for chunk in self._spooled(0, self._model_at):
            yield chunk
        if part:
            yield part
        async for chunk in self._spooled(self._model_at, self._written_bytes):
            yield chunk
        yield end

    def _begin(self, part: Part) -> None:
        self._in_model = part.name == "model"
        if not self._in_model:
            self._in_part = True
            self._write(self._head(part.head))
            return
        if self._model is not None:
            raise ErrorResponse("The form has several parts named 'model'.", "model")
        self._model = bytearray()
        self._model_at = self._written_bytes

    def _take(self, data: bytes) -> None:
        if not self._in_model:
            self._write(data)
            return
        assert self._model is not None
        self._model += data
        if len(self._model) > MODEL_MAX_BYTES:
            raise ErrorResponse(f"'model' is longer than {MODEL_MAX_BYTES} bytes.", "model")

    def _head(self, head: bytes) -> bytes:
        return b"--" + self._boundary + b"\r\n" + head + b"\r\n\r\n"

    def _write(self, data: bytes) -> None:
        self._memory += data
        self._written_bytes += len(data)

    async def _spill(self) -> None:
        """Move the data in memory to the file, in a thread, as disk I/O may block."""
        data, self._memory = self._memory, bytearray()
        try:
            if self._file is None:
                self._file = await asyncio.to_thread(tempfile.TemporaryFile)
            await asyncio.to_thread(_append, self._file, data)
        except OSError as error:
            raise no_room(str(error)) from None

    async def _spooled(self, start: int, end: int) -> AsyncIterator[bytes]:
        in_file = self._written_bytes - len(self._memory)
        while start < min(end, in_file):
            assert self._file is not None
            size = min(READ_BYTES, end - start, in_file - start)
            # At an offset: a read of an attempt that has ended may still run.
            data = await asyncio.to_thread(os.pread, self._file.fileno(), size, start)
            if not data:
                raise OSError("the spool file is shorter than what was written to it")
            start += len(data)
            yield data
        if start < end:
            yield bytes(self._memory[start - in_file : end - in_file])


def _append(file: IO[bytes], data: bytes | bytearray) -> None:
    file.write(data)
    file.flush()
