"""Content codings of request bodies: which ones are supported, and how a body is decoded.

A compressed body must be one gzip member or one Zstandard frame, and nothing else. With several,
or with data after the last one, some decoders read all of it and some only the first part, so the
gateway and the engine could read different models. HTTP clients send no such bodies.

Pure: no I/O. zlib and zstd release the GIL, so that a thread can call :func:`decompress`.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable, Iterable
from typing import Protocol

from kubeai.errors import quoted
from kubeai.openai.errors import ErrorResponse, UnsupportedCoding

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

HEADER = "Content-Encoding"
ACCEPTED = "gzip, zstd"
ZSTD_WINDOW_LOG_MAX = 23  # 8 MiB, the limit for this content coding (RFC 9659)
_GZIP_WBITS = 31  # of zlib: a gzip member with a window of up to 32 KiB


class _Decoder(Protocol):
    """What zlib and zstd have in common."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


def _zstd_decoder() -> _Decoder:
    limits: dict[int, int] = {zstd.DecompressionParameter.window_log_max: ZSTD_WINDOW_LOG_MAX}
    return zstd.ZstdDecompressor(options=limits)


_DECODERS: dict[str, Callable[[], _Decoder]] = {
    "gzip": lambda: zlib.decompressobj(_GZIP_WBITS),
    "zstd": _zstd_decoder,
}


def codings_in(values: Iterable[str]) -> list[str]:
    """The content codings in Content-Encoding headers, in lower case and without identity."""
    codings = [coding.strip(" \t").lower() for value in values for coding in value.split(",")]
    return [coding for coding in codings if coding not in ("", "identity")]


def content_coding(values: Iterable[str]) -> str | None:
    """The content coding in Content-Encoding headers: "gzip", "zstd", or None for identity.

    UnsupportedCoding for any other coding, and for several.
    """
    codings = codings_in(values)
    if not codings:
        return None
    coding = "gzip" if codings == ["x-gzip"] else codings[0]
    if len(codings) > 1 or coding not in _DECODERS:
        raise UnsupportedCoding(
            f"{HEADER} {quoted(', '.join(codings))} is not supported. Compress the body once, with "
            "gzip or zstd, or send it uncompressed.",
            ACCEPTED,
        )
    return coding


def compressed_form() -> UnsupportedCoding:
    """415 for a compressed multipart form."""
    return UnsupportedCoding(
        "Compressed forms are not supported. Send the form uncompressed.", "identity"
    )


def decompress(coding: str, body: bytes, max_bytes: int) -> bytes:
    """Decode a body that has a coding returned by :func:`content_coding`.

    ErrorResponse 413 if the decoded body is longer than ``max_bytes``, of which no more than one
    byte beyond the limit is produced; 400 if the body is malformed, truncated, or followed by more
    data.
    """
    decoder = _DECODERS[coding]()
    try:
        decoded = decoder.decompress(body, max_bytes + 1)
    except (zlib.error, zstd.ZstdError) as error:
        raise _invalid(coding, f"is malformed: {error}") from None
    if len(decoded) > max_bytes:
        raise ErrorResponse(f"The decompressed body is longer than {max_bytes} bytes.", status=413)
    if not decoder.eof:
        raise _invalid(coding, "is truncated")
    if decoder.unused_data:
        part = "gzip member" if coding == "gzip" else "zstd frame"
        raise _invalid(coding, f"has more data after its first {part}")
    return decoded


def _invalid(coding: str, problem: str) -> ErrorResponse:
    return ErrorResponse(f"{HEADER} is {coding}, but the body {problem}.", param=HEADER)
