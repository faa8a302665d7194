"""Content codings: what is accepted, and that nothing else is decoded."""

import gzip
import sys
import tracemalloc
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kubeai.openai.content_coding import ZSTD_WINDOW_LOG_MAX, content_coding, decompress
from kubeai.openai.errors import ErrorResponse, UnsupportedCoding

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

COMPRESS = {"gzip": gzip.compress, "zstd": zstd.compress}
CODINGS = sorted(COMPRESS)
TEXT = b'{"model":"m","messages":[{"role":"user","content":"Hello"}]}' * 20
LIMIT = 1 << 20


def refused(coding: str, body: bytes, max_bytes: int = LIMIT) -> ErrorResponse:
    with pytest.raises(ErrorResponse) as caught:
        decompress(coding, body, max_bytes)
    return caught.value


@pytest.mark.parametrize(
    ("values", "coding"),
    [
        ([], None),
        ([""], None),
        (["Identity , identity"], None),
        (["gzip"], "gzip"),
        (["X-GZip"], "gzip"),
        (["ZSTD"], "zstd"),
        (["identity", " zstd\t"], "zstd"),
        (["identity,gzip,"], "gzip"),
    ],
)
def test_the_coding_is_read_from_all_headers(values, coding):
    assert content_coding(values) == coding


@pytest.mark.parametrize(
    "values",
    [["br"], ["deflate"], ["gzip, zstd"], ["gzip", "gzip"], ["identity identity"], ["gzip;q=1"]],
)
def test_another_coding_is_a_415_that_names_those_that_are_supported(values):
    with pytest.raises(UnsupportedCoding, match=r"gzip or zstd, or send it uncompressed") as caught:
        content_coding(values)
    assert (caught.value.status, caught.value.accepted) == (415, "gzip, zstd")


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("body", [b"", b"x", TEXT], ids=["empty", "short", "long"])
def test_a_body_is_decoded(coding, body):
    assert decompress(coding, COMPRESS[coding](body), max(1, len(body))) == body


@pytest.mark.parametrize("coding", CODINGS)
def test_a_body_of_exactly_the_limit_is_accepted_and_one_byte_more_is_not(coding):
    body = COMPRESS[coding](TEXT)
    assert decompress(coding, body, len(TEXT)) == TEXT
    error = refused(coding, body, len(TEXT) - 1)
    assert (error.status, str(len(TEXT) - 1) in error.message) == (413, True)


@pytest.mark.parametrize("coding", CODINGS)
def test_a_bomb_takes_no_more_memory_than_the_limit(coding):
    bomb = COMPRESS[coding](bytes(64 << 20))
    assert len(bomb) < 100_000
    tracemalloc.start()
    try:
        error = refused(coding, bomb)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert error.status == 413
    assert peak < 4 * LIMIT


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda body: b"", "truncated"),
        (lambda body: body[:-1], "truncated"),
        (lambda body: body[: len(body) // 2], "truncated"),
        (lambda body: body + b"x", "more data after its first"),
        (lambda body: body + bytes(8), "more data after its first"),
        (lambda body: body + body, "more data after its first"),
        (lambda body: b"{" + body, "malformed"),
        (lambda body: TEXT, "malformed"),
    ],
    ids=["empty", "last byte", "half", "garbage", "zeros", "two", "shifted", "plain"],
)
def test_a_body_that_is_not_one_member_or_frame_is_a_400_that_names_the_header(
    coding, change, problem
):
    error = refused(coding, change(COMPRESS[coding](TEXT)))
    assert (error.status, error.param) == (400, "Content-Encoding")
    assert error.message.startswith(f"Content-Encoding is {coding}, but the body ")
    assert problem in error.message


def test_a_wrong_checksum_is_malformed():
    body = bytearray(gzip.compress(TEXT))
    body[-8] ^= 1
    assert "malformed" in refused("gzip", bytes(body)).message
    options = {zstd.CompressionParameter.checksum_flag: 1}
    body = bytearray(zstd.compress(TEXT, options=options))
    body[-1] ^= 1
    assert "malformed" in refused("zstd", bytes(body)).message


def test_zlib_data_is_not_gzip():
    assert refused("gzip", zlib.compress(TEXT)).status == 400


def test_a_zstd_frame_with_a_larger_window_than_the_standard_allows_is_malformed():
    parameter = zstd.CompressionParameter
    for log, accepted in ((ZSTD_WINDOW_LOG_MAX, True), (ZSTD_WINDOW_LOG_MAX + 1, False)):
        options = {parameter.window_log: log, parameter.content_size_flag: 0}
        compressor = zstd.ZstdCompressor(options=options)
        body = compressor.compress(TEXT) + compressor.flush()
        if accepted:
            assert decompress("zstd", body, LIMIT) == TEXT
        else:
            assert "malformed" in refused("zstd", body).message


def test_a_skippable_frame_is_refused():
    skippable = bytes.fromhex("502a4d18") + (4).to_bytes(4, "little") + b"skip"
    assert refused("zstd", skippable + zstd.compress(TEXT)).status == 400
    assert refused("zstd", zstd.compress(TEXT) + skippable).status == 400


@given(
    coding=st.sampled_from(CODINGS),
    text=st.binary(max_size=2000),
    changes=st.lists(st.tuples(st.integers(0, 3000), st.binary(max_size=3)), max_size=3),
    limit=st.integers(1, 3000),
)
def test_any_body_is_decoded_to_what_was_compressed_or_refused(coding, text, changes, limit):
    body = whole = COMPRESS[coding](text)
    for at, data in changes:
        body = body[:at] + data + body[at + len(data) :]
    decoded = attempt(coding, body, limit)
    if decoded is None:
        assert body != whole or len(text) > limit
    elif coding == "gzip" or body == whole:  # a gzip member has a checksum
        assert decoded == text


@given(coding=st.sampled_from(CODINGS), body=st.binary(max_size=500))
def test_arbitrary_bytes_are_refused_or_decoded_within_the_limit(coding, body):
    attempt(coding, body, 1000)


def attempt(coding: str, body: bytes, max_bytes: int) -> bytes | None:
    """The decoded body; None if it is refused with 400 or 413."""
    try:
        decoded = decompress(coding, body, max_bytes)
    except ErrorResponse as error:
        if error.status not in (400, 413):
            raise
        return None
    assert len(decoded) <= max_bytes
    return decoded
