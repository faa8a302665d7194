"""OpenAI's speech and images APIs: a tone for each word, and a plain image for each prompt."""

from __future__ import annotations

import base64
import hashlib
import io
import math
import struct
import wave
import zlib
from array import array
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from typing_extensions import override

from kubeai.mock_engine.formats.base import Meta, Positive
from kubeai.mock_engine.formats.computed import ComputedRequest, Media, length

IMAGES_MAX = 10
IMAGE_PIXELS = 64  # on each side
SAMPLES_PER_S = 8000
WORD_S = 0.2
WORDS_MAX = 600


class SpeechRequest(ComputedRequest, kw_only=True):
    """The supported fields of ``POST /v1/audio/speech``. The format is WAV or raw samples."""

    input: Annotated[str, msgspec.Meta(min_length=1)]
    voice: str | dict[str, Any] | None = None
    response_format: Literal["mp3", "opus", "aac", "flac", "wav", "pcm"] = "wav"

    @override
    def lengths(self) -> list[int]:
        return [length(self.input)]

    @override
    def response(self, meta: Meta, tokens: int) -> Media:
        samples = array("h")
        for word in self.input.split()[:WORDS_MAX]:
            hertz = 200 + zlib.crc32(word.encode()) % 400
            samples.extend(
                round(9000 * math.sin(2 * math.pi * hertz * n / SAMPLES_PER_S))
                for n in range(int(WORD_S * SAMPLES_PER_S))
            )
        if self.response_format == "pcm":
            return Media("audio/pcm", samples.tobytes())
        file = io.BytesIO()
        with wave.open(file, "wb") as out:
            out.setparams((1, 2, SAMPLES_PER_S, len(samples), "NONE", ""))
            out.writeframes(samples.tobytes())
        return Media("audio/wav", file.getvalue())


class ImageRequest(ComputedRequest, kw_only=True):
    """The supported fields of ``POST /v1/images/generations``, and of an edit without a form."""

    prefix: ClassVar[str] = "img-"
    prompt: str = ""
    n: Annotated[int, msgspec.Meta(ge=1, le=IMAGES_MAX)] | None = 1
    seed: Positive | None = None

    @override
    def lengths(self) -> list[int]:
        return [max(1, length(self.prompt))]

    @override
    def response(self, meta: Meta, tokens: int) -> dict[str, Any]:
        return images(meta, self.prompt.encode(), self.n or 1)


def images(meta: Meta, of: bytes, count: int) -> dict[str, Any]:
    """A response with images whose colour depends on some bytes."""
    data = [
        {"b64_json": base64.b64encode(_png(hashlib.sha256(of + bytes([n])).digest()[:3])).decode()}
        for n in range(count)
    ]
    return {"created": meta.created, "data": data}


def _png(colour: bytes) -> bytes:
    """An image of one colour (three bytes)."""
    head = struct.pack(">IIBBBBB", IMAGE_PIXELS, IMAGE_PIXELS, 8, 2, 0, 0, 0)
    rows = zlib.compress((b"\0" + colour * IMAGE_PIXELS) * IMAGE_PIXELS)
    chunks = ((b"IHDR", head), (b"IDAT", rows), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )
