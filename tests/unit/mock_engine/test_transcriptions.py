"""Transcriptions by the mock engine, over real loopback."""

from __future__ import annotations

import io
import wave

import aiohttp
import openai
import pytest
from fakes.mock_engine import FAST, serving

from kubeai.mock_engine.formats.transcriptions import audio_seconds


def wav(seconds: float, value: int = 0) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(8000)
        out.writeframes(bytes([value]) * int(16000 * seconds))
    return file.getvalue()


async def test_a_transcription_depends_on_the_audios_bytes():
    async with serving(*FAST, "--engine=FasterWhisper") as served:
        create = served.client.audio.transcriptions.create
        first = await create(model="m", file=("a.wav", wav(2.5)))
        assert "2.50 s" in first.text
        again = await create(model="m", file=("b.wav", wav(2.5)))
        other = await create(model="m", file=("a.wav", wav(2.5, 1)))
        assert first.text == again.text != other.text
        text = await create(model="m", file=("a.wav", wav(2.5)), response_format="text")
        assert text == first.text + "\n"
        verbose = await create(model="m", file=("a.wav", wav(2.5)), response_format="verbose_json")
        assert verbose.duration == 2.5
        assert verbose.segments[0].text == verbose.text == first.text
        with pytest.raises(openai.BadRequestError, match="response_format"):
            await create(model="m", file=("a.wav", wav(1)), response_format="srt")
        form = aiohttp.FormData({"file": io.BytesIO(wav(40.0))})
        async with served.session.post("/v1/audio/transcriptions", data=form) as response:
            assert response.status == 200, "no model is needed"
            assert "40.00 s" in (await response.json())["text"]


async def test_a_malformed_form_or_one_without_a_file_is_rejected(served):
    path = "/v1/audio/transcriptions"
    assert (await served.post(path, {"model": "m"}))[0] == 400
    kind = {"Content-Type": "multipart/form-data"}
    assert (await served.post(path, b"--x\r\n", **kind))[0] == 400
    form = aiohttp.FormData({"model": "m"}, default_to_multipart=True)
    async with served.session.post(path, data=form) as response:
        assert response.status == 400
        assert (await response.json())["error"]["param"] == "file"


def test_the_audio_length_is_the_headers_limited_by_the_bytes():
    data = wav(3.0)
    assert audio_seconds(data[:64], len(data)) == 3.0
    assert audio_seconds(data[:64], 16_000) == 1.0
    assert audio_seconds(b"ID3 something else", 32_000) == 2.0
