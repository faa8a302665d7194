"""Reads a multipart form without keeping its files in memory."""

from __future__ import annotations

import hashlib

import aiohttp
from aiohttp import web

from kubeai.mock_engine.formats.base import ApiError

AUDIO_MAX_BYTES = 1 << 30
FIELD_MAX_BYTES = 64 << 10  # of a form field that is not the file
WAV_HEAD_MAX_BYTES = 64 << 10


async def read_form(request: web.Request) -> tuple[dict[str, str], bytes | None, bytes, int]:
    """The form fields, and the files' digest (None if there is none), first bytes and size."""
    fields: dict[str, str] = {}
    whole = hashlib.sha256()
    has_file = False
    head, size = b"", 0
    async for part in await request.multipart():
        if not isinstance(part, aiohttp.BodyPartReader):
            raise ApiError("nested multipart bodies are not supported")
        if part.name != "file" and part.filename is None:
            fields[part.name or ""] = await _read_field(part)
            continue
        has_file = True
        while chunk := await part.read_chunk(1 << 16):
            whole.update(chunk)
            size += len(chunk)
            head += chunk[: WAV_HEAD_MAX_BYTES - len(head)]
            if size > AUDIO_MAX_BYTES:
                raise ApiError("file: is too large", 413)
    return fields, whole.digest() if has_file else None, head, size


async def _read_field(part: aiohttp.BodyPartReader) -> str:
    value = b""
    while chunk := await part.read_chunk():
        value += chunk
        if len(value) > FIELD_MAX_BYTES:
            raise ApiError(f"{part.name}: is too large", 413, param=part.name)
    return value.decode("utf-8", "replace")
