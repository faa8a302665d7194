"""Length-prefixed frames: any division of the stream yields the same bodies."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kubeai.framing import FrameTooLong, frame, read_frame, take_frames

BODIES = st.lists(st.binary(max_size=50), max_size=5)


@given(BODIES, st.integers(1, 9))
def test_frames_are_taken_from_any_pieces_of_the_stream(bodies, piece):
    stream = b"".join(map(frame, bodies))
    buffer, taken = bytearray(), []
    for at in range(0, len(stream), piece):
        buffer += stream[at : at + piece]
        taken += take_frames(buffer, 50)
    assert taken == bodies
    assert not buffer


@given(BODIES)
def test_frames_are_read_until_the_stream_ends(bodies):
    async def read():
        reader = asyncio.StreamReader()
        reader.feed_data(b"".join(map(frame, bodies)))
        reader.feed_eof()
        read = [await read_frame(reader, 50) for _ in bodies]
        with pytest.raises(asyncio.IncompleteReadError):
            await read_frame(reader, 50)
        return read

    assert asyncio.run(read()) == bodies


def test_a_frame_that_is_too_long_is_refused_before_its_body_arrives():
    buffer = bytearray(frame(b"first") + frame(b"x" * 51)[:4])
    frames = take_frames(buffer, 50)
    assert next(frames) == b"first"
    with pytest.raises(FrameTooLong, match="51 bytes"):
        next(frames)
